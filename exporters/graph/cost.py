"""What a graph costs, counted from its shapes: bytes moved, multiply-adds, bytes of constants.

All figures are of one run on one sample: the batch axis is 1 long. What does not grow with the batch, such as the
look-up of a bias, counts whole.

**Movement** is the bytes that operators *write* which compute nothing: Transpose, Gather, Slice, Concat and the others
of :data:`COPIES`. What they write they have read once as well, so the traffic is about twice the figure. Views are
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
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.graph.shapes import elements
from deploycli.exporters.graph.steps import GraphCost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from deploycli.exporters.graph.analysis import Dims, Facts

COPIES = frozenset(
    {"CenterCropPad", "Compress", "Concat", "ConcatFromSequence", "DepthToSpace", "Expand", "Gather", "GatherElements",
     "GatherND", "Pad", "ReverseSequence", "Scatter", "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split",
     "SplitToSequence", "TensorScatter", "Tile", "Transpose", "Trilu"}
)  # fmt: skip
"""Operators of ONNX that write what they have read, and compute nothing."""

_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
"""Operators of ONNX that multiply, and that this module does not count."""


def graph_cost(graph: ir.Graph, facts: Facts) -> GraphCost:
    """Count a graph.

    Args:
        graph: the main graph of a model.
        facts: what is known of its values; no shape is inferred anew, so that counting takes milliseconds.
    """
    nodes, kept = _contents(graph)
    return GraphCost(
        movement_bytes=_total(_moved(node, facts) for node in nodes),
        multiply_adds=_total(_products(node, facts) for node in nodes),
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


def _moved(node: ir.Node, facts: Facts) -> int | None:
    """Return the bytes that a node writes without computing them; None where they are not known."""
    if node.domain != "" or node.op_type not in COPIES:
        return 0
    total = 0
    for output in node.outputs:
        fact = facts[output]
        if fact is not None and fact.dims is not None and not fact.dtype.is_string():
            total += math.ceil(elements(fact.dims) * fact.dtype.bitwidth / 8)
        elif output.name:  # an optional output that is absent has no name
            return None
    return 0 if node.op_type == "Transpose" and _keeps_order(node, facts) else total


def _keeps_order(node: ir.Node, facts: Facts) -> bool:
    dims = facts.dims(node.inputs[0])
    if dims is None:
        return False
    order = node.attributes.get_ints("perm", None) or range(len(dims))[::-1]
    moved = [i for i in order if dims[i] != 1]
    return moved == sorted(moved)


# --- products --------------------------------------------------------------------------------------------------------


def _products(node: ir.Node, facts: Facts) -> int | None:
    """Return the multiply-adds of a node of the graph; None where they are not known."""
    if node.domain == "" and node.op_type not in _COUNTS and node.op_type not in _RECURRENT:
        return 0
    inputs = [None if value is None else facts.dims(value) for value in node.inputs]
    return multiply_adds(node, inputs, facts.dims(node.outputs[0]))


def multiply_adds(node: ir.Node, inputs: list[Dims | None], result: Dims | None) -> int | None:
    """Return the multiply-adds of an operator; None where they are not known.

    Args:
        node: the operator.
        inputs: shapes of its operands; that of one that is absent does not matter.
        result: shape of its first result.
    """
    if node.domain != "" or node.op_type in _RECURRENT:
        return None
    count = _COUNTS.get(node.op_type)
    if count is None:
        return 0
    return None if result is None else count(node, inputs, result)


def _matmul(node: ir.Node, inputs: list[Dims | None], result: Dims) -> int | None:
    first = inputs[0]
    if first is None:
        return None
    summed = first[0] if node.attributes.get_int("transA", 0) else first[-1]
    return elements((*result, summed))


def _conv(node: ir.Node, inputs: list[Dims | None], result: Dims) -> int | None:
    weight = inputs[3 if node.op_type == "QLinearConv" else 1]  # [O, I / groups, kh, kw]
    return None if weight is None else elements(result) * elements(weight[1:])


def _conv_transpose(_node: ir.Node, inputs: list[Dims | None], _result: Dims) -> int | None:
    first, weight = inputs[0], inputs[1]  # [I, O / groups, kh, kw]
    return None if first is None or weight is None else elements(first) * elements(weight[1:])


def _attention(_node: ir.Node, inputs: list[Dims | None], result: Dims) -> int | None:
    """Count q by k^T and probabilities by v; [B, S, N*D], or [B, N, S, D] with its own number of heads for k and v."""
    q, k = inputs[0], inputs[1]
    past = inputs[4] if len(inputs) > 4 else ()
    if q is None or k is None or past is None:
        return None
    keys = k[-2] + (past[-2] if past else 0)
    return elements((*q, keys)) + elements((*result, keys))


def _einsum(node: ir.Node, inputs: list[Dims | None], _result: Dims) -> int | None:
    operands = node.attributes.get_string("equation", "").replace(" ", "").partition("->")[0].split(",")
    if len(operands) == 1:
        return 0
    if len(operands) > 2 or any("." in labels for labels in operands):
        return None  # the order of three products, or the axes of an ellipsis, are not written down
    sizes: dict[str, int] = {}
    for labels, dims in zip(operands, inputs, strict=True):
        if dims is None or len(labels) != len(dims):
            return None
        for label, dim in zip(labels, dims, strict=True):
            sizes[label] = max(sizes.get(label, 1), dim)
    return elements(tuple(sizes.values()))


_COUNTS: dict[str, Callable[[ir.Node, list[Dims | None], Dims], int | None]] = {
    "Attention": _attention,
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "DeformConv": _conv,
    "Einsum": _einsum,
    "Gemm": _matmul,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
}
"""Operators that multiply. ``fn(node, dims of the operands, dims of the first result) -> multiply-adds``."""
