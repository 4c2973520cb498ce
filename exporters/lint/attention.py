"""Find the attention blocks of a graph: MatMul, additions, Softmax, MatMul, with Casts and Q/DQ pairs among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycli.exporters.graph.attention import find_attention
from deploycli.exporters.graph.operators import ARITHMETIC, QDQ, VIEWS, is_onnx, operand
from deploycli.exporters.graph.shapes import BATCH

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir

    from deploycli.exporters.graph.attention import Attention
    from deploycli.exporters.lint.subject import Subject

MOVES = VIEWS | {"Expand", "Gather", "Slice", "Split", "Transpose"}
"""Operators that move data and that TensorRT commutes with Q/DQ."""

_OF_TWO = frozenset({*ARITHMETIC, "Max", "Min"})
_BETWEEN = MOVES | _OF_TWO | {"Cast", "Clip", "Dropout", "Pow", "Tanh", "Where", *QDQ}
"""Operators that a search for the other end of an attention passes."""

_PRODUCTS = ("Einsum", "MatMul")

_MOST_STEPS = 14
"""Operators between two ends of an attention: a shifted window with Casts and Q/DQ has eight."""


def attentions(subject: Subject) -> list[Attention]:
    """Return the attention blocks, in the order of the graph."""

    def leads(node: ir.Node) -> Iterable[int] | None:
        return _leading(node, subject) if is_onnx(node, *_BETWEEN) and node.outputs else None

    def is_product(node: ir.Node) -> bool:
        return is_onnx(node, *_PRODUCTS) and _multiplies_values(node, subject)

    softmaxes = [node for node in subject.nodes if is_onnx(node, "Softmax") and node.inputs]
    found = [find_attention(softmax, leads, is_product, _MOST_STEPS) for softmax in softmaxes]
    return [attention for attention in found if attention is not None]


def _multiplies_values(node: ir.Node, subject: Subject) -> bool:
    return len(node.inputs) == 2 and bool(node.outputs) and not any(is_weight(value, subject) for value in node.inputs)


def _leading(node: ir.Node, subject: Subject) -> tuple[int, ...]:
    """Return the operands through which an attention may lead."""
    if node.op_type == "Where":
        return (1, 2)
    if node.op_type in _OF_TWO:
        return tuple(i for i, value in enumerate(node.inputs) if not is_weight(value, subject))
    return (0,)


def is_weight(value: ir.Value | None, subject: Subject) -> bool:
    """Say whether a value is stored, or is a stored one that was quantized, dequantized, cast or moved."""
    for _ in range(_MOST_STEPS):
        if value is None:
            return False
        if subject.stored(value) is not None:
            return True
        node = value.producer()
        if node is None or not is_onnx(node, "Cast", *QDQ, *MOVES) or not node.inputs:
            return False
        value = node.inputs[0]
    return False


def made_by(value: ir.Value | None, *through: str) -> ir.Node | None:
    """Return the operator that makes a value, seen through data movement and through the operators named."""
    for _ in range(_MOST_STEPS):
        node = None if value is None else value.producer()
        if node is None or not is_onnx(node, *MOVES, *through) or not node.inputs:
            return node
        value = node.inputs[0]
    return None


def dequantized(value: ir.Value | None) -> ir.Node | None:
    """Return the DQ that a value comes from, seen through data movement; None where it is not quantized."""
    node = made_by(value)
    return node if node is not None and is_onnx(node, "DequantizeLinear") else None


def quantized_type(value: ir.Value | None, subject: Subject) -> ir.DataType | None:
    """Return the type in which a dequantized value was stored; None where it is not quantized."""
    node = dequantized(value)
    return None if node is None else subject.inference.dtype(operand(node, 0))


def requantized(value: ir.Value) -> bool:
    """Say whether a Q reads a value, seen through data movement."""
    for _ in range(_MOST_STEPS):
        readers = value.consumers()
        if any(is_onnx(reader, "QuantizeLinear") for reader in readers):
            return True
        if len(readers) != 1 or not is_onnx(readers[0], *MOVES) or not readers[0].outputs:
            return False
        value = readers[0].outputs[0]
    return False


def is_fixed(dim: int) -> bool:
    """Say whether a dimension does not grow with the batch."""
    return dim < BATCH or dim % BATCH != 0
