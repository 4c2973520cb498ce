"""deploycli quantize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from click.core import ParameterSource

from deploycli.commands.cast import finish_typed, show_work_on
from deploycli.console import Progress, interval_text, next_step, print_json, stdout, table_of
from deploycli.options import (
    Count,
    Number,
    calibration_options,
    expressions,
    file_of,
    file_options,
    gpu_option,
    json_option,
    labels_source,
    lint_option,
    names,
    open_bundles,
    scheme_option,
    target_of,
    target_option,
    typing_options,
)

if TYPE_CHECKING:
    from deploycli.exporters.precision.budget import Search
    from deploycli.exporters.quantize import Quantized
    from deploycli.exporters.verification.accuracy import Accuracy
    from deploycli.options import FileArguments
    from deploycli.terminal import Output


_STAGES = "patch-embed, head, mlp.fc2, patch-merging"


@click.command("quantize")
@click.argument("bundles", nargs=-1, metavar="[BUNDLE|IN.onnx]...")
@target_option
@click.option(
    "--calibrate",
    metavar="DATA",
    help="Data to measure ranges on: a folder of pictures, flat or with one folder a class; .npy; .npz; or "
    "package.module:factory, a function that returns an iterable.",
)
@calibration_options
@click.option(
    "--precision",
    type=click.Choice(["int8", "fp8"]),
    default="int8",
    show_default=True,
    help="INT8; or FP8 (E4M3), for GPUs of compute capability 8.9 and later.",
)
@gpu_option("GPU that --scheme auto chooses for  [default: all that compute in the precision]")
@scheme_option
@click.option("--exclude", multiple=True, metavar="REGEX", help="Leave matching operators alone. Repeatable.")
@click.option(
    "--exclude-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The same, one expression a line; # comments.",
)
@click.option(
    "--high-precision",
    default="patch-embed,head",
    show_default=True,
    metavar="STAGES",
    help=f"Stages to leave alone: {_STAGES}; or sensitive, which is all four; or none.",
)
@click.option(
    "--method",
    type=click.Choice(["max", "percentile", "entropy", "mse"]),
    help="How a range follows from the values that were seen.  [default: that of --cache; max for FP8 and for the "
    "INT8 of --scheme auto, else mse, the least squared error]",
)
@click.option(
    "--percentile", type=Number(0, 100, above=True), metavar="P", help="Of --method percentile.  [default: 99.99]"
)
@click.option(
    "--around",
    type=click.Choice(["fp16", "bf16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Type of what is not quantized.",
)
@typing_options
@click.option(
    "--weights",
    type=click.Choice(["quantized", "float"]),
    default="quantized",
    show_default=True,
    help="Store weights in 8 bits with DQ, or as they are with Q and DQ.",
)
@click.option(
    "--max-drop",
    type=Number(0, 100),
    metavar="POINTS",
    help="Revert what hurts most until no more than so many points of top-1 are lost. Needs --labels.",
)
@click.option("--images", metavar="DATA", help="Labelled data for --max-drop.  [default: the calibration data]")
@click.option(
    "--labels",
    type=labels_source,
    metavar="folders|FILE.csv",
    help="Classes of the pictures: their folders, as in ImageFolder, or lines path,class of a CSV file.",
)
@click.option("--limit", type=Count(), metavar="N", help="At most N labelled samples for --max-drop.")
@file_options
@lint_option
@click.option("-v", "--verbose", is_flag=True, help="Name every operator that was left alone, and why.")
@json_option
def command(
    bundles: tuple[str, ...],
    root: Path,
    calibrate: str | None,
    samples: int,
    cache: Path | None,
    allow_random_calibration: bool,
    seed: int,
    precision: str,
    gpus: tuple[str, ...],
    scheme: str,
    exclude: tuple[str, ...],
    exclude_file: Path | None,
    high_precision: str,
    method: str | None,
    percentile: float | None,
    around: str,
    keep_fp32: tuple[str, ...],
    keep_fp32_file: Path | None,
    allow_fp16: tuple[str, ...],
    io_types: str,
    weights: str,
    max_drop: float | None,
    images: str | None,
    labels: Path | Literal["folders"] | None,
    limit: int | None,
    no_lint: bool,
    verbose: bool,
    as_json: bool,
    of_file: FileArguments,
) -> int:
    """Write the INT8 or FP8 graph of BUNDLE (or of every bundle) beside its FP32 graph, or of IN.onnx to OUT.onnx:
    symmetric Q/DQ, as TensorRT reads it.

    An interrupted calibration goes on where it stopped. 8 bits are not always faster than FP16: build and time both.

    \b
    Examples:
      deploycli quantize swin_t --calibrate photos/
      deploycli quantize swin_t --calibrate train/ --images val/ --labels folders --max-drop 0.5
      deploycli quantize swin_t --calibrate photos/ --precision fp8 --gpu ada
      deploycli quantize vit_b_16 --calibrate photos/ --high-precision sensitive --around fp32
      deploycli quantize swin_t --cache artifacts/swin_t/model.int8.calibration.json --exclude 'blocks.0.'
      deploycli quantize model.onnx -o model.int8.onnx --calibrate samples.npz
      deploycli quantize model.onnx -o m8.onnx --calibrate photos/ --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5
    """
    from deploycli.exporters.precision.methods import Method
    from deploycli.exporters.precision.options import (
        AccuracyBudget,
        CalibrationData,
        CastOptions,
        QuantizeOptions,
        stages,
    )
    from deploycli.exporters.quantize import quantize_bundle
    from deploycli.exporters.target.targets import parse_targets

    _check_options(click.get_current_context())
    cast = CastOptions(around, names(allow_fp16), expressions(keep_fp32, keep_fp32_file), io_types == "fp16")
    parameters = {} if percentile is None else {"percentile": percentile}
    options = QuantizeOptions(
        precision=precision,
        targets=parse_targets(gpus),
        scheme=scheme,
        exclude=expressions(exclude, exclude_file),
        high_precision=stages(names((high_precision,))),
        method=None if method is None else Method.of(method, **parameters),
        float_weights=weights == "float",
        around=None if around == "fp32" else cast,
    )
    data = CalibrationData(calibrate, samples, cache, allow_random_calibration, seed)
    budget = None if max_drop is None else AccuracyBudget(max_drop / 100, images, labels, limit)
    file = file_of(bundles)
    if file is not None:
        from deploycli.exporters.typed_file import quantize_file

        with Progress() as progress:
            asked = of_file.options(file, target_of(file, root), lint=not no_lint)
            typed = quantize_file(asked, options, data, budget=budget, progress=progress.count)
        if typed.quantized is not None and not as_json:
            show_calibration(stdout(), typed.quantized)
        return finish_typed(typed, verbose=verbose, as_json=as_json)
    with Progress() as progress:
        made = [
            quantize_bundle(bundle, options, data, budget=budget, lint=not no_lint, progress=progress.count)
            for bundle in open_bundles(root, bundles)
        ]
    if as_json:
        print_json([quantized.to_json() for quantized in made])
    else:
        for quantized in made:
            show_quantized(quantized, verbose=verbose)
    return 0


def _check_options(context: click.Context) -> None:
    """Refuse options that would do nothing.

    Raises:
        UsageError: one was given without the one that it serves.
    """
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    values = context.params
    has_data = bool(given & {"calibrate", "allow_random_calibration"})
    for options, serves, is_served in (
        (("images", "labels", "limit"), "--max-drop", "max_drop" in given),
        (("percentile",), "--method percentile", values["method"] == "percentile"),
        (("gpus",), "--scheme auto", values["scheme"] == "auto"),
        (("seed",), "--allow-random-calibration", values["allow_random_calibration"]),
        (("samples",), "--calibrate", has_data or "cache" not in given),
        (
            ("keep_fp32", "keep_fp32_file", "allow_fp16", "io_types"),
            "--around fp16 or bf16",
            values["around"] != "fp32",
        ),
    ):
        for option in options:
            if option in given and not is_served:
                shown = "gpu" if option == "gpus" else option.replace("_", "-")
                raise click.UsageError(f"--{shown} does nothing without {serves}")


def show_quantized(quantized: Quantized, *, verbose: bool) -> None:
    """Print an INT8 or FP8 artifact, and what an accuracy budget led to."""
    console = stdout()
    show_work_on(console, quantized, verbose=verbose)
    show_calibration(console, quantized)
    next_step(console, quantized.bundle)


def show_calibration(console: Output, quantized: Quantized) -> None:
    """Print what was quantized, by which ranges, and what an accuracy budget led to."""
    artifact = quantized.artifact
    console.print(f"  {len(artifact.quantized)} products and attentions in {artifact.precision.upper()}")
    if (calibration := artifact.calibration) is not None:
        skipped = f", {len(calibration.skipped)} skipped" if calibration.skipped else ""
        console.print(
            f"  calibrated by {calibration.method} on {calibration.data}{skipped} (sha256 {calibration.sha256[:12]})",
            soft_wrap=True,
        )
    for note in quantized.notes:
        console.print(f"  {note}", soft_wrap=True)
    if quantized.search is not None:
        _show_search(console, quantized.search, artifact.precision.upper())


def _show_search(console: Output, search: Search, title: str) -> None:
    rows = table_of("graph", "labelled", "top-1", "95 % interval", "top-1 lost")
    for name, accuracy in (
        ("fp32", search.fp32),
        (f"all in {title}", search.quantized),
        (f"{len(search.kept)} in {title}, {len(search.reverted)} reverted", search.result),
    ):
        rows.add_row(
            name,
            str(accuracy.samples),
            f"{accuracy.top1:.2%}",
            interval_text(accuracy.top1_interval),
            _lost(search, accuracy),
        )
    console.print(rows)
    for group in search.reverted:
        console.print(f"  reverted {group}: alone in {title} it moves the logits by {search.harm[group] ** 0.5:.2%}")


def _lost(search: Search, accuracy: Accuracy) -> str:
    return "-" if accuracy is search.fp32 else f"{100 * (search.fp32.top1 - accuracy.top1):.2f} points"
