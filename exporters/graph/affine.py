"""Shape arithmetic on numbers that grow with the batch.

A number that a graph computes from the batch size B is followed only while it is ``a*B + c``: such a number is known
from its values at two batch sizes. Shape arithmetic has other functions that agree with a line at the sizes one happens
to look at, ``min(B, 16)`` or ``B // 8``; so it is the operator that decides, not the numbers it gave.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.movement_ops import MOVEMENT, Array, data_operands

BATCH = 1_000_003
"""Stand-in for the symbolic batch: a prime above every dimension of a real model."""

ENDS = (1, BATCH)
"""The batch sizes at which shape arithmetic is done. Together they decide ``a*B + c``."""

INTEGERS = {int(ir.DataType.INT32): np.int32, int(ir.DataType.INT64): np.int64}
"""Types of shape arithmetic, by their number in ONNX."""

_LINEAR = frozenset({"Add", "Neg", "Sub"})
_ORDERED = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min"})
_SIZED_BY_VALUE = frozenset({"Expand", "Tile"})


def grows(ends: tuple[Array, Array] | None) -> bool:
    """Say whether a known value is another at the other end."""
    return ends is not None and ends[0] is not ends[1]


def at(ends: tuple[Array, Array], batch: int) -> Array:
    """Return the value at a batch size."""
    low, high = ends
    return low if low is high else low + (high - low) // (ENDS[1] - ENDS[0]) * (batch - ENDS[0])


def stays_affine(node: ir.Node, operands: list[tuple[Array, Array] | None]) -> bool:
    """Say whether the node's results are of the form ``a*B + c`` if its operands are, None where one is absent."""
    growing = [i for i, ends in enumerate(operands) if grows(ends)]
    if node.op_type in MOVEMENT:
        return node.op_type not in _SIZED_BY_VALUE and set(growing) <= set(data_operands(node))
    if node.op_type in _LINEAR or node.op_type == "Mul":
        is_wide = all(ends is None or ends[0].dtype == np.int64 for ends in operands)  # a narrow one might overflow
        return is_wide and (node.op_type != "Mul" or len(growing) < 2)
    if node.op_type == "Cast":
        return _keeps_integers(node, operands)
    if node.op_type == "Where":
        return 0 not in growing
    if len(operands) != 2 or operands[0] is None or operands[1] is None:
        return False
    (a, a_high), (b, b_high) = operands[0], operands[1]
    if node.op_type in _ORDERED:  # two lines that do not cross
        return np.array_equal(np.sign(a - b), np.sign(a_high - b_high))
    if node.op_type == "Div":
        exact = (a_high == a * ENDS[1]) & (np.where(b == 0, 1, a % np.where(b == 0, 1, b)) == 0)
        return 1 not in growing and bool(b.all()) and bool(np.all((a == a_high) | exact))
    return False


def _keeps_integers(node: ir.Node, operands: list[tuple[Array, Array] | None]) -> bool:
    to = INTEGERS.get(node.attributes.get_int("to", 0))
    limit = 0 if to is None else np.iinfo(to).max
    return all(abs(int(x)) <= limit for ends in operands if ends is not None for end in ends for x in end.reshape(-1))
