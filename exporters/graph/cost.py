"""What a graph costs, counted from its shapes: bytes moved, multiply-adds, bytes of constants.

All figures are of one run on one sample: the batch axis is 1 long. What does not grow with the batch, such as the
look-up of a bias, counts whole.

**Movement** is the bytes that operators *write* which compute nothing: Transpose, Gather, Slice, Concat and the others
of `operators.COPIES`. What they write they have read once as well, so the traffic is about twice the figure. Views are
free: Reshape, Squeeze, Unsqueeze, Flatten, Identity, and a Transpose that passes only axes of length 1. A compiler may
fuse a copy into its reader; this counts the graph as it stands.

**Multiply-adds** are those of MatMul, Gemm, Conv, ConvTranspose, Einsum, Attention and their integer forms, as many as
the definition has: one for each product that is added up. A bias or a normalisation is no product.

**Constants** are the bytes of all stored tensors, those of inner graphs too.

A figure to which an operator of unknown shape would add is None: it is not guessed. So are both where the graph inside
an If or a Loop moves or multiplies, because nobody knows how often it runs, and the multiply-adds of a graph with an
operator of another domain or a recurrent one.

Before anything runs a graph it is weighed by its shapes, too (`refuse_what_is_too_large`): a file of a kilobyte may ask
for terabytes.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.graph.operators import COPIES
from deploycli.exporters.graph.products import COUNTED, UNCOUNTED, multiply_adds
from deploycli.exporters.graph.shapes import elements, item_bytes
from deploycli.exporters.graph.steps import GraphCost
from deploycli.models.errors import EnvironmentUnsuitable
from deploycli.models.memory import available, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from deploycli.exporters.graph.analysis import Analysis


def graph_cost(graph: ir.Graph, analysis: Analysis) -> GraphCost:
    """Count a graph.

    Args:
        graph: the main graph of a model.
        analysis: what is known of its values; no shape is inferred anew, so that counting takes milliseconds.
    """
    nodes, kept = _contents(graph)
    return GraphCost(
        movement_bytes=_total(_moved(node, analysis) for node in nodes),
        multiply_adds=_total(_products(node, analysis) for node in nodes),
        constant_bytes=kept,
    )


def constant_bytes(graph: ir.Graph) -> int:
    """Count the stored tensors of a graph and of those inside it, bytes."""
    return _contents(graph)[1]


def _contents(graph: ir.Graph) -> tuple[list[ir.Node], int]:
    """Return all nodes, those of inner graphs too, and the bytes of all tensors; one walk, because it runs often."""
    nodes, graphs, size = list[ir.Node](), [graph], 0
    while graphs:
        inner = graphs.pop()
        size += sum(v.const_value.nbytes for v in inner.initializers.values() if v.const_value is not None)
        for node in inner:
            nodes.append(node)
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    size += attribute.value.nbytes  # as_tensor() checks a protocol, which takes longer than all else
                elif attribute.type == ir.AttributeType.GRAPH:
                    graphs.append(attribute.as_graph())
                elif attribute.type == ir.AttributeType.GRAPHS:
                    graphs.extend(attribute.as_graphs())
    return nodes, size


def _total(figures: Iterable[int | None]) -> int | None:
    total = 0
    for figure in figures:
        if figure is None:
            return None
        total += figure
    return total


# --- movement --------------------------------------------------------------------------------------------------------


def _moved(node: ir.Node, analysis: Analysis) -> int | None:
    """Return the bytes that a node writes without computing them; None where they are not known."""
    if node.domain != "" or node.op_type not in COPIES:
        return 0
    total = 0
    for output in node.outputs:
        fact = analysis[output]
        if fact is not None and fact.dims is not None and not fact.dtype.is_string():
            total += math.ceil(elements(fact.dims) * item_bytes(fact.dtype))
        elif output.name:  # an optional output that is absent has no name
            return None
    return 0 if node.op_type == "Transpose" and _keeps_order(node, analysis) else total


def _keeps_order(node: ir.Node, analysis: Analysis) -> bool:
    dims = analysis.dims(node.inputs[0])
    if dims is None:
        return False
    order = node.attributes.get_ints("perm", None) or range(len(dims))[::-1]
    moved = [i for i in order if dims[i] != 1]
    return moved == sorted(moved)


# --- products --------------------------------------------------------------------------------------------------------


def _products(node: ir.Node, analysis: Analysis) -> int | None:
    """Return the multiply-adds of a node of the graph; None where they are not known."""
    if node.domain == "" and node.op_type not in COUNTED and node.op_type not in UNCOUNTED:
        return 0
    inputs = [None if value is None else analysis.dims(value) for value in node.inputs]
    return multiply_adds(node, inputs, analysis.dims(node.outputs[0]))


def operator_counts(model: ir.Model) -> dict[str, int]:
    """Return how many nodes of the main graph are of each operator, most first."""
    return dict(Counter(node.op_type for node in model.graph).most_common())


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
