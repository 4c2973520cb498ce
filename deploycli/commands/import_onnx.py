"""deploycli import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploycli.commands.export import show_export
from deploycli.console import Progress, print_json
from deploycli.options import (
    SEEDS,
    attention_option,
    external_option,
    file_input_option,
    inputs_option,
    json_option,
    lint_option,
    output_option,
    preprocessing_of,
    preprocessing_options,
)

if TYPE_CHECKING:
    from deploycli.models.spec import TensorSpec


@click.command("import")
@click.argument("source", metavar="IN.onnx", type=click.Path(path_type=Path))
@output_option
@click.option("--name", metavar="NAME", help="Name of the bundle.  [default: the file's]")
@file_input_option
@inputs_option
@preprocessing_options
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Names of the classes: one a line, or JSON.  [default: those in the file's metadata]",
)
@click.option("--no-rewrite", is_flag=True, help="Take the file as it is.")
@attention_option
@external_option
@click.option("--seed", type=SEEDS, default=0, show_default=True, help="Seed of random inputs.")
@click.option("--replace", is_flag=True, help="Replace a bundle of another model that has this name.")
@lint_option
@click.option("-v", "--verbose", is_flag=True, help="Show every step, and what each pass refused and why.")
@json_option
def command(
    source: Path,
    root: Path,
    name: str | None,
    inputs: tuple[TensorSpec, ...],
    inputs_file: Path | None,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    crop: float | None,
    resize: int | None,
    interpolation: str | None,
    labels: Path | None,
    no_rewrite: bool,
    attention: str,
    external: str,
    seed: int,
    replace: bool,
    no_lint: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Make a bundle of IN.onnx, whoever exported it, for cast, quantize, build-trt, verify, bench and package.

    The graph is rewritten as by `optimize`, and compared with the file. The file as it was, in ONNX Runtime, is what
    verify compares with. All inputs and outputs have the batch for their first axis.

    \b
    Examples:
      deploycli import model.onnx
      deploycli import text.onnx --input ids:1x128:int64:0..30521 --input mask:1x128:int64:0..1
      deploycli import saliency.onnx --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
      deploycli import detector.onnx --inputs samples.npz --no-rewrite
    """
    from deploycli.exporters.imported import ImportOptions, import_model

    options = ImportOptions(
        source=source,
        root=root,
        name=name,
        inputs=inputs,
        samples=inputs_file,
        preprocessing=preprocessing_of(mean, std, crop, resize, interpolation),
        labels=labels,
        rewrite=not no_rewrite,
        attention=attention,  # type: ignore[arg-type]  # click checked the choice
        external=external,  # type: ignore[arg-type]  # click checked the choice
        seed=seed,
        replace=replace,
        lint=not no_lint,
    )
    with Progress() as progress:
        bundle = import_model(options, progress=progress, warn=progress.warn)
        progress.warn_of_gone(bundle)
    if as_json:
        print_json(bundle.manifest.to_json() | {"path": str(bundle.path), "gone": list(bundle.gone)})
    else:
        show_export(bundle, verbose=verbose)
    return 0
