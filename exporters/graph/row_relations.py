"""Which operators are row-wise, and along which axes.

An operator is row-wise along an axis of its result if each row there is computed from the same row of its operands, or
from operands that all rows share: addition along every axis, LayerNormalization along all but the normalised ones, a
product along the rows of the left and the columns of the right operand. For such an axis, and for those that movement
reorders, the question "which rows of the operands do these rows of the result need?" has an exact answer. Along any
other axis, and for an operator that is not listed, all rows are needed.

Four relations are enough. :class:`Links`: each row is computed from the same row of the operands. :class:`Take`: rows
are chosen. :class:`Join`: operands follow each other. :class:`View`: the elements are counted in another way.

Source of the semantics: https://onnx.ai/onnx/operators/ (opsets 13 to 24).

A part of a value (`IndexSets`) is a set of indices on each of its axes: for every axis it says which rows are meant,
all, or a few. An axis that grows with the batch can be selected from only where it holds another axis beside the batch,
as ``[197*B, 768]`` holds tokens and images: it is then read as ``[outer, size, inner]``, and the selection is one of
the ``size``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from deploycli.exporters.graph.analysis import dynamic_axes, reshape_target
from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.operators import ELEMENTWISE, REDUCTIONS, SOFTMAX, TRAILING_NORMALIZATIONS, VIEWS
from deploycli.exporters.graph.regions import moved
from deploycli.exporters.graph.shapes import elements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.shapes import Dims


@dataclass(frozen=True)
class IndexSet:
    """Some rows of one axis, which is read as [outer, size, inner].

    Attributes:
        outer: 1 where the axis is static.
        size: how many rows there are; it does not grow with the batch.
        inner: 1 where the axis is static.
        kept: the selected rows, at least one, ascending.
    """

    outer: int
    size: int
    inner: int
    kept: tuple[int, ...]

    @property
    def length(self) -> int:
        """Size of the axis when nothing else is left of it."""
        return self.outer * len(self.kept) * self.inner

    def same_axis(self, other: IndexSet) -> bool:
        """Say whether both read the axis alike."""
        return (self.outer, self.size, self.inner) == (other.outer, other.size, other.inner)


_MOST_PARTS = 32
"""A value is asked for so many parts at most; where it is asked for more, they are one."""

IndexSets: TypeAlias = "tuple[IndexSet | None, ...]"
"""A selection on every axis; None where all of the axis is meant."""


def rows(dim: int, kept: Iterable[int]) -> IndexSet | None:
    """Select rows of a static axis; None where these are all."""
    ordered = tuple(sorted({int(i) for i in kept}))
    return None if len(ordered) == dim else IndexSet(1, dim, 1, ordered)


def rows_within(dim: int, size: int, inner: int, kept: tuple[int, ...]) -> IndexSet | None:
    """Select rows of an axis of ``dim`` that is read as [outer, size, inner]; a static axis is selected from flat."""
    outer = dim // (size * inner)
    if dynamic_axes((dim,)):
        return IndexSet(outer, size, inner, kept)
    # [outer, size, inner] -> [outer, kept, inner] -> flat
    return rows(dim, np.arange(dim).reshape(outer, size, inner)[:, list(kept)].reshape(-1))


def whole(dims: Sequence[object]) -> IndexSets:
    """Return the part of everything."""
    return (None,) * len(dims)


def is_whole(part: IndexSets) -> bool:
    """Say whether nothing is left out."""
    return all(selected is None for selected in part)


def sizes(dims: Dims, part: IndexSets) -> Dims:
    """Return the shape of what a part selects."""
    return tuple(dim if selected is None else selected.length for dim, selected in zip(dims, part, strict=True))


def volume(dims: Dims, part: IndexSets) -> int:
    """Count the elements that a part selects in one sample."""
    return elements(sizes(dims, part))


def covers(part: IndexSets, other: IndexSets) -> bool:
    """Say whether a part holds all of another one."""
    return all(
        mine is None or (theirs is not None and mine.same_axis(theirs) and set(mine.kept).issuperset(theirs.kept))
        for mine, theirs in zip(part, other, strict=True)
    )


def hull(*parts: IndexSets) -> IndexSets:
    """Return the smallest part that holds all, axis by axis."""
    return tuple(map(_union, zip(*parts, strict=True)))


def _union(selections: Sequence[IndexSet | None]) -> IndexSet | None:
    first, present = selections[0], [rows for rows in selections if rows is not None]
    if first is None or len(present) < len(selections) or not all(map(first.same_axis, present)):
        return None
    kept = tuple(sorted({row for rows in present for row in rows.kept}))
    return None if len(kept) == first.size else IndexSet(first.outer, first.size, first.inner, kept)


def merge(dims: Dims, parts: Iterable[IndexSets]) -> tuple[IndexSets, ...]:
    """Cover parts by as few elements as possible: two become one where that one is not larger than both together.

    So the queries of one token and the keys and values of all are two parts of the one product that makes them, while
    the tiles of a shifted image are one part, the whole image.
    """
    kept = list(dict.fromkeys(parts))
    if any(is_whole(part) for part in kept):
        return (whole(dims),)
    if len(kept) > _MOST_PARTS:
        kept = [hull(*kept)]
    merging = True
    while merging:
        merging = False
        for a, b in combinations(kept, 2):
            both = hull(a, b)
            if volume(dims, both) <= volume(dims, a) + volume(dims, b):
                kept = [*(part for part in kept if part not in (a, b)), both]
                merging = True
                break
    if len(kept) > 1 and sum(volume(dims, part) for part in kept) >= elements(dims):
        return (whole(dims),)
    return tuple(sorted(kept, key=lambda part: [() if r is None else r.kept for r in part]))


MOST_ROWS = 2**16
"""An axis of more rows than this is not selected from: a selection is a list of rows."""


class Relation(ABC):
    """How one result of an operator follows from its operands."""

    @abstractmethod
    def widen(self, part: IndexSets) -> IndexSets:
        """Return the smallest part of the result, at least the given one, that can be computed for itself."""

    @abstractmethod
    def operands(self, part: IndexSets) -> tuple[IndexSets | None, ...]:
        """Return what a part that needs no widening reads of each operand; None where it reads nothing of it.

        An operand that says where to move, such as the shape of a Reshape, is read whole: its part is empty.
        """


@dataclass(frozen=True)
class Links(Relation):
    """Axes that are row-wise.

    Attributes:
        free: the axes of the result along which rows can be computed one by one.
        inputs: for every axis of every operand, the axis of the result whose rows it shares; None for any other.
    """

    free: frozenset[int]
    inputs: tuple[tuple[int | None, ...], ...]

    def widen(self, part: IndexSets) -> IndexSets:
        """See the base class."""
        return tuple(selected if axis in self.free else None for axis, selected in enumerate(part))

    def operands(self, part: IndexSets) -> tuple[IndexSets | None, ...]:
        """See the base class."""
        return tuple(tuple(None if axis is None else part[axis] for axis in linked) for linked in self.inputs)


@dataclass(frozen=True)
class Take(Relation):
    """Rows of the first operand: a Gather by constants, a Slice, one part of a Split.

    Attributes:
        dims: shape of the operand.
        indices: for every axis of the operand, the rows that are taken in their order, of any shape: the axis becomes
            that many axes; None where the axis stays as it is.
    """

    dims: Dims
    indices: tuple[Array | None, ...]

    def widen(self, part: IndexSets) -> IndexSets:
        """See the base class."""
        return part

    def operands(self, part: IndexSets) -> tuple[IndexSets | None, ...]:
        """See the base class."""
        wanted = self.taken(part)
        pairs = zip(self.dims, self._parts(part), wanted, strict=True)
        return (tuple(own[0] if index is None else rows(dim, index.reshape(-1)) for dim, own, index in pairs),)

    def taken(self, part: IndexSets) -> list[Array | None]:
        """Return which rows of the operand stand where in a part of the result; None where an axis stays as it is."""
        return [
            None if index is None else index[np.ix_(*(_kept(r, n) for r, n in zip(own, index.shape, strict=True)))]
            for index, own in zip(self.indices, self._parts(part), strict=True)
        ]

    def _parts(self, part: IndexSets) -> Iterator[IndexSets]:
        """Yield what a part selects of the axes that each axis of the operand became."""
        start = 0
        for index in self.indices:
            end = start + (1 if index is None else index.ndim)
            yield part[start:end]
            start = end


@dataclass(frozen=True)
class Join(Relation):
    """A Concat.

    Attributes:
        axis: the axis on which the operands follow each other.
        lengths: how long each is there.
    """

    axis: int
    lengths: tuple[int, ...]

    def widen(self, part: IndexSets) -> IndexSets:
        """See the base class."""
        if dynamic_axes(self.lengths):
            return (*part[: self.axis], None, *part[self.axis + 1 :])
        return part

    def operands(self, part: IndexSets) -> tuple[IndexSets | None, ...]:
        """See the base class."""
        selected = part[self.axis]
        if selected is None:
            return (part,) * len(self.lengths)
        found: list[IndexSets | None] = []
        start = 0
        for length in self.lengths:
            kept = [row - start for row in selected.kept if start <= row < start + length]
            found.append((*part[: self.axis], rows(length, kept), *part[self.axis + 1 :]) if kept else None)
            start += length
        return tuple(found)


@dataclass(frozen=True)
class View(Relation):
    """A Reshape, or another operator that only says how the elements are counted.

    Attributes:
        source: shape of the operand.
        result: shape of the result.
        groups: axes of the operand and axes of the result that hold the same elements, as few in a group as can be.
    """

    source: Dims
    result: Dims
    groups: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(_groups(self.source, self.result)))

    def widen(self, part: IndexSets) -> IndexSets:
        """See the base class."""
        widened = list(part)
        for _, results in self.groups:
            if any(part[i] is not None for i in results) and self._read_group(results, part) is None:
                for i in results:
                    widened[i] = None
        return tuple(widened) if reshape_target(sizes(self.result, tuple(widened))) else whole(part)

    def operands(self, part: IndexSets) -> tuple[IndexSets | None, ...]:
        """See the base class."""
        found = list(whole(self.source))
        for _, results in self.groups:
            for axis, selected in (self._read_group(results, part) or {}).items():
                found[axis] = selected
        return (tuple(found),)

    def _read_group(self, results: tuple[int, ...], part: IndexSets) -> dict[int, IndexSet | None] | None:
        """Return what the part of a group selects of the operand's axes; None where that is no part."""
        sources = next(s for s, r in self.groups if r == results)
        if all(part[i] is None for i in results):
            return {}
        if len(sources) == len(results) == 1:
            return {sources[0]: part[results[0]]}
        if dynamic_axes(tuple(self.source[i] for i in sources)):
            return self._read_factors(sources, results, part)
        return self._read_flat(sources, results, part)

    def _read_flat(
        self, sources: tuple[int, ...], results: tuple[int, ...], part: IndexSets
    ) -> dict[int, IndexSet | None] | None:
        """Static axes: count the elements, and see whether they are a part of the operand."""
        wide, deep = ([dims[i] for i in axes] for dims, axes in ((self.source, sources), (self.result, results)))
        if math.prod(wide) > MOST_ROWS:
            return None
        flat = np.ravel_multi_index(np.ix_(*(_kept(part[i], self.result[i]) for i in results)), deep).reshape(-1)
        kept = [np.unique(coordinate) for coordinate in np.unravel_index(flat, wide)]
        if math.prod(len(coordinate) for coordinate in kept) != flat.size:
            return None
        return {axis: rows(dim, k.tolist()) for axis, dim, k in zip(sources, wide, kept, strict=True)}

    def _read_factors(
        self, sources: tuple[int, ...], results: tuple[int, ...], part: IndexSets
    ) -> dict[int, IndexSet | None] | None:
        """Axes with the batch among them: find, for every selection, the one axis of the operand that it lies in."""
        found: dict[int, IndexSet | None] = {}
        for position, i in enumerate(results):
            selected = part[i]
            if selected is None:
                continue
            inner = selected.inner * math.prod(self.result[j] for j in results[position + 1 :])
            for place, axis in enumerate(sources):
                below = math.prod(self.source[j] for j in sources[place + 1 :])
                if inner % below == 0 and (self.source[axis] * below) % (inner * selected.size) == 0:
                    if axis in found:
                        return None
                    found[axis] = rows_within(self.source[axis], selected.size, inner // below, selected.kept)
                    break
            else:
                return None
        return found


def _kept(selected: IndexSet | None, size: int) -> Sequence[int]:
    return range(size) if selected is None else selected.kept


def _groups(source: Dims, result: Dims) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    i = j = 0
    while i < len(source) and j < len(result):
        first, left, right = (i, j), source[i], result[j]
        i, j = i + 1, j + 1
        while left != right and (i < len(source) if left < right else j < len(result)):
            if left < right:
                left, i = left * source[i], i + 1
            else:
                right, j = right * result[j], j + 1
        if i < len(source) and j == len(result):
            i = len(source)  # axes of length 1
        if j < len(result) and i == len(source):
            j = len(result)
        yield tuple(range(first[0], i)), tuple(range(first[1], j))


# --- operators -------------------------------------------------------------------------------------------------------


def relations(node: ir.Node, analysis: Analysis) -> list[Relation | None]:
    """Return how each result of a node follows from its operands, or None where nothing is known of that.

    Args:
        node: the operator.
        analysis: what is known of the graph.
    """
    unknown: list[Relation | None] = [None] * len(node.outputs)
    read = _RELATIONS.get(node.op_type) if node.domain == "" else None
    inputs = [() if value is None else analysis.dims(value) for value in node.inputs]
    results = [analysis.dims(output) for output in node.outputs]
    if read is None or any(dims is None or 0 in dims for dims in inputs):
        return unknown
    if node.op_type == "Split":
        return _taken(node, analysis) if all(dims is not None and 0 not in dims for dims in results) else unknown
    if results[0] is None or 0 in results[0] or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return unknown
    case = _Case(node, [dims or () for dims in inputs], results[0], analysis)
    try:
        found = read(case)
    except _OutsideError:
        return unknown
    return [None if isinstance(found, Links) and not _fits(found, case) else found, *unknown[1:]]


class _OutsideError(Exception):
    """An attribute names an axis that is not there."""


def _fits(links: Links, case: _Case) -> bool:
    """Say whether axes that share their rows are of one length: a graph may be at odds with itself."""
    pairs = zip(links.inputs, case.inputs, strict=False)
    linked = [(axis, dim) for axes, dims in pairs for axis, dim in zip(axes, dims, strict=False) if axis is not None]
    return all(axis < len(case.result) and case.result[axis] == dim for axis, dim in linked)


@dataclass(frozen=True)
class _Case:
    """A node whose shapes are known: those of its operands (none for one that is absent), and of its first result."""

    node: ir.Node
    inputs: list[Dims]
    result: Dims
    analysis: Analysis

    def axis(self, default: int, rank: int | None = None) -> int:
        """Return the axis attribute, counted from the front."""
        axis, rank = self.node.attributes.get_int("axis", default), len(self.result) if rank is None else rank
        if not -rank <= axis < rank:
            raise _OutsideError
        return axis % rank

    def constant(self, position: int) -> Array | None:
        """Return an operand's value."""
        value = self.node.inputs[position] if position < len(self.node.inputs) else None
        return self.analysis.constant(value)

    def rest(self) -> tuple[tuple[int | None, ...], ...]:
        """Return the links of all operands but the first: there are none."""
        return tuple((None,) * len(dims) for dims in self.inputs[1:])


def _elementwise(case: _Case) -> Relation | None:
    return _broadcast(case, range(len(case.result)))


def _broadcast(case: _Case, free: Sequence[int]) -> Links | None:
    """Align the operands at their last axes."""
    links = []
    for dims in case.inputs:
        offset = len(case.result) - len(dims)
        if offset < 0 or any(dim not in (1, case.result[offset + i]) for i, dim in enumerate(dims)):
            return None
        links.append(tuple(None if dim == 1 else offset + i for i, dim in enumerate(dims)))
    return Links(frozenset(free), tuple(links))


def _row_wise_before(case: _Case) -> Relation | None:
    """Normalisations over all axes from a given one on."""
    return _broadcast(case, range(case.axis(-1)))


def _row_wise_beside(case: _Case) -> Relation | None:
    """Normalisations over one axis."""
    return _broadcast(case, [i for i in range(len(case.result)) if i != case.axis(-1)])


def _matmul(case: _Case) -> Relation | None:
    a, b = case.inputs
    rank = len(case.result)
    if min(len(a), len(b)) < 2:
        return None
    links = []
    for dims, linked in ((a, -2), (b, -1)):
        offset = rank - len(dims)
        outer = [None if dim == 1 else offset + i for i, dim in enumerate(dims[:-2])]
        links.append((*outer, *(rank + i if i == linked else None for i in (-2, -1))))
    return Links(frozenset(range(rank)), tuple(links))


def _gemm(case: _Case) -> Relation | None:
    a, b = (bool(case.node.attributes.get_int(name, 0)) for name in ("transA", "transB"))
    bias = Links(frozenset(), ())
    if len(case.inputs) > 2 and case.node.inputs[2] is not None:
        found = _broadcast(_Case(case.node, case.inputs[2:3], case.result, case.analysis), ())
        if found is None:
            return None
        bias = found
    links = ((None, 0) if a else (0, None), (1, None) if b else (None, 1), *(bias.inputs or ((),)))
    return Links(frozenset((0, 1)), links[: len(case.inputs)])


def _attention(case: _Case) -> Relation | None:
    """Along the queries [B, N, S, D], where neither their place nor what came before them matters."""
    node = case.node
    stateful = any(value is not None for value in node.inputs[4:])
    if len(case.inputs[0]) != 4 or stateful or node.attributes.get_int("is_causal", 0) != 0:
        return None
    links: list[tuple[int | None, ...]] = [(None, None, 2, None), (None,) * 4, (None,) * 4]
    for mask in case.inputs[3:4]:
        spread = [None] * max(len(mask) - 2, 0)
        links.append((*spread, None if mask[-2] == 1 else 2, None) if len(mask) > 1 else (None,) * len(mask))
    return Links(frozenset((2,)), tuple(links))


def _reduction(case: _Case) -> Relation | None:
    rank = len(case.inputs[0])
    if case.node.op_type.startswith("Arg"):
        axes = [case.node.attributes.get_int("axis", 0)]
    elif len(case.node.inputs) > 1 and case.node.inputs[1] is not None:
        operand = case.constant(1)
        if operand is None:
            return None
        axes = operand.reshape(-1).tolist()
    else:
        axes = list(case.node.attributes.get_ints("axes", ()))
    if any(not -rank <= axis < rank for axis in axes):
        return None
    gone = {axis % rank for axis in axes}
    if not gone:
        return None  # all axes, or none
    keeps = case.node.attributes.get_int("keepdims", 1) != 0
    left = [i for i in range(rank) if keeps or i not in gone]
    links = tuple(None if i in gone else left.index(i) for i in range(rank))
    return Links(frozenset(link for link in links if link is not None), (links, *case.rest()))


def _transpose(case: _Case) -> Relation | None:
    rank = len(case.result)
    order = list(case.node.attributes.get_ints("perm", ()) or range(rank)[::-1])
    return Links(frozenset(range(rank)), (tuple(order.index(i) for i in range(rank)),))


def _expand(case: _Case) -> Relation | None:
    """Only where the target is constant: a selection on an axis that is repeated changes it."""
    spread = _broadcast(_Case(case.node, case.inputs[:1], case.result, case.analysis), range(len(case.result)))
    return None if spread is None or case.constant(1) is None else Links(spread.free, (*spread.inputs, (None,)))


def _view(case: _Case) -> Relation | None:
    return View(case.inputs[0], case.result)


def _concat(case: _Case) -> Relation | None:
    axis = case.axis(0)
    return Join(axis, tuple(dims[axis] for dims in case.inputs))


def _gather(case: _Case) -> Relation | None:
    data, indices = case.inputs[:2]
    axis = case.axis(0, len(data))
    constant = case.constant(1)
    if constant is not None and not dynamic_axes((data[axis],)) and data[axis] <= MOST_ROWS:
        rows_taken = np.where(constant < 0, constant + data[axis], constant)
        if constant.size and not 0 <= rows_taken.min() <= rows_taken.max() < data[axis]:
            return None  # whoever runs it says so
        return Take(data, tuple(rows_taken if i == axis else None for i in range(len(data))))
    # Row-wise in the indices, and along the other axes of the data.
    shift = len(indices) - 1
    of_data = tuple(None if i == axis else i + (shift if i > axis else 0) for i in range(len(data)))
    of_indices = tuple(range(axis, axis + len(indices)))
    return Links(frozenset(range(len(case.result))), (of_data, of_indices))


def _slice(case: _Case) -> Relation | None:
    return _taken(case.node, case.analysis)[0]


def _taken(node: ir.Node, analysis: Analysis) -> list[Relation | None]:
    """Return which rows of its first operand each result of a node takes: run it on their numbers, axis by axis."""
    source, data = node.inputs[0], analysis.dims(node.inputs[0])
    assert source is not None, "its shape is known"
    assert data is not None, "its shape is known"
    if any(value is not None and analysis.constant(value) is None for value in node.inputs[1:]):
        return [None] * len(node.outputs)
    numbers = [
        [index_map.line(axis) for index_map in moved(node, {source: IndexMap.coordinate(data, axis)}, analysis)]
        for axis in range(len(data))
    ]
    return [_take(data, rows) for rows in zip(*numbers, strict=True)]


def _take(data: Dims, numbers: Sequence[IndexMap]) -> Relation | None:
    """Return the rows of every axis that are taken; None where an axis has too many, or grows with the batch."""
    chosen = [dim for dim, rows in zip(data, numbers, strict=True) if not rows.is_identity]
    if dynamic_axes(tuple(chosen)) or max(chosen, default=0) > MOST_ROWS:
        return None
    return Take(data, tuple(None if rows.is_identity else rows.dense() for rows in numbers))


def _table() -> dict[str, Callable[[_Case], Relation | None]]:
    return {
        **dict.fromkeys((*ELEMENTWISE, "Identity"), _elementwise),
        **dict.fromkeys((*REDUCTIONS, "ArgMax", "ArgMin"), _reduction),
        **dict.fromkeys(TRAILING_NORMALIZATIONS, _row_wise_before),
        **dict.fromkeys((*SOFTMAX, "Hardmax", "LpNormalization"), _row_wise_beside),
        **dict.fromkeys(VIEWS - {"Identity"}, _view),
        **dict.fromkeys(("Slice", "Split"), _slice),  # a Split has a relation for each of its results
        "Attention": _attention,
        "Concat": _concat,
        "Expand": _expand,
        "Gather": _gather,
        "Gemm": _gemm,
        "MatMul": _matmul,
        "Transpose": _transpose,
    }


_RELATIONS = _table()
