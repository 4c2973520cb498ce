"""Regions of pure data movement, and what they mean.

A region is a maximal set of movement operators with one source. Its meaning is an index map for each of its results:
found by running the region on the map that moves nothing, and remembered for all regions of the same operators and
shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, proxy

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.movement_ops import NOWHERE, data_operands, move
from deploycli.exporters.graph.shapes import BATCH, grows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array, Operands
    from deploycli.exporters.graph.shapes import Dims


_SHARED: WeakKeyDictionary[Analysis, RegionMaps] = WeakKeyDictionary()


@dataclass
class Region:
    """Movement operators with one source.

    Attributes:
        source: the value that is moved.
        nodes: the operators, in topological order.
        sinks: the results that are read from outside the region.
    """

    source: ir.Value
    nodes: dict[ir.Node, None] = field(default_factory=dict)
    sinks: list[ir.Value] = field(default_factory=list)


def find_regions(graph: ir.Graph, analysis: Analysis) -> list[Region]:
    """Return the movement regions of a graph. Every movement operator on data belongs to one or is a boundary."""
    regions: dict[ir.Value, Region] = {}
    source_of: dict[ir.Value, ir.Value] = {}
    for node in graph:
        source = _common_source(node, source_of, analysis)
        if source is None:
            continue
        regions.setdefault(source, Region(source)).nodes[node] = None
        source_of.update((output, source) for output in node.outputs)
    for region in regions.values():
        for node in region.nodes:
            for value in node.outputs:
                if value.is_graph_output() or any(reader not in region.nodes for reader in value.consumers()):
                    region.sinks.append(value)
    return list(regions.values())


def _common_source(node: ir.Node, source_of: dict[ir.Value, ir.Value], analysis: Analysis) -> ir.Value | None:
    """Return what the node moves, or None where it is no movement or moves several things together."""
    if not analysis.only_moves(node) or any(analysis.dims(output) is None for output in node.outputs):
        return None
    if analysis.constant(node.outputs[0]) is not None:
        return None  # left to constant folding
    sources = set()
    for i in data_operands(node):
        value = node.inputs[i]
        if value is None or analysis.dims(value) is None:
            return None
        if not analysis.is_zero(value):
            sources.add(source_of.get(value, value))
    if len(sources) != 1:
        return None
    (source,) = sources
    return source if source.const_value is None else None


class RegionMaps:
    """Finds the index maps of regions and remembers those that look alike.

    Attributes:
        lowerings: what a pass found out about regions, by their signatures.
    """

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self.lowerings: dict[object, Any] = {}
        self._known: dict[object, IndexMap | str] = {}
        self._interned: dict[object, int] = {}

    @classmethod
    def of(cls, analysis: Analysis) -> RegionMaps:
        """Return the maps that all passes over a graph share: most regions outlive a pass."""
        if analysis not in _SHARED:
            _SHARED[analysis] = cls(proxy(analysis))
        return _SHARED[analysis]

    def __call__(self, region: Region) -> dict[ir.Value, IndexMap | str]:
        """Return, for every sink, its index map or the reason why it has none."""
        keys = self.signatures(region)
        if any(keys[sink] not in self._known for sink in region.sinks):
            self._known.update((keys[sink], found) for sink, found in self._evaluate(region).items())
        return {sink: self._known[keys[sink]] for sink in region.sinks}

    def signatures(self, region: Region) -> dict[ir.Value, object]:
        """Return a key for every value: regions of the same operators and shapes share their maps."""
        keys: dict[ir.Value, object] = {region.source: self._analysis.dims(region.source)}
        for node in region.nodes:
            operands = tuple(self._operand_key(value, keys) for value in node.inputs)
            attributes = tuple(sorted((a.name, str(a.value)) for a in node.attributes.values()))
            key = (node.op_type, attributes, operands, len(node.outputs))
            # An integer stands for the key, so that a diamond of operators does not hash its top twice.
            number = self._interned.setdefault(key, len(self._interned))
            keys.update((output, (number, i)) for i, output in enumerate(node.outputs))
        return keys

    def _operand_key(self, value: ir.Value | None, keys: dict[ir.Value, object]) -> object:
        if value is None or value in keys:
            return None if value is None else keys[value]
        fact = self._analysis[value]
        assert fact is not None
        if fact.extremes is None:
            return fact.dims  # zeros
        return tuple((value.dtype.str, value.shape, value.tobytes()) for value in fact.extremes)

    def _evaluate(self, region: Region) -> dict[ir.Value, IndexMap | str]:
        """Run the region on the map that moves nothing."""
        source = self._analysis.known_dims(region.source)
        if 0 in source:
            return dict.fromkeys(region.sinks, "holds no elements")
        maps: dict[ir.Value, IndexMap | str] = {region.source: IndexMap.identity(source)}
        for node in region.nodes:
            read = [found for value in node.inputs if value is not None and (found := maps.get(value)) is not None]
            reason = next((found for found in read if isinstance(found, str)), None)
            if reason is None:
                try:
                    maps.update(zip(node.outputs, moved(node, maps, self._analysis), strict=True))
                    continue
                except ValueError as error:
                    reason = str(error)
            maps.update(dict.fromkeys(node.outputs, reason))
        return {sink: _for_every_batch(maps[sink], source, self._analysis.known_dims(sink)) for sink in region.sinks}


def moves_one(node: ir.Node, analysis: Analysis) -> bool:
    """Say whether a node moves one value, where to is known, and what shapes it has before and behind."""
    if node.inputs[:1] in ((), (None,)) or len(data_operands(node)) > 1 or not analysis.only_moves(node):
        return False
    return all(analysis.dims(value) is not None for value in (node.inputs[0], *node.outputs))


def moved(node: ir.Node, maps: Mapping[ir.Value, IndexMap | str], analysis: Analysis) -> list[IndexMap]:
    """Return what a movement operator makes of index maps.

    Args:
        node: an operator that only moves.
        maps: the maps of the values that it moves; what has none is zero.
        analysis: what is known of the graph.

    Raises:
        ValueError: the movement has no map; the message says why.
    """
    operands: list[Array | IndexMap | None] = []
    followed = data_operands(node)
    for i, value in enumerate(node.inputs):
        fact = None if value is None else analysis[value]
        if value is None or fact is None:
            operands.append(None)
        elif i in followed:
            found = maps.get(value)
            assert not isinstance(found, str), "callers follow what has a map"
            operands.append(IndexMap.nowhere(fact.dims or ()) if found is None else found)
        elif grows(fact.extremes) and not _only_sizes_grow(node, analysis):
            raise ValueError("depends on the batch size")
        else:
            operands.append(fact.value(BATCH))
    # A map answers to what movement asks of an array.
    return cast("list[IndexMap]", move(node, cast("Operands", operands), zero=NOWHERE))


def _only_sizes_grow(node: ir.Node, analysis: Analysis) -> bool:
    """Say whether an operator reads the batch size only to say how long the axes of the batch are."""
    if node.op_type in ("Expand", "Reshape"):
        return True
    dims = analysis.dims(node.inputs[0])
    if node.op_type != "Slice" or dims is None:
        return False
    starts, ends, axes, steps = (analysis[value] if value is not None else None for value in _four(node.inputs[1:]))
    if any(fact is not None and grows(fact.extremes) for fact in (axes, steps)):
        return False
    bounds = [fact.extremes for fact in (starts, ends) if fact is not None and fact.extremes is not None]
    named = None if axes is None else axes.constant
    on = range(len(bounds[0][0])) if named is None else [int(axis) % len(dims) for axis in named]
    growing = {axis for low, high in bounds for axis, a, b in zip(on, low, high, strict=True) if a != b}
    return growing <= set(dynamic_axes(dims))


def _four(operands: Sequence[ir.Value | None]) -> tuple[ir.Value | None, ...]:
    return (*operands, None, None)[:4]


def _for_every_batch(index_map: IndexMap | str, source: Dims, result: Dims) -> IndexMap | str:
    """Return a map if it can be written for every batch size, or the reason why not."""
    if len(dynamic_axes(source)) > 1 or len(dynamic_axes(result)) > 1:
        return "grows with the batch on two axes"
    if dynamic_axes(result) and not dynamic_axes(source):
        return "depends on the batch size, but its source does not"
    if dynamic_axes(source) and not dynamic_axes(result):
        return "reads one sample of the batch"
    if isinstance(index_map, IndexMap) and index_map.shape != result:
        return f"makes {list(index_map.shape)}, not {list(result)} as was inferred"
    return index_map
