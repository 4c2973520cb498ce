"""What a rule says: a finding that does not know the rule's number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycli.exporters.graph.unique import label

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir

    from deploycli.exporters.lint.report import Level


@dataclass(frozen=True)
class Problem:
    """One place where a rule is broken; see :class:`~deploycli.exporters.lint.report.Finding`."""

    level: Level
    where: str
    message: str
    hint: str
    silent: bool = False


def error(where: ir.Node | str, message: str, hint: str = "") -> Problem:
    """Return a problem with which the parser or the builder refuses the graph."""
    return Problem("error", name_of(where), message, hint)


def differs(where: ir.Node | str, message: str, hint: str = "") -> Problem:
    """Return an error with which there is an engine all the same: it gives a tensor another type or other values than
    ONNX does, in silence.
    """
    return Problem("error", name_of(where), message, hint, silent=True)


def warning(where: ir.Node | str, message: str, hint: str = "") -> Problem:
    """Return a problem that costs speed or accuracy."""
    return Problem("warning", name_of(where), message, hint)


def name_of(where: ir.Node | str) -> str:
    """Return what to call a node, a tensor or a graph."""
    return where if isinstance(where, str) else label(where) or "a node without name and operator"


def type_name(dtype: ir.DataType | None) -> str:
    """Return what to call an element type."""
    return "an unknown type" if dtype is None else dtype.name


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return names for a message: the first few, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
