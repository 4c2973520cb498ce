"""FP32 graph -> strongly typed FP16 or BF16 graph.

Before -> after, where LayerNormalization stays FP32::

    x: f32 -> MatMul(x, W: f32) -> LayerNormalization -> Reshape -> MatMul
    x: f32 -> Cast f16 -> MatMul(x, W: f16) -> Cast f32 -> LayerNormalization -> Cast f16 -> Reshape -> MatMul

Every operator has one precision, and a value is cast where it passes from one precision to another: so there is no
Cast between neighbours of one type, and one value is never cast twice. Operators that only move data take the
precision that needs fewer casts, and the smaller one where that is equal. What stays FP32 says why (see `policy`).

Refused, for one: a graph with Q/DQ of an opset below 19, whose scales cannot be FP16.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from exporters.precision.constants import feeds_softmax, reduced
from exporters.precision.policy import NEAR_OVERFLOW, decide, reducible
from exporters.rewrite.builder import initializer
from exporters.rewrite.facts import Facts
from exporters.rewrite.unique import Names, value_names
from exporters.steps import Refusal
from models.errors import UsageError

if TYPE_CHECKING:
    from exporters.precision.policy import Policy

_MOVES = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
_FLOAT = ir.DataType.FLOAT


def cast(model: ir.Model, policy: Policy, *, reduce_io: bool = False) -> list[Refusal]:
    """Type a model in place.

    Args:
        model: an FP32 model; nodes have names.
        policy: which type, and what stays FP32.
        reduce_io: give graph inputs and outputs the reduced type too; otherwise they stay as they are.

    Returns:
        What stays FP32 and why, then what rounding did to constants: an operator or a constant each.

    Raises:
        UsageError: the graph has no FP32 operator, or is typed already.
    """
    graph = model.graph
    _fill_types(graph)
    _check(graph, policy)
    kept = decide(graph, policy)
    notes = [Refusal(node.name or node.op_type, reason) for node, reason in kept.items() if _floats(node)]
    high = set(kept) | {node for node in graph if not _floats(node)}
    _move_in_one_type(graph, high, reduce_io=reduce_io)
    caster = _Caster(graph, policy)
    caster.run(high, reduce_io=reduce_io)
    return notes + caster.notes


def _fill_types(graph: ir.Graph) -> None:
    """Infer the element types that the file does not say."""
    missing = [value for node in graph for value in node.outputs if value.dtype is None]
    if not missing:
        return
    facts = Facts(graph)
    for value in missing:
        if (fact := facts[value]) is not None:
            value.dtype = fact.dtype


def _check(graph: ir.Graph, policy: Policy) -> None:
    if not any(_floats(node) for node in graph):
        raise UsageError(
            f"the graph has no FP32 operator to cast to {policy.target.name}",
            expected="an FP32 graph",
            hint="export it",
        )
    found = Counter(value.dtype for node in graph for value in node.outputs)
    typed = [t.name for t in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) if found[t]]
    if typed:
        raise UsageError(
            f"the graph has {typed[0]} values already",
            expected="an FP32 graph",
            hint="cast the FP32 graph it was made from",
        )


def _floats(node: ir.Node) -> bool:
    """Whether a node reads or writes FP32 values."""
    return any(value is not None and value.dtype == _FLOAT for value in (*node.inputs, *node.outputs))


def _move_in_one_type(graph: ir.Graph, high: set[ir.Node], *, reduce_io: bool) -> None:
    """Leave data movement in FP32 where what it reads and what reads it does: two casts less."""
    ends_high: set[ir.Node] = set()  # movement whose readers, through more movement, all read FP32
    for node in reversed(graph):
        readers = [reader for output in node.outputs for reader in output.consumers()]
        leaves = any(output.is_graph_output() for output in node.outputs)
        if (
            node.op_type in _MOVES
            and node not in high
            and (readers or leaves)
            and all(reader in high or reader in ends_high for reader in readers)
            and not (leaves and reduce_io)
        ):
            ends_high.add(node)
    for node in graph:
        if node in ends_high and all(
            value.const_value is not None or value.producer() in high or (value.is_graph_input() and not reduce_io)
            for value in node.inputs
            if value is not None and value.dtype == _FLOAT
        ):
            high.add(node)


class _Caster:
    """Gives every operator its type, and casts between them."""

    def __init__(self, graph: ir.Graph, policy: Policy) -> None:
        self._graph = graph
        self._policy = policy
        self._target = policy.target
        self._names = Names(value_names(graph))
        self._node_names = Names(node.name for node in graph if node.name)
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._constants: dict[ir.Value, ir.Value] = {}
        self.notes: list[Refusal] = []

    def run(self, high: set[ir.Node], *, reduce_io: bool) -> None:
        nodes = list(self._graph)
        if reduce_io:
            for value in self._graph.inputs:
                if value.dtype == _FLOAT:
                    value.dtype = self._target
        for node in nodes:
            if node not in high:
                self._retype(node)
        for node in nodes:
            if node in high:
                self._feed_high(node)
            else:
                self._feed_low(node)
        self._finish_outputs(reduce_io=reduce_io)

    def _retype(self, node: ir.Node) -> None:
        """Give a node's results the reduced type."""
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(self._target))
        results = self._schema(node).outputs
        for i, output in enumerate(node.outputs):
            if output.dtype == _FLOAT and reducible(results, i, self._target):
                output.dtype = self._target

    def _schema(self, node: ir.Node) -> onnx.defs.OpSchema:
        return onnx.defs.get_schema(node.op_type, self._graph.opset_imports[node.domain], node.domain)

    def _feed_low(self, node: ir.Node) -> None:
        operands = self._schema(node).inputs
        for i, value in enumerate(node.inputs):
            wanted = self._target if reducible(operands, i, self._target) else _FLOAT
            if value is not None and value.dtype in (_FLOAT, self._target) and value.dtype != wanted:
                node.replace_input_with(i, self._as(value, wanted))

    def _feed_high(self, node: ir.Node) -> None:
        """A node that stays as it is reads FP32, and so do the graphs inside it."""
        for inner in (node, *(n for graph in _subgraphs(node) for n in graph.all_nodes())):
            for i, value in enumerate(inner.inputs):
                if value is not None and value.graph is self._graph and value.dtype == self._target:
                    inner.replace_input_with(i, self._as(value, _FLOAT))

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return a value in another type: a constant is rounded, anything else is cast, once."""
        if dtype == self._target and value.const_value is not None and not value.is_graph_input():
            return self._rounded(value)
        found = self._casts.get((value, dtype))
        if found is None:
            producer = value.producer()
            module = ((None if producer is None else producer.name) or "").rpartition("/")[0]
            name = self._node_names.unique(f"{module}/Cast" if module else "Cast")
            node = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
            found = self._casts[value, dtype] = node.outputs[0]
            found.name, found.dtype, found.shape = self._names.unique(name), dtype, value.shape
            if producer is None:
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.insert_after(producer, node)
        return found

    def _rounded(self, value: ir.Value) -> ir.Value:
        found = self._constants.get(value)
        if found is None:
            assert value.const_value is not None
            rounding, clip = self._policy.examine(value), None
            assert rounding is not None
            if rounding.overflowed:
                clip = NEAR_OVERFLOW * self._policy.largest  # a score may be added to it
                self._note(value, f"mask: {rounding.overflowed} of {rounding.size} values are clipped to {clip:g}")
                assert feeds_softmax(value), "any other constant that overflows keeps its operator in FP32"
            if rounding.flushed:
                self._note(value, f"flush: {rounding.flushed} of {rounding.size} values become zero")
            name = self._names.unique(f"{value.name}.{self._target.short_name()}")
            found = initializer(name, ir.tensor(reduced(value.const_value.numpy(), self._target, clip=clip), name=name))
            self._graph.register_initializer(found)
            self._constants[value] = found
        return found

    def _note(self, value: ir.Value, reason: str) -> None:
        self.notes.append(Refusal(value.name or "", reason))

    def _finish_outputs(self, *, reduce_io: bool) -> None:
        """Cast what leaves the graph, under the name that it always had, and drop constants that nothing reads."""
        for i, value in enumerate(self._graph.outputs):
            wanted = self._target if reduce_io else _FLOAT
            if value.dtype not in (_FLOAT, self._target) or value.dtype == wanted:
                continue
            name, value.name = value.name, self._names.unique(f"{value.name}_{value.dtype.short_name()}")
            output = self._as(value, wanted)
            output.name = name
            self._graph.outputs[i] = output
        for value, rounded in self._constants.items():
            if not value.uses() and not value.is_graph_output():
                name = value.name or ""
                del self._graph.initializers[name], self._graph.initializers[rounded.name or ""]
                rounded.name = name
                self._graph.register_initializer(rounded)


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    return graphs
