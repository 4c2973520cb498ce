"""deploycli build-trt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploycli.commands.inspect import counts_text, work_text
from deploycli.commands.lint import show_fusable, show_lint
from deploycli.console import Progress, next_step, print_json, size_text, stdout, styled
from deploycli.options import (
    MOST_BATCH,
    Count,
    Number,
    calibration_options,
    expressions,
    gpu_option,
    json_option,
    models,
    names,
    output_option,
    run_options,
    scheme_option,
    tensorrt_option,
    typing_options,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycli.exporters.build_trt import BuiltEngine, PlannedEngine
    from deploycli.exporters.target.product import CompilerName
    from deploycli.options import FileArguments


def _batch_range(text: str) -> tuple[int, int, int]:
    """Read ``1:8:32``, or ``8`` for all three."""
    parts = text.split(":")
    sizes = [size for part in parts if (size := whole(part, most=MOST_BATCH)) is not None]
    if len(parts) not in (1, 3) or len(sizes) != len(parts):
        raise click.BadParameter(f"{text!r} is no range of batches; write MIN:OPT:MAX, such as 1:8:32")
    low, best, high = sizes * (3 // len(sizes))
    return low, best, high


@click.command("build-trt")
@click.argument("bundles", nargs=-1, metavar="[BUNDLE|IN.onnx]...")
@output_option
@click.option(
    "--compiler",
    type=click.Choice(["tensorrt", "rtx"]),
    help="NVIDIA's compiler: TensorRT builds for the GPU that is here; TensorRT for RTX for those of --gpu, and needs "
    "none.  [default: tensorrt where it and a GPU are there, else rtx]",
)
@gpu_option("GPU to compile for, of rtx  [default: ampere, ada and blackwell]")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["fp32", "fp16", "bf16", "fp8", "int8"]),
    multiple=True,
    default=("fp16",),
    show_default=True,
    help="Repeatable. int8 and fp8 build fp16 as well: it can be the faster of the two.",
)
@click.option(
    "--batch",
    "batches",
    type=_batch_range,
    multiple=True,
    metavar="MIN:OPT:MAX",
    help="Batches to take; repeatable, each with kernels of its own.  [default: 1:8:32, or the one that was exported]",
)
@click.option("--workspace", metavar="SIZE", help="Scratch memory of a layer: 4G, 512M.  [default: all of the GPU]")
@click.option(
    "--builder-optimization-level",
    type=Count(0, 5),
    metavar="0-5",
    help="How long to look for faster kernels.  [default: TensorRT's, 3]",
)
@click.option(
    "--hardware-compatibility",
    type=click.Choice(["none", "ampere+", "same-compute-capability"]),
    default="none",
    show_default=True,
    help="GPUs that the engine runs on, besides those like this one.",
)
@click.option("--version-compatible", is_flag=True, help="Run on later TensorRT versions too; slower.")
@click.option("--strip-weights", is_flag=True, help="Leave the weights out; they are refitted from the ONNX file.")
@click.option("--max-aux-streams", type=Count(0, 1024), metavar="N", help="Streams beside the main one.")
@click.option("--tf32", is_flag=True, help="Let FP32 products round to TF32.")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Kernel timings, a file for each TensorRT version and GPU.",
)
@click.option("--error-on-timing-cache-miss", is_flag=True, help="Fail where the timing cache does not know a layer.")
@click.option("--timeout", type=Number(0, 30 * 86400, above=True), metavar="SECONDS", help="Longest time of one build.")
@click.option(
    "--assert-precision",
    "assertions",
    multiple=True,
    metavar="P>=N%",
    help="Share of the products (matrix products, convolutions, attention) that must compute in a precision; exit 6 "
    "otherwise. Repeatable.  [default: fp32>=90%, fp16>=80%, bf16>=80%, int8 and fp8>= half of what the graph "
    "quantizes]",
)
@click.option(
    "--calibrate",
    metavar="DATA",
    help="Data to calibrate int8 and fp8 with.  [default: the bundle's INT8 or FP8 graph]",
)
@calibration_options
@scheme_option
@typing_options
@tensorrt_option("To lint for where none is installed.")
@click.option("--dry-run", is_flag=True, help="Write and lint the typed ONNX, show what would be built; no TensorRT.")
@click.option("-v", "--verbose", is_flag=True, help="Keep the compiler's verbose messages in the builder's log.")
@run_options
@json_option
def command(
    bundles: tuple[str, ...],
    root: Path,
    compiler: CompilerName | None,
    gpus: tuple[str, ...],
    precisions: tuple[str, ...],
    batches: tuple[tuple[int, int, int], ...],
    workspace: str | None,
    builder_optimization_level: int | None,
    hardware_compatibility: str,
    version_compatible: bool,
    strip_weights: bool,
    max_aux_streams: int | None,
    tf32: bool,
    timing_cache: Path | None,
    error_on_timing_cache_miss: bool,
    timeout: float | None,
    assertions: tuple[str, ...],
    calibrate: str | None,
    samples: int,
    cache: Path | None,
    allow_random_calibration: bool,
    seed: int,
    scheme: str,
    keep_fp32: tuple[str, ...],
    keep_fp32_file: Path | None,
    allow_fp16: tuple[str, ...],
    io_types: str,
    version: str,
    dry_run: bool,
    verbose: bool,
    as_json: bool,
    of_file: FileArguments,
) -> int:
    """Build TensorRT engines for BUNDLE (or for every bundle): cast or quantize, lint, build, prove, write.

    Of IN.onnx a bundle is made first, as by `deploycli import`.

    An FP16, INT8 or FP8 graph that the bundle holds already is taken as it is, unless an option says how to cast or
    data to calibrate with are given. Each build runs in a process of its own. Engine and sidecar go to engines/ in the
    bundle; `deploycli verify` then judges the very engine.

    \b
    Examples:
      deploycli build-trt
      deploycli build-trt swin_t --precision int8 --calibrate photos/ --batch 1:16:64
      deploycli build-trt --compiler rtx --gpu ada --gpu rtx-3090
      deploycli build-trt swin_t --precision fp8 --gpu ada --calibrate photos/
      deploycli build-trt --timing-cache timings/ --hardware-compatibility ampere+
      deploycli build-trt --dry-run
      deploycli build-trt model.onnx
    """
    from deploycli.exporters.build_trt import EngineOptions, build_all, plan_all
    from deploycli.exporters.precision.options import CalibrationData, CastOptions, QuantizeOptions
    from deploycli.exporters.target.settings import BuildSettings, ShapeOptions, parse_size
    from deploycli.exporters.target.targets import parse_targets
    from deploycli.exporters.tensorrt import library
    from deploycli.exporters.tensorrt.inspector import PrecisionAssertion

    targets = parse_targets(gpus)
    keep = expressions(keep_fp32, keep_fp32_file)
    cast = CastOptions("fp16", names(allow_fp16), keep, io_types == "fp16")
    given = calibrate is not None or cache is not None or allow_random_calibration
    options = EngineOptions(
        precisions=precisions,
        shapes=ShapeOptions(batches[0] if batches else None, batches[1:]),
        settings=BuildSettings(
            {},
            workspace=None if workspace is None else parse_size(workspace),
            optimization_level=builder_optimization_level,
            hardware_compatibility=hardware_compatibility,
            version_compatible=version_compatible,
            strip_weights=strip_weights,
            max_aux_streams=max_aux_streams,
            timing_cache=None if timing_cache is None else str(timing_cache),
            error_on_timing_cache_miss=error_on_timing_cache_miss,
            tf32=tf32,
        ),
        cast=cast,
        recast=bool(keep or allow_fp16 or io_types != "fp32"),
        quantize=QuantizeOptions(scheme=scheme, around=cast),
        data=CalibrationData(calibrate, samples, cache, allow_random_calibration, seed) if given else None,
        assertions=tuple(PrecisionAssertion.parse(text) for text in assertions),
        timeout=timeout,
        tensorrt=version,
        product=library.choose("rtx" if compiler is None and targets else compiler),
        targets=targets,
        verbose=verbose,
    )
    with Progress() as progress, models(root, bundles, of_file, keep=True, progress=progress) as opened:
        if dry_run:
            planned = list(plan_all(opened, options, progress=progress.count))
        else:
            built = list(build_all(opened, options, progress=progress.count))
    if as_json:
        print_json([engine.to_json() for engine in (planned if dry_run else built)])
    elif dry_run:
        show_planned(planned)
    else:
        show_built(built)
    return 0


ATTENTION_RULE = "attention-form"
"""The lint's rule on the form of attention."""


def show_planned(engines: Sequence[PlannedEngine]) -> None:
    """Print what would be built, and what the lint says of it."""
    console = stdout()
    for engine in engines:
        show_lint([engine.report], verbose=False)
        console.print(styled("would build", "bold"), engine.describe(), soft_wrap=True)


def show_built(engines: Sequence[BuiltEngine]) -> None:
    """Print engines, what their layers compute in, and what to do next."""
    console = stdout()
    for engine in engines:
        sidecar, layers = engine.engine.sidecar, engine.layers
        console.print(
            styled(str(engine.engine.path), "bold"),
            f"{size_text(sidecar.size)}, {sidecar.precision}, {sidecar.product.title} {sidecar.tensorrt}, "
            f"{sidecar.runs_on}",
            soft_wrap=True,
        )
        if engine.kept:
            console.print(
                "  is there already, by this compiler from this graph and with these settings: nothing was done"
            )
            continue
        if layers.detailed:
            console.print(
                f"  {len(layers.judged)} products: {counts_text(layers.products_per_type)}; "
                f"{layers.fused_attention} kernels of fused attention; "
                f"{len(layers.computing)} layers compute: {counts_text(layers.per_type)}",
                soft_wrap=True,
            )
            console.print(f"  {work_text(sidecar.totals)}", soft_wrap=True)
        if sidecar.precision != "fp32":
            show_fusable(console, engine.planned.report)
            if slow := [f for f in engine.planned.report.warnings if f.rule == ATTENTION_RULE]:
                console.print(styled(f"    try: {slow[0].hint}", "yellow"), soft_wrap=True)
        if sidecar.assertions:
            console.print(f"  {' and '.join(sidecar.assertions)} holds; built in {sidecar.seconds:.0f} s")
        else:
            console.print(styled("  not opened, for it holds host code: what it computes in is not proven", "yellow"))
        if sidecar.unreleasable:
            console.print(styled(f"  NOT FOR RELEASE: {sidecar.unreleasable}", "bold red"))
    for bundle in {built.engine.bundle.path: built.engine.bundle for built in engines}.values():
        next_step(console, bundle)
