"""What people read of an optimized graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycli.console import Rows, assembled, stdout, styled, table_of
from deploycli.render import show_remarks, show_steps, size_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.text import Text

    from deploycli.exporters.graph_check import Check
    from deploycli.exporters.optimize import Optimized


def show_optimized(result: Optimized, *, verbose: bool) -> None:
    """Print a graph before and after, how the check went, and where it is."""
    console = stdout()
    console.print(_comparison(result))
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
