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

from exporters.rewrite.facts import dynamic_axes, substitute
from exporters.rewrite.forms import Move, Plan, view_plans
from exporters.rewrite.index_map import IndexMap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from exporters.rewrite.facts import Dims
    from exporters.rewrite.movement_ops import Array


def joint_plans(maps: Sequence[IndexMap], source: Dims, results: Sequence[Dims]) -> Iterator[tuple[Plan, ...]]:
    """Yield the forms that move several results as one.

    Args:
        maps: index map of each result.
        source: shape of the common source.
        results: shape of each result.

    Yields:
        One plan a result. They share everything up to the Slices, which tile the last common value.
    """
    rows = [_by_rows(index_map, dims) for index_map, dims in zip(maps, results, strict=True)]
    keys = [(dims, index.tobytes()) for index, dims, _ in rows]  # a result and its transposed twin are one part
    parts = {key: index for key, (index, _, _) in zip(keys, rows, strict=True)}
    order = sorted(parts, key=lambda key: int(parts[key].flat[0]))
    first, _ = keys[0]
    for axis in range(len(first)) if len(parts) > 1 else ():
        if any(not _agree(dims, first, axis) for dims, _ in keys):
            continue
        index = np.concatenate([parts[key] for key in order], axis).reshape(-1)
        ends = np.cumsum([0, *(dims[axis] for dims, _ in order)])
        starts = {key: int(start) for key, start in zip(order, ends[:-1], strict=True)}
        whole = (*first[:axis], int(ends[-1]), *first[axis + 1 :])
        for plan in view_plans(IndexMap(index, maps[0].source, maps[0].repeats), source, whole):
            yield tuple(
                (*plan, Move("Slice", key[0], axis, (starts[key], key[0][axis])), *_swap(key[0], swapped=swapped))
                for key, (_, _, swapped) in zip(keys, rows, strict=True)
            )


def _agree(one: Dims, other: Dims, axis: int) -> bool:
    """Say whether two shapes differ in one axis at most, which is the same for every batch size."""
    return len(one) == len(other) and all(
        a == b if i != axis else not {axis}.intersection(dynamic_axes(one), dynamic_axes(other))
        for i, (a, b) in enumerate(zip(one, other, strict=True))
    )


def _by_rows(index_map: IndexMap, dims: Dims) -> tuple[Array, Dims, bool]:
    """Return the map of one sample in the result's shape, the shape, and whether its last two axes were swapped.

    They are where that makes rows of neighbours: a key that is transposed for its product is a key that was split off.
    """
    index = index_map.index.reshape([substitute(d, 1) for d in dims])
    first = index[(0,) * max(0, index.ndim - 2)]
    turned = (
        index.ndim > 1
        and min(first.shape) > 1
        and first[0, 1] - first[0, 0] != 1
        and first[1, 0] - first[0, 0] == 1
        and not {len(dims) - 1, len(dims) - 2}.intersection(dynamic_axes(dims))
    )
    if not turned:
        return index, dims, False
    return index.swapaxes(-1, -2), (*dims[:-2], dims[-1], dims[-2]), True


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
