"""deploycli cast."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from deploycli.console import Progress, next_step, print_json, show_artifact, show_steps, stdout, styled
from deploycli.models.errors import UsageError
from deploycli.options import (
    expressions,
    json_option,
    lint_option,
    names,
    open_bundles,
    output_option,
    samples_option,
    typing_options,
)

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.derive import Derived
    from deploycli.terminal import Output


@click.command("cast")
@click.argument("bundles", nargs=-1, metavar="[BUNDLE]...")
@output_option
@click.option("--precision", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True, help="The type.")
@typing_options
@click.option(
    "--calibrate",
    metavar="DATA",
    help="Run the FP32 graph on this data first: what comes near the end of FP16's range is stored smaller, by a power "
    "of two, or stays FP32. A folder of pictures, .npy, .npz, or package.module:factory.",
)
@samples_option
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
) -> int:
    """Write the strongly typed FP16 (or BF16) graph of BUNDLE (or of every bundle) beside its FP32 graph.

    LayerNormalization, reductions and softmaxes that are no attention's stay FP32, between casts; so does what a rule
    or an expression names. Runs anywhere; on a CPU the numbers are simulated.

    \b
    Examples:
      deploycli cast swin_t
      deploycli cast swin_t --keep-fp32 'layers.3.*fc2' --keep-fp32 Softmax
      deploycli cast vit_b_16 --precision bf16
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


def show_derived(derived: Derived, *, verbose: bool) -> None:
    """Print a new artifact of a bundle, what stays in higher precision, and how it compares."""
    console = stdout()
    show_work_on(console, derived, verbose=verbose)
    next_step(console, derived.bundle)


def show_work_on(console: Output, derived: Derived, *, verbose: bool) -> None:
    """Print what was made of a graph, and how it compares on a few samples."""
    from deploycli.exporters.precision.insert_casts import NOTES

    artifact = derived.artifact
    show_artifact(console, derived.bundle, artifact)
    reasons = Counter(refusal.reason.partition(":")[0] for step in artifact.steps for refusal in step.refusals)
    left = [f"{count} {rule}" for rule, count in reasons.items() if rule not in NOTES]
    if left:
        console.print(f"  left as it was: {', '.join(left)}")
    for rule, what in NOTES.items():
        if reasons[rule]:
            console.print(f"  {reasons[rule]} {what}")
    for comparison in derived.comparisons:
        figures = f"cosine {comparison.cosine:.6f}, relative error {comparison.max_rel_error:.2g}"
        samples = comparison.reference_shape[0] if comparison.reference_shape else 0
        console.print(f"  {comparison.name}: {figures} to eager on {samples} golden samples ({derived.runtime})")
        if comparison.reasons:
            console.print(styled(f"  outside the budget: {'; '.join(comparison.reasons)}", "yellow"), soft_wrap=True)
    if verbose:
        show_steps(console, artifact.steps)
