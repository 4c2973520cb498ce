"""A region of pure data movement has one meaning: which source element each result element is.

The meaning is found by evaluation. The region runs on ``arange`` at two batch sizes; if both runs are one and the same
map repeated for every sample, the batch axis is free and the map of one sample says everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from exporters.rewrite.affine import BATCH
from exporters.rewrite.facts import Dims, dynamic_axes, substitute
from exporters.rewrite.movement_ops import NOWHERE, Array

if TYPE_CHECKING:
    from collections.abc import Sequence

RUNS = (2, 3)
"""Batch sizes at which a region is evaluated. Not 1, where all samples are one."""


def elements(dims: Dims, batch: int = 1) -> int:
    """Return the number of elements of a shape at a batch size."""
    return math.prod(substitute(d, batch) for d in dims)


def numbered(dims: Dims, batch: int) -> Array:
    """Return an array of a shape whose elements are their own flat indices, in half the bytes where they fit."""
    shape = tuple(substitute(d, batch) for d in dims)
    count = math.prod(shape)
    return np.arange(count, dtype=np.int32 if count <= np.iinfo(np.int32).max else np.int64).reshape(shape)


@dataclass(frozen=True)
class IndexMap:
    """Where each element of one sample comes from.

    Attributes:
        index: source index within the sample of every result element, or :data:`NOWHERE`; shape ``[elements]``.
        source: number of source elements in a sample.
        repeats: the stand-in :data:`BATCH` where the map holds for every sample of a batch, 1 where it is the whole.
    """

    index: Array
    source: int
    repeats: int

    @property
    def is_identity(self) -> bool:
        """Nothing moves."""
        return self.index.size == self.source and bool(np.array_equal(self.index, np.arange(self.source)))

    @cached_property
    def unit(self) -> int:
        """The longest row: the largest u such that the map moves aligned runs of u elements as wholes."""
        index = self.index
        nowhere = index == NOWHERE
        goes_on = np.where(nowhere[:-1], nowhere[1:], np.diff(index) == 1)
        starts = np.concatenate([[0], np.flatnonzero(~goes_on) + 1])
        first = index[starts]
        return math.gcd(
            int(np.gcd.reduce(starts)), int(np.gcd.reduce(first[first != NOWHERE])), index.size, self.source
        )

    def rows(self, outer: int, unit: int) -> Array | None:
        """Read the map as: ``outer`` times the same selection of rows of ``unit`` elements.

        Returns:
            The row indices, :data:`NOWHERE` included, shape ``[rows]``; None where the map is not of that form.
        """
        if self.unit % unit or self.index.size % (outer * unit) or self.source % (outer * unit):
            return None
        rows = self.index[::unit] // unit  # NOWHERE // unit is NOWHERE
        table = rows.reshape(outer, -1)
        source_rows = self.source // (outer * unit)
        first = table[0]
        if first.max(initial=NOWHERE) >= source_rows:
            return None
        expected = first + np.arange(outer)[:, None] * source_rows
        expected[:, first == NOWHERE] = NOWHERE
        return first if np.array_equal(table, expected) else None

    def digits(self) -> tuple[int, list[tuple[int, int]]] | None:
        """Read the map as a strided view: ``offset + sum(digit_k * stride_k)``, digits outermost first.

        Returns:
            The offset and ``(size, stride)`` per digit, or None where the map is not of that form.
        """
        index = self.index
        if index.min() < 0:
            return None
        offset, found = int(index[0]), list[tuple[int, int]]()
        while index.size > 1:
            stride = int(index[1] - index[0])
            changes = np.flatnonzero(np.diff(index) != stride)
            size = int(changes[0]) + 1 if changes.size else index.size
            if stride <= 0 or index.size % size:
                return None
            table = index.reshape(-1, size)
            if not np.array_equal(table, table[:, :1] + np.arange(size) * stride):
                return None
            found.insert(0, (size, stride))
            index = table[:, 0]
        return offset, found


def per_sample(runs: Sequence[Array], source: Dims, result: Dims) -> IndexMap | str:
    """Reduce the runs at the batch sizes of :data:`RUNS` to the map of one sample.

    Args:
        runs: flat source index of every result element, one array a run; one is enough where nothing grows.
        source: shape of the region's source.
        result: shape of the region's result.

    Returns:
        The map, or the reason why the region has none.
    """
    if 0 in (*source, *result):
        return "holds no elements"
    if len(dynamic_axes(source)) > 1 or len(dynamic_axes(result)) > 1:
        return "grows with the batch on two axes"
    if not dynamic_axes(source):
        if dynamic_axes(result) or any(not np.array_equal(run, runs[0]) for run in runs):
            return "depends on the batch size, but its source does not"
        return IndexMap(runs[0].reshape(-1).astype(np.int64), elements(source), 1)
    if not dynamic_axes(result):
        return "reads one sample of the batch"
    size, span = elements(result), elements(source)
    first = runs[0].reshape(-1)[:size]
    if first.max(initial=NOWHERE) >= span:
        return "mixes the samples of a batch, or the batch is not the outermost axis"
    nowhere = np.flatnonzero(first == NOWHERE)
    for batch, run in zip(RUNS, runs, strict=True):
        for i, sample in enumerate(run.reshape(batch, size)):
            expected = first + np.asarray(i * span, first.dtype)
            expected[nowhere] = NOWHERE
            if not np.array_equal(sample, expected):
                return "mixes the samples of a batch, or the batch is not the outermost axis"
    return IndexMap(first.astype(np.int64), span, BATCH)
