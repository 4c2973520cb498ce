"""FP32 graph -> strongly typed FP16 or BF16 graph.

Before -> after, where LayerNormalization stays FP32::

    x: f32 -> MatMul(x, W: f32) -> LayerNormalization -> Reshape -> MatMul
    x: f32 -> Cast f16 -> MatMul(x, W: f16) -> Cast f32 -> LayerNormalization -> Cast f16 -> Reshape -> MatMul

Every operator has one precision, and a value is cast where it passes from one precision to another: so there is no
Cast between neighbours of one type, and one value is never cast twice. Data movement has the reduced type, unless it
stands between two operators in FP32: it must not round what it moves. What stays FP32 says why (see `policy`).

Refused, for one: a graph that has FP16 values already.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploycli.exporters.graph.builder import initializer, inner_graphs
from deploycli.exporters.graph.movement_ops import MOVEMENT
from deploycli.exporters.graph.operators import is_onnx
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import Names, value_names
from deploycli.exporters.lint.element_types import derive
from deploycli.exporters.precision.dtypes import (
    REDUCED,
    drop_idle_casts,
    feeds_softmax,
    fill_types,
    opset_of,
    reduced,
    takes,
    type_of,
)
from deploycli.exporters.precision.policy import decide, stored
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt

    from deploycli.exporters.precision.policy import Policy

NOTES: Mapping[str, str] = {
    "mask": "masks are clipped",
    "flush": "constants have values that become zero",
    "rescaled": "repairs by powers of two: what is too large is stored smaller",
    "unscaled": "values are too large, and cannot be stored smaller",
}
"""What is noted of constants -> what happens to them; all other notes are of operators that stay FP32."""

_FLOAT = ir.DataType.FLOAT


def cast(model: ir.Model, policy: Policy, *, reduce_io: bool = False) -> list[Remark]:
    """Type a model in place.

    Args:
        model: an FP32 model, its nodes in order. Constant nodes become initializers, and nameless nodes are named.
        policy: which type, and what stays FP32.
        reduce_io: give graph inputs and outputs the reduced type too; otherwise they stay as they are.

    Returns:
        What stays FP32 and why, then what rounding did to constants: an operator or a constant each.

    Raises:
        UsageError: the graph is typed already, nothing in it can be cast, or an expression finds no operator.
    """
    graph, policy = model.graph, replace(policy)  # what it finds out of values goes with them
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    node_names = Names(node.name for node in graph.all_nodes() if node.name)
    for node in graph:
        node.name = node.name or node_names.unique(node.op_type)
    fill_types(model)
    _check(graph, policy)
    drop_idle_casts(graph)
    kept = decide(graph, policy)
    notes = [Remark(node.name or "", reason) for node, reason in kept.items() if _floats((*node.inputs, *node.outputs))]
    without = {node for node in graph if not _floats((*node.inputs, *node.outputs))}
    high = _high(graph, set(kept) | without, reduce_io=reduce_io)
    if all(node in high or (_reads_any_type(node) and node.outputs[0].dtype != _FLOAT) for node in graph):
        raise UsageError(
            f"nothing is left to cast to {policy.target.name}: {len(notes)} operators stay FP32"
            + "".join(f", such as {note.node} ({note.reason})" for note in notes[:1]),
            expected="at least one operator in the reduced type",
            hint="fewer --keep-fp32",
        )
    caster = _Caster(graph, policy, node_names, reduce_io=reduce_io)
    caster.run(high)
    drop_idle_casts(graph)
    return notes + caster.notes


def _check(graph: ir.Graph, policy: Policy) -> None:
    typed = {value.dtype for node in graph for value in node.outputs} & REDUCED
    if typed:
        raise UsageError(
            f"the graph has {min(dtype.name for dtype in typed if dtype is not None)} values already",
            expected="an FP32 graph",
            hint="cast the FP32 graph that it was made from",
        )
    for pattern in policy.keep:
        if not any(pattern.search(node.name or "") for node in graph):
            raise UsageError(
                f"no operator has a name that {pattern.pattern!r} finds",
                expected=f"names such as {next((node.name for node in graph), '')}",
                hint="deploycli cast --verbose names what stays FP32 by itself",
            )


def _floats(values: Iterable[ir.Value | None]) -> list[ir.Value]:
    """Return the FP32 ones of some values."""
    return [value for value in values if value is not None and value.dtype == _FLOAT]


def _reads_any_type(node: ir.Node) -> bool:
    """Whether an operator gives the same result in whichever type it reads its operand."""
    return is_onnx(node, "Cast", "Shape", "Size")


def _high(graph: ir.Graph, kept: set[ir.Node], *, reduce_io: bool) -> set[ir.Node]:
    """Return what stays FP32: what the policy keeps, and the data movement that moves FP32 values to what reads FP32.

    A Cast from integers and a repeated constant are as good as movement: they give FP32 at no cost.
    """
    high = kept
    while found := _between(graph, high, reduce_io=reduce_io):
        high = high | found  # now what these make is FP32, too
    return high


def _between(graph: ir.Graph, high: set[ir.Node], *, reduce_io: bool) -> set[ir.Node]:
    exact = set[ir.Value]() if reduce_io else set(_floats(graph.inputs))  # computed in FP32, and moved
    rounded = set[ir.Value]()
    moves = []
    for node in graph:
        operands, results = _floats(node.inputs), _floats(node.outputs)
        is_move = is_onnx(node, "Cast", "ConstantOfShape", *MOVEMENT)
        if node in high or (is_move and not exact.isdisjoint(operands)):
            exact.update(results)
        elif not is_move or not rounded.isdisjoint(operands):
            rounded.update(results)
        if is_move and node not in high and rounded.isdisjoint(results):
            moves.append(node)
    between = set[ir.Node]()
    for node in reversed(moves):
        if any(_is_read_exactly(output, high | between, reduce_io=reduce_io) for output in node.outputs):
            between.add(node)
    return between


def _is_read_exactly(value: ir.Value, high: set[ir.Node], *, reduce_io: bool) -> bool:
    """Whether something wants an FP32 value as it is."""
    if value.dtype != _FLOAT:
        return False
    return (value.is_graph_output() and not reduce_io) or any(
        (reader in high and (not _reads_any_type(reader) or reader.outputs[0].dtype == _FLOAT))
        or reader.graph is not value.graph
        for reader in value.consumers()
    )


class _Caster:
    """Gives every operator its type, and casts between them."""

    def __init__(self, graph: ir.Graph, policy: Policy, node_names: Names, *, reduce_io: bool) -> None:
        self._graph = graph
        self._policy = policy
        self._target = policy.target
        self._boundary = policy.target if reduce_io else _FLOAT  # type of what enters and leaves the graph
        self._names = Names(value_names(graph))
        self._node_names = node_names
        self._first = graph[0]
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._constants: dict[ir.Value, ir.Value] = {}
        self.notes: list[Remark] = []

    def run(self, high: set[ir.Node]) -> None:
        """Type the nodes in order, so that the type of what a node reads is known."""
        nodes = list(self._graph)
        for value in self._graph.inputs:
            if value.dtype == _FLOAT and self._boundary != _FLOAT:
                self._reduce_input(value)
        for node in nodes:
            if node in high:
                self._feed_high(node)
            else:
                self._feed_low(node)
                self._retype(node)
        for value in dict.fromkeys(self._graph.outputs):
            if value.dtype in (_FLOAT, self._target) and value.dtype != self._boundary:
                self._finish_output(value)
        for value, rounded in self._constants.items():
            self._drop_unread(value, rounded)

    def _reduce_input(self, value: ir.Value) -> None:
        value.type = ir.TensorType(self._target)
        if value.const_value is not None:  # a default, which a caller may replace
            array = self._reduced(value, value.const_value)
            value.const_value = ir.tensor(array, name=value.name)

    def _feed_low(self, node: ir.Node) -> None:
        for i, value in enumerate(node.inputs):
            if value is None or value.dtype not in (_FLOAT, self._target) or _reads_any_type(node):
                continue
            wanted = self._target if takes(node, i, self._target) else _FLOAT
            if value.dtype != wanted:
                node.replace_input_with(i, self._as(value, wanted))

    def _feed_high(self, node: ir.Node) -> None:
        """A node that stays as it is reads FP32, and so do the graphs inside it."""
        inner = (n for graph in inner_graphs(node) for n in graph.all_nodes())
        for reader in (*(() if _reads_any_type(node) else (node,)), *inner):
            for i, value in enumerate(reader.inputs):
                if value is not None and value.graph is self._graph and value.dtype == self._target:
                    reader.replace_input_with(i, self._as(value, _FLOAT))

    def _retype(self, node: ir.Node) -> None:
        """Give a node's results the types that follow from its operands."""
        for name in ("to", "output_dtype"):
            if node.attributes.get_int(name, 0) == _FLOAT and is_onnx(node, "Cast", "DequantizeLinear"):
                node.attributes[name] = ir.AttrInt64(name, int(self._target))
        if is_onnx(node, "ConstantOfShape") and node.outputs[0].dtype == _FLOAT:
            tensor = stored(node.outputs[0])
            fill = (
                reduced(np.zeros(1, np.float32), self._target)
                if tensor is None
                else self._reduced(node.outputs[0], tensor)
            )
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(fill))
        for output, dtype in zip(node.outputs, derive(node, type_of, opset_of(node)), strict=True):
            if output.dtype == _FLOAT and dtype == self._target:
                output.type = ir.TensorType(dtype)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return a value in another type: a constant is rounded, anything else is cast, once."""
        if dtype == self._target and value.const_value is not None and not value.is_graph_input():
            return self._rounded(value, value.const_value)
        if (value, dtype) not in self._casts:
            producer = value.producer()
            module = value.name if producer is None else (producer.name or "").rpartition("/")[0]
            name = self._node_names.unique(f"{module}/Cast" if module else "Cast")
            node = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
            result = self._casts[value, dtype] = node.outputs[0]
            result.name, result.type = self._names.unique(name), ir.TensorType(dtype)
            result.shape = None if value.shape is None else value.shape.copy()
            if producer is None:
                self._graph.insert_before(self._first, node)
            else:
                self._graph.insert_after(producer, node)
        return self._casts[value, dtype]

    def _rounded(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        if value not in self._constants:
            name = self._names.unique(f"{value.name}.{self._target.short_name()}")
            rounded = initializer(name, ir.tensor(self._reduced(value, tensor), name=name))
            self._graph.register_initializer(rounded)
            self._constants[value] = rounded
        return self._constants[value]

    def _reduced(self, value: ir.Value, tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
        """Round a constant, and note what that does to it."""
        rounding, limit = self._policy.examine(value), None
        if rounding is not None and rounding.near and feeds_softmax(value):
            limit = self._policy.limit
            self._note(value, f"mask: {rounding.near} of {rounding.size} values are clipped to {limit:g}")
        if rounding is not None and rounding.flushed:
            self._note(value, f"flush: {rounding.flushed} of {rounding.size} values become zero")
        return reduced(tensor.numpy(), self._target, limit=limit)

    def _note(self, value: ir.Value, reason: str) -> None:
        self.notes.append(Remark(value.name or "", reason))

    def _finish_output(self, value: ir.Value) -> None:
        """Cast what leaves the graph, under the name that it always had."""
        inner = self._target if self._boundary == _FLOAT else _FLOAT
        name, value.name = value.name, self._names.unique(f"{value.name}.{inner.short_name()}")
        output = self._as(value, self._boundary)
        output.name = name
        for i, old in enumerate(self._graph.outputs):
            if old is value:
                self._graph.outputs[i] = output

    def _drop_unread(self, value: ir.Value, rounded: ir.Value) -> None:
        """Give a rounded constant the name of its original, where nothing reads that any more."""
        if value.uses() or value.is_graph_output():
            return
        name = value.name or ""
        del self._graph.initializers[name]
        if not rounded.is_graph_output():
            del self._graph.initializers[rounded.name or ""]
            rounded.name = name
            self._graph.register_initializer(rounded)
