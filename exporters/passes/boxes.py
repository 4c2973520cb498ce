"""Selections of rows on the axes of a value.

A box says for every axis of a value which of its rows are meant: all, or a few. An axis that grows with the batch can
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

    from deploycli.exporters.graph.analysis import Dims


@dataclass(frozen=True)
class Rows:
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

    def same_axis(self, other: Rows) -> bool:
        """Say whether both read the axis alike."""
        return (self.outer, self.size, self.inner) == (other.outer, other.size, other.inner)


_MOST_BOXES = 32
"""A value is asked for so many parts at most; where it is asked for more, they are one."""

Box: TypeAlias = "tuple[Rows | None, ...]"
"""A selection on every axis; None where all of the axis is meant."""


def rows(dim: int, kept: Iterable[int]) -> Rows | None:
    """Select rows of a static axis; None where these are all."""
    ordered = tuple(sorted({int(i) for i in kept}))
    return None if len(ordered) == dim else Rows(1, dim, 1, ordered)


def rows_within(dim: int, size: int, inner: int, kept: tuple[int, ...]) -> Rows | None:
    """Select rows of an axis of ``dim`` that is read as [outer, size, inner]; a static axis is selected from flat."""
    outer = dim // (size * inner)
    if dynamic_axes((dim,)):
        return Rows(outer, size, inner, kept)
    # [outer, size, inner] -> [outer, kept, inner] -> flat
    return rows(dim, np.arange(dim).reshape(outer, size, inner)[:, list(kept)].reshape(-1))


def whole(dims: Sequence[object]) -> Box:
    """Return the box of everything."""
    return (None,) * len(dims)


def is_whole(box: Box) -> bool:
    """Say whether nothing is left out."""
    return all(selected is None for selected in box)


def sizes(dims: Dims, box: Box) -> Dims:
    """Return the shape of what a box selects."""
    return tuple(dim if selected is None else selected.length for dim, selected in zip(dims, box, strict=True))


def volume(dims: Dims, box: Box) -> int:
    """Count the elements that a box selects in one sample."""
    return elements(sizes(dims, box))


def covers(box: Box, other: Box) -> bool:
    """Say whether a box holds all of another one."""
    return all(
        mine is None or (theirs is not None and mine.same_axis(theirs) and set(mine.kept).issuperset(theirs.kept))
        for mine, theirs in zip(box, other, strict=True)
    )


def hull(*boxes: Box) -> Box:
    """Return the smallest box that holds all, axis by axis."""
    return tuple(map(_union, zip(*boxes, strict=True)))


def _union(selections: Sequence[Rows | None]) -> Rows | None:
    first, present = selections[0], [rows for rows in selections if rows is not None]
    if first is None or len(present) < len(selections) or not all(map(first.same_axis, present)):
        return None
    kept = tuple(sorted({row for rows in present for row in rows.kept}))
    return None if len(kept) == first.size else Rows(first.outer, first.size, first.inner, kept)


def merge(dims: Dims, boxes: Iterable[Box]) -> tuple[Box, ...]:
    """Cover boxes by as few elements as possible: two become one where that one is not larger than both together.

    So the queries of one token and the keys and values of all are two boxes of the one product that makes them, while
    the tiles of a shifted image are one box, the whole image.
    """
    kept = list(dict.fromkeys(boxes))
    if any(is_whole(box) for box in kept):
        return (whole(dims),)
    if len(kept) > _MOST_BOXES:
        kept = [hull(*kept)]
    merging = True
    while merging:
        merging = False
        for a, b in combinations(kept, 2):
            both = hull(a, b)
            if volume(dims, both) <= volume(dims, a) + volume(dims, b):
                kept = [*(box for box in kept if box not in (a, b)), both]
                merging = True
                break
    if len(kept) > 1 and sum(volume(dims, box) for box in kept) >= elements(dims):
        return (whole(dims),)
    return tuple(sorted(kept, key=lambda box: [() if r is None else r.kept for r in box]))
