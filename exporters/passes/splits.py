"""Several results of one source: move them all at once, and split them at the end.

Before -> after, for the query, key and value of an attention::

    Reshape [B, S, 3N, D], Split -> 3 x [B, S, N, D]; Transpose -> q, v [B, N, S, D]; Transpose -> k [B, N, D, S]
    -> Reshape [B, S, 3N, D], Transpose [B, 3N, S, D], Split -> q, k, v [B, N, S, D]; Transpose -> k [B, N, D, S]

The results, laid one after the other along an axis, are one result with an index map of its own; so the forms of a
single map serve here too. Not found, for one: results that agree in no axis but one that grows with the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.index_map import concatenate
from deploycli.exporters.graph.lowerings import Move, Plan, view_plans

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from deploycli.exporters.graph.analysis import Dims
    from deploycli.exporters.graph.index_map import IndexMap


def joint_plans(maps: Sequence[IndexMap], source: Dims) -> Iterator[tuple[Plan, ...]]:
    """Yield the forms that move several results as one.

    Args:
        maps: index map of each result.
        source: shape of the common source.

    Yields:
        One plan a result. They share everything up to the Slices, which tile the last common value.
    """
    rows = [_by_rows(index_map) for index_map in maps]
    parts = {index_map.key: index_map for index_map, _ in rows}  # a result and its transposed twin are one part
    ordered = sorted(parts.values(), key=lambda part: part.at(*(0,) * part.ndim))
    first = rows[0][0].shape
    for axis in range(len(first)) if len(parts) > 1 else ():
        if any(not _agree(part.shape, first, axis) for part in ordered):
            continue
        ends = np.cumsum([0, *(part.shape[axis] for part in ordered)]).tolist()
        starts = {part.key: start for part, start in zip(ordered, ends, strict=False)}
        try:
            whole = concatenate(ordered, axis)
        except ValueError:
            continue
        for plan in view_plans(whole, source, whole.shape):
            yield tuple(
                (*plan, Move("Slice", m.shape, axis, (starts[m.key], m.shape[axis])), *_swap(m.shape, swapped=swapped))
                for m, swapped in rows
            )


def _agree(one: Dims, other: Dims, axis: int) -> bool:
    """Say whether two shapes differ in one axis at most, which is the same for every batch size."""
    return len(one) == len(other) and all(
        a == b if i != axis else not {axis}.intersection(dynamic_axes(one), dynamic_axes(other))
        for i, (a, b) in enumerate(zip(one, other, strict=True))
    )


def _by_rows(index_map: IndexMap) -> tuple[IndexMap, bool]:
    """Return a map, with its last two axes swapped where that makes rows of neighbours, and whether they were.

    A key that is transposed for its product is a key that was split off.
    """
    rank, dims = index_map.ndim, index_map.shape
    if rank < 2 or min(dims[-2:]) < 2 or dynamic_axes(dims[-2:]):
        return index_map, False
    origin = (0,) * (rank - 2)
    here, right, below = (index_map.at(*origin, *place) for place in ((0, 0), (0, 1), (1, 0)))
    swapped = right - here != 1 and below - here == 1
    return (index_map.swapaxes(-1, -2) if swapped else index_map), swapped


def _swap(dims: Dims, *, swapped: bool) -> Plan:
    """Return the Transpose that swaps the last two axes back, or nothing."""
    if not swapped:
        return ()
    rank = len(dims)
    return (Move("Transpose", (*dims[:-2], dims[-1], dims[-2]), values=(*range(rank - 2), rank - 1, rank - 2)),)


def swaps_last_axes(perm: Sequence[int]) -> bool:
    """Say whether a permutation swaps the last two axes and nothing else: a product reads such an operand in place."""
    rank = len(perm)
    return rank > 1 and tuple(perm) == (*range(rank - 2), rank - 1, rank - 2)


def split_groups(prefixes: Iterable[Plan], source: Dims) -> dict[tuple[Plan, int], list[Move]]:
    """Group the Slices that together tile one axis of one value: they are one Split."""
    groups: dict[tuple[Plan, int], list[Move]] = {}
    for prefix in prefixes:
        if prefix[-1].op == "Slice":
            groups.setdefault((prefix[:-1], prefix[-1].axis), []).append(prefix[-1])
    tiled = {}
    for (parent, axis), tiles in groups.items():
        tiles.sort(key=lambda tile: tile.values)
        ends = [0, *(sum(tile.values) for tile in tiles)]
        whole = (parent[-1].dims if parent else source)[axis]
        if len(tiles) > 1 and [tile.values[0] for tile in tiles] == ends[:-1] and ends[-1] == whole:
            tiled[parent, axis] = tiles
    return tiled
