"""Operators that compute every row by itself, and the orders in which rows can stand.

A value of shape ``[B, *tokens, C]`` is, for one sample, a matrix of rows, one a token, with C channels. An operator is
row-wise if row i of its result depends on row i of its operands alone: it computes the same numbers in whichever order
the rows stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.affine import BATCH
from deploycli.exporters.graph.lowerings import MOST_ROWS
from deploycli.exporters.graph.shapes import elements

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Dims, Facts
    from deploycli.exporters.graph.movement_ops import Array

_ELEMENTWISE = frozenset(
    {
        *("Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
        *("HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign"),
        *("Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
        *("Add", "Div", "Max", "Min", "Mul", "Pow", "PRelu", "Sub", "Where"),
    }
)
_NORMALIZATIONS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
REDUCTIONS = frozenset({"ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})
"""Reductions whose axes are known where they are constant."""


@dataclass(frozen=True)
class RowWise:
    """A row-wise operator.

    Attributes:
        node: the operator.
        operands: positions of the operands that have rows.
        varying: positions of constants that are another number in another row.
    """

    node: ir.Node
    operands: tuple[int, ...]
    varying: tuple[int, ...] = ()

    @property
    def result(self) -> ir.Value:
        """What it makes."""
        return self.node.outputs[0]

    def values(self) -> list[ir.Value]:
        """Return the operands that have rows, each once."""
        return list(dict.fromkeys(v for i in self.operands if (v := self.node.inputs[i]) is not None))


def rows_of(dims: Dims | None) -> tuple[int, int] | None:
    """Return the rows and channels of one sample, or None where a value is no rows of a batch.

    Without a symbolic batch the whole tensor is the sample.
    """
    if dims is None or len(dims) < 2 or 0 in dims or any(d % BATCH == 0 for d in dims[1:]):
        return None
    rows = elements(dims[:-1])
    return (rows, dims[-1]) if 1 < rows <= MOST_ROWS else None


def row_wise(node: ir.Node, facts: Facts) -> RowWise | None:
    """Read a node as a row-wise operator, or return None."""
    dims = facts.dims(node.outputs[0]) if node.outputs else None
    shape = rows_of(dims)
    if node.domain != "" or dims is None or shape is None or any(o.uses() for o in node.outputs[1:]):
        return None
    if node.op_type in _ELEMENTWISE:
        return _elementwise(node, dims, facts)
    first = facts.dims(node.inputs[0]) if node.inputs else None
    if first is None or first[:-1] != dims[:-1] or rows_of(first) is None or _is_constant(node.inputs[0], facts):
        return None
    return RowWise(node, (0,)) if _keeps_rows(node, first, facts) else None


def _elementwise(node: ir.Node, dims: Dims, facts: Facts) -> RowWise | None:
    operands, varying = [], []
    for i, value in enumerate(node.inputs):
        if value is None:
            continue
        shape = facts.dims(value)
        if shape is None:
            return None
        if not _is_constant(value, facts):
            if shape[:-1] != dims[:-1] or shape[-1] not in (1, dims[-1]):
                return None
            operands.append(i)
        elif any(d != 1 for d in shape[:-1]):
            # Without a symbolic batch the first axis is one of rows.
            whole = (1, *dims[1:-1]) if dims[0] == BATCH else dims[:-1]
            fits = shape[:-1] == whole or (whole[0] == 1 and shape[:-1] == whole[1:])
            if (dims[0] % BATCH == 0 and dims[0] != BATCH) or not fits:
                return None  # it repeats itself: in another order it would have to be spelled out
            varying.append(i)
    return RowWise(node, tuple(operands), tuple(varying)) if operands else None


def _keeps_rows(node: ir.Node, dims: Dims, facts: Facts) -> bool:
    """Say whether an operator whose first operand has rows works on its last axis alone."""
    rank = len(dims)
    constant = [facts.constant(value) for value in node.inputs[1:] if value is not None]
    if any(c is None for c in constant):
        return False
    arrays = [c for c in constant if c is not None]
    if node.op_type == "MatMul":
        return arrays[0].ndim == 2
    if node.op_type == "Gemm":
        transposed = node.attributes.get_int("transA", 0)
        return not transposed and all(c.ndim < 2 or len(c) == 1 for c in arrays[1:])
    if node.op_type in _NORMALIZATIONS:
        return node.attributes.get_int("axis", -1) in (-1, rank - 1) and all(c.ndim == 1 for c in arrays)
    if node.op_type in ("Softmax", "LogSoftmax"):
        return node.attributes.get_int("axis", -1) in (-1, rank - 1)
    if node.op_type in REDUCTIONS:
        return reduced_axes(node, rank, facts) == (rank - 1,) and node.attributes.get_int("keepdims", 1) == 1
    return False


def reduced_axes(node: ir.Node, rank: int, facts: Facts) -> tuple[int, ...] | None:
    """Return the axes that a reduction sums over, ascending; None where they are not known."""
    if node.domain != "" or node.op_type not in REDUCTIONS:
        return None
    axes = facts.constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    listed = node.attributes.get_ints("axes", None) if axes is None else [int(a) for a in axes.reshape(-1)]
    if (len(node.inputs) > 1 and node.inputs[1] is not None and axes is None) or not listed:
        return None
    return tuple(sorted(a % rank for a in listed))


def permuted(constant: Array, order: Array) -> Array:
    """Return a constant that differs from row to row, ``[*tokens, C]``, with its rows in another order."""
    # [*tokens, C] -> [rows, C] -> [*tokens, C]
    moved: Array = constant.reshape(-1, constant.shape[-1])[order].reshape(constant.shape)
    return moved


def _is_constant(value: ir.Value | None, facts: Facts) -> bool:
    return facts.constant(value) is not None


class Orders:
    """Orders of rows, each known by a number: equal orders have equal numbers.

    Order p of a matrix x is the matrix ``x[p]``.
    """

    def __init__(self) -> None:
        self._arrays: list[Array] = []
        self._numbers: dict[bytes, int] = {}
        self._products: dict[tuple[int, int], int] = {}
        self._inverses: dict[int, int] = {}
        self._identities: dict[int, int] = {}

    def __getitem__(self, order: int) -> Array:
        return self._arrays[order]

    def number(self, array: Array) -> int:
        """Return the number of an order."""
        array = np.ascontiguousarray(array, np.int64)
        number = self._numbers.setdefault(array.tobytes(), len(self._arrays))
        if number == len(self._arrays):
            self._arrays.append(array)
        return number

    def identity(self, rows: int) -> int:
        """Return the order in which rows stand already."""
        if rows not in self._identities:
            self._identities[rows] = self.number(np.arange(rows))
        return self._identities[rows]

    def then(self, first: int, second: int) -> int:
        """Return ``x[first][second]``."""
        key = (first, second)
        if key not in self._products:
            self._products[key] = self.number(self[first][self[second]])
        return self._products[key]

    def inverse(self, order: int) -> int:
        """Return the order that undoes this one."""
        if order not in self._inverses:
            self._inverses[order] = self.number(np.argsort(self[order], kind="stable"))
        return self._inverses[order]


def is_permutation(index: Array, rows: int) -> bool:
    """Say whether every row stands there once."""
    return index.size == rows and bool((np.bincount(index, minlength=rows) == 1).all() if index.min() >= 0 else False)
