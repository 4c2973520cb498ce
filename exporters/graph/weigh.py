"""Weigh what a graph computes, by its shapes, before anything runs it: a file of a kilobyte may ask for terabytes."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from deploycli.exporters.graph.cost import constant_bytes
from deploycli.exporters.graph.shapes import elements, item_bytes
from deploycli.models.errors import EnvironmentUnsuitable
from deploycli.models.memory import available, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis

MOST_CONSTANT = 2**30
_TIMES_STORED = 4
"""No model makes more at once out of constants alone than this, bytes, and so many times what it stores."""

_PROCESS = 2**31
_THREAD = 80 * 2**20
"""Address space that an interpreter with ONNX Runtime takes, and each of its threads, whatever the graph is, bytes."""


def refuse_what_is_too_large(graph: ir.Graph, analysis: Analysis, *, batch: int, hint: str) -> None:
    """Refuse to run a graph one of whose operators takes and makes more than there can be.

    What does not follow from shapes is not weighed.

    Args:
        graph: the graph.
        analysis: what is known of it.
        batch: size of the batch that it would run at.
        hint: how to do without running it.

    Raises:
        EnvironmentUnsuitable: far more than it stores follows from no input, or more than there is left from any.
    """
    left, most = available(), MOST_CONSTANT + _TIMES_STORED * constant_bytes(graph)
    for node, follows in _nodes(graph):
        values = dict.fromkeys(value for value in (*node.inputs, *node.outputs) if value is not None)
        sizes = {value: _bytes(value, analysis, batch) for value in values if not value.is_initializer()}
        total = sum(sizes.values())
        if total > (left if follows and left is not None else most):
            largest = max(sizes, key=lambda value: sizes[value])
            fact = analysis[largest]
            shape = "x".join(map(str, fact.shape(batch) or ())) if fact is not None else ""
            raise EnvironmentUnsuitable(
                f"the graph is too large to be run: {node.op_type} {node.name or largest.name} takes and makes "
                f"{size(total)}, {size(sizes[largest])} of them for {largest.name} ({shape})",
                expected=f"at most {size(most)} of what follows from no input"
                if not follows
                else f"less than the {size(left or 0)} that are left",
                hint=hint,
            )


def address_space(files: int) -> int | None:
    """Return the bytes of address space that a process which runs a graph may take: what this machine has left.

    Args:
        files: bytes of the graph's files, which are mapped.
    """
    left = available()
    return None if left is None else left + _PROCESS + _THREAD * (os.cpu_count() or 1) + files


def _nodes(graph: ir.Graph) -> Iterator[tuple[ir.Node, bool]]:
    """Yield the nodes of a graph, and whether what each makes follows from an input."""
    follow = {value for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        follows = any(value in follow for value in node.inputs) or any(
            attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.attributes.values()
        )
        if follows:
            follow.update(node.outputs)
        yield node, follows


def _bytes(value: ir.Value, analysis: Analysis, batch: int) -> int:
    fact = analysis[value]
    if fact is None or fact.dims is None:
        return 0
    return math.ceil(elements(fact.dims, batch) * item_bytes(fact.dtype))
