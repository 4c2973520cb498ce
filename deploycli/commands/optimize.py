"""deploycli optimize."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from deploycli.options import SEEDS, json_option


def _named_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Read ``images:1x3x224x224``: a name, and a whole shape."""
    name, _, shape = text.rpartition(":")
    dims = shape.lower().split("x")
    if not name or not all(dim.isdigit() for dim in dims):
        raise click.BadParameter(f"{text!r} is no shape of an input; write name:1x3x224x224")
    return name, tuple(int(dim) for dim in dims)


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
    type=click.IntRange(0),
    metavar="N",
    help="Run both graphs on N random inputs; exit 5 where they differ. 0 leaves this out.",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    type=_named_shape,
    metavar="NAME:1x3x224x224",
    help="Shape of an input in the check, where an axis is symbolic. Repeatable.",
)
@click.option("--seed", type=SEEDS, default=0, show_default=True, help="Seed of these inputs.")
@click.option("--without", multiple=True, metavar="PASS", help="Leave out a pass. Repeatable.")
@click.option(
    "--attention",
    type=click.Choice(["4d", "5d", "onnx"]),
    default="4d",
    show_default=True,
    help="Scores of masked windows: windows folded into the heads, or an axis of their own; or the operator Attention.",
)
@click.option(
    "--external-data",
    "external",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Weights in a file of their own; auto: above 2 GiB.",
)
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

    from deploycli.render import Progress, print_json
    from deploycli.render_optimize import show_optimized
    from exporters.optimize import OptimizeRequest, optimize

    request = OptimizeRequest(
        source=source,
        target=None if dry_run else target,
        without=frozenset(without),
        attention=attention,
        check=check,
        shapes=dict(shapes),
        seed=seed,
        external=external,
    )
    with Progress() as progress:
        result = optimize(request, progress=progress)
    if as_json:
        print_json(result.to_json())
    else:
        show_optimized(result, verbose=verbose)
    return 0
