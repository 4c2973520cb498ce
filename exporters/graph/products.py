"""Multiply-adds of one operator, by its definition: one for each product that is added up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycli.exporters.graph.shapes import elements

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from deploycli.exporters.graph.shapes import Dims

UNCOUNTED = frozenset({"GRU", "LSTM", "RNN"})
"""Operators of ONNX that multiply, and that are not counted here."""


def multiply_adds(node: ir.Node, inputs: list[Dims | None], result: Dims | None) -> int | None:
    """Return the multiply-adds of an operator; None where they are not known.

    Args:
        node: the operator.
        inputs: shapes of its operands; that of one that is absent does not matter.
        result: shape of its first result.
    """
    if node.domain != "" or node.op_type in UNCOUNTED:
        return None
    count = COUNTED.get(node.op_type)
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


COUNTED: dict[str, Callable[[ir.Node, list[Dims | None], Dims], int | None]] = {
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
