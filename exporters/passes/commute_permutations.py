"""Permutations of tokens commute with what works on each token by itself, and meet.

Before -> after, for two blocks of a Swin (W and S are the orders of its plain and of its shifted windows)::

    LN, Gather(W), attention, Gather(W^-1), Add, LN, MLP, Add; LN, Gather(S), attention, Gather(S^-1), Add, LN, MLP, Add
    -> Gather(W); LN, attention, Add, LN, MLP, Add; Gather(W^-1 S); LN, attention, Add, LN, MLP, Add

The residual stream stays in the order in which it was needed last; a reduction over all tokens takes any order. Each
token's numbers are computed by the same operators from the same numbers, so the result is equal within the rounding of
a kernel that blocks its rows in another way. Refused, for one: an Add of a constant that repeats itself over the
windows, which would have to be spelled out in another order.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.builder import Builder
from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.lowerings import plans
from deploycli.exporters.graph.rewiring import replace
from deploycli.exporters.graph.rows import permuted
from deploycli.exporters.graph.shapes import item_bytes
from deploycli.exporters.passes.graph_pass import GraphPass
from deploycli.exporters.passes.order_plan import Compute, Planner, ReadAsIs, Reduce, Shuffle
from deploycli.exporters.passes.row_events import read_events
from deploycli.exporters.passes.tidy import sweep

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Dims, Facts
    from deploycli.exporters.graph.lowerings import Plan
    from deploycli.exporters.passes.order_plan import Matrix


_PLANS = 4
"""Plans that are carried out one after another. One is usual, a third has not been seen."""


class CommutePermutations(GraphPass):
    """Let the tokens of each value stand in the order in which least is moved. Equal within rounding."""

    def transform(self, graph: ir.Graph, facts: Facts) -> bool:
        """Run the pass; see the module's documentation."""
        modified = False
        for _ in range(_PLANS):  # what one plan made room for, the next one finds
            planner = Planner(read_events(graph, facts))
            before = planner.cost_as_it_is()
            after, choices = planner.plan()
            if after >= before:
                break
            _Writer(Builder(graph, facts), planner).write(choices)
            sweep(graph)
            modified = True
        return modified


class _Writer:
    """Carries out a plan: operators compute in place, in the order that was chosen for them."""

    def __init__(self, builder: Builder, planner: Planner) -> None:
        self._builder = builder
        self._planner = planner
        self._at_hand: dict[ir.Value, dict[int, ir.Value]] = {}
        self._plans: dict[object, Plan] = {}

    def write(self, choices: list[int]) -> None:
        """Rewire the events."""
        for event, order in zip(self._planner.events, choices, strict=True):
            if isinstance(event, Compute):
                self._compute(event, order)
            elif isinstance(event, Shuffle):
                self._shuffle(event, order)
            elif isinstance(event, ReadAsIs):
                value = self._get(event.source, order, event.anchor)
                for node, position in event.usages:
                    _read(node, position, value)
            else:
                self._reduce(event, order)

    def _compute(self, event: Compute, order: int) -> None:
        node = event.operator.node
        places = {m.value: [i for i in event.operator.operands if node.inputs[i] is m.value] for m in event.operands}
        for matrix in event.operands:  # one may be read in an order that is another one's own
            value = self._get(matrix, order, node)
            for i in places[matrix.value]:
                _read(node, i, value)
        if order != self._own(event.result):
            for i in event.operator.varying:
                constant = self._builder.facts.constant(node.inputs[i])
                assert constant is not None, "it was when the plan was made"
                node.replace_input_with(i, self._builder.constant(permuted(constant, self._planner.orders[order])))
        self._at_hand[event.result.value] = {order: event.result.value}

    def _shuffle(self, event: Shuffle, order: int) -> None:
        have = self._orders_of(event.source)
        origin, _ = self._planner.nearest_for(event, tuple(have), order)
        own = self._own(event.source)
        stands = have.get(own) is event.source.value
        if stands and (origin, order) == (own, self._own(event.result)):
            self._at_hand[event.result.value] = {order: event.result.value}
            return  # as it stands in the graph
        value = self._get(event.source, origin, event.anchor)
        orders = self._planner.orders
        pieces = event.pieces(orders[origin] if event.by_rows else None, orders[order])
        moved = self._move(value, pieces, event.unit, event.source.dims, event.result.dims, event.anchor)
        if event.pinned:
            if moved.producer() is None or moved.is_graph_output():  # its name is taken
                moved = self._builder.value("Identity", [moved], event.anchor)
            replace(event.result.value, moved)
        self._at_hand[event.result.value] = {order: moved}

    def _reduce(self, event: Reduce, own: int) -> None:
        serving = [
            value for order, value in self._orders_of(event.source).items() if self._planner.serves(event, order)
        ]
        value = serving[0] if serving else self._get(event.source, own, event.anchor)
        _read(event.anchor, 0, value)

    def _own(self, matrix: Matrix) -> int:
        return self._planner.orders.identity(matrix.rows)

    def _orders_of(self, matrix: Matrix) -> dict[int, ir.Value]:
        return self._at_hand.setdefault(matrix.value, {self._own(matrix): matrix.value})

    def _get(self, matrix: Matrix, order: int, anchor: ir.Node) -> ir.Value:
        """Return a value with its rows in an order, moved there before the anchor if it has to be."""
        have = self._orders_of(matrix)
        if order not in have:
            origin, _ = self._planner.nearest(matrix, tuple(have), order)
            orders = self._planner.orders
            index = IndexMap.of(orders[orders.then(orders.inverse(origin), order)], matrix.rows)
            have[order] = self._move(have[origin], index, matrix.channels, matrix.dims, matrix.dims, anchor)
        return have[order]

    def _move(
        self, value: ir.Value, pieces: IndexMap, unit: int, source: Dims, result: Dims, anchor: ir.Node
    ) -> ir.Value:
        fact = self._builder.facts[value]
        assert fact is not None
        key = (pieces.key, unit, source, result)
        if key not in self._plans:
            self._plans[key] = _cheapest(pieces, unit, source, result, math.ceil(item_bytes(fact.dtype)))
        for move in self._plans[key]:
            value = self._builder.move(move, value, anchor)
        return value


def _read(node: ir.Node, position: int, value: ir.Value) -> None:
    if node.inputs[position] is not value:
        node.replace_input_with(position, value)


def _cheapest(pieces: IndexMap, unit: int, source: Dims, result: Dims, itemsize: int) -> Plan:
    """Return the cheapest form of a movement of pieces."""
    # [pieces] -> [pieces, unit] -> [B, pieces, unit]
    index_map = pieces.of_pieces(unit)
    found = plans(index_map.in_every_sample() if dynamic_axes(source) else index_map, source, result)
    return min(found, key=lambda plan: (sum(m.cost(itemsize) for m in plan), len(plan), [m.op for m in plan]))
