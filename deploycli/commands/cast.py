"""deploycli cast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from deploycli.options import json_option, lint_option, open_bundles, output_option
from deploycli.precision_options import expressions, names, samples_option, typing_options

if TYPE_CHECKING:
    from pathlib import Path


@click.command("cast")
@click.argument("bundles", nargs=-1, metavar="[BUNDLE]...")
@output_option
@click.option("--precision", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True, help="The type.")
@typing_options
@click.option(
    "--calibrate",
    metavar="DATA",
    help="Run the FP32 graph on this data first: what comes near the end of FP16's range stays FP32. A folder of "
    "pictures, .npy, .npz, or package.module:factory.",
)
@samples_option
@lint_option
@click.option("-v", "--verbose", is_flag=True, help="Name every operator that stays FP32, and why.")
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
    from deploycli.models.errors import UsageError
    from deploycli.render import Progress, print_json
    from deploycli.render_precision import show_derived

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
