"""deploycli optimize."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from deploycli.options import (
    SEEDS,
    Count,
    attention_option,
    external_option,
    input_shape,
    json_option,
    lint_option,
)


@click.command("optimize")
@click.argument("source", metavar="IN.onnx", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "target",
    metavar="OUT.onnx",
    type=click.Path(path_type=Path),
    help="File to write; it may be IN.onnx itself.",
)
@click.option("--dry-run", is_flag=True, help="Do everything but write the file.")
@click.option(
    "--check",
    default=3,
    show_default=True,
    type=Count(0, 1_000_000),
    metavar="N",
    help="Run both graphs on N random inputs, at batch 3 and 1; exit 5 where they differ. 0 leaves this out.",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    type=input_shape,
    metavar="NAME:1x3x224x224",
    help="Shape of an input in the check, where an axis is symbolic. Repeatable.",
)
@click.option("--seed", type=SEEDS, default=0, show_default=True, help="Seed of these inputs.")
@click.option("--without", multiple=True, metavar="PASS", help="Leave out a pass. Repeatable.")
@attention_option
@external_option
@lint_option
@click.option("-v", "--verbose", is_flag=True, help="Show every step, and what each pass refused and why.")
@json_option
def command(
    source: Path,
    target: Path | None,
    dry_run: bool,
    check: int,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    seed: int,
    without: tuple[str, ...],
    attention: Literal["4d", "5d", "onnx"],
    external: Literal["auto", "always", "never"],
    no_lint: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Rewrite the graph of IN.onnx, whoever exported it, into one of fewer nodes that gives the same answers.

    Inputs and outputs keep their names, types, shapes and order. Unless --check is 0, both graphs are run in ONNX
    Runtime first, and nothing is written where they differ (exit 5) or where the original cannot be run (exit 7).

    \b
    Examples:
      deploycli optimize model.onnx -o small.onnx
      deploycli optimize model.onnx --dry-run -v
      deploycli optimize text.onnx -o text.onnx --shape ids:1x128 --shape mask:1x128
    """
    if target is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output': name the file to write, or use --dry-run.")

    from deploycli.exporters.optimize import OptimizeOptions, optimize
    from deploycli.render import Progress, print_json
    from deploycli.render_optimize import show_optimized

    options = OptimizeOptions(
        source=source,
        target=None if dry_run else target,
        without=frozenset(without),
        attention=attention,
        check=check,
        shapes=dict(shapes),
        seed=seed,
        external=external,
        lint=not no_lint,
    )
    with Progress() as progress:
        result = optimize(options, progress=progress)
    if as_json:
        print_json(result.to_json())
    else:
        show_optimized(result, verbose=verbose)
    return 0
