"""Find the attention blocks of a graph: MatMul, additions, Softmax, MatMul, with Casts and Q/DQ pairs among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycli.exporters.graph.operators import QDQ, is_onnx
from deploycli.exporters.graph.shapes import BATCH
from deploycli.exporters.lint.subject import operand

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from deploycli.exporters.lint.subject import Subject

MOVES = frozenset(
    {"Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that move data and that TensorRT commutes with Q/DQ."""

_BETWEEN = MOVES | {
    *("Add", "Cast", "Clip", "DequantizeLinear", "Div", "Dropout", "Max", "Min", "Mul", "Pow", "QuantizeLinear"),
    *("Sub", "Tanh", "Where"),
}
"""Operators that a search for the other end of an attention passes."""

_PRODUCTS = ("Einsum", "MatMul")

_MOST_STEPS = 14
"""Operators between two ends of an attention: a shifted window with Casts and Q/DQ has eight."""


@dataclass(frozen=True)
class Step:
    """An operator on the way, and the position of the operand that leads on."""

    node: ir.Node
    position: int


@dataclass(frozen=True)
class Attention:
    """An attention made of primitive operators.

    Attributes:
        scores: the product of queries and keys, [.., Sq, Skv].
        before: what stands between it and the Softmax, in the order of the data.
        softmax: the Softmax.
        after: what stands between that and the second product.
        context: the product of the probabilities and the values, [.., Sq, D].
        position: operand of ``context`` that holds the probabilities.
    """

    scores: ir.Node
    before: tuple[Step, ...]
    softmax: ir.Node
    after: tuple[Step, ...]
    context: ir.Node
    position: int

    @property
    def operands(self) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None, ir.Value | None]:
        """Queries, keys, probabilities and values, as the products read them."""
        values = self.context.inputs
        return *self.scores.inputs[:2], values[self.position], values[1 - self.position]  # type: ignore[return-value]


def find_attention(subject: Subject) -> list[Attention]:
    """Return the attention blocks, in the order of the graph."""
    found = []
    for node in subject.nodes:
        if not is_onnx(node, "Softmax") or not node.inputs:
            continue
        above = _climb(node.inputs[0], subject, _MOST_STEPS, set())
        below = _descend(node.outputs[0], subject, _MOST_STEPS, set())
        if above is not None and below is not None:
            scores, before = above
            context, position, after = below
            found.append(Attention(scores, before, node, after, context, position))
    return found


def _climb(
    value: ir.Value | None, subject: Subject, steps: int, seen: set[ir.Node]
) -> tuple[ir.Node, tuple[Step, ...]] | None:
    """Walk against the data to a product of two values that are no constants."""
    node = None if value is None else value.producer()
    if node is None or not steps or node in seen:
        return None
    seen.add(node)
    if is_onnx(node, *_PRODUCTS):
        return (node, ()) if _multiplies_values(node, subject) else None
    for position in _leading(node, subject):
        found = _climb(operand(node, position), subject, steps - 1, seen)
        if found is not None:
            return found[0], (*found[1], Step(node, position))
    return None


def _descend(
    value: ir.Value, subject: Subject, steps: int, seen: set[ir.Node]
) -> tuple[ir.Node, int, tuple[Step, ...]] | None:
    """Walk with the data to a product of two values that are no constants."""
    for use in value.uses() if steps else ():
        node = use.node
        if is_onnx(node, *_PRODUCTS):
            if _multiplies_values(node, subject):
                return node, use.idx, ()
        elif node not in seen and use.idx in _leading(node, subject) and node.outputs:
            seen.add(node)
            found = _descend(node.outputs[0], subject, steps - 1, seen)
            if found is not None:
                return found[0], found[1], (Step(node, use.idx), *found[2])
    return None


def _multiplies_values(node: ir.Node, subject: Subject) -> bool:
    return len(node.inputs) == 2 and bool(node.outputs) and not any(is_weight(value, subject) for value in node.inputs)


def _leading(node: ir.Node, subject: Subject) -> Iterator[int]:
    """Yield the operands through which an attention may lead."""
    if not is_onnx(node) or node.op_type not in _BETWEEN:
        return
    if node.op_type == "Where":
        yield from (1, 2)
    elif node.op_type in ("Add", "Div", "Max", "Min", "Mul", "Sub"):
        yield from (i for i, value in enumerate(node.inputs) if not is_weight(value, subject))
    else:
        yield 0


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
