"""Movement folds by evaluation.

Before -> after, for Swin's shifted window partition::

    Reshape, Slice, Slice, Concat, Slice, Slice, Concat, Reshape, Transpose, Reshape
    -> Gather(rows), Reshape

A region is a maximal set of movement operators with one source. It has a meaning of its own, an index map, whatever
operators spell it; so no operator is matched against a pattern. The map is lowered in the cheapest way, where that
is cheaper than what stands there. Several results of one source may be moved at once and split at the end,
as query, key and value of an attention are::

    Reshape [B, S, 3N, D], Split -> 3 x [B, S, N, D]; Transpose -> q, v [B, N, S, D]; Transpose -> k [B, N, D, S]
    -> Reshape [B, S, 3N, D], Transpose [B, 3N, S, D], Split -> q, k, v [B, N, S, D]; Transpose -> k [B, N, D, S]

Refused, for one: a flip of the channels, which moves single elements against their order.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.builder import Builder, remove, replace, replace_all
from deploycli.exporters.graph.index_map import IndexMap, concatenate
from deploycli.exporters.graph.lowerings import LAUNCH, VIEW, Lowering, MovementOp, find_lowerings, find_view_lowerings
from deploycli.exporters.graph.movement_ops import swaps_last_axes
from deploycli.exporters.graph.operators import VIEWS
from deploycli.exporters.graph.regions import RegionMaps, find_regions
from deploycli.exporters.graph.shapes import elements, item_bytes
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.regions import Region
    from deploycli.exporters.graph.shapes import Dims


class FoldMovement(GraphPass):
    """Write every movement region in its cheapest lowering. Bit-equal: no number is computed."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        folder = _Folder(graph, analysis)
        modified = False
        for region in find_regions(graph, analysis):
            modified |= folder.fold(region)
        self.remarks = folder.remarks
        return modified


class _Folder:
    """Folds regions one by one and remembers the maps and lowerings of those that look alike."""

    def __init__(self, graph: ir.Graph, analysis: Analysis) -> None:
        self._analysis = analysis
        self._builder = Builder(graph, analysis)
        self._graph = graph
        self._maps = RegionMaps.of(analysis)
        self.remarks: list[Remark] = []

    def _is_tokens_first(self, value: ir.Value) -> bool:
        """Say whether a value has its batch behind another axis: what brings it there and back is as it should be."""
        return any(axis > 0 for axis in dynamic_axes(self._builder.analysis.dims(value) or ()))

    def fold(self, region: Region) -> bool:
        """Rewrite a region as a whole, or else sink by sink, where that is cheaper."""
        lowerings, joint = self._lowerings(region)
        for sink, options in lowerings.items():
            if isinstance(options, str):
                producer = sink.producer()
                assert producer is not None
                if not self._is_tokens_first(region.source) and not self._is_tokens_first(sink):
                    self.remarks.append(Remark(label(producer), options))
        chosen = self._choose(region, {sink: o for sink, o in lowerings.items() if not isinstance(o, str)}, joint)
        if len(chosen) == len(region.sinks) and self._take(region, chosen):
            return True
        modified = False
        while True:  # what two sinks share is freed with the last of them
            taken = [sink for sink, lowering in chosen.items() if self._take(region, {sink: lowering})]
            if not taken:
                return modified
            modified = True
            for sink in taken:
                del chosen[sink]

    def _take(self, region: Region, chosen: dict[ir.Value, Lowering]) -> bool:
        """Write these sinks in these lowerings, if that costs less than what it frees."""
        freed = _freed(region, chosen)
        cost = self._cost(chosen, region) + VIEW * _identities(region, chosen)
        if cost >= sum(self._node_cost(node) for node in freed):
            return False
        self._emit(region, chosen)
        remove(self._graph, freed)
        return True

    def _choose(
        self, region: Region, options: dict[ir.Value, list[Lowering]], joint: list[tuple[Lowering, ...]]
    ) -> dict[ir.Value, Lowering]:
        """Return the cheapest set of lowerings: each sink for itself, all as strided views, or all moved as one."""

        def rank(sink: ir.Value, lowering: Lowering) -> tuple[int, int, list[tuple[str, Dims]]]:
            return self._cost({sink: lowering}, region), len(lowering), [(m.op_type, m.dims) for m in lowering]

        def each(options: dict[ir.Value, list[Lowering]]) -> dict[ir.Value, Lowering]:
            return {
                sink: min(lowerings, key=lambda lowering: rank(sink, lowering)) for sink, lowerings in options.items()
            }

        strided = {
            sink: [p for p in lowerings if not any(m.is_row_gather for m in p)] for sink, lowerings in options.items()
        }
        views = each({sink: strided[sink] or lowerings for sink, lowerings in options.items()})  # they share a Split
        candidates = [views, *(dict(zip(region.sinks, lowerings, strict=True)) for lowerings in joint)]
        one_by_one = each(options)
        gathered = sum(node.op_type == "Gather" and bool(self._analysis.dims(node.inputs[1])) for node in region.nodes)
        if _gathers(one_by_one) <= max(1, _gathers(views), gathered):
            candidates.insert(0, one_by_one)
        return min(candidates, key=lambda chosen: self._cost(chosen, region))

    def _lowerings(self, region: Region) -> tuple[dict[ir.Value, list[Lowering] | str], list[tuple[Lowering, ...]]]:
        """Return the lowerings of every sink's index map, or why it has none, and those of all sinks as one."""
        keys = self._maps.signatures(region)
        jointly = ("jointly", *(keys[sink] for sink in region.sinks))
        known = self._maps.lowerings
        if jointly not in known:
            source, maps = self._analysis.known_dims(region.source), self._maps(region)
            for sink, found in maps.items():
                if isinstance(found, IndexMap):
                    known[keys[sink]] = find_lowerings(found, source, self._analysis.known_dims(sink)) or (
                        "neither a strided view, nor rows gathered on one axis"
                    )
                else:
                    known[keys[sink]] = found
            index_maps = [found for found in maps.values() if isinstance(found, IndexMap)]
            is_joint = 1 < len(index_maps) == len(region.sinks)
            known[jointly] = list(joint_lowerings(index_maps, source)) if is_joint else []
        return {sink: known[keys[sink]] for sink in region.sinks}, known[jointly]

    def _itemsize(self, value: ir.Value) -> int:
        fact = self._analysis[value]
        assert fact is not None
        return math.ceil(item_bytes(fact.dtype))

    def _cost(self, chosen: Mapping[ir.Value, Lowering], region: Region) -> int:
        """Cost of a set of lowerings that share their common beginnings; Slices that tile an axis are one Split."""
        prefixes = {lowering[: i + 1] for lowering in chosen.values() for i in range(len(lowering))}
        source, itemsize = self._analysis.known_dims(region.source), self._itemsize(region.source)
        cost = sum(prefix[-1].cost(itemsize) for prefix in prefixes)
        for sink, lowering in chosen.items():
            if (
                lowering
                and lowering[-1].op_type == "Transpose"
                and _is_read_in_place(sink, lowering[-1].values, region.nodes)
            ):
                cost += VIEW - lowering[-1].cost(itemsize)
        return cost - LAUNCH * sum(len(tiles) - 1 for tiles in split_groups(prefixes, source).values())

    def _node_cost(self, node: ir.Node) -> int:
        """Cost of an operator that stands in the graph, by the same measure as a move's."""
        if node.op_type in VIEWS:
            shape = node.inputs[1] if len(node.inputs) > 1 else None
            return VIEW if shape is None or self._analysis.constant(shape) is not None else VIEW + LAUNCH
        itemsize = self._itemsize(node.outputs[0])
        dims = [self._analysis.dims(output) or () for output in node.outputs]
        if node.op_type == "Gather" and node.inputs[1] is not None:
            indices = self._analysis.dims(node.inputs[1]) or ()
            axis = node.attributes.get_int("axis", 0) % (len(dims[0]) - len(indices) + 1)
            row = elements(dims[0][axis + len(indices) :])
            return MovementOp("Gather", dims[0], shape=indices, row=row).cost(itemsize)
        if node.op_type == "Transpose" and _is_read_in_place(node.outputs[0], node.attributes.get_ints("perm", ())):
            return VIEW
        return LAUNCH + sum(elements(d) * itemsize for d in dims)

    def _emit(self, region: Region, chosen: dict[ir.Value, Lowering]) -> None:
        prefixes = {lowering[: i + 1] for lowering in chosen.values() for i in range(len(lowering))}
        splits = split_groups(prefixes, self._analysis.known_dims(region.source))
        made: dict[Lowering, ir.Value] = {(): region.source}
        results: dict[ir.Value, ir.Value] = {}
        for sink, lowering in chosen.items():
            anchor = sink.producer()  # sinks come in topological order: what they share stands before the first
            assert anchor is not None
            for i in range(len(lowering)):
                prefix = lowering[: i + 1]
                if prefix in made:
                    continue
                key = (lowering[:i], lowering[i].axis)
                if lowering[i].op_type == "Slice" and key in splits:
                    self._emit_split(made, lowering[:i], splits[key], anchor)
                else:
                    made[prefix] = self._builder.move(lowering[i], made[lowering[:i]], anchor)
            result = made[lowering]
            if sink.is_graph_output():
                replace(sink, result if _may_be_renamed(result) else self._builder.value("Identity", [result], anchor))
            else:
                results[sink] = result
        replace_all(results)

    def _emit_split(
        self, made: dict[Lowering, ir.Value], parent: Lowering, tiles: list[MovementOp], anchor: ir.Node
    ) -> None:
        sizes = self._builder.constant(np.array([tile.values[1] for tile in tiles], np.int64))
        node = self._builder.node("Split", [made[parent], sizes], anchor, len(tiles), axis=tiles[0].axis)
        made.update(((*parent, tile), output) for tile, output in zip(tiles, node.outputs, strict=True))


def _is_read_in_place(value: ir.Value, perm: Sequence[int], besides: Collection[ir.Node] = ()) -> bool:
    """Say whether only products read a transposed value: they read such an operand where it lies.

    ONNX Runtime fuses the Transpose into the product, TensorRT sets a flag of it.

    Args:
        value: the transposed value.
        perm: the permutation.
        besides: readers that are about to be written anew.
    """
    readers = [reader for reader in value.consumers() if reader not in besides]
    products = all(reader.op_type == "MatMul" and reader.domain == "" for reader in readers)
    return bool(readers) and products and not value.is_graph_output() and swaps_last_axes(perm)


def _gathers(chosen: Mapping[ir.Value, Lowering]) -> int:
    """Count the Gathers of a set of lowerings.

    TensorRT moves by one kernel whatever is cut from one value by Slices; of Gathers each may be a kernel for itself.
    """
    return len({lowering[: i + 1] for lowering in chosen.values() for i, m in enumerate(lowering) if m.is_row_gather})


def _may_be_renamed(value: ir.Value) -> bool:
    return value.producer() is not None and not value.is_graph_output()


def _identities(region: Region, chosen: dict[ir.Value, Lowering]) -> int:
    """Count the graph outputs that need an Identity, because their value cannot take their name."""
    lowerings_of_outputs = [lowering for sink, lowering in chosen.items() if sink.is_graph_output()]
    free = set(lowerings_of_outputs) - (set() if _may_be_renamed(region.source) else {()})
    return len(lowerings_of_outputs) - len(free)


def _freed(region: Region, sinks: Iterable[ir.Value]) -> set[ir.Node]:
    """Return the nodes that nothing reads once these sinks are read from elsewhere."""
    released = set(sinks)
    freed: set[ir.Node] = set()
    queue = [sink.producer() for sink in sinks]
    while queue:
        node = queue.pop()
        if node is None or node in freed or node not in region.nodes:
            continue
        if all(o in released or (not o.is_graph_output() and freed.issuperset(o.consumers())) for o in node.outputs):
            freed.add(node)
            queue.extend(value.producer() for value in node.inputs if value is not None)
    return freed


# --- several results of one source -----------------------------------------------------------------------------------
#
# Results laid one after the other along an axis are one result with an index map of its own; so the lowerings of a
# single map serve here too. Not found, for one: results that agree in no axis but one that grows with the batch.


def joint_lowerings(maps: Sequence[IndexMap], source: Dims) -> Iterator[tuple[Lowering, ...]]:
    """Yield the lowerings that move several results as one.

    Args:
        maps: index map of each result.
        source: shape of the common source.

    Yields:
        One lowering a result. They share everything up to the Slices, which tile the last common value.
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
        for lowering in find_view_lowerings(whole, source, whole.shape):
            yield tuple(
                (
                    *lowering,
                    MovementOp("Slice", m.shape, axis, (starts[m.key], m.shape[axis])),
                    *_swap(m.shape, swapped=swapped),
                )
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


def _swap(dims: Dims, *, swapped: bool) -> Lowering:
    """Return the Transpose that swaps the last two axes back, or nothing."""
    if not swapped:
        return ()
    rank = len(dims)
    return (MovementOp("Transpose", (*dims[:-2], dims[-1], dims[-2]), values=(*range(rank - 2), rank - 1, rank - 2)),)


def split_groups(prefixes: Iterable[Lowering], source: Dims) -> dict[tuple[Lowering, int], list[MovementOp]]:
    """Group the Slices that together tile one axis of one value: they are one Split."""
    groups: dict[tuple[Lowering, int], list[MovementOp]] = {}
    for prefix in prefixes:
        if prefix[-1].op_type == "Slice":
            groups.setdefault((prefix[:-1], prefix[-1].axis), []).append(prefix[-1])
    tiled = {}
    for (parent, axis), tiles in groups.items():
        tiles.sort(key=lambda tile: tile.values)
        ends = [0, *(sum(tile.values) for tile in tiles)]
        whole = (parent[-1].dims if parent else source)[axis]
        if len(tiles) > 1 and [tile.values[0] for tile in tiles] == ends[:-1] and ends[-1] == whole:
            tiled[parent, axis] = tiles
    return tiled
