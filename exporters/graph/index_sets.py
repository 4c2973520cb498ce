"""Parts of a value, as a set of indices on each of its axes.

A part says for every axis of a value which of its rows are meant: all, or a few. An axis that grows with the batch can
be selected from only where it holds another axis beside the batch, as ``[197*B, 768]`` holds tokens and images: it is
then read as ``[outer, size, inner]``, and the selection is one of the ``size``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.shapes import elements

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
