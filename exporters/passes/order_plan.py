"""In which order each value's rows should stand, so that least is moved.

The choice is a shortest path. Operators are visited in the order of the graph; the state is, for every value that is
still to be read, the orders in which it is at hand; a row-wise operator picks the order that it computes in and pays
for the operands that are not at hand in it. States that agree are merged, the cheapest stays (Bellman), and only the
best few go on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.lowerings import CACHE_LINE, LAUNCH, MOST_AXES, OPAQUE, VIEW
from deploycli.exporters.graph.movement_ops import NOWHERE
from deploycli.exporters.graph.rows import Orders, is_permutation

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Dims
    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.rows import RowWise

_STATES = 48
"""States that are kept. A residual network has two values alive at a time, with a few orders each."""

_DEMANDS = 4
"""Orders that are tried because a reader further on asks for them, nearest first."""


@dataclass(frozen=True)
class Matrix:
    """A value seen as rows.

    Attributes:
        value: the value.
        dims: its shape.
        rows: rows of one sample.
        channels: elements of a row.
        itemsize: bytes of an element.
    """

    value: ir.Value
    dims: Dims
    rows: int
    channels: int
    itemsize: int


@dataclass(frozen=True)
class Shuffle:
    """Movement from one value to another.

    Attributes:
        source: what is moved; where it has no rows that are moved as wholes, it is read as it stands.
        result: what comes out.
        moves: for every piece of ``unit`` elements of a result row, which piece of the source it is.
        unit: elements of a piece: a row of the source, or 1.
        by_rows: pieces are rows of the source.
        pinned: the result is read where orders cannot be told: it has to stand as it does.
        anchor: the operator that makes the result.
    """

    source: Matrix
    result: Matrix
    moves: IndexMap
    unit: int
    by_rows: bool
    pinned: bool
    anchor: ir.Node

    @cached_property
    def index(self) -> Array:
        """Which row of the source each piece of the result is, or NOWHERE; only where pieces are rows."""
        return self.moves.dense().reshape(-1)

    def pieces(self, source: Array | None, result: Array) -> IndexMap:
        """Return the map where source and result stand in other orders; None for the order that is."""
        if not self.by_rows:
            return self.moves.take(result, 0)
        return IndexMap.of(self.rows(source, result), self.moves.source)

    def rows(self, source: Array | None, result: Array) -> Array:
        """Return the index where source and result stand in other orders; None for the order that is."""
        # [rows * pieces] -> [rows, pieces] -> reordered -> flat
        moved = self.index.reshape(self.result.rows, -1)[result].reshape(-1)
        if source is None:
            return moved
        place = np.argsort(source, kind="stable")
        return np.where(moved == NOWHERE, NOWHERE, place[moved])


@dataclass(frozen=True)
class Compute:
    """A row-wise operator; its operands must all stand in one order, in which its result then stands."""

    operator: RowWise
    operands: tuple[Matrix, ...]
    result: Matrix
    pinned: bool

    @property
    def anchor(self) -> ir.Node:
        """The operator."""
        return self.operator.node


@dataclass(frozen=True)
class ReadAsIs:
    """Readers that need a value in the order in which it stood: attention, a graph output, anything not understood."""

    source: Matrix
    usages: tuple[tuple[ir.Node, int], ...]
    anchor: ir.Node


@dataclass(frozen=True)
class Reduce:
    """A reduction over groups of consecutive rows: the order within a group does not matter."""

    source: Matrix
    group: int
    anchor: ir.Node


Event: TypeAlias = "Shuffle | Compute | ReadAsIs | Reduce"
_AtHand: TypeAlias = "dict[ir.Value, tuple[int, ...]]"
_Trail: TypeAlias = "tuple[int, _Trail] | None"


@dataclass
class _State:
    at_hand: _AtHand
    cost: int = 0
    choices: _Trail = None  # the last choice, and the trail of those before it


@dataclass
class Planner:
    """Chooses an order for every event's result.

    Attributes:
        events: in the order of the graph.
        orders: knows orders by number.
    """

    events: Sequence[Event]
    orders: Orders = field(default_factory=Orders)

    def __post_init__(self) -> None:
        self._demands: dict[ir.Value, list[int]] = {}
        self._last: dict[ir.Value, int] = {}
        self._costs: dict[object, int] = {}
        self._maps: dict[object, int] = {}
        self._map_of = {id(event): self._number_of(event) for event in self.events if isinstance(event, Shuffle)}
        self._readers: Counter[ir.Value] = Counter()
        self._made = {event.result.value for event in self.events if isinstance(event, (Compute, Shuffle))}
        for i, event in enumerate(self.events):
            for matrix in operands(event):
                self._last[matrix.value] = i
                self._readers[matrix.value] += 1
        for event in reversed(self.events):
            self._demand(event)

    def plan(self) -> tuple[int, list[int]]:
        """Return what the best plan costs, in bytes, and the order of every event's result."""
        return self._run(free=True)

    def cost_as_it_is(self) -> int:
        """Return what the graph costs with every value in its own order."""
        return self._run(free=False)[0]

    def _run(self, *, free: bool) -> tuple[int, list[int]]:
        states = [_State({})]
        for i, event in enumerate(self.events):
            found: dict[object, _State] = {}
            for state in states:
                for choice in self._choices(event, state) if free else [self.own(event)]:
                    after = self._after(event, state, choice, i)
                    key = tuple(sorted((id(value), at) for value, at in after.at_hand.items()))
                    if key not in found or after.cost < found[key].cost:
                        found[key] = after
            states = sorted(found.values(), key=lambda s: s.cost)[:_STATES]  # stable: the first found wins a tie
        best = states[0]
        choices: list[int] = []
        trail = best.choices
        while trail is not None:
            choice, trail = trail
            choices.append(choice)
        return best.cost, choices[::-1]

    def own(self, event: Event) -> int:
        """Return the order in which an event's result stands now."""
        matrix = event.source if isinstance(event, (ReadAsIs, Reduce)) else event.result
        return self.orders.identity(matrix.rows)

    def at_hand(self, matrix: Matrix, at_hand: _AtHand) -> tuple[int, ...]:
        """Return the orders in which a value is at hand; one that no event made stands as it does."""
        return at_hand.get(matrix.value) or (self.orders.identity(matrix.rows),)

    def nearest(self, matrix: Matrix, have: tuple[int, ...], want: int) -> tuple[int, int]:
        """Return the order from which another is made at least cost, and that cost, in bytes."""
        cost, _, order = min((self._reorder_cost(matrix, h, want), i, h) for i, h in enumerate(have))
        return order, cost

    def nearest_for(self, shuffle: Shuffle, have: tuple[int, ...], want: int) -> tuple[int, int]:
        """Return the order of the source from which a result is made at least cost, and that cost, in bytes."""
        if not shuffle.by_rows:
            own = self.orders.identity(shuffle.source.rows)
            extra = 0 if own in have or shuffle.source.rows == 1 else self.nearest(shuffle.source, have, own)[1]
            return own, extra + self._shuffle_cost(shuffle, None, want)
        cost, _, order = min((self._shuffle_cost(shuffle, h, want), i, h) for i, h in enumerate(have))
        return order, cost

    def serves(self, reduce: Reduce, order: int) -> bool:
        """Say whether a reduction gives the same in this order."""
        array = self.orders[order]
        return bool(np.array_equal(array // reduce.group, np.arange(array.size) // reduce.group))

    # --- choices ---

    def _choices(self, event: Event, state: _State) -> list[int]:
        own = self.own(event)
        if isinstance(event, (ReadAsIs, Reduce)) or event.pinned:
            return [own]
        wanted = self._demands.get(event.result.value, [])
        if isinstance(event, Compute):
            at_hand = [order for matrix in event.operands for order in self.at_hand(matrix, state.at_hand)]
            is_branch = len(event.operands) > 1 or any(self._readers[m.value] > 1 for m in event.operands)
            return list(dict.fromkeys([*at_hand, *(wanted if is_branch else [])]))
        if not event.by_rows:  # channels that become the last axis: a Transpose, and nothing dearer
            return [own, *(order for order in wanted if order != own and self._is_strided(event, order))]
        if event.source.value not in self._made and event.result.channels != event.unit:
            return [own]  # heads that merge: TensorRT fuses the plain Transpose into the attention
        free = []
        if is_permutation(event.index, event.source.rows) and event.result.rows == event.source.rows:
            undo = self.orders.inverse(self.orders.number(event.index))
            free = [self.orders.then(undo, h) for h in self.at_hand(event.source, state.at_hand)]
        return list(dict.fromkeys([own, *wanted, *free]))

    def _demand(self, event: Event) -> None:
        """Tell the operands of an event in which orders its readers would like them."""
        if isinstance(event, Reduce):
            return
        own = self.own(event)
        if isinstance(event, ReadAsIs):
            wanted = [own]
        else:
            wanted = [own] if event.pinned else self._demands.get(event.result.value, [])
        if isinstance(event, Shuffle):
            if not event.by_rows:
                return
            rows = [event.rows(None, self.orders[order]) for order in wanted or [own]]
            wanted = [self.orders.number(r) for r in rows if is_permutation(r, event.source.rows)]
        for matrix in operands(event):
            known = self._demands.get(matrix.value, [])
            self._demands[matrix.value] = list(dict.fromkeys([*wanted, *known]))[:_DEMANDS]

    # --- consequences ---

    def _after(self, event: Event, state: _State, choice: int, position: int) -> _State:
        at_hand, cost = dict(state.at_hand), state.cost
        if isinstance(event, (Compute, ReadAsIs)):
            for matrix in operands(event):
                have = self.at_hand(matrix, at_hand)
                if choice not in have:
                    cost += self.nearest(matrix, have, choice)[1]
                    at_hand[matrix.value] = (*have, choice)
        elif isinstance(event, Reduce):
            have = self.at_hand(event.source, at_hand)
            if not any(self.serves(event, order) for order in have):
                cost += self.nearest(event.source, have, choice)[1]
                at_hand[event.source.value] = (*have, choice)
        else:
            have = self.at_hand(event.source, at_hand)
            order, paid = self.nearest_for(event, have, choice)
            cost += paid
            if order not in have:
                at_hand[event.source.value] = (*have, order)
        if isinstance(event, (Compute, Shuffle)) and choice != self.own(event):  # what is not noted stands as it does
            at_hand[event.result.value] = (choice,)
        for matrix in operands(event):
            if self._last[matrix.value] == position:
                at_hand.pop(matrix.value, None)
        if isinstance(event, (Compute, Shuffle)) and event.result.value not in self._last:
            at_hand.pop(event.result.value, None)
        return _State(at_hand, cost, (choice, state.choices))

    # --- costs ---

    def _reorder_cost(self, matrix: Matrix, have: int, want: int) -> int:
        if have == want:
            return 0
        key = (matrix.channels * matrix.itemsize, self.orders.then(self.orders.inverse(have), want))
        if key not in self._costs:
            self._costs[key] = _copy_cost(IndexMap.of(self.orders[key[1]], matrix.rows), matrix, matrix.channels)
        return self._costs[key]

    def _shuffle_cost(self, shuffle: Shuffle, have: int | None, want: int) -> int:
        same = shuffle.source.dims == shuffle.result.dims
        kind = (self._map_of[id(shuffle)], shuffle.unit * shuffle.source.itemsize, same)
        key = (kind, have, want)
        if key not in self._costs:
            pieces = shuffle.pieces(None if have is None else self.orders[have], self.orders[want])
            if pieces.is_identity:
                self._costs[key] = 0 if same else VIEW
            else:
                self._costs[key] = _copy_cost(pieces, shuffle.result, shuffle.unit)
        return self._costs[key]

    def _is_strided(self, shuffle: Shuffle, want: int) -> bool:
        key = ("strided", self._map_of[id(shuffle)], want)
        if key not in self._costs:
            self._costs[key] = _is_strided(shuffle.pieces(None, self.orders[want]), shuffle.unit)
        return bool(self._costs[key])

    def _number_of(self, shuffle: Shuffle) -> int:
        """Return a number that movements of the same rows share."""
        key = (shuffle.moves.key, shuffle.source.rows, shuffle.source.channels, shuffle.result.rows)
        return self._maps.setdefault(key, len(self._maps))


def operands(event: Event) -> tuple[Matrix, ...]:
    """Return what an event reads."""
    return event.operands if isinstance(event, Compute) else (event.source,)


def _is_strided(pieces: IndexMap, unit: int) -> bool:
    """Say whether a Transpose of few axes moves these pieces."""
    read = pieces.strides
    is_view = read is not None and all(stride > 0 for _, stride in read)
    return is_view and len(read or ()) + (unit > 1) + 1 <= MOST_AXES  # and the batch


def _copy_cost(pieces: IndexMap, result: Matrix, unit: int) -> int:
    """Return what it costs to move pieces of so many elements, by the measure of forms.py, in bytes for one sample."""
    total = result.rows * result.channels * result.itemsize
    if _is_strided(pieces, unit):
        return LAUNCH + total + 2 * VIEW
    padding = LAUNCH + total if pieces.pads else 0
    return LAUNCH + total * (OPAQUE + CACHE_LINE // (unit * result.itemsize)) + padding
