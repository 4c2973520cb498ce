"""What is known of every value: its type, its shape for any batch size, and its value where that is known.

A symbolic dimension is written as a multiple of the stand-in :data:`BATCH`, so that ``[64*B, 49, 96]`` is a tuple of
plain integers on which all arithmetic works. The graph is interpreted at batch 1 and at batch :data:`BATCH`: so far
apart that a dimension which is clipped, rounded or padded on its way is a multiple of the batch at one end only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx_ir as ir

from exporters.rewrite.affine import BATCH, ENDS, at, stays_affine
from exporters.rewrite.evaluate import can_evaluate, evaluate
from exporters.rewrite.movement_ops import MOVEMENT, data_operands, is_movement
from exporters.rewrite.shapes import NodeShapes, Operand
from exporters.rewrite.shapes import substitute as substitute  # also for those who read shapes

if TYPE_CHECKING:
    from exporters.rewrite.movement_ops import Array

Dims: TypeAlias = tuple[int, ...]
_Ends: TypeAlias = "tuple[Array, Array]"


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one value.

    Attributes:
        dtype: element type.
        dims: shape, with the batch written as multiples of :data:`BATCH`; None where it is not of that form.
        ends: the value at each batch size of :data:`ENDS`, one object if it is constant; None where it is not known.
        zero: every element is zero, however many there are.
    """

    dtype: ir.DataType
    dims: Dims | None
    ends: _Ends | None = None
    zero: bool = False

    @property
    def constant(self) -> Array | None:
        """The value, where it is the same at every batch size."""
        return None if self.ends is None or self.ends[0] is not self.ends[1] else self.ends[0]

    def shape(self, batch: int) -> Dims | None:
        """The shape for a batch size."""
        return None if self.dims is None else tuple(substitute(d, batch) for d in self.dims)

    def value(self, batch: int) -> Array | None:
        """The value for a batch size."""
        return None if self.ends is None else at(self.ends, batch)


def dynamic_axes(dims: Dims) -> list[int]:
    """Return the axes that grow with the batch."""
    return [i for i, dim in enumerate(dims) if dim and dim % BATCH == 0]


def reshape_target(dims: Dims) -> list[int] | None:
    """Return dims as a Reshape operand, -1 for the batch; None where two axes grow with it."""
    axes = dynamic_axes(dims)
    return None if len(axes) > 1 else [-1 if i in axes else dim for i, dim in enumerate(dims)]


class Facts:
    """Facts about a graph, kept up to date by the passes as they add nodes."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._facts: dict[ir.Value, Fact] = {}
        self._shapes = NodeShapes(graph.opset_imports)
        self.batch_name = _batch_symbol(graph)
        for value in graph.inputs:
            self._add_input(value)
        for node in graph:
            self.infer(node)

    def __getitem__(self, value: ir.Value) -> Fact | None:
        return self._facts.get(value) or self._fact_of_initializer(value)

    def dims(self, value: ir.Value | None) -> Dims | None:
        """Return the shape of a value, or None where it is not known."""
        fact = None if value is None else self[value]
        return None if fact is None else fact.dims

    def constant(self, value: ir.Value | None) -> Array | None:
        """Return the value of a constant, or None."""
        fact = None if value is None else self[value]
        return None if fact is None else fact.constant

    def is_zero(self, value: ir.Value) -> bool:
        """Say whether every bit of a value is known to be zero."""
        fact = self[value]
        if fact is None or fact.zero:
            return fact is not None
        return fact.constant is not None and _all_zero(fact.constant)

    def only_moves(self, node: ir.Node) -> bool:
        """Say whether a node moves data, and where to is known for every batch size."""
        moved = data_operands(node)
        operands = [None if i in moved else self.constant(value) for i, value in enumerate(node.inputs)]
        if not is_movement(node, operands):
            return False
        facts = [self[value] for i, value in enumerate(node.inputs) if value is not None and i not in moved]
        return all(fact is not None and fact.ends is not None for fact in facts)

    def infer(self, node: ir.Node) -> None:
        """Record what follows for the outputs of a node whose inputs are known."""
        facts: list[Fact | None] = []
        operands: list[Operand | None] = []
        for value in node.inputs:
            fact = None if value is None else self[value]
            if fact is None and value is not None:
                return
            facts.append(fact)
            # A shape that is not known ends inference, but not the evaluation of constants.
            operands.append(None if fact is None or fact.dims is None else Operand(fact.dtype, fact.dims, fact.ends))
        values = self._evaluate(node, facts)
        if values is not None:
            for output, ends in zip(node.outputs, values, strict=True):
                if ends is not None:
                    dims = _fit(ends[0].shape, ends[1].shape)
                    self._facts[output] = Fact(ir.DataType.from_numpy(ends[0].dtype), dims, ends)
            return
        if any(operand is None and fact is not None for operand, fact in zip(operands, facts, strict=True)):
            return
        inferred = self._shapes.infer(node, operands)
        if inferred is None:
            return
        zero = self._makes_zeros(node)
        for output, known in zip(node.outputs, inferred, strict=True):
            if known is not None:
                dtype, low, high = known
                self._facts[output] = Fact(dtype, _fit(low, high), zero=zero)

    def _add_input(self, value: ir.Value) -> None:
        if value.shape is None or value.dtype is None:
            return
        symbols = {dim.value for dim in value.shape if isinstance(dim, ir.SymbolicDim)}
        if symbols <= {self.batch_name} and None not in symbols:
            low, high = (tuple(d if isinstance(d, int) else batch for d in value.shape) for batch in ENDS)
            self._facts[value] = Fact(value.dtype, _fit(low, high))

    def _fact_of_initializer(self, value: ir.Value) -> Fact | None:
        tensor = value.const_value
        if tensor is None or not value.is_initializer() or value.is_graph_input():
            return None
        shape = tuple(tensor.shape.numpy())
        ends = None
        if not tensor.dtype.is_string():
            array = tensor.numpy()
            ends = (array, array)
        fact = self._facts[value] = Fact(tensor.dtype, _fit(shape, shape), ends)
        return fact

    def _evaluate(self, node: ir.Node, facts: list[Fact | None]) -> list[_Ends | None] | None:
        """Return the outputs at both ends, where they follow from constants and shapes alone."""
        if not can_evaluate(node) or not facts:
            return None
        if node.op_type in ("Shape", "Size") and facts[0] is not None and facts[0].dims is not None:
            return _measure(node, facts[0].dims)
        if node.op_type == "CastLike" and facts[1] is not None:
            like = np.empty(0, facts[1].dtype.numpy())  # only its type is read
            facts = [facts[0], Fact(facts[1].dtype, (0,), (like, like))]
        if any(fact is not None and fact.ends is None for fact in facts):
            return None
        operands = [None if fact is None else fact.ends for fact in facts]
        constant = all(fact is None or fact.constant is not None for fact in facts)
        if not constant and not stays_affine(node, operands):
            return None
        try:
            low, high = (
                evaluate(node, [None if x is None else x[end] for x in operands], self._graph.opset_imports)
                if end == 0 or not constant
                else None
                for end in range(len(ENDS))
            )
        except ValueError:
            return None
        assert low is not None
        if high is None:
            return [None if x is None else (x, x) for x in low]
        return [None if x is None or y is None else _as_ends(x, y) for x, y in zip(low, high, strict=True)]

    def _makes_zeros(self, node: ir.Node) -> bool:
        if node.op_type == "ConstantOfShape" and node.domain == "":
            value = node.attributes.get_tensor("value", None)
            return value is None or _all_zero(value.numpy())
        if node.op_type not in MOVEMENT:
            return False
        moved = [value for i, value in enumerate(node.inputs) if value is not None and i in data_operands(node)]
        return all(self.is_zero(value) for value in moved) and self.only_moves(node)


def _batch_symbol(graph: ir.Graph) -> str | None:
    """Return the name of the batch axis: the first symbol on axis 0 of an input, or else on any axis."""
    shapes = [value.shape for value in graph.inputs if value.shape is not None]
    axes = [*(shape[0] for shape in shapes if len(shape)), *(dim for shape in shapes for dim in shape)]
    return next((dim.value for dim in axes if isinstance(dim, ir.SymbolicDim) and dim.value is not None), None)


def _all_zero(array: Array) -> bool:
    """Say whether every bit is zero: the zero of a Pad is not a negative one."""
    return not array.any() and not np.signbit(array).any() if array.dtype.kind == "f" else not array.any()


def _measure(node: ir.Node, dims: Dims) -> list[_Ends | None] | None:
    """Evaluate Shape or Size."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    low, high = ([substitute(d, batch) for d in dims[start:end]] for batch in ENDS)
    if node.op_type == "Shape":
        return [_as_ends(np.array(low, np.int64), np.array(high, np.int64))]
    if len(dynamic_axes(dims)) > 1:
        return None
    return [_as_ends(np.array(math.prod(low), np.int64), np.array(math.prod(high), np.int64))]


def _as_ends(low: Array, high: Array) -> _Ends:
    return (low, low) if np.array_equal(low, high) else (low, high)


def _fit(low: Dims, high: Dims) -> Dims | None:
    """Return the dims that give these shapes at the ends, or None where they are not multiples of the batch."""
    if len(low) != len(high):
        return None
    dims = []
    for a, b in zip(low, high, strict=True):
        is_static = a == b and (b == 0 or b % BATCH != 0)
        if not is_static and (a == 0 or b != a * BATCH):
            return None
        dims.append(b)
    return tuple(dims)
