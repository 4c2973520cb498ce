"""deploycli inspect."""

from __future__ import annotations

from pathlib import Path

import click

from deploycli.options import bundle_path, json_option, output_option


@click.command("inspect")
@click.argument("path")
@output_option
@click.option("-v", "--verbose", is_flag=True, help="Show every refusal of the passes.")
@json_option
def command(path: str, root: Path, verbose: bool, as_json: bool) -> int:
    """Show what is in PATH: a bundle (its folder or its name), or an ONNX file.

    Of a bundle every hash is checked first; a changed or missing file is exit 8. Each artifact is shown with what the
    last `deploycli verify` found of it: ok, failed, not verified, or stale where it was written again since.

    \b
    Examples:
      deploycli inspect swin_t
      deploycli inspect artifacts/swin_t/model.onnx
      deploycli inspect swin_t --json
    """
    from deploycli.render import print_json, show_bundle, show_onnx
    from exporters.bundle import Bundle
    from exporters.proof import Proof
    from exporters.summary import summarize

    if path.endswith(".onnx"):
        summary = summarize(Path(path))
        if as_json:
            print_json(summary.to_json())
        else:
            show_onnx(summary)
        return 0
    bundle = Bundle.open(bundle_path(root, path))
    proof = Proof.load(bundle)
    if as_json:
        print_json(bundle.manifest.to_json() | {"path": str(bundle.path), "verified": proof.to_json(bundle)})
    else:
        show_bundle(bundle, proof, verbose=verbose)
    return 0
