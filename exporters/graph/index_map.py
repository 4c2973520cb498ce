"""A movement of data has one meaning: which source element each result element is.

Movement is a product of axes nearly always: rows here are chosen whatever the columns are there. So the meaning is not
spelled out element by element. The flat index of a result is read as a number in mixed radix, and each of its digits
says how far the source index moves with it::

    Transpose of [B, 49, 96] to [B, 96, 49]    digits (B, 96, 49), strides (49*96, 1, 96)
    torch.roll of 56 rows by 3                 one digit of 56, a table [3, 4, .., 55, 0, 1, 2] of rows

Digits have a stride, or stand in a table together with those that they do not act apart from. An operator costs what
its digits and tables take, not what its elements would; the batch is a digit like any other, of the size
:data:`~deploycli.exporters.graph.shapes.BATCH`, and stands in no table: what would tabulate it mixes the samples of a
batch.

An :class:`IndexMap` answers to the part of NumPy's interface that movement operators are written in, so that the one
table of them (:mod:`deploycli.exporters.graph.movement_ops`) also says what they mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.movement_ops import NOWHERE, Array
from deploycli.exporters.graph.shapes import BATCH, Dims

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MOST_ENTRIES = 2**22
"""A table of more entries than this is not made: what moves so irregularly is left as it stands."""

EMPTY = "holds no elements"
MIXES = "mixes the samples of a batch"

_VOID = int(np.iinfo(np.int64).min)
"""Entry of a table where nothing is read. Entries are differences: any smaller number may be one."""

_MOST = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, eq=False)
class Digit:
    """One digit of a result's flat index; it is itself and no other of the same size.

    Attributes:
        size: how many values it takes, at least two.
        stride: how far the source index moves with each of them; 0 where a table says it, or where nothing moves.
    """

    size: int
    stride: int = 0


@dataclass(frozen=True, eq=False)
class Table:
    """What digits add to the source index together.

    Attributes:
        digits: the digits, in any order.
        index: what each of their combinations adds, or :data:`_VOID`: a result element is nowhere if any table says
            so. Shape: their sizes.
    """

    digits: tuple[Digit, ...]
    index: Array


Axes: TypeAlias = "tuple[tuple[Digit, ...], ...]"
Strides: TypeAlias = "list[tuple[int, int]]"


@dataclass(frozen=True, eq=False)
class IndexMap:
    """Where each element of a result comes from.

    Attributes:
        source: number of source elements, with the batch written as :data:`BATCH`.
        axes: for every axis of the result its digits, outermost first; none where the axis is 1 long.
        offset: source index of the first result element, where no table adds to it.
        tables: what digits add that have no stride.
    """

    source: int
    axes: Axes
    offset: int = 0
    tables: tuple[Table, ...] = ()

    # --- the maps that others are made from -------------------------------------------------------------------------

    @classmethod
    def identity(cls, dims: Dims) -> IndexMap:
        """Return the map that moves nothing."""
        strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
        return cls(math.prod(dims), tuple(_digits(dim, stride) for dim, stride in zip(dims, strides, strict=True)))

    @classmethod
    def coordinate(cls, dims: Dims, axis: int) -> IndexMap:
        """Return the map to the coordinate of an axis: the index of a vector that is repeated along all others."""
        return cls(dims[axis], tuple(_digits(dim, int(i == axis)) for i, dim in enumerate(dims)))

    @classmethod
    def nowhere(cls, dims: Dims) -> IndexMap:
        """Return the map of padded zeros."""
        return cls(0, tuple(_digits(dim, 0) for dim in dims), tables=(Table((), np.array(_VOID)),))

    @classmethod
    def of(cls, index: Array, source: int) -> IndexMap:
        """Return a map that is known element by element: the source index of each, or :data:`NOWHERE`."""
        whole = tuple(_digits(size, 0) for size in index.shape)
        digits = tuple(digit for axis in whole for digit in axis)
        index = np.where(index == NOWHERE, _VOID, index.astype(np.int64))
        table = Table(digits, index.reshape([digit.size for digit in digits]))
        return cls(source, whole, tables=(table,))._simplified()

    # --- the part of NumPy's interface that movement is written in --------------------------------------------------

    @property
    def shape(self) -> Dims:
        """Shape of the result."""
        return tuple(math.prod(digit.size for digit in axis) for axis in self.axes)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.axes)

    def reshape(self, *shape: int | Sequence[int]) -> IndexMap:
        """Count the same elements in another way."""
        dims, total = _numbers(shape), math.prod(self.shape)
        if -1 in dims:
            known = math.prod(dim for dim in dims if dim != -1)
            dims[dims.index(-1)] = total // known if known else 0
        if math.prod(dims) != total:
            raise ValueError(f"{list(self.shape)} cannot be reshaped to {dims}")
        return self._regrouped(tuple(dims))

    def transpose(self, *perm: int | Sequence[int] | None) -> IndexMap:
        """Put the axes into another order; by default the opposite one."""
        order = _numbers(tuple(p for p in perm if p is not None)) or list(range(self.ndim))[::-1]
        return replace(self, axes=tuple(self.axes[i] for i in order))

    def swapaxes(self, one: int, other: int) -> IndexMap:
        """Let two axes change places."""
        order = list(range(self.ndim))
        order[one], order[other] = order[other], order[one]
        return self.transpose(order)

    def squeeze(self, axis: tuple[int, ...] | None = None) -> IndexMap:
        """Remove axes that are 1 long, by default all."""
        gone = {i % self.ndim for i in axis} if axis is not None else {i for i in range(self.ndim) if not self.axes[i]}
        if any(self.axes[i] for i in gone):
            raise ValueError(f"an axis of {list(self.shape)} that is not 1 long cannot be squeezed")
        return replace(self, axes=tuple(digits for i, digits in enumerate(self.axes) if i not in gone))

    def broadcast_to(self, dims: Dims) -> IndexMap:
        """Repeat the elements along new axes, and along those that are 1 long."""
        axes = list[tuple[Digit, ...]]()
        for size, digits in zip(dims, (*((),) * (len(dims) - self.ndim), *self.axes), strict=True):
            if digits and math.prod(d.size for d in digits) != size:
                raise ValueError(f"{list(self.shape)} cannot be broadcast to {list(dims)}")
            axes.append(digits or _digits(size, 0))
        return replace(self, axes=tuple(axes))

    def take(self, indices: Array, axis: int) -> IndexMap:
        """Choose entries of one axis; it becomes as many axes as the indices have."""
        axis %= self.ndim
        size, indices = self.shape[axis], np.asarray(indices)
        if indices.size == 0:
            raise ValueError("holds no elements")
        if indices.min() < -size or indices.max() >= size:
            raise IndexError(f"an index is outside of an axis of {size}")
        indices = np.where(indices < 0, indices + size, indices).astype(np.int64)
        one = self._joined(axis)
        digit = one.axes[axis][0] if one.axes[axis] else None
        made = tuple(_digits(n, 0) for n in indices.shape)
        flat = tuple(d for digits in made for d in digits)
        picked = indices.reshape([d.size for d in flat])
        axes = (*one.axes[:axis], *made, *one.axes[axis + 1 :])
        if digit is None:
            return replace(one, axes=axes)
        table = one._table_of(digit)
        if table is None:
            tables = (*one.tables, Table(flat, picked * digit.stride))
        else:
            place = table.digits.index(digit)
            held = (*table.digits[:place], *flat, *table.digits[place + 1 :])
            _weigh(held)
            tables = (*(t for t in one.tables if t is not table), Table(held, table.index.take(picked, place)))
        return replace(one, axes=axes, tables=tables)._simplified()

    def __getitem__(self, index: tuple[Any, ...]) -> IndexMap:
        """Slice axes, or index the first axes by arrays, element by element."""
        if all(isinstance(part, slice) for part in index):
            result = self
            for axis, part in enumerate(index):
                result = result._sliced(axis, part)
            return result
        arrays = np.broadcast_arrays(*index)
        sizes = self.shape[: len(arrays)]
        if dynamic_axes(sizes):
            raise ValueError(MIXES)
        flat = np.ravel_multi_index(
            [np.where(a < 0, a + size, a) for a, size in zip(arrays, sizes, strict=True)], sizes
        )
        return self._regrouped((math.prod(sizes), *self.shape[len(arrays) :])).take(flat, 0)

    def __array_function__(
        self, function: Callable[..., Any], _types: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand in for an array where NumPy's own functions are called (NEP 18)."""
        return _FUNCTIONS[function](*args, **kwargs) if function in _FUNCTIONS else NotImplemented

    # --- what a map says --------------------------------------------------------------------------------------------

    @cached_property
    def strides(self) -> Strides | None:
        """Size and stride of every digit, outermost first, as few as can be; None where a table is left."""
        return None if self.tables else _merged([(d.size, d.stride) for axis in self.axes for d in axis])

    @property
    def is_nowhere(self) -> bool:
        """No element comes from anywhere."""
        return any((table.index == _VOID).all() for table in self.tables)

    @property
    def is_identity(self) -> bool:
        """Nothing moves."""
        return self.offset == 0 and self.strides == ([] if self.source == 1 else [(self.source, 1)])

    @cached_property
    def key(self) -> object:
        """A key that equal maps share, and others do not; a map may miss its equal."""
        digits = [d for axis in self.axes for d in axis]
        place = {digit: i for i, digit in enumerate(digits)}
        tables = sorted((tuple(place[d] for d in t.digits), t.index.tobytes()) for t in self.tables)
        plain = tuple((d.size, d.stride) for d in digits) if tables else tuple(self.strides or ())
        return self.source, self.shape, self.offset, plain, tuple(tables)

    def at(self, *place: int) -> int:
        """Return the source index of one result element, or :data:`NOWHERE`."""
        values: dict[Digit, int] = {}
        for digits, coordinate in zip(self.axes, place, strict=True):
            for digit in reversed(digits):
                coordinate, values[digit] = divmod(coordinate, digit.size)
        found = [int(table.index[tuple(values[d] for d in table.digits)]) for table in self.tables]
        return NOWHERE if _VOID in found else self.offset + sum(d.stride * v for d, v in values.items()) + sum(found)

    def line(self, axis: int) -> IndexMap:
        """Return the map of one axis, at the first entry of all others."""
        entries = self[tuple(slice(None) if i == axis else slice(1) for i in range(self.ndim))]
        return replace(entries, axes=(entries.axes[axis],))

    def dense(self) -> Array:
        """Return the source index of every result element, in the result's shape.

        Raises:
            ValueError: there are too many.
        """
        digits = tuple(digit for axis in self.axes for digit in axis)
        found = self._summed(digits, self.offset).reshape(self.shape)
        return np.where(found == _VOID, NOWHERE, found)

    def block(self) -> IndexMap:
        """Return the smallest map that broadcasts to this one: axes along which nothing moves are 1 long."""
        moving = {digit for table in self.tables for digit in table.digits}
        axes = tuple(axis if any(d.stride or d in moving for d in axis) else () for axis in self.axes)
        return replace(self, axes=axes)

    def reached(self, most: int) -> Array | None:
        """Return every source index that is read, ascending, without :data:`NOWHERE`; None if there are too many."""
        digits = [d for axis in self.axes for d in axis if d.stride]
        if any(d.size > most for d in digits):
            return None
        found = np.array([self.offset])
        for part in (*(np.arange(d.size) * d.stride for d in digits), *(_values(t.index) for t in self.tables)):
            found = np.unique(np.add.outer(found, part))
            if found.size > most:
                return None
        return found

    @cached_property
    def unit(self) -> int:
        """The longest row: the largest u such that the map moves aligned runs of u elements as wholes."""
        if self.is_nowhere:
            return math.gcd(math.prod(self.shape), self.source)
        unit, digits = 1, [digit for axis in self.axes for digit in axis]
        while digits and digits[-1].stride == unit and self._table_of(digits[-1]) is None:
            unit *= digits.pop().size
        rest = [self.source, self.offset, *(d.stride for d in digits)]
        last = self._table_of(digits[-1]) if digits else None
        for table in self.tables:
            index = table.index.reshape(table.index.shape or (1,))
            if table is not last:
                rest += _values(index).tolist()
                continue
            # [..., size]: where a run of neighbours goes on along the innermost digit that is not natural
            index = np.moveaxis(index, table.digits.index(digits[-1]), -1)
            nowhere = index == _VOID
            step = np.diff(index) == unit
            goes_on = np.where(nowhere[..., :-1], nowhere[..., 1:], step & ~nowhere[..., 1:])
            starts = np.concatenate([np.ones((*index.shape[:-1], 1), bool), ~goes_on], -1)
            places = np.flatnonzero(starts.reshape(-1, starts.shape[-1]).any(0))
            rest += [unit * int(p) for p in places] + _values(index[starts]).tolist()
            unit *= digits[-1].size
        return math.gcd(unit, *rest)

    def rows(self, outer: int, unit: int) -> Array | None:
        """Read the map as: ``outer`` times the same selection of rows of ``unit`` elements.

        Returns:
            The row indices, :data:`NOWHERE` included, shape ``[rows]``; None where the map is not of that form, or has
            more than :data:`MOST_ENTRIES` rows.
        """
        total = math.prod(self.shape)
        if total % (outer * unit) or self.source % (outer * unit) or dynamic_axes((total // (outer * unit),)):
            return None
        count, source_rows = total // (outer * unit), self.source // (outer * unit)
        if self.is_nowhere:
            return np.full(count, NOWHERE)
        try:
            index = self._regrouped((outer, count, unit))
            head, middle, tail = index.axes
            if not (_is_natural(head, outer, source_rows * unit) and _is_natural(tail, unit, 1)):
                return None
            found = index._summed(middle, index.offset).reshape(-1)
        except ValueError:  # its digits do not go apart there
            return None
        if any(set(table.digits) - set(middle) for table in index.tables):
            return None
        placed = found[found != _VOID]
        if (placed % unit).any() or placed.min(initial=0) < 0 or placed.max(initial=0) >= source_rows * unit:
            return None
        return np.where(found == _VOID, NOWHERE, found // unit)

    def sample(self) -> IndexMap | None:
        """Return the map of one sample, its elements flat, where the batch is outermost on both sides; else None."""
        total = math.prod(self.shape)
        if not dynamic_axes((total, self.source)):
            return self._regrouped((total,))
        span = self.source // BATCH
        if total % BATCH or self.source % BATCH:
            return None
        try:
            one = self._regrouped((BATCH, total // BATCH))
        except ValueError:
            return None
        batch, sample = one.axes
        if not _is_natural(batch, BATCH, span):
            return None
        rest = replace(one, source=span, axes=(sample,))
        reach = [(d.size - 1) * d.stride for axis in rest.axes for d in axis]
        reach += [end for table in rest.tables for end in (*_values(table.index)[:1], *_values(table.index)[-1:])]
        nearest, furthest = (rest.offset + sum(fold(0, far) for far in reach) for fold in (min, max))
        return rest if nearest >= 0 and furthest < span else None

    @property
    def pads(self) -> bool:
        """Some element comes from nowhere."""
        return any((table.index == _VOID).any() for table in self.tables)

    def of_pieces(self, unit: int) -> IndexMap:
        """Return the map of elements, where this is one of pieces of so many elements: one axis more, their place."""
        grown = {d: Digit(d.size, d.stride * unit) for axis in self.axes for d in axis}
        tables = tuple(
            Table(tuple(grown[d] for d in t.digits), np.where(t.index == _VOID, _VOID, t.index * unit))
            for t in self.tables
        )
        axes = (*(tuple(grown[d] for d in axis) for axis in self.axes), _digits(unit, 1))
        return IndexMap(self.source * unit, axes, self.offset * unit, tables)

    def in_every_sample(self) -> IndexMap:
        """Return the map that does this to every sample of a batch: one axis more, the batch."""
        return replace(self, source=self.source * BATCH, axes=(_digits(BATCH, self.source), *self.axes))

    # --- digits -----------------------------------------------------------------------------------------------------

    def _table_of(self, digit: Digit) -> Table | None:
        return next((table for table in self.tables if digit in table.digits), None)

    def _summed(self, digits: tuple[Digit, ...], offset: int) -> Array:
        """Return what digits add to the source index, with the tables that hold no others: of their sizes."""
        _weigh(digits)
        total = np.full([digit.size for digit in digits], offset, np.int64)
        nowhere = np.zeros((), bool)
        for i, digit in enumerate(digits):
            total += (np.arange(digit.size) * digit.stride).reshape([-1 if i == j else 1 for j in range(len(digits))])
        for table in self.tables:
            if set(table.digits) <= set(digits):
                # [*table's digits] -> the digits' order, 1 long where the table has none
                order = sorted(range(len(table.digits)), key=lambda i: digits.index(table.digits[i]))
                spread = [d.size if d in table.digits else 1 for d in digits]
                part = table.index.transpose(order).reshape(spread)
                void = part == _VOID
                total += np.where(void, 0, part)
                nowhere = nowhere | void
        total[np.broadcast_to(nowhere, total.shape)] = _VOID
        return total

    def _tabled(self, digits: Iterable[Digit]) -> tuple[IndexMap, Table]:
        """Put digits into one table, with all that share a table with one of them."""
        wanted = set(digits)
        shared = [table for table in self.tables if wanted.intersection(table.digits)]
        held = dict.fromkeys(d for axis in self.axes for d in axis if d in wanted or any(d in t.digits for t in shared))
        part = replace(self, tables=tuple(shared))._summed(tuple(held), 0)
        bare = {digit: Digit(digit.size) if digit.stride else digit for digit in held}
        table = Table(tuple(bare.values()), part)
        rest = tuple(t for t in self.tables if t not in shared)
        axes = tuple(tuple(bare.get(d, d) for d in axis) for axis in self.axes)
        return replace(self, axes=axes, tables=(*rest, table)), table

    def _joined(self, axis: int) -> IndexMap:
        """Let an axis have one digit, or none."""
        joined = self
        while len(joined.axes[axis]) > 1:
            joined = joined._join(axis, len(joined.axes[axis]) - 2)
        return joined

    def _join(self, axis: int, place: int) -> IndexMap:
        """Let a digit of an axis and the next one be one."""
        outer, inner = self.axes[axis][place : place + 2]
        size = outer.size * inner.size
        if outer.stride == inner.size * inner.stride and self._table_of(outer) is self._table_of(inner) is None:
            return self._with(axis, place, 2, (Digit(size, inner.stride),))
        joined, table = self._tabled((outer, inner))
        outer, inner = joined.axes[axis][place : place + 2]
        rest = tuple(d for d in table.digits if d not in (outer, inner))
        order = [table.digits.index(d) for d in (*rest, outer, inner)]
        digit = Digit(size)
        # [..., outer, inner] -> [..., outer * inner]
        index = table.index.transpose(order).reshape([*(d.size for d in rest), size])
        tables = tuple(t for t in joined.tables if t is not table)
        joined = replace(joined, tables=(*tables, Table((*rest, digit), index)))
        return joined._with(axis, place, 2, (digit,))

    def _split(self, axis: int, place: int, inner: int) -> IndexMap:
        """Let a digit of an axis be two, of which the inner one is so large."""
        digit = self.axes[axis][place]
        parts = (Digit(digit.size // inner, digit.stride * inner), Digit(inner, digit.stride))
        table, split = self._table_of(digit), self
        if table is not None:
            at = table.digits.index(digit)
            shape = [d.size for d in table.digits]
            index = table.index.reshape([*shape[:at], *(d.size for d in parts), *shape[at + 1 :]])
            made = Table((*table.digits[:at], *parts, *table.digits[at + 1 :]), index)
            split = replace(self, tables=(*(t for t in self.tables if t is not table), made))
        return split._with(axis, place, 1, parts)

    def _with(self, axis: int, place: int, count: int, digits: tuple[Digit, ...]) -> IndexMap:
        """Exchange digits of an axis for others."""
        held = self.axes[axis]
        changed = (*held[:place], *digits, *held[place + count :])
        return replace(self, axes=(*self.axes[:axis], changed, *self.axes[axis + 1 :]))

    def _cut(self, below: int, axis: int = 0) -> IndexMap:
        """Let so many elements of an axis be counted by digits of their own, its innermost ones."""
        digits = self.axes[axis]
        # places[i]: how many elements the digits behind the i-th count
        places = [math.prod(digit.size for digit in digits[i + 1 :]) for i in range(len(digits))]
        if below == 1 or below in places or below == math.prod(self.shape[axis : axis + 1]):
            return self
        first = max(i for i, place in enumerate(places) if (place * digits[i].size) % below == 0)
        last = min(i for i, place in enumerate(places) if below % place == 0 and place < below)
        joined = self
        for _ in range(last - first):
            joined = joined._join(axis, first)
        return joined._split(axis, first, below // places[last])

    def _regrouped(self, dims: Dims) -> IndexMap:
        """Count the same elements by other axes."""
        flat = replace(self, axes=(tuple(digit for axis in self.axes for digit in axis),))
        below = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
        for place in below:
            flat = flat._cut(place)
        axes, waiting = list[tuple[Digit, ...]](), list(flat.axes[0])
        for dim in dims:
            held: list[Digit] = []
            while math.prod(digit.size for digit in held) != dim:
                held.append(waiting.pop(0))
            axes.append(tuple(held))
        return replace(flat, axes=tuple(axes))._simplified()

    def _sliced(self, axis: int, part: slice) -> IndexMap:
        size = self.shape[axis]
        kept = range(size)[part]
        if kept == range(size):
            return self
        if not kept:
            raise ValueError("holds no elements")
        one = self._joined(axis)
        if not one.axes[axis]:
            return one
        digit = one.axes[axis][0]
        table = one._table_of(digit)
        if table is not None:
            return self.take(np.arange(size)[part], axis)
        made = _digits(len(kept), digit.stride * kept.step)
        return replace(one._with(axis, 0, 1, made), offset=one.offset + kept.start * digit.stride)

    def _simplified(self) -> IndexMap:
        """Take out of tables what their digits add apart from each other, and let that be strides where it can."""
        offset, exchanged, tables = self.offset, dict[Digit, tuple[Digit, ...]](), list[Table]()
        for table in self.tables:
            base, digits, left = _apart(table)
            offset += base
            exchanged.update(digits)
            tables += left
        axes = tuple(tuple(d for digit in axis for d in exchanged.get(digit, (digit,))) for axis in self.axes)
        simple = replace(self, axes=axes, offset=offset, tables=tuple(tables))
        return replace(IndexMap.nowhere(self.shape), source=self.source) if simple.is_nowhere else simple


# --- tables ----------------------------------------------------------------------------------------------------------


def _weigh(digits: Iterable[Digit]) -> None:
    """Refuse a table of too many entries.

    Raises:
        ValueError: the batch is among the digits, or there are too many combinations of them.
    """
    sizes = tuple(digit.size for digit in digits)
    if dynamic_axes(sizes):
        raise ValueError(MIXES)
    if math.prod(sizes) > MOST_ENTRIES:
        raise ValueError(f"moves {math.prod(sizes)} elements one by one")


def _apart(table: Table) -> tuple[int, dict[Digit, tuple[Digit, ...]], list[Table]]:
    """Read a table as the sum of smaller ones.

    Returns:
        A number to add, for some digits those that stand for them and have strides, and the tables that are left.
    """
    base, exchanged, tables = 0, dict[Digit, tuple[Digit, ...]](), list[Table]()
    digits, index = table.digits, table.index
    for digit in table.digits:
        place = digits.index(digit)
        column = _column(index, place)
        if column is None:
            continue
        digits, index = (*digits[:place], *digits[place + 1 :]), index.take(0, place)
        strides = _strided(column)
        if strides is None:
            base += int(column.min())
            tables.append(Table((digit,), column - column.min()))
        else:
            base += int(column[0])
            exchanged[digit] = tuple(Digit(size, stride) for size, stride in strides)
    values = index[index != _VOID]
    least = int(values.min(initial=_MOST)) if values.size else 0
    if digits or not values.size:
        tables.append(Table(digits, np.where(index == _VOID, _VOID, index - least)))
    return base + least, exchanged, tables


def _column(index: Array, axis: int) -> Array | None:
    """Return what an axis of a table adds, whatever the others are; None where it depends on them."""
    table = np.moveaxis(index, axis, 0).reshape(index.shape[axis], -1)  # [size, combinations of the others]
    there = table[0] != _VOID
    if not np.array_equal((table == _VOID), np.broadcast_to(~there, table.shape)) or not there.any():
        return None
    table = table[:, there] - table[0, there]
    return table[:, 0] if np.array_equal(table, np.broadcast_to(table[:, :1], table.shape)) else None


def _strided(index: Array) -> Strides | None:
    """Read a list of numbers as ``first + sum(digit_k * stride_k)``, digits outermost first; None where it is not."""
    found: Strides = []
    while index.size > 1:
        stride = int(index[1] - index[0])
        changes = np.flatnonzero(np.diff(index) != stride)
        size = int(changes[0]) + 1 if changes.size else index.size
        if index.size % size:
            return None
        table = index.reshape(-1, size)
        if not np.array_equal(table, table[:, :1] + np.arange(size) * stride):
            return None
        found.insert(0, (size, stride))
        index = table[:, 0]
    return found


def _merged(digits: Iterable[tuple[int, int]]) -> Strides:
    """Let neighbours be one digit where they count on."""
    merged: Strides = []
    for size, stride in digits:
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        merged.append((size, stride))
    return merged


def _is_natural(digits: Iterable[Digit], size: int, stride: int) -> bool:
    """Say whether digits count so many pieces of so many elements, one after the other."""
    return _merged((d.size, d.stride) for d in digits) == ([] if size == 1 else [(size, stride)])


def _digits(size: int, stride: int) -> tuple[Digit, ...]:
    if size == 0:
        raise ValueError(EMPTY)
    return () if size == 1 else (Digit(size, stride),)


def _numbers(given: tuple[int | Sequence[int], ...]) -> list[int]:
    """Read what NumPy takes as numbers or as one list of them."""
    return [int(n) for part in given for n in ([part] if isinstance(part, int) else part)]


def _values(index: Array) -> Array:
    """Return what a table can add, ascending."""
    return np.unique(index[index != _VOID])


# --- NumPy's functions -----------------------------------------------------------------------------------------------


def concatenate(parts: Sequence[IndexMap], axis: int = 0) -> IndexMap:
    """Let maps of one source follow each other along an axis.

    Raises:
        ValueError: their shapes do not fit, or the result has no map.
    """
    maps = list(parts)
    axis %= maps[0].ndim
    if len({(*m.shape[:axis], *m.shape[axis + 1 :]) for m in maps}) > 1:
        raise ValueError(f"shapes {', '.join(str(list(m.shape)) for m in maps)} cannot follow each other")
    maps = [m._joined(axis) for m in maps]
    for other in range(maps[0].ndim):
        if other != axis:
            maps = _alike(maps, other)
    return replace(_Join(maps, axis).map, source=max(m.source for m in maps))  # zeros have none


def _alike(maps: list[IndexMap], axis: int) -> list[IndexMap]:
    """Let an axis have digits of the same sizes in all maps."""
    cuts = [{math.prod(d.size for d in m.axes[axis][i:]) for i in range(1, len(m.axes[axis]))} for m in maps]
    chosen = set.intersection(*cuts)
    for cut in sorted(set.union(*cuts)):
        if all(max(cut, other) % min(cut, other) == 0 for other in chosen):
            chosen.add(cut)
    for cut in sorted(chosen):
        maps = [m._cut(cut, axis) for m in maps]
    return maps


_AXIS = -1
"""Number of the axis on which maps follow each other, among the digits of the others."""


class _Join:
    """Maps that follow each other along an axis, which have digits of the same sizes on all others."""

    def __init__(self, maps: list[IndexMap], axis: int) -> None:
        self._maps = maps
        self._axis = axis
        self._model = next((m for m in maps if not m.is_nowhere), maps[0])
        """Digits that all maps share are as here."""

    @property
    def map(self) -> IndexMap:
        """The result."""
        return self._with_strides() or self._with_table()

    def _with_strides(self) -> IndexMap | None:
        """Return the map of parts that count on one after the other."""
        model, sizes = self._model, [m.shape[self._axis] for m in self._maps]
        apart, stride, end = self._apart, 0, model.offset
        if apart or any(m.is_nowhere or self._table(m) is not None for m in self._maps):
            return None
        stride = max((d.stride for m in self._maps for d in m.axes[self._axis]), key=abs, default=0)
        if not stride:
            stride = self._maps[1].offset - model.offset if len(self._maps) > 1 else 0
        for m, size in zip(self._maps, sizes, strict=True):
            if m.offset != end or any(d.stride != stride for d in m.axes[self._axis]):
                return None
            end += size * stride
        return replace(model, axes=self._axes(_digits(sum(sizes), stride), {}))

    def _with_table(self) -> IndexMap:
        """Return the map in which a table says where each part begins, and what is not the same in all."""
        apart, parts, model = self._apart, list[Array](), self._model
        bare = {d: Digit(d.size) for d in self._others(model, apart)}
        digits = _digits(sum(m.shape[self._axis] for m in self._maps), 0)
        _weigh((*digits, *bare))
        for m in self._maps:
            held = self._others(m, apart)
            if m.is_nowhere:
                part = np.full([m.shape[self._axis], *(d.size for d in held)], _VOID)
            else:
                part = m._summed((*m.axes[self._axis], *held), m.offset - model.offset)
                part = part if m.axes[self._axis] else part[None]
            parts.append(part)
        index = np.concatenate(parts) if digits else parts[0][0]
        shared = tuple(t for t in model.tables if not self._is_absorbed(t, model, apart))
        table = Table((*digits, *bare.values()), index)
        return replace(model, axes=self._axes(digits, bare), tables=(*shared, table))._simplified()

    def _axes(self, digits: tuple[Digit, ...], bare: dict[Digit, Digit]) -> Axes:
        axes = [tuple(bare.get(d, d) for d in axis) for axis in self._model.axes]
        axes[self._axis] = digits
        return tuple(axes)

    def _positions(self, m: IndexMap) -> dict[Digit, int]:
        """Number the digits of all other axes."""
        digits = (d for i, axis in enumerate(m.axes) if i != self._axis for d in axis)
        return {digit: i for i, digit in enumerate(digits)}

    def _others(self, m: IndexMap, positions: set[int]) -> tuple[Digit, ...]:
        return tuple(digit for digit, i in self._positions(m).items() if i in positions)

    def _table(self, m: IndexMap) -> Table | None:
        return next((t for digit in m.axes[self._axis] if (t := m._table_of(digit)) is not None), None)

    def _is_absorbed(self, table: Table, m: IndexMap, apart: set[int]) -> bool:
        """Say whether a table holds the axis, or digits that are not the same in all maps."""
        positions = self._positions(m)
        return any(positions.get(digit, _AXIS) in {_AXIS, *apart} for digit in table.digits)

    @cached_property
    def _apart(self) -> set[int]:
        """Digits of other axes that do not add the same in all maps, or that stand in a table with the axis."""
        maps = [m for m in self._maps if not m.is_nowhere]
        strides = [[d.stride for d in self._positions(m)] for m in maps]
        apart = {i for i, of_all in enumerate(zip(*strides, strict=True)) if len(set(of_all)) > 1}
        held = [self._held(m) for m in maps]
        common = set.intersection(*(set(tables) for tables in held)) if held else set()
        apart |= {i for tables in held for key, places in tables.items() if key not in common for i in places}
        apart.add(_AXIS)
        grown = True
        while grown:  # a digit stands in one table at most
            grown = False
            for places in (p for tables in held for p in tables.values()):
                if apart.intersection(places) and not apart.issuperset(places):
                    apart.update(places)
                    grown = True
        return apart - {_AXIS}

    def _held(self, m: IndexMap) -> dict[object, tuple[int, ...]]:
        """Return a key for every table, equal for equal ones, with the digits that it holds."""
        positions, found = self._positions(m), dict[object, tuple[int, ...]]()
        for table in m.tables:
            held = [positions.get(digit, _AXIS) for digit in table.digits]
            order = sorted(range(len(held)), key=held.__getitem__)
            places = tuple(held[i] for i in order)
            found[places, table.index.transpose(order).tobytes()] = places
        return found


def _pad(data: IndexMap, widths: Sequence[tuple[int, int]], **_: object) -> IndexMap:
    for axis, width in enumerate(widths):
        sides = [() if n == 0 else (IndexMap.nowhere((*data.shape[:axis], n, *data.shape[axis + 1 :])),) for n in width]
        if any(sides):
            data = concatenate([*sides[0], data, *sides[1]], axis)
    return data


def _tile(data: IndexMap, repeats: Sequence[int]) -> IndexMap:
    axes = tuple((*_digits(n, 0), *digits) for n, digits in zip(repeats, data.axes, strict=True))
    return replace(data, axes=axes)


def _expand_dims(data: IndexMap, axis: tuple[int, ...]) -> IndexMap:
    rank = data.ndim + len(axis)
    new, old = {i % rank for i in axis}, iter(data.axes)
    return replace(data, axes=tuple(() if i in new else next(old) for i in range(rank)))


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    np.broadcast_to: IndexMap.broadcast_to,
    np.concatenate: concatenate,
    np.expand_dims: _expand_dims,
    np.pad: _pad,
    np.tile: _tile,
}
