"""Regions of pure data movement, and what they mean.

A region is a maximal set of movement operators with one source. Its meaning is an index map for each of its results:
found by running the region on arange, and remembered for all regions of the same operators and shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, proxy

import numpy as np

from exporters.rewrite.index_map import RUNS, IndexMap, numbered, per_sample
from exporters.rewrite.movement_ops import NOWHERE, data_operands, move

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporters.rewrite.facts import Dims, Facts
    from exporters.rewrite.movement_ops import Array


_SHARED: WeakKeyDictionary[Facts, RegionMaps] = WeakKeyDictionary()


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


def find_regions(graph: ir.Graph, facts: Facts) -> list[Region]:
    """Return the movement regions of a graph. Every movement operator on data belongs to one or is a boundary."""
    regions: dict[ir.Value, Region] = {}
    source_of: dict[ir.Value, ir.Value] = {}
    for node in graph:
        source = _common_source(node, source_of, facts)
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


def _common_source(node: ir.Node, source_of: dict[ir.Value, ir.Value], facts: Facts) -> ir.Value | None:
    """Return what the node moves, or None where it is no movement or moves several things together."""
    if not facts.only_moves(node) or any(facts.dims(output) is None for output in node.outputs):
        return None
    if facts.constant(node.outputs[0]) is not None:
        return None  # left to constant folding
    sources = set()
    for i in data_operands(node):
        value = node.inputs[i]
        if value is None or facts.dims(value) is None:
            return None
        if not facts.is_zero(value):
            sources.add(source_of.get(value, value))
    if len(sources) != 1:
        return None
    (source,) = sources
    return source if source.const_value is None else None


class RegionMaps:
    """Finds the index maps of regions and remembers those that look alike.

    Attributes:
        forms: what a pass found out about regions, by their signatures.
    """

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self.forms: dict[object, Any] = {}
        self._known: dict[object, IndexMap | str] = {}
        self._interned: dict[object, int] = {}

    @classmethod
    def of(cls, facts: Facts) -> RegionMaps:
        """Return the maps that all passes over a graph share: most regions outlive a pass."""
        if facts not in _SHARED:
            _SHARED[facts] = cls(proxy(facts))
        return _SHARED[facts]

    def __call__(self, region: Region) -> dict[ir.Value, IndexMap | str]:
        """Return, for every sink, its index map or the reason why it has none."""
        keys = self.signatures(region)
        if any(keys[sink] not in self._known for sink in region.sinks):
            try:
                self._known.update((keys[sink], found) for sink, found in self._evaluate(region).items())
            except ValueError as error:
                return dict.fromkeys(region.sinks, str(error))
        return {sink: self._known[keys[sink]] for sink in region.sinks}

    def signatures(self, region: Region) -> dict[ir.Value, object]:
        """Return a key for every value: regions of the same operators and shapes share their maps."""
        keys: dict[ir.Value, object] = {region.source: self._facts.dims(region.source)}
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
        fact = self._facts[value]
        assert fact is not None
        if fact.ends is None:
            return fact.dims  # zeros
        return tuple((end.dtype.str, end.shape, end.tobytes()) for end in fact.ends)

    def _evaluate(self, region: Region) -> dict[ir.Value, IndexMap | str]:
        """Run the region on arange."""
        source = self._dims(region.source)
        runs: dict[ir.Value, list[Array]] = {sink: [] for sink in region.sinks}
        for batch in RUNS:
            arrays = {region.source: numbered(source, batch)}
            for node in region.nodes:
                operands = [self._operand(node, i, arrays, batch) for i in range(len(node.inputs))]
                arrays.update(zip(node.outputs, move(node, operands, zero=NOWHERE), strict=True))
            for sink in region.sinks:
                runs[sink].append(arrays[sink])
        return {sink: per_sample(runs[sink], source, self._dims(sink)) for sink in region.sinks}

    def _operand(self, node: ir.Node, position: int, arrays: dict[ir.Value, Array], batch: int) -> Array | None:
        value = node.inputs[position]
        if value is None or value in arrays:
            return None if value is None else arrays[value]
        if position in data_operands(node):  # a Concat with zeros pads
            return np.broadcast_to(NOWHERE, self._shape(value, batch))
        fact = self._facts[value]
        return None if fact is None else fact.value(batch)

    def _shape(self, value: ir.Value, batch: int) -> Dims:
        fact = self._facts[value]
        shape = None if fact is None else fact.shape(batch)
        assert shape is not None, "regions hold only values of known shape"
        return shape

    def _dims(self, value: ir.Value) -> Dims:
        dims = self._facts.dims(value)
        assert dims is not None, "regions hold only values of known shape"
        return dims
