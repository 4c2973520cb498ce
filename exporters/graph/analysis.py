"""What is known of every value: its type, its shape for any batch size, and its value where that is known.

A symbolic dimension is written as a multiple of the stand-in :data:`BATCH`, so that ``[64*B, 49, 96]`` is a tuple of
plain integers on which all arithmetic works. The graph is interpreted at batch 1 and at batch :data:`BATCH`: so far
apart that a dimension which is clipped, rounded or padded on its way is a multiple of the batch at one of them only.

One symbol is the batch. An axis of another one, one that has no name, and one that is declared -1 are not known; what
follows of the other axes is known all the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.evaluate import can_evaluate, evaluate
from deploycli.exporters.graph.movement_ops import MOVEMENT, data_operands, is_movement
from deploycli.exporters.graph.shapes import (
    BATCH,
    BATCHES,
    Axes,
    Dims,
    Extremes,
    NodeShapes,
    Operand,
    at,
    grows,
    stays_affine,
    substitute,
)
from deploycli.exporters.graph.unique import listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycli.exporters.graph.movement_ops import Array

GROWTH = 16 * 2**20
"""A constant may be this much larger than what it is made of, bytes."""

_MOST_AXES = 32
"""NumPy broadcasts no more axes. Of a value that has more nothing is known."""

SCRATCH = 256 * 2**20
"""All constants that are computed may take this much more than twice those that are stored, bytes."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one value.

    Attributes:
        dtype: element type.
        axes: shape, with the batch written as multiples of :data:`BATCH`; None for an axis that is not of that form, or
            for all if not even their number is known.
        extremes: the value at the smallest and at the largest batch, one object if it is constant; None where it is not
            known.
        zero: every element is zero, however many there are.
        stored: bytes of the stored constants that its value is made of.
        is_large: its value is spelled out nowhere, and would be too large for a stored constant.
    """

    dtype: ir.DataType
    axes: Axes | None
    extremes: Extremes | None = None
    zero: bool = False
    stored: int = 0
    is_large: bool = False

    @property
    def dims(self) -> Dims | None:
        """The shape, where all of it is known."""
        return None if self.axes is None or None in self.axes else self.axes  # type: ignore[return-value]  # none is None

    @property
    def constant(self) -> Array | None:
        """The value, where it is the same at every batch size, and not too large to be stored."""
        known = self.extremes is not None and self.extremes[0] is self.extremes[1] and not self.is_large
        return self.extremes[0] if known and self.extremes is not None else None

    @property
    def operand(self) -> Operand | None:
        """What inference may read, where the number of axes is known."""
        return None if self.axes is None else Operand(self.dtype, self.axes, self.extremes)

    def shape(self, batch: int) -> Dims | None:
        """The shape for a batch size."""
        return None if self.dims is None else tuple(substitute(d, batch) for d in self.dims)

    def value(self, batch: int) -> Array | None:
        """The value for a batch size."""
        return None if self.extremes is None else at(self.extremes, batch)


def dynamic_axes(dims: Dims) -> list[int]:
    """Return the axes that grow with the batch."""
    return [i for i, dim in enumerate(dims) if dim and dim % BATCH == 0]


def squeezes_all(axes: Array | None) -> bool:
    """Say whether the axes of a Squeeze are an empty list, which ONNX Runtime takes for none and ONNX does not."""
    return axes is not None and axes.size == 0


def reshape_target(dims: Dims) -> list[int] | None:
    """Return dims as a Reshape operand, -1 for the batch; None where two axes grow with it."""
    axes = dynamic_axes(dims)
    return None if len(axes) > 1 else [-1 if i in axes else dim for i, dim in enumerate(dims)]


class Analysis:
    """What is known of a graph, kept up to date by the passes as they add nodes."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._facts: dict[ir.Value, Fact] = {}
        self._shapes = NodeShapes(graph.opset_imports)
        stored = (value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
        self._scratch = SCRATCH + 2 * sum(stored)
        self.weighed: dict[ir.Node, str] = {}
        """Why the value of a node is not known, though all that it is made of is."""
        self.batch = _batch_axis(graph)
        for value in graph.inputs:
            self._add_input(value)
        for node in graph:
            self.infer(node)

    def __getitem__(self, value: ir.Value) -> Fact | None:
        return self._facts.get(value) or self._fact_of_initializer(value)

    def axes(self, value: ir.Value | None) -> Axes | None:
        """Return the shape of a value as far as it is known, None for an axis that is not; None if nothing is."""
        fact = None if value is None else self[value]
        return None if fact is None else fact.axes

    def dims(self, value: ir.Value | None) -> Dims | None:
        """Return the shape of a value, or None where it is not known."""
        fact = None if value is None else self[value]
        return None if fact is None else fact.dims

    def known_dims(self, value: ir.Value) -> Dims:
        """Return the shape of a value that is known to have one: the caller has looked, or whoever chose the value."""
        dims = self.dims(value)
        assert dims is not None, f"the shape of {value.name} is not known"
        return dims

    def constant(self, value: ir.Value | None) -> Array | None:
        """Return the value of a constant, or None."""
        fact = None if value is None else self[value]
        return None if fact is None else fact.constant

    def is_zero(self, value: ir.Value) -> bool:
        """Say whether every bit of a value is known to be zero."""
        fact = self[value]
        if fact is None or fact.zero:
            return fact is not None
        return fact.extremes is not None and all(_all_zero(value) for value in fact.extremes)

    def only_moves(self, node: ir.Node) -> bool:
        """Say whether a node moves data, and where to is known for every batch size."""
        moved = data_operands(node)
        operands = [None if i in moved else self.constant(value) for i, value in enumerate(node.inputs)]
        if not is_movement(node, operands):
            return False
        facts = [self[value] for i, value in enumerate(node.inputs) if value is not None and i not in moved]
        return all(fact is not None and fact.extremes is not None and not fact.is_large for fact in facts)

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
            operands.append(None if fact is None else fact.operand)
        values = self._evaluate(node, facts)
        if values is not None:
            self._note_values(node, values, facts)
            return
        if any(operand is None and fact is not None for operand, fact in zip(operands, facts, strict=True)):
            return
        if node.op_type == "Squeeze" and len(facts) > 1 and facts[1] is not None and squeezes_all(facts[1].constant):
            operands[1] = None
        inferred = self._shapes.infer(node, operands)
        if inferred is None:
            return
        zero = self._makes_zeros(node)
        for output, known in zip(node.outputs, inferred, strict=True):
            if known is not None:
                dtype, low, high = known
                self._facts[output] = Fact(dtype, _fit(low, high), zero=zero)

    def _note_values(self, node: ir.Node, values: list[Extremes | None], facts: list[Fact | None]) -> None:
        """Record what the outputs of a node are, and whether they may be stored."""
        given = _given(node, facts)
        made = sum(extremes[0].nbytes for extremes in values if extremes is not None)
        is_large = made > given + GROWTH
        if is_large:
            self.weighed[node] = f"{made} bytes of constants from {given}"
        for output, extremes in zip(node.outputs, values, strict=True):
            if extremes is not None and extremes[0].ndim <= _MOST_AXES:
                dtype, axes = ir.DataType.from_numpy(extremes[0].dtype), _fit(extremes[0].shape, extremes[1].shape)
                self._facts[output] = Fact(dtype, axes, extremes, stored=given if is_large else made, is_large=is_large)

    def _add_input(self, value: ir.Value) -> None:
        if value.shape is None or value.dtype is None:
            return
        low, high = (tuple(self._input_axis(value, i, batch) for i in range(len(value.shape))) for batch in BATCHES)
        self._facts[value] = Fact(value.dtype, _fit(low, high))

    def _input_axis(self, value: ir.Value, axis: int, batch: int) -> int | None:
        """Return how long an axis of an input is at a batch size."""
        dim = None if value.shape is None else value.shape[axis]
        if isinstance(dim, int) and dim >= 0:
            return dim
        return batch if self.batch is not None and self.batch.is_axis(value, axis) else None

    def _fact_of_initializer(self, value: ir.Value) -> Fact | None:
        tensor = value.const_value
        if tensor is None or not value.is_initializer() or value.is_graph_input():
            return None
        shape = tuple(tensor.shape.numpy())
        extremes = None
        if not tensor.dtype.is_string() and len(shape) <= _MOST_AXES:
            array = tensor.numpy()
            extremes = (array, array)
        fact = self._facts[value] = Fact(tensor.dtype, _fit(shape, shape), extremes, stored=tensor.nbytes)
        return fact

    def _evaluate(self, node: ir.Node, facts: list[Fact | None]) -> list[Extremes | None] | None:
        """Return the outputs at both batch sizes, where they follow from constants and shapes alone."""
        if not can_evaluate(node) or not facts:
            return None
        if node.op_type in ("Shape", "Size") and facts[0] is not None and facts[0].axes is not None:
            return _measure(node, facts[0].axes)
        if node.op_type == "CastLike" and facts[1] is not None:
            like = np.empty(0, facts[1].dtype.numpy())  # only its type is read
            facts = [facts[0], Fact(facts[1].dtype, (0,), (like, like))]
        if any(fact is not None and fact.extremes is None for fact in facts):
            return None
        operands = [None if fact is None else fact.extremes for fact in facts]
        constant = not any(map(grows, operands))
        if not constant and not stays_affine(node, operands):
            return None
        found: list[Sequence[Array | None]] = []
        for i in range(1 if constant else len(BATCHES)):
            read = [None if x is None else x[i] for x in operands]
            most = min(_given(node, facts) + GROWTH, self._scratch)
            try:
                found.append(evaluate(node, read, self._graph.opset_imports, most))
            except ValueError as error:
                self.weighed[node] = str(error)
                return None
            self._scratch -= sum(_own_bytes(x, read) for x in found[-1] if x is not None)
        low, high = found[0], found[-1]
        return [None if x is None or y is None else as_extremes(x, y) for x, y in zip(low, high, strict=True)]

    def _makes_zeros(self, node: ir.Node) -> bool:
        if node.op_type == "ConstantOfShape" and node.domain == "":
            value = node.attributes.get_tensor("value", None)
            return value is None or _all_zero(value.numpy())
        if node.op_type not in MOVEMENT:
            return False
        moved = (node.inputs[i] for i in data_operands(node))
        return all(value is None or self.is_zero(value) for value in moved) and self.only_moves(node)


def unknowns(graph: ir.Graph, analysis: Analysis) -> str:
    """Say in one line what is not known of a graph that passes would have to know; empty where nothing is missing."""
    found = []
    shapes = [f"{value.name} {_shape_text(value, analysis)}" for value in graph.inputs if not value.is_initializer()
              and analysis.dims(value) is None]  # fmt: skip
    if shapes:
        blind = sum(any(output.name and analysis.dims(output) is None for output in node.outputs) for node in graph)
        found.append(
            f"not all axes of {listed(shapes)} are known, so the shapes of {blind} of {graph.num_nodes()} operators "
            "are not: passes that need them left these alone"
        )
    defaults = [value.name or "" for value in graph.inputs if value.is_initializer()]
    if defaults:
        found.append(
            f"{len(defaults)} constants are inputs too, and a caller may pass others: none of {listed(defaults)} was "
            "taken for a constant"
        )
    return "; ".join(found)


def _shape_text(value: ir.Value, analysis: Analysis) -> str:
    """Return a shape with a question mark where an axis is not known."""
    axes = analysis.axes(value)
    if value.shape is None or axes is None:
        return "of unknown shape"
    known = (str(dim) if axis is not None else f"{_symbol(value, i) or ''}?" for i, (dim, axis) in
             enumerate(zip(value.shape, axes, strict=True)))  # fmt: skip
    return f"[{', '.join(known)}]"


@dataclass(frozen=True)
class _Batch:
    """The one symbolic axis that is followed.

    Attributes:
        name: its symbol; None where it has none.
        only: the input and the axis that it is, where it has no name; None where it is every axis of the name.
    """

    name: str | None
    only: tuple[ir.Value, int] | None = None

    def is_axis(self, value: ir.Value, axis: int) -> bool:
        """Say whether a symbolic axis of an input is the batch."""
        if self.only is not None:
            return self.only == (value, axis)
        dim = None if value.shape is None else value.shape[axis]
        return isinstance(dim, ir.SymbolicDim) and dim.value == self.name


def _batch_axis(graph: ir.Graph) -> _Batch | None:
    """Return the axis that is followed: the first symbol on axis 0 of an input, else on any, else a lone axis without.

    Two axes without a name may be of different lengths.
    """
    inputs = [value for value in graph.inputs if value.shape is not None and not value.is_initializer()]
    places = [(value, i) for value in inputs for i in range(len(value.shape or ())) if not _is_static(value, i)]
    named = [(name, i) for value, i in places if (name := _symbol(value, i)) is not None]
    if named:
        return _Batch(next((name for name, i in named if i == 0), named[0][0]))
    return _Batch(None, places[0]) if len(places) == 1 else None


def _is_static(value: ir.Value, axis: int) -> bool:
    dim = None if value.shape is None else value.shape[axis]
    return isinstance(dim, int) and dim >= 0


def _symbol(value: ir.Value, axis: int) -> str | None:
    dim = None if value.shape is None else value.shape[axis]
    return dim.value if isinstance(dim, ir.SymbolicDim) else None


def _given(node: ir.Node, facts: list[Fact | None]) -> int:
    """Return the bytes of stored constants that a node reads, each operand once."""
    read = {value: fact.stored for value, fact in zip(node.inputs, facts, strict=True) if value and fact is not None}
    return sum(read.values())


def _own_bytes(array: Array, operands: list[Array | None]) -> int:
    """Return the bytes that an array takes besides those of the arrays that it may be a view of."""
    is_view = any(x is not None and np.may_share_memory(array, x) for x in operands)
    return 0 if is_view else _core(array).nbytes


def _core(array: Array) -> Array:
    """Return an array without the axes along which it is one number repeated, however long they are."""
    return array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)]


def _all_zero(array: Array) -> bool:
    """Say whether every bit is zero: the zero of a Pad is not a negative one."""
    core = _core(array)
    return not core.any() and not np.signbit(core).any() if core.dtype.kind == "f" else not core.any()


def _measure(node: ir.Node, axes: Axes) -> list[Extremes | None] | None:
    """Evaluate Shape or Size."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    dims = [d for d in axes[start:end] if d is not None]
    if len(dims) < len(axes[start:end]):
        return None
    low, high = ([substitute(d, batch) for d in dims] for batch in BATCHES)
    if node.op_type == "Shape":
        return [as_extremes(np.array(low, np.int64), np.array(high, np.int64))]
    if len(dynamic_axes(tuple(dims))) > 1:
        return None
    return [as_extremes(np.array(math.prod(low), np.int64), np.array(math.prod(high), np.int64))]


def as_extremes(low: Array, high: Array) -> Extremes:
    """Return a value at the smallest and at the largest batch; as one object where it is the same."""
    same = low is high or (low.shape == high.shape and low.nbytes <= GROWTH and np.array_equal(low, high))
    return (low, low) if same else (low, high)


def _fit(low: Axes, high: Axes) -> Axes | None:
    """Return the axes that give these shapes at both batch sizes, None for one that is no multiple of the batch."""
    if len(low) != len(high) or len(low) > _MOST_AXES:
        return None
    return tuple(fit_axis(a, b) for a, b in zip(low, high, strict=True))


def fit_axis(low: int | None, high: int | None) -> int | None:
    """Return the axis that has these lengths at both batch sizes, None where it is no multiple of the batch."""
    if low is None or high is None:
        return None
    is_static = low == high and (high == 0 or high % BATCH != 0)
    return high if is_static or (low != 0 and high == low * BATCH) else None
