"""deploycli predict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploycli.console import Progress, print_json, stdout, styled, table_of
from deploycli.options import DEFAULT_ROOT, Count, json_option, models, prepared_options

if TYPE_CHECKING:
    from deploycli.exporters.predict import Prediction
    from deploycli.options import FileArguments
    from deploycli.terminal import Output


@click.command("predict")
@click.argument("model", metavar="BUNDLE|FILE.onnx")
@click.argument("images", nargs=-1, type=click.Path(path_type=Path), metavar="[IMAGE]...")
@click.option(
    "--artifact",
    metavar="NAME",
    help="Which file of the bundle: its name, or a precision. An engine runs on its GPU.  [default: the exported one]",
)
@click.option("--top", type=Count(), default=5, show_default=True, metavar="N", help="How many classes of each.")
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="OUT.npz",
    help="Write all outputs there, as arrays.",
)
@click.option(
    "--allow-engine-host-code", is_flag=True, help="Run a version compatible engine: it holds code for this CPU."
)
@prepared_options
@json_option
def command(
    model: str,
    images: tuple[Path, ...],
    artifact: str | None,
    top: int,
    target: Path | None,
    allow_engine_host_code: bool,
    as_json: bool,
    of_file: FileArguments,
) -> int:
    """Run a bundle, or FILE.onnx, on pictures, and print the best classes of each; folders stand for what is in them.

    A model that names no classes gives arrays, which --output writes.

    \b
    Examples:
      deploycli predict swin_t cat.jpg
      deploycli predict swin_t photos/ --artifact int8 --top 3 --json
      deploycli predict model.onnx cat.jpg --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
      deploycli predict text --inputs samples.npz -o answers.npz
    """
    from deploycli.exporters.predict import PredictOptions, predict

    options = PredictOptions(images, of_file.samples, artifact, top, allow_engine_host_code)
    with (
        Progress() as progress,
        models(DEFAULT_ROOT, (model,), of_file, keep=False, progress=progress) as (bundle,),
    ):
        found = predict(bundle, options, progress=progress.count)
    if target is not None:
        found.save(target)
    if as_json:
        print_json([found.to_json()])
    else:
        show_prediction(found, target)
    return 0


def show_prediction(found: Prediction, target: Path | None) -> None:
    """Print the best classes of each sample, or what the outputs are like."""
    console = stdout()
    console.print(styled(found.artifact, "bold"), f"({found.runtime})", soft_wrap=True)
    if found.guesses:
        _show_classes(console, found)
    else:
        table = table_of("output", "type", "shape", "least", "mean", "most")
        for name, array in found.outputs.items():
            spread = (f"{figure:.4g}" for figure in (array.min(), array.mean(), array.max()))
            table.add_row(name, str(array.dtype), "x".join(map(str, array.shape)), *spread)
        console.print(table)
    for name in found.skipped:
        console.print(styled(f"could not be read: {name}", "yellow"), soft_wrap=True)
    if target is not None:
        console.print("wrote", styled(str(target), "bold"), soft_wrap=True)
    elif not found.guesses:
        console.print("-o OUT.npz writes the arrays")


def _show_classes(console: Output, found: Prediction) -> None:
    for name, best in zip(found.samples, found.guesses, strict=True):
        console.print(name, soft_wrap=True)
        for guess in best:
            console.print(f"  {guess.probability:7.2%}  {guess.index:5d}  {guess.name}", soft_wrap=True)
