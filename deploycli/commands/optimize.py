"""deploycli optimize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from deploycli.console import (
    Progress,
    assembled,
    print_json,
    show_remarks,
    show_steps,
    show_tuning,
    size_text,
    stdout,
    styled,
    table_of,
)
from deploycli.options import (
    SEEDS,
    Count,
    attention_option,
    external_option,
    input_shape,
    inputs_option,
    json_option,
    lint_option,
    tune_options,
    tuning_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.text import Text

    from deploycli.exporters.graph_check import Check
    from deploycli.exporters.optimize import Optimized
    from deploycli.terminal import Rows


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
@inputs_option
@click.option("--without", multiple=True, metavar="PASS", help="Leave out a pass. Repeatable.")
@attention_option
@external_option
@lint_option
@tune_options
@click.option("-v", "--verbose", is_flag=True, help="Show every step, and what each pass refused and why.")
@json_option
def command(
    source: Path,
    target: Path | None,
    dry_run: bool,
    check: int,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    seed: int,
    inputs_file: Path | None,
    without: tuple[str, ...],
    attention: Literal["4d", "5d", "onnx"],
    external: Literal["auto", "always", "never"],
    no_lint: bool,
    tune: bool,
    tune_seconds: int,
    tune_gpu: str,
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

    options = OptimizeOptions(
        source=source,
        target=None if dry_run else target,
        without=frozenset(without),
        attention=attention,
        check=check,
        shapes=dict(shapes),
        seed=seed,
        inputs=inputs_file,
        external=external,
        lint=not no_lint,
        tune=tuning_of(tune, tune_seconds, tune_gpu),
    )
    with Progress() as progress:
        result = optimize(options, progress=progress)
    if as_json:
        print_json(result.to_json())
    else:
        show_optimized(result, verbose=verbose)
    return 0


def show_optimized(result: Optimized, *, verbose: bool) -> None:
    """Print a graph before and after, how the check went, and where it is."""
    console = stdout()
    if result.tuning is not None:
        show_tuning(console, result.tuning)
    console.print(_comparison(result))
    kernels = f"{result.before.kernels} before; {result.after.kernels} after"
    console.print(f"predicted for TensorRT: {kernels}; measured by `build-trt`", soft_wrap=True)
    show_remarks(console, result.steps)
    if verbose:
        show_steps(console, result.steps)
    elif refusals := sum(len(step.refusals) for step in result.steps):
        console.print(f"{refusals} refusal{'s' * (refusals > 1)}; -v shows {'them' if refusals > 1 else 'it'}")
    for line in _verdict(result.check):
        console.print(line, soft_wrap=True)
    for path in result.unread:
        console.print(styled(f"{path} is no longer read by {result.source.name}", "yellow"), soft_wrap=True)
    written = " and ".join(map(str, result.files)) or "nothing: a dry run"
    console.print("wrote", styled(written, "bold"), soft_wrap=True)


def _comparison(result: Optimized) -> Rows:
    before, after = result.before, result.after
    table = table_of("", "before", "after", "")
    for op in sorted({*before.ops, *after.ops}, key=lambda op: (-before.ops.get(op, 0), -after.ops.get(op, 0), op)):
        one, other = before.ops.get(op, 0), after.ops.get(op, 0)
        table.add_row(op, str(one or ""), str(other or ""), _change(one, other))
    table.add_section()
    rows = (
        ("nodes", before.nodes, after.nodes, str),
        ("moved in a run", before.cost.movement_bytes, after.cost.movement_bytes, size_text),
        ("multiply-adds of a run", before.cost.multiply_adds, after.cost.multiply_adds, count_text),
        ("constants", before.cost.constant_bytes, after.cost.constant_bytes, size_text),
        ("file size", before.size, after.size, size_text),
    )
    for name, old, new, text in rows:
        known = ["not known" if figure is None else text(figure) for figure in (old, new)]
        table.add_row(styled(name, "bold"), *known, _change(old, new))
    if before.opset != after.opset:
        table.add_row(styled("opset", "bold"), str(before.opset), str(after.opset))
    return table


def _change(before: int | None, after: int | None) -> str:
    """Return the change in per cent, or nothing where there is none or it is not known."""
    if before is None or after is None or before == after:
        return ""
    return f"{100 * (after - before) / before:+.1f} %" if before else "new"


def count_text(count: int) -> str:
    """Return a number of multiply-adds in words."""
    return f"{count / 1e9:.2f} G" if count >= 1e7 else f"{count:,}"


def _verdict(check: Check | None) -> Iterator[Text]:
    if check is None:
        yield styled("not checked (--check 0)", "yellow")
        return
    error = max((output.max_rel_error for output in check.outputs), default=0.0)
    same = all(output.identical for output in check.outputs)
    seen = "identical" if same else f"largest relative error {error:.1e}, {check.budget.upper()} budget"
    shapes = "; ".join(dict.fromkeys(check.runs))
    yield assembled(("checked ", "green"), f"in ONNX Runtime on {len(check.runs)} inputs ({shapes}): {seen}")
    for output in check.outputs:
        if output.own_error:
            yield styled(
                f"output {output.name} amplifies rounding: it moves by {output.own_error:.1e} where the inputs "
                f"change in their last place, and by {output.max_rel_error:.1e} from graph to graph",
                "yellow",
            )
        if output.vacuous:
            yield styled(f"output {output.name} proves little: {output.vacuous}", "yellow")
