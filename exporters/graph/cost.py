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
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.graph.operators import COPIES
from deploycli.exporters.graph.products import COUNTED, UNCOUNTED, multiply_adds
from deploycli.exporters.graph.shapes import elements, item_bytes
from deploycli.exporters.graph.steps import GraphCost

if TYPE_CHECKING:
    from collections.abc import Iterable

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
