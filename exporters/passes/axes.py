"""How the axes of a result follow from those of the operands, and so: which rows are read for which.

Four relations are enough. :class:`Links`: each row is computed from the same row of the operands. :class:`Take`: rows
are chosen. :class:`Join`: operands follow each other. :class:`View`: the elements are counted in another way.
:mod:`deploycli.exporters.passes.relations` says which operator has which.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.analysis import dynamic_axes, reshape_target
from deploycli.exporters.passes.boxes import Box, Rows, rows, rows_within, sizes, whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deploycli.exporters.graph.analysis import Dims
    from deploycli.exporters.graph.movement_ops import Array

MOST_ROWS = 2**16
"""An axis of more rows than this is not selected from: a selection is a list of rows."""


class Relation(ABC):
    """How one result of an operator follows from its operands."""

    @abstractmethod
    def widen(self, box: Box) -> Box:
        """Return the smallest box of the result, at least the given one, that can be computed for itself."""

    @abstractmethod
    def operands(self, box: Box) -> tuple[Box | None, ...]:
        """Return what a box that needs no widening reads of each operand; None where it reads nothing of it.

        An operand that says where to move, such as the shape of a Reshape, is read whole: its box is empty.
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

    def widen(self, box: Box) -> Box:
        """See the base class."""
        return tuple(selected if axis in self.free else None for axis, selected in enumerate(box))

    def operands(self, box: Box) -> tuple[Box | None, ...]:
        """See the base class."""
        return tuple(tuple(None if axis is None else box[axis] for axis in linked) for linked in self.inputs)


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

    def widen(self, box: Box) -> Box:
        """See the base class."""
        return box

    def operands(self, box: Box) -> tuple[Box | None, ...]:
        """See the base class."""
        wanted = self.taken(box)
        pairs = zip(self.dims, self._parts(box), wanted, strict=True)
        return (tuple(part[0] if index is None else rows(dim, index.reshape(-1)) for dim, part, index in pairs),)

    def taken(self, box: Box) -> list[Array | None]:
        """Return which rows of the operand stand where in a box of the result; None where an axis stays as it is."""
        return [
            None if index is None else index[np.ix_(*(_kept(r, n) for r, n in zip(part, index.shape, strict=True)))]
            for index, part in zip(self.indices, self._parts(box), strict=True)
        ]

    def _parts(self, box: Box) -> Iterator[Box]:
        """Yield what a box selects of the axes that each axis of the operand became."""
        start = 0
        for index in self.indices:
            end = start + (1 if index is None else index.ndim)
            yield box[start:end]
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

    def widen(self, box: Box) -> Box:
        """See the base class."""
        if dynamic_axes(self.lengths):
            return (*box[: self.axis], None, *box[self.axis + 1 :])
        return box

    def operands(self, box: Box) -> tuple[Box | None, ...]:
        """See the base class."""
        selected = box[self.axis]
        if selected is None:
            return (box,) * len(self.lengths)
        found: list[Box | None] = []
        start = 0
        for length in self.lengths:
            kept = [row - start for row in selected.kept if start <= row < start + length]
            found.append((*box[: self.axis], rows(length, kept), *box[self.axis + 1 :]) if kept else None)
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

    def widen(self, box: Box) -> Box:
        """See the base class."""
        widened = list(box)
        for _, results in self.groups:
            if any(box[i] is not None for i in results) and self._read_group(results, box) is None:
                for i in results:
                    widened[i] = None
        return tuple(widened) if reshape_target(sizes(self.result, tuple(widened))) else whole(box)

    def operands(self, box: Box) -> tuple[Box | None, ...]:
        """See the base class."""
        found = list(whole(self.source))
        for _, results in self.groups:
            for axis, selected in (self._read_group(results, box) or {}).items():
                found[axis] = selected
        return (tuple(found),)

    def _read_group(self, results: tuple[int, ...], box: Box) -> dict[int, Rows | None] | None:
        """Return what the box of a group selects of the operand's axes; None where that is no box."""
        sources = next(s for s, r in self.groups if r == results)
        if all(box[i] is None for i in results):
            return {}
        if len(sources) == len(results) == 1:
            return {sources[0]: box[results[0]]}
        if dynamic_axes(tuple(self.source[i] for i in sources)):
            return self._read_factors(sources, results, box)
        return self._read_flat(sources, results, box)

    def _read_flat(self, sources: tuple[int, ...], results: tuple[int, ...], box: Box) -> dict[int, Rows | None] | None:
        """Static axes: count the elements, and see whether they are a box of the operand."""
        wide, deep = ([dims[i] for i in axes] for dims, axes in ((self.source, sources), (self.result, results)))
        if math.prod(wide) > MOST_ROWS:
            return None
        flat = np.ravel_multi_index(np.ix_(*(_kept(box[i], self.result[i]) for i in results)), deep).reshape(-1)
        kept = [np.unique(coordinate) for coordinate in np.unravel_index(flat, wide)]
        if math.prod(len(coordinate) for coordinate in kept) != flat.size:
            return None
        return {axis: rows(dim, k.tolist()) for axis, dim, k in zip(sources, wide, kept, strict=True)}

    def _read_factors(
        self, sources: tuple[int, ...], results: tuple[int, ...], box: Box
    ) -> dict[int, Rows | None] | None:
        """Axes with the batch among them: find, for every selection, the one axis of the operand that it lies in."""
        found: dict[int, Rows | None] = {}
        for position, i in enumerate(results):
            selected = box[i]
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


def _kept(selected: Rows | None, size: int) -> Sequence[int]:
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
