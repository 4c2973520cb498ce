"""Additive constants meet across data movement and become one.

Before -> after, for shifted-window attention::

    Add(scores, bias [1, N, S, S]), Reshape [B, nW, N, S, S], Add(mask [1, nW, 1, S, S])
    -> Reshape, Add(constant [1, nW, N, S, S])

``move(x + a) + b == move(x) + (move(a) + b)``: an addition is re-associated, so the result is equal within rounding,
not bit for bit. Refused, for one: a first sum that something else reads as well.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.rewrite.builder import Builder, remove_dead, replace
from exporters.rewrite.facts import PROBES, Facts
from exporters.rewrite.movement_ops import Array, NotMovementError, is_movement, move
from exporters.steps import Refusal


class SumAdditiveConstants(ir.passes.InPlacePass):
    """Let each value receive one additive constant instead of several."""

    def __init__(self, facts: Facts | None = None) -> None:
        super().__init__()
        self._facts = facts
        self.refusals: list[Refusal] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass; see the module's documentation."""
        graph = model.graph
        facts = self._facts or Facts(graph)
        builder = Builder(graph, facts)
        self.refusals = []
        modified = False
        for node in list(graph):
            if node.graph is graph and self._merge(node, builder):
                modified = True
        return ir.passes.PassResult(model, modified)

    def _merge(self, second: ir.Node, builder: Builder) -> bool:
        """Merge the constant of the Add that the second Add's operand comes from."""
        facts = builder.facts
        operands = _sum_with_constant(second, facts)
        if operands is None:
            return False
        moved, b = operands
        path: list[ir.Node] = []
        value = moved
        while True:
            producer = value.producer()
            if producer is None:
                return False
            inner = _sum_with_constant(producer, facts)
            if inner is not None:
                break
            if not is_movement(producer) or len(producer.outputs) != 1 or producer.op_type == "Concat":
                return False
            if any(facts.constant(v) is None and _probes(v, facts) is None for v in producer.inputs[1:] if v):
                return False
            path.insert(0, producer)
            above = producer.inputs[0]
            if above is None:
                return False
            value = above
        if any(len(v.uses()) != 1 or v.is_graph_output() for v in (value, *(n.outputs[0] for n in path))):
            self.refusals.append(Refusal(second.name or "", "the first sum is read elsewhere too"))
            return False
        x, a = inner
        total = _moved_sum(value, a, path, moved, b, facts)
        if isinstance(total, str):
            self.refusals.append(Refusal(second.name or "", total))
            return False
        self._rebuild(second, producer, path, x, total, builder)
        return True

    def _rebuild(
        self, second: ir.Node, first: ir.Node, path: list[ir.Node], x: ir.Value, total: Array, builder: Builder
    ) -> None:
        """Leave the first Add out of the path; add the total in the second one's place."""
        value = x
        for node in path:
            inputs = [value, *(v for v in node.inputs[1:] if v is not None)]
            attributes = {a.name: a.value for a in node.attributes.values()}
            value = builder.value(node.op_type, inputs, second, **attributes)
        constant = builder.constant(total, name=f"{second.outputs[0].name}_constant")
        replace(second.outputs[0], builder.value("Add", [value, constant], second))
        remove_dead(builder.graph, [first, *path, second])


def _sum_with_constant(node: ir.Node, facts: Facts) -> tuple[ir.Value, Array] | None:
    """Read a node as ``x + constant``."""
    if node.op_type != "Add" or node.domain != "":
        return None
    x, y = node.inputs
    if x is None or y is None or facts.dims(node.outputs[0]) is None:
        return None
    for value, constant in ((x, facts.constant(y)), (y, facts.constant(x))):
        if constant is not None and facts.dims(value) == facts.dims(node.outputs[0]):
            return value, constant
    return None


def _probes(value: ir.Value, facts: Facts) -> tuple[Array, ...] | None:
    fact = facts[value]
    return None if fact is None else fact.probes


def _moved_sum(
    source: ir.Value, a: Array, path: list[ir.Node], result: ir.Value, b: Array, facts: Facts
) -> Array | str:
    """Return ``move(a) + b`` for one sample with a leading axis of 1, as small as broadcasting allows."""
    samples: list[Array] = []
    for probe, batch in enumerate(PROBES):
        fact, target = facts[source], facts[result]
        assert fact is not None
        assert target is not None
        shape, final = fact.at(batch), target.at(batch)
        assert shape is not None
        assert final is not None
        moved: Array = np.broadcast_to(a, shape)
        try:
            for node in path:
                rest = [None if v is None else (_probes(v, facts) or ())[probe] for v in node.inputs[1:]]
                (moved,) = move(node, [moved, *rest])
        except NotMovementError as error:
            return str(error)
        total = np.broadcast_to(moved + b, final)
        for axis in range(total.ndim):
            first = total.take([0], axis)
            if np.array_equal(total, np.broadcast_to(first, total.shape)):
                total = first
        samples.append(total)
    if any(s.shape != samples[0].shape or not np.array_equal(s, samples[0]) for s in samples[1:]):
        return "the constant would depend on the batch size"
    return np.ascontiguousarray(samples[0])
