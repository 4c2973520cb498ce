"""A scale goes into the weights of what it scales.

Before -> after, for the query of an attention::

    MatMul(x, W [C, 3C]), Add(b [3C]), Reshape, Split -> q, k, v; Mul(q, 0.177), MatMul(q, k^T)
    -> MatMul(x, W'), Add(b'), Reshape, Split -> q, k, v; MatMul(q, k^T)

where the columns of W and b that q is made of are multiplied by 0.177. Which they are is found by running the movement
between the projection and the scale on the numbers of the columns. A scale of the scores q k^T goes to q, or else to k.

``(x W + b) s == x (W s) + b s``: products are re-associated, so the result is equal within rounding. Refused, for one:
a scale of scores whose query and key were normalised after their projection (Swin V2), and columns that something
else reads as well.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.builder import Builder, remove, replace
from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.operators import only_reader
from deploycli.exporters.graph.regions import moved, moves_one
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array

_AT_A_TIME = 2**20
"""Elements that are scaled at a time."""

Use = tuple["ir.Node", int]
"""An operator and the position of the operand that it reads."""


@dataclass(frozen=True)
class _Scale:
    """``x * factor`` or ``x / factor``.

    Attributes:
        node: the Mul or Div.
        x: what is scaled.
        factor: one number, or an array that broadcasts to x.
    """

    node: ir.Node
    x: ir.Value
    factor: Array

    def apply(self, array: Array) -> Array:
        """Scale an array; rounded once. Not more than some of its rows are in FP64 at a time."""
        factor, scaled = float(self.factor.reshape(())), np.empty(array.shape, array.dtype)  # in C order
        flat, made = array.reshape(-1), scaled.reshape(-1)
        with np.errstate(over="ignore"):
            for start in range(0, flat.size, _AT_A_TIME):
                exact = flat[start : start + _AT_A_TIME].astype(np.float64)
                made[start : start + _AT_A_TIME] = exact * factor if self.node.op_type == "Mul" else exact / factor
        return scaled


@dataclass(frozen=True)
class _Parameter:
    """A constant operand that a projection's result is linear in.

    Attributes:
        node: the operator that reads it.
        position: which operand it is.
        axis: its axis of columns.
        is_weight: it is large: a scaled copy beside the original is not to be stored.
    """

    node: ir.Node
    position: int
    axis: int
    is_weight: bool


@dataclass(frozen=True)
class _Projection:
    """Operators with constants whose result is scaled column by column as the constants are.

    Attributes:
        result: [..., columns, ...].
        axis: axis of the columns.
        parameters: all the constants.
    """

    result: ir.Value
    axis: int
    parameters: tuple[_Parameter, ...]


class FoldScale(GraphPass):
    """Fold scales into weights and biases. Equal within rounding."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        folder = _Folder(Builder(graph, analysis))
        folded = 0
        for node in list(graph):
            scale = _read(node, analysis)
            if scale is None:
                continue
            reason = folder.fold(scale)
            if reason is None:
                folded += 1
            elif reason:
                self.remarks.append(Remark(label(node), reason))
        return folded > 0


def _read(node: ir.Node, analysis: Analysis) -> _Scale | None:
    """Read a node as a scale that leaves the shape of what it scales."""
    if node.domain != "" or node.op_type not in ("Div", "Mul") or node.outputs[0].is_graph_output():
        return None
    x, y = node.inputs
    for value, other in ((x, y), (y, x)) if node.op_type == "Mul" else ((x, y),):
        factor = analysis.constant(other)
        dims = analysis.dims(value)
        if value is None or factor is None or factor.dtype.kind in "biu" or analysis.constant(value) is not None:
            continue
        if dims is not None and dims == analysis.dims(node.outputs[0]):
            return _Scale(node, value, factor)
    return None


class _Folder:
    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._analysis = builder.analysis
        self._graph = builder.graph

    def fold(self, scale: _Scale) -> str | None:
        """Fold one scale; return the reason where that cannot be done, empty where none was to be expected."""
        origin = self._origin(scale.x)
        product = origin.producer()
        if product is None or product.op_type != "MatMul" or self._analysis.constant(product.inputs[1]) is not None:
            reason = self._into(scale, origin, (scale.node, list(scale.node.inputs).index(scale.x)))
            return "" if reason is not None and reason.startswith(_NO_PROJECTION) else reason
        if scale.factor.size != 1:
            return "its scale is not one number"
        uses = self._uses(origin, IndexMap.identity(self._analysis.known_dims(origin)))
        if [None if use is None else use[0] for use, _ in uses] != [scale.node]:
            return "the scores are read elsewhere too"
        reasons = []
        for position, value in enumerate(product.inputs):
            assert value is not None, "a MatMul has two operands"
            reason = self._into(scale, self._origin(value), (product, position))
            if reason is None:
                return None
            reasons.append(reason)
        return "; ".join(dict.fromkeys(reasons))

    def _into(self, scale: _Scale, origin: ir.Value, use: Use) -> str | None:
        """Fold into the projection that a value is, where its columns are read by this use alone."""
        projection = self._projection(origin)
        if projection is None:
            producer = origin.producer()
            return f"{_NO_PROJECTION} {'an input' if producer is None else producer.op_type}"
        if scale.factor.size != 1:
            return "its scale is not one number"
        columns = self._columns(projection, use)
        if columns is None:
            return "its columns are read elsewhere too"
        constants = []
        for parameter in projection.parameters:
            value = parameter.node.inputs[parameter.position]
            if parameter.is_weight and value is not None and len(value.uses()) > 1:
                return "its weight is read elsewhere too"
            constants.append(self._scaled(parameter, columns, scale))
        if any(after is None for after in constants):
            return "its weight would overflow or vanish"
        for parameter, array in zip(projection.parameters, constants, strict=True):
            assert array is not None
            parameter.node.replace_input_with(parameter.position, self._builder.constant(array))
        replace(scale.node.outputs[0], scale.x)
        remove(self._graph, [scale.node])
        return None

    def _scaled(self, parameter: _Parameter, columns: Array, scale: _Scale) -> Array | None:
        """Return a parameter with its columns scaled, or None where that is not exact enough."""
        array = self._analysis.constant(parameter.node.inputs[parameter.position])
        assert array is not None, "_projection looked at it"
        array = np.atleast_1d(array)
        if array.shape[parameter.axis] == 1 < columns.size:
            array = np.repeat(array, columns.size, parameter.axis)
        last = np.moveaxis(array.copy(), parameter.axis, -1)
        before = last[..., columns]
        after = scale.apply(before)
        if not np.isfinite(after).all() or np.any((after == 0) & (before != 0)):
            return None
        last[..., columns] = after
        scaled: Array = np.moveaxis(last, -1, parameter.axis)
        return scaled

    def _columns(self, projection: _Projection, use: Use) -> Array | None:
        """Return which columns a use reads, as a mask; None where others read one of them too."""
        dims = self._analysis.known_dims(projection.result)
        count = dims[projection.axis]
        mine, others = np.zeros(count, bool), np.zeros(count, bool)
        for found, columns in self._uses(projection.result, IndexMap.coordinate(dims, projection.axis)):
            read = columns.reached(count)
            (mine if found == use else others)[slice(None) if read is None else read] = True
        return None if (mine & others).any() else mine

    def _uses(self, value: ir.Value, index_map: IndexMap) -> Iterator[tuple[Use | None, IndexMap]]:
        """Yield what reads a value, through all movement, and what of it; None for a graph output."""
        waiting = [(value, index_map)]
        while waiting:
            value, index_map = waiting.pop()
            if value.is_graph_output():
                yield None, index_map
            for reader, position in value.uses():
                if self._moves(reader):
                    with contextlib.suppress(ValueError):  # it may move anything that it reads
                        waiting += zip(reader.outputs, moved(reader, {value: index_map}, self._analysis), strict=True)
                        continue
                yield (reader, position), index_map

    def _origin(self, value: ir.Value) -> ir.Value:
        """Return what a value was before it was moved."""
        while (node := value.producer()) is not None and self._moves(node):
            source = node.inputs[0]
            assert source is not None, "movement has an operand"
            value = source
        return value

    def _moves(self, node: ir.Node) -> bool:
        """Say whether a node moves one thing, in a way that is known."""
        return node.graph is self._graph and moves_one(node, self._analysis)

    def _projection(self, result: ir.Value) -> _Projection | None:
        """Read a value as the result of a projection and of additions to it."""
        parameters: list[_Parameter] = []
        dims, node = self._analysis.dims(result), result.producer()
        while node is not None and node.op_type == "Add" and node.domain == "":
            found = [i for i, value in enumerate(node.inputs) if self._analysis.constant(value) is not None]
            summand = node.inputs[1 - found[0]] if len(found) == 1 else None
            if summand is None or self._analysis.dims(summand) != dims or only_reader(summand) is None:
                return None
            parameters.append(_Parameter(node, found[0], -1, is_weight=False))
            node = summand.producer()
        if node is None or node.domain != "" or node.op_type not in _OPERATORS or not dims:
            return None
        axis = 1 if node.op_type == "Conv" else len(dims) - 1
        if axis in dynamic_axes(dims) or (parameters and axis != len(dims) - 1):
            return None
        if node.op_type == "LayerNormalization" and node.attributes.get_int("axis", -1) not in (-1, axis):
            return None
        for position, value in enumerate(node.inputs[1:], 1):
            constant = self._analysis.constant(value)
            if value is None:
                continue
            if constant is None or (position == 1 and constant.ndim == 1 and node.op_type == "MatMul"):
                return None
            turned = node.op_type == "Gemm" and position == 1 and node.attributes.get_int("transB", 0) == 1
            columns = 0 if node.op_type == "Conv" or turned else -1
            parameters.append(_Parameter(node, position, columns, is_weight=constant.ndim > 1))
        return _Projection(result, axis, tuple(parameters))


_OPERATORS = frozenset({"Conv", "Gemm", "LayerNormalization", "MatMul"})
"""Operators whose result is linear in their constant operands, column by column."""

_NO_PROJECTION = "no projection by constants: it comes from"
