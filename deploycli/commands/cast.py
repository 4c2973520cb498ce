"""deploycli cast."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from deploycli.console import (
    Progress,
    next_step,
    print_json,
    quoted,
    show_artifact,
    show_steps,
    size_text,
    stdout,
    styled,
)
from deploycli.models.errors import UsageError
from deploycli.models.sources import IMPORTED
from deploycli.options import (
    expressions,
    file_of,
    file_options,
    json_option,
    lint_option,
    names,
    open_bundles,
    samples_option,
    target_of,
    target_option,
    typing_options,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deploycli.exporters.derive import Derived
    from deploycli.exporters.graph.steps import Step
    from deploycli.exporters.typed_file import TypedFile
    from deploycli.exporters.verification.compare import Comparison
    from deploycli.options import FileArguments
    from deploycli.terminal import Output


@click.command("cast")
@click.argument("bundles", nargs=-1, metavar="[BUNDLE|IN.onnx]...")
@target_option
@click.option("--precision", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True, help="The type.")
@typing_options
@click.option(
    "--calibrate",
    metavar="DATA",
    help="Run the FP32 graph on this data first: what comes near the end of FP16's range is stored smaller, by a power "
    "of two, or stays FP32. A folder of pictures, .npy, .npz, or package.module:factory.",
)
@samples_option
@file_options
@lint_option
@click.option("-v", "--verbose", is_flag=True, help="Name every operator that stays FP32, and why, and every repair.")
@json_option
def command(
    bundles: tuple[str, ...],
    root: Path,
    precision: str,
    keep_fp32: tuple[str, ...],
    keep_fp32_file: Path | None,
    allow_fp16: tuple[str, ...],
    io_types: str,
    calibrate: str | None,
    samples: int,
    no_lint: bool,
    verbose: bool,
    as_json: bool,
    of_file: FileArguments,
) -> int:
    """Write the strongly typed FP16 (or BF16) graph of BUNDLE (or of every bundle) beside its FP32 graph, or of IN.onnx
    to OUT.onnx.

    LayerNormalization, reductions and softmaxes that are no attention's stay FP32, between casts; so does what a rule
    or an expression names. Runs anywhere; on a CPU the numbers are simulated.

    \b
    Examples:
      deploycli cast swin_t
      deploycli cast swin_t --keep-fp32 'layers.3.*fc2' --keep-fp32 Softmax
      deploycli cast vit_b_16 --precision bf16
      deploycli cast model.onnx -o model.fp16.onnx
      deploycli cast text.onnx -o text.fp16.onnx --inputs samples.npz
    """
    from deploycli.exporters.cast import cast_bundle
    from deploycli.exporters.precision.options import CalibrationData, CastOptions

    if io_types not in ("fp32", precision):
        raise UsageError(
            f"--io-types {io_types} was asked for with --precision {precision}",
            expected="inputs and outputs in FP32",
            hint="--precision fp16",
        )
    options = CastOptions(precision, names(allow_fp16), expressions(keep_fp32, keep_fp32_file), io_types == precision)
    data = None if calibrate is None else CalibrationData(calibrate, samples)
    file = file_of(bundles)
    if file is not None:
        from deploycli.exporters.typed_file import cast_file

        with Progress() as progress:
            asked = of_file.options(file, target_of(file, root), lint=not no_lint)
            typed = cast_file(asked, options, data=data, progress=progress.count)
        return finish_typed(typed, verbose=verbose, as_json=as_json)
    with Progress() as progress:
        made = [
            cast_bundle(bundle, options, data=data, lint=not no_lint, progress=progress.count)
            for bundle in open_bundles(root, bundles)
        ]
    if as_json:
        print_json([derived.to_json() for derived in made])
    else:
        for derived in made:
            show_derived(derived, verbose=verbose)
    return 0


def finish_typed(typed: TypedFile, *, verbose: bool, as_json: bool) -> int:
    """Print what was made of a file; return the exit code."""
    if as_json:
        print_json([typed.to_json()])
        return 0
    console = stdout()
    before, after = sum(typed.ops_before.values()), sum(typed.ops_after.values())
    console.print(
        styled(str(typed.files[0]), "bold"),
        f"{size_text(typed.size)}, {typed.precision}, opset {typed.opset}",
        soft_wrap=True,
    )
    console.print(f"  from {typed.source}: {before} nodes before, {after} after")
    _show_left(console, typed.steps)
    comparison = typed.comparison
    show_comparisons(
        console, comparison.comparisons, f"{comparison.reference} on {'; '.join(comparison.runs)}", comparison.runtime
    )
    if verbose:
        show_steps(console, typed.steps)
    console.print(f"next: deploycli verify {quoted(typed.files[0])} --against {quoted(typed.source)}")
    return 0


def show_derived(derived: Derived, *, verbose: bool) -> None:
    """Print a new artifact of a bundle, what stays in higher precision, and how it compares."""
    console = stdout()
    show_work_on(console, derived, verbose=verbose)
    next_step(console, derived.bundle)


def show_work_on(console: Output, derived: Derived, *, verbose: bool) -> None:
    """Print what was made of a graph, and how it compares on a few samples."""
    artifact = derived.artifact
    show_artifact(console, derived.bundle, artifact)
    _show_left(console, artifact.steps)
    shape = derived.comparisons[0].reference_shape
    reference = "the imported file" if derived.bundle.manifest.spec.family == IMPORTED else "eager"
    show_comparisons(
        console, derived.comparisons, f"{reference} on {shape[0] if shape else 0} golden samples", derived.runtime
    )
    if verbose:
        show_steps(console, artifact.steps)


def _show_left(console: Output, steps: Sequence[Step]) -> None:
    """Print how many operators stay as they were, by rule."""
    from deploycli.exporters.precision.insert_casts import NOTES

    reasons = Counter(refusal.reason.partition(":")[0] for step in steps for refusal in step.refusals)
    left = [f"{count} {rule}" for rule, count in reasons.items() if rule not in NOTES]
    if left:
        console.print(f"  left as it was: {', '.join(left)}")
    for rule, what in NOTES.items():
        if reasons[rule]:
            console.print(f"  {reasons[rule]} {what}")


def show_comparisons(console: Output, comparisons: Sequence[Comparison], reference: str, runtime: str) -> None:
    """Print how each output compares."""
    for comparison in comparisons:
        error, cosine = comparison.max_rel_error, comparison.cosine
        if error is not None and cosine is not None:
            figures = f"cosine {cosine:.6f}, relative error {error:.2g}"
            console.print(f"  {comparison.name}: {figures} to {reference} ({runtime})", soft_wrap=True)
        if comparison.reasons:
            reasons = f"  {comparison.name} is outside the budget: {'; '.join(comparison.reasons)}"
            console.print(styled(reasons, "yellow"), soft_wrap=True)
