"""Permutations of tokens commute with what works on each token by itself, and meet.

Before -> after, for two blocks of a Swin (W and S are the layouts of its plain and of its shifted windows)::

    LN, Gather(W), attention, Gather(W^-1), Add, LN, MLP, Add; LN, Gather(S), attention, Gather(S^-1), Add, LN, MLP, Add
    -> Gather(W); LN, attention, Add, LN, MLP, Add; Gather(W^-1 S); LN, attention, Add, LN, MLP, Add

The residual stream stays in the layout in which it was needed last; a reduction over all tokens takes any layout. Each
token's numbers are computed by the same operators from the same numbers, so the result is equal within the rounding of
a kernel that blocks its rows in another way. Refused, for one: an Add of a constant that repeats itself over the
windows, which would have to be spelled out in another layout.

In which layout each value's rows should stand is a shortest path. Operators are visited in the order of the graph; the
state is, for every value that is still to be read, the layouts in which it is at hand; a row-wise operator picks the
layout that it computes in and pays for the operands that are not at hand in it. States that agree are merged, the
cheapest stays (Bellman), and only the best few go on.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.builder import Builder, let_read, replace
from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.lowerings import CACHE_LINE, LAUNCH, MOST_AXES, OPAQUE, VIEW, find_lowerings
from deploycli.exporters.graph.shapes import item_bytes
from deploycli.exporters.graph.token_view import Compute, FixedLayout, Permute, Reduce, operands, token_view
from deploycli.exporters.passes.common.tidy import sweep
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.lowerings import Lowering
    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.shapes import Dims
    from deploycli.exporters.graph.token_view import TokenOp, Tokens

_PLANS = 4
"""Plans that are carried out one after another. One is usual, a third has not been seen."""

_STATES = 48
"""States that are kept. A residual network has two values alive at a time, with a few layouts each."""

_MOST_WANTED = 4
"""Layouts that are tried because a reader further on asks for them, nearest first."""

_AtHand: TypeAlias = "dict[ir.Value, tuple[int, ...]]"
_Trail: TypeAlias = "tuple[int, _Trail] | None"


class CommutePermutations(GraphPass):
    """Let the tokens of each value stand in the order in which least is moved. Equal within rounding."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        modified = False
        for _ in range(_PLANS):  # what one plan made room for, the next one finds
            planner = Planner(token_view(graph, analysis))
            before = planner.cost_as_it_is()
            after, choices = planner.plan()
            if after >= before:
                break
            _Writer(Builder(graph, analysis), planner).write(choices)
            sweep(graph)
            modified = True
        return modified


class _Writer:
    """Carries out a plan: operators compute in place, in the order that was chosen for them."""

    def __init__(self, builder: Builder, planner: Planner) -> None:
        self._builder = builder
        self._planner = planner
        self._at_hand: dict[ir.Value, dict[int, ir.Value]] = {}
        self._lowerings: dict[object, Lowering] = {}

    def write(self, choices: list[int]) -> None:
        """Rewire the operations."""
        for op, layout in zip(self._planner.ops, choices, strict=True):
            if isinstance(op, Compute):
                self._compute(op, layout)
            elif isinstance(op, Permute):
                self._permute(op, layout)
            elif isinstance(op, FixedLayout):
                value = self._get(op.source, layout, op.anchor)
                for node, position in op.usages:
                    let_read(node, position, value)
            else:
                self._reduce(op, layout)

    def _compute(self, op: Compute, layout: int) -> None:
        node = op.operator.node
        places = {m.value: [i for i in op.operator.operands if node.inputs[i] is m.value] for m in op.operands}
        for tokens in op.operands:  # one may be read in a layout that is another one's own
            value = self._get(tokens, layout, node)
            for i in places[tokens.value]:
                let_read(node, i, value)
        if layout != self._own(op.result):
            for i in op.operator.varying:
                constant = self._builder.analysis.constant(node.inputs[i])
                assert constant is not None, "it was when the plan was made"
                node.replace_input_with(i, self._builder.constant(permuted(constant, self._planner.layouts[layout])))
        self._at_hand[op.result.value] = {layout: op.result.value}

    def _permute(self, op: Permute, layout: int) -> None:
        have = self._layouts_of(op.source)
        origin, _ = self._planner.nearest_for(op, tuple(have), layout)
        own = self._own(op.source)
        stands = have.get(own) is op.source.value
        if stands and (origin, layout) == (own, self._own(op.result)):
            self._at_hand[op.result.value] = {layout: op.result.value}
            return  # as it stands in the graph
        value = self._get(op.source, origin, op.anchor)
        layouts = self._planner.layouts
        pieces = op.pieces(layouts[origin] if op.by_rows else None, layouts[layout])
        moved = self._move(value, pieces, op.unit, op.source.dims, op.result.dims, op.anchor)
        if op.fixed:
            if moved.producer() is None or moved.is_graph_output():  # its name is taken
                moved = self._builder.value("Identity", [moved], op.anchor)
            replace(op.result.value, moved)
        self._at_hand[op.result.value] = {layout: moved}

    def _reduce(self, op: Reduce, own: int) -> None:
        serving = [value for layout, value in self._layouts_of(op.source).items() if self._planner.serves(op, layout)]
        value = serving[0] if serving else self._get(op.source, own, op.anchor)
        let_read(op.anchor, 0, value)

    def _own(self, tokens: Tokens) -> int:
        return self._planner.layouts.identity(tokens.rows)

    def _layouts_of(self, tokens: Tokens) -> dict[int, ir.Value]:
        return self._at_hand.setdefault(tokens.value, {self._own(tokens): tokens.value})

    def _get(self, tokens: Tokens, layout: int, anchor: ir.Node) -> ir.Value:
        """Return a value with its rows in a layout, moved there before the anchor if it has to be."""
        have = self._layouts_of(tokens)
        if layout not in have:
            origin, _ = self._planner.nearest(tokens, tuple(have), layout)
            layouts = self._planner.layouts
            index = IndexMap.of(layouts[layouts.then(layouts.inverse(origin), layout)], tokens.rows)
            have[layout] = self._move(have[origin], index, tokens.channels, tokens.dims, tokens.dims, anchor)
        return have[layout]

    def _move(
        self, value: ir.Value, pieces: IndexMap, unit: int, source: Dims, result: Dims, anchor: ir.Node
    ) -> ir.Value:
        fact = self._builder.analysis[value]
        assert fact is not None
        key = (pieces.key, unit, source, result)
        if key not in self._lowerings:
            self._lowerings[key] = _cheapest(pieces, unit, source, result, math.ceil(item_bytes(fact.dtype)))
        for op in self._lowerings[key]:
            value = self._builder.move(op, value, anchor)
        return value


def _cheapest(pieces: IndexMap, unit: int, source: Dims, result: Dims, itemsize: int) -> Lowering:
    """Return the cheapest lowering of a movement of pieces."""
    # [pieces] -> [pieces, unit] -> [B, pieces, unit]
    index_map = pieces.of_pieces(unit)
    found = find_lowerings(index_map.in_every_sample() if dynamic_axes(source) else index_map, source, result)
    return min(
        found,
        key=lambda lowering: (sum(m.cost(itemsize) for m in lowering), len(lowering), [m.op_type for m in lowering]),
    )


# --- the choice of layouts --------------------------------------------------------------------------------------------


def permuted(constant: Array, layout: Array) -> Array:
    """Return a constant that differs from row to row, ``[*tokens, C]``, with its rows in another layout."""
    # [*tokens, C] -> [rows, C] -> [*tokens, C]
    moved: Array = constant.reshape(-1, constant.shape[-1])[layout].reshape(constant.shape)
    return moved


class Layouts:
    """Layouts of rows, each known by a number: equal layouts have equal numbers.

    Layout p of the rows x is the rows ``x[p]``.
    """

    def __init__(self) -> None:
        self._arrays: list[Array] = []
        self._numbers: dict[bytes, int] = {}
        self._products: dict[tuple[int, int], int] = {}
        self._inverses: dict[int, int] = {}
        self._identities: dict[int, int] = {}

    def __getitem__(self, layout: int) -> Array:
        return self._arrays[layout]

    def number(self, array: Array) -> int:
        """Return the number of a layout."""
        array = np.ascontiguousarray(array, np.int64)
        number = self._numbers.setdefault(array.tobytes(), len(self._arrays))
        if number == len(self._arrays):
            self._arrays.append(array)
        return number

    def identity(self, rows: int) -> int:
        """Return the layout in which rows stand already."""
        if rows not in self._identities:
            self._identities[rows] = self.number(np.arange(rows))
        return self._identities[rows]

    def then(self, first: int, second: int) -> int:
        """Return ``x[first][second]``."""
        key = (first, second)
        if key not in self._products:
            self._products[key] = self.number(self[first][self[second]])
        return self._products[key]

    def inverse(self, layout: int) -> int:
        """Return the layout that undoes this one."""
        if layout not in self._inverses:
            self._inverses[layout] = self.number(np.argsort(self[layout], kind="stable"))
        return self._inverses[layout]


def is_permutation(index: Array, rows: int) -> bool:
    """Say whether every row stands there once."""
    return index.size == rows and bool((np.bincount(index, minlength=rows) == 1).all() if index.min() >= 0 else False)


@dataclass
class _State:
    at_hand: _AtHand
    cost: int = 0
    choices: _Trail = None  # the last choice, and the trail of those before it


@dataclass
class Planner:
    """Chooses a layout for every operation's result.

    Attributes:
        ops: in the order of the graph.
        layouts: knows layouts by number.
    """

    ops: Sequence[TokenOp]
    layouts: Layouts = field(default_factory=Layouts)

    def __post_init__(self) -> None:
        self._wanted: dict[ir.Value, list[int]] = {}
        self._last: dict[ir.Value, int] = {}
        self._costs: dict[object, int] = {}
        self._maps: dict[object, int] = {}
        self._map_of = {id(op): self._number_of(op) for op in self.ops if isinstance(op, Permute)}
        self._breaking = {tokens.value: _cost_of_breaking(tokens) for op in self.ops for tokens in operands(op)}
        self._readers: Counter[ir.Value] = Counter()
        self._made = {op.result.value for op in self.ops if isinstance(op, (Compute, Permute))}
        for i, op in enumerate(self.ops):
            for tokens in operands(op):
                self._last[tokens.value] = i
                self._readers[tokens.value] += 1
        for op in reversed(self.ops):
            self._want(op)

    def plan(self) -> tuple[int, list[int]]:
        """Return what the best plan costs, in bytes, and the layout of every operation's result."""
        return self._run(free=True)

    def cost_as_it_is(self) -> int:
        """Return what the graph costs with every value in its own layout."""
        return self._run(free=False)[0]

    def _run(self, *, free: bool) -> tuple[int, list[int]]:
        states = [_State({})]
        for i, op in enumerate(self.ops):
            found: dict[object, _State] = {}
            for state in states:
                for choice in self._choices(op, state) if free else [self.own(op)]:
                    after = self._after(op, state, choice, i)
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

    def own(self, op: TokenOp) -> int:
        """Return the layout in which an operation's result stands now."""
        tokens = op.source if isinstance(op, (FixedLayout, Reduce)) else op.result
        return self.layouts.identity(tokens.rows)

    def at_hand(self, tokens: Tokens, at_hand: _AtHand) -> tuple[int, ...]:
        """Return the layouts in which a value is at hand; one that no operation made stands as it does."""
        return at_hand.get(tokens.value) or (self.layouts.identity(tokens.rows),)

    def nearest(self, tokens: Tokens, have: tuple[int, ...], want: int) -> tuple[int, int]:
        """Return the layout from which another is made at least cost, and that cost, in bytes."""
        cost, _, layout = min((self._relayout_cost(tokens, h, want), i, h) for i, h in enumerate(have))
        return layout, cost

    def nearest_for(self, permute: Permute, have: tuple[int, ...], want: int) -> tuple[int, int]:
        """Return the layout of the source from which a result is made at least cost, and that cost, in bytes."""
        if not permute.by_rows:
            own = self.layouts.identity(permute.source.rows)
            extra = 0
            if own not in have and permute.source.rows > 1:  # and is moved in any case
                extra = self.nearest(permute.source, have, own)[1] - self._breaking[permute.source.value]
            return own, extra + self._permute_cost(permute, None, want)
        cost, _, layout = min((self._permute_cost(permute, h, want), i, h) for i, h in enumerate(have))
        return layout, cost

    def serves(self, reduce: Reduce, layout: int) -> bool:
        """Say whether a reduction gives the same in this layout."""
        array = self.layouts[layout]
        return bool(np.array_equal(array // reduce.group, np.arange(array.size) // reduce.group))

    # --- choices ---

    def _choices(self, op: TokenOp, state: _State) -> list[int]:
        own = self.own(op)
        if isinstance(op, (FixedLayout, Reduce)) or op.fixed:
            return [own]
        wanted = self._wanted.get(op.result.value, [])
        if isinstance(op, Compute):
            at_hand = [layout for tokens in op.operands for layout in self.at_hand(tokens, state.at_hand)]
            is_branch = len(op.operands) > 1 or any(self._readers[m.value] > 1 for m in op.operands)
            may_move = is_branch or op.operator.node.op_type == "LayerNormalization"  # by the kernel that normalises
            return list(dict.fromkeys([*at_hand, *(wanted if may_move else [])]))
        if not op.by_rows:  # channels that become the last axis: a Transpose, and nothing dearer
            return [own, *(layout for layout in wanted if layout != own and self._is_strided(op, layout))]
        if op.source.value not in self._made and op.result.channels != op.unit:
            return [own]  # heads that merge: TensorRT fuses the plain Transpose into the attention
        free = []
        if is_permutation(op.index, op.source.rows) and op.result.rows == op.source.rows:
            undo = self.layouts.inverse(self.layouts.number(op.index))
            free = [self.layouts.then(undo, h) for h in self.at_hand(op.source, state.at_hand)]
        return list(dict.fromkeys([own, *wanted, *free]))

    def _want(self, op: TokenOp) -> None:
        """Tell the operands of an operation in which layouts its readers would like them."""
        if isinstance(op, Reduce):
            return
        own = self.own(op)
        wanted = [own] if isinstance(op, FixedLayout) or op.fixed else self._wanted.get(op.result.value, [])
        if isinstance(op, Permute):
            if not op.by_rows:
                return
            rows = [op.rows(None, self.layouts[layout]) for layout in wanted or [own]]
            wanted = [self.layouts.number(r) for r in rows if is_permutation(r, op.source.rows)]
        for tokens in operands(op):
            known = self._wanted.get(tokens.value, [])
            self._wanted[tokens.value] = list(dict.fromkeys([*wanted, *known]))[:_MOST_WANTED]

    # --- consequences ---

    def _after(self, op: TokenOp, state: _State, choice: int, position: int) -> _State:
        at_hand, cost = dict(state.at_hand), state.cost
        if isinstance(op, (Compute, FixedLayout)):
            for tokens in operands(op):
                have = self.at_hand(tokens, at_hand)
                if choice not in have:
                    cost += self.nearest(tokens, have, choice)[1]
                    at_hand[tokens.value] = (*have, choice)
        elif isinstance(op, Reduce):
            have = self.at_hand(op.source, at_hand)
            if not any(self.serves(op, layout) for layout in have):
                cost += self.nearest(op.source, have, choice)[1]
                at_hand[op.source.value] = (*have, choice)
        else:
            have = self.at_hand(op.source, at_hand)
            layout, paid = self.nearest_for(op, have, choice)
            cost += paid
            if layout not in have:
                at_hand[op.source.value] = (*have, layout)
        if isinstance(op, (Compute, Permute)) and choice != self.own(op):  # what is not noted stands as it does
            at_hand[op.result.value] = (choice,)
        for tokens in operands(op):
            if self._last[tokens.value] == position:
                at_hand.pop(tokens.value, None)
        if isinstance(op, (Compute, Permute)) and op.result.value not in self._last:
            at_hand.pop(op.result.value, None)
        return _State(at_hand, cost, (choice, state.choices))

    # --- costs ---

    def _relayout_cost(self, tokens: Tokens, have: int, want: int) -> int:
        if have == want:
            return 0
        key = (tokens.channels * tokens.itemsize, self.layouts.then(self.layouts.inverse(have), want))
        if key not in self._costs:
            self._costs[key] = _copy_cost(IndexMap.of(self.layouts[key[1]], tokens.rows), tokens, tokens.channels)
        return self._costs[key] + self._breaking[tokens.value]

    def _permute_cost(self, permute: Permute, have: int | None, want: int) -> int:
        same = permute.source.dims == permute.result.dims
        kind = (self._map_of[id(permute)], permute.unit * permute.source.itemsize, same)
        key = (kind, have, want)
        if key not in self._costs:
            pieces = permute.pieces(None if have is None else self.layouts[have], self.layouts[want])
            if pieces.is_identity:
                self._costs[key] = 0 if same else VIEW
            else:
                self._costs[key] = _copy_cost(pieces, permute.result, permute.unit)
        # Where channels move, too, the value is moved in any order of its rows.
        is_broken = permute.by_rows and self._costs[key] > VIEW
        return self._costs[key] + (self._breaking[permute.source.value] if is_broken else 0)

    def _is_strided(self, permute: Permute, want: int) -> bool:
        key = ("strided", self._map_of[id(permute)], want)
        if key not in self._costs:
            self._costs[key] = _is_strided(permute.pieces(None, self.layouts[want]), permute.unit)
        return bool(self._costs[key])

    def _number_of(self, permute: Permute) -> int:
        """Return a number that movements of the same rows share."""
        key = (permute.moves.key, permute.source.rows, permute.source.channels, permute.result.rows)
        return self._maps.setdefault(key, len(self._maps))


def _is_strided(pieces: IndexMap, unit: int) -> bool:
    """Say whether a Transpose of few axes moves these pieces."""
    read = pieces.strides
    is_view = read is not None and all(stride > 0 for _, stride in read)
    return is_view and len(read or ()) + (unit > 1) + 1 <= MOST_AXES  # and the batch


def _copy_cost(pieces: IndexMap, result: Tokens, unit: int) -> int:
    """Return what it costs to move pieces of so many elements, as lowerings do, in bytes for one sample."""
    total = result.rows * result.channels * result.itemsize
    if _is_strided(pieces, unit):
        return LAUNCH + total + 2 * VIEW
    padding = LAUNCH + total if pieces.pads else 0
    return LAUNCH + total * (OPAQUE + CACHE_LINE // (unit * result.itemsize)) + padding


def _cost_of_breaking(source: Tokens) -> int:
    """Return what it costs to move a value right behind the operator that makes it, in bytes for one sample.

    A compiler moves and normalises by one kernel, but normalises and moves by two, with numbers of 32 bits between
    them, also where a residual is added to what was normalised. And it adds a residual to a product while it writes
    that, which it cannot if the product is moved in between.
    """
    elements = source.rows * source.channels
    node = source.value.producer()
    makers = [] if node is None else [node, *_operand_makers(node)] if node.op_type == "Add" else [node]
    if any(maker.op_type == "LayerNormalization" for maker in makers):
        return LAUNCH + 4 * elements * source.itemsize  # written and read at twice the size
    is_added = [reader.op_type for reader in source.value.consumers()] == ["Add"]
    if is_added and any(maker.op_type == "MatMul" for maker in makers):
        return LAUNCH + 2 * elements * source.itemsize
    return 0


def _operand_makers(node: ir.Node) -> list[ir.Node]:
    makers = (value.producer() for value in node.inputs if value is not None)
    return [maker for maker in makers if maker is not None]
