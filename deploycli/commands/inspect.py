"""deploycli inspect."""

from __future__ import annotations

from pathlib import Path

import click

from deploycli.models.errors import UsageError
from deploycli.options import bundle_path, json_option, output_option

_ONNX, _PLAN = ".onnx", ".plan"


@click.command("inspect")
@click.argument("path")
@output_option
@click.option("--against", metavar="PATH", help="A second engine, or a second ONNX file, side by side with the first.")
@click.option("-v", "--verbose", is_flag=True, help="Show every refusal of the passes; of an engine, every kernel.")
@json_option
def command(path: str, root: Path, against: str | None, verbose: bool, as_json: bool) -> int:
    """Show what is in PATH: a bundle (its folder or its name), an ONNX file, or an engine.

    Of a bundle every hash is checked first; a changed or missing file is exit 8. Each artifact is shown with what the
    last `deploycli verify` found of it: ok, failed, not verified, or stale where it was written again since. Of an
    engine (.plan), or of those of a bundle, the kernels are shown by PyTorch module: launches, products by type, fused
    attention, and the activations that they move for one image.

    \b
    Examples:
      deploycli inspect swin_t
      deploycli inspect artifacts/swin_t/model.onnx
      deploycli inspect artifacts/swin_t/engines/fp16-rtx1.7.1.116.plan
      deploycli inspect A.plan --against B.plan
      deploycli inspect swin_t --json
    """
    from dataclasses import asdict

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.render import print_json, show_bundle
    from deploycli.render_engines import show_engine

    kinds = {Path(name).suffix for name in (path, against) if name is not None}
    if kinds == {_ONNX}:
        _files([Path(name) for name in (path, against) if name is not None], as_json)
        return 0
    if kinds == {_PLAN}:
        _engines([Path(name) for name in (path, against) if name is not None], verbose, as_json)
        return 0
    if against is not None:
        raise UsageError(
            f"{path} cannot be shown against {against}", expected=f"two engines ({_PLAN}) or two ONNX files ({_ONNX})"
        )
    bundle = Bundle.open(bundle_path(root, path))
    graphs, engines = list(bundle.onnx_files()), list(bundle.engines())
    for engine in engines:
        engine.check()
    if as_json:
        more = {
            "path": str(bundle.path),
            "verified": {file.name: asdict(file.verdict) for file in graphs},
            "engines": [engine.sidecar.to_json() for engine in engines],
        }
        print_json(bundle.manifest.to_json() | more)
    else:
        show_bundle(bundle, graphs, verbose=verbose)
        for engine in engines:
            click.echo()
            show_engine(engine.path, engine.sidecar, verbose=verbose, stale=bool(engine.stale))
    return 0


def _files(paths: list[Path], as_json: bool) -> None:
    from deploycli.exporters.inspect import summarize
    from deploycli.render import print_json, show_onnx, show_onnx_against

    summaries = [summarize(path) for path in paths]
    if as_json:
        found = [summary.to_json() for summary in summaries]
        print_json(found if len(found) > 1 else found[0])
    elif len(summaries) > 1:
        show_onnx_against(summaries)
    else:
        show_onnx(summaries[0])


def _engines(plans: list[Path], verbose: bool, as_json: bool) -> None:
    from deploycli.exporters.bundle.engine import sidecar_of_plan
    from deploycli.exporters.bundle.kernels import by_module, readable_depth
    from deploycli.render import print_json
    from deploycli.render_engines import show_against, show_engine

    engines = [(plan, sidecar_of_plan(plan)) for plan in plans]
    if as_json:
        depth = readable_depth(*(sidecar.first_kernels for _, sidecar in engines))
        found = [
            sidecar.to_json()
            | {"path": str(plan)}
            | {"modules": {name: totals.to_json() for name, totals in by_module(sidecar.first_kernels, depth).items()}}
            for plan, sidecar in engines
        ]
        print_json(found if len(found) > 1 else found[0])
    elif len(engines) > 1:
        show_against(engines)
    else:
        show_engine(*engines[0], verbose=verbose)
