"""Movement folds by evaluation.

Before -> after, for Swin's shifted window partition::

    Reshape, Slice, Slice, Concat, Slice, Slice, Concat, Reshape, Transpose, Reshape
    -> Gather(rows), Reshape

A region is a maximal set of movement operators with one source. It has a meaning of its own, an index map, whatever
operators spell it; so no operator is matched against a pattern. The map is written in its cheapest form, where that
is cheaper than what stands there. Refused, for one: a flip of the channels, which moves single elements against
their order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from exporters.rewrite.builder import Builder, remove_dead, replace
from exporters.rewrite.facts import PROBES, Dims, Facts
from exporters.rewrite.forms import LAUNCH, VIEW, Move, Plan, plans
from exporters.rewrite.index_map import IndexMap, elements, per_sample
from exporters.rewrite.movement_ops import NOWHERE, Array, NotMovementError, data_operands, is_movement, move
from exporters.steps import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass
class Region:
    """Movement operators with one source.

    Attributes:
        source: the value that is moved.
        nodes: the operators, in topological order.
        sinks: the results that are read from outside the region.
    """

    source: ir.Value
    nodes: list[ir.Node] = field(default_factory=list)
    sinks: list[ir.Value] = field(default_factory=list)


class FoldMovement(ir.passes.InPlacePass):
    """Write every movement region in its cheapest form. Bit-equal: no number is computed."""

    def __init__(self, facts: Facts | None = None) -> None:
        super().__init__()
        self._facts = facts
        self.refusals: list[Refusal] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass; see the module's documentation."""
        facts = self._facts or Facts(model.graph)
        folder = _Folder(model.graph, facts)
        modified = False
        for region in find_regions(model.graph, facts):
            modified |= folder.fold(region)
        self.refusals = folder.refusals
        return ir.passes.PassResult(model, modified)


def find_regions(graph: ir.Graph, facts: Facts) -> list[Region]:
    """Return the movement regions of a graph. Every movement operator on data belongs to one or is a boundary."""
    regions: dict[ir.Value, Region] = {}
    source_of: dict[ir.Value, ir.Value] = {}
    for node in graph:
        source = _common_source(node, source_of, facts)
        if source is None:
            continue
        regions.setdefault(source, Region(source)).nodes.append(node)
        source_of.update((output, source) for output in node.outputs)
    for region in regions.values():
        inside = set(region.nodes)
        for node in region.nodes:
            region.sinks.extend(v for v in node.outputs if v.is_graph_output() or not inside.issuperset(v.consumers()))
    return list(regions.values())


def _common_source(node: ir.Node, source_of: dict[ir.Value, ir.Value], facts: Facts) -> ir.Value | None:
    """Return what the node moves, or None where it is no movement or moves several things together."""
    if not is_movement(node) or any(facts.dims(output) is None for output in node.outputs):
        return None
    if facts.constant(node.outputs[0]) is not None:
        return None  # left to constant folding
    moved = data_operands(node)
    sources = set()
    for i, value in enumerate(node.inputs):
        if value is None:
            continue
        fact = facts[value]
        if fact is None or fact.dims is None:
            return None
        if i not in moved:
            if fact.probes is None:
                return None
        elif not _is_zero(fact.constant):
            sources.add(source_of.get(value, value))
    if len(sources) != 1:
        return None
    (source,) = sources
    return source if source.const_value is None else None


def _is_zero(array: Array | None) -> bool:
    return array is not None and not array.any()


class _Folder:
    """Folds regions one by one and remembers the maps and forms of those that look alike."""

    def __init__(self, graph: ir.Graph, facts: Facts) -> None:
        self._facts = facts
        self._builder = Builder(graph, facts)
        self._graph = graph
        self._known: dict[object, list[Plan] | str] = {}
        self._interned: dict[object, int] = {}
        self.refusals: list[Refusal] = []

    def fold(self, region: Region) -> bool:
        """Rewrite a region as a whole, or else sink by sink, where that is cheaper."""
        forms = self._forms(region)
        for sink, options in forms.items():
            if isinstance(options, str):
                producer = sink.producer()
                assert producer is not None
                self.refusals.append(Refusal(producer.name or "", options))
        chosen = self._choose(region, {sink: o for sink, o in forms.items() if not isinstance(o, str)})
        if len(chosen) == len(region.sinks) and self._is_profit(region, list(chosen), chosen):
            self._emit(region, chosen)
            return True
        modified = False
        for sink, plan in chosen.items():
            if self._is_profit(region, [sink], {sink: plan}):
                self._emit(region, {sink: plan})
                modified = True
        return modified

    def _choose(self, region: Region, options: dict[ir.Value, list[Plan]]) -> dict[ir.Value, Plan]:
        """Return the cheapest set of plans: each sink for itself, or all as strided views, which share a Split."""

        def rank(plan: Plan) -> tuple[int, int, list[tuple[str, Dims]]]:
            return self._cost([plan], region), len(plan), [(m.op, m.dims) for m in plan]

        chosen = {sink: min(plans, key=rank) for sink, plans in options.items()}
        strided = {sink: [p for p in plans if not any(m.is_row_gather for m in p)] for sink, plans in options.items()}
        if len(options) > 1 and all(strided.values()):
            together = {sink: min(plans, key=rank) for sink, plans in strided.items()}
            return min(together, chosen, key=lambda c: self._cost(c.values(), region))
        return chosen

    def _forms(self, region: Region) -> dict[ir.Value, list[Plan] | str]:
        """Return, for every sink, the forms of its index map or the reason why it has none."""
        keys = self._signatures(region)
        if any(keys[sink] not in self._known for sink in region.sinks):
            source = self._dims(region.source)
            try:
                maps = self._index_maps(region, source)
            except (NotMovementError, ValueError, IndexError) as error:
                return dict.fromkeys(region.sinks, str(error))
            for sink in region.sinks:
                index_map = maps[sink]
                if isinstance(index_map, IndexMap):
                    self._known[keys[sink]] = plans(index_map, source, self._dims(sink)) or (
                        "neither a strided view, nor rows gathered on one axis"
                    )
                else:
                    self._known[keys[sink]] = index_map
        return {sink: self._known[keys[sink]] for sink in region.sinks}

    def _signatures(self, region: Region) -> dict[ir.Value, object]:
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
        assert fact.probes is not None
        return tuple((p.shape, p.tobytes()) for p in fact.probes)

    def _index_maps(self, region: Region, source: Dims) -> dict[ir.Value, IndexMap | str]:
        """Run the region on arange at every probe."""
        runs: dict[ir.Value, list[Array]] = {sink: [] for sink in region.sinks}
        for probe, batch in enumerate(PROBES):
            size = elements(source, batch)
            shape = self._shape(region.source, batch)
            arrays: dict[ir.Value, Array] = {region.source: np.arange(size, dtype=np.int64).reshape(shape)}
            for node in region.nodes:
                operands = [self._operand(value, arrays, probe, batch) for value in node.inputs]
                arrays.update(zip(node.outputs, move(node, operands, zero=NOWHERE), strict=True))
            for sink in region.sinks:
                runs[sink].append(arrays[sink])
        return {sink: per_sample(runs[sink], source, self._dims(sink)) for sink in region.sinks}

    def _operand(self, value: ir.Value | None, arrays: dict[ir.Value, Array], probe: int, batch: int) -> Array | None:
        if value is None or value in arrays:
            return None if value is None else arrays[value]
        fact = self._facts[value]
        assert fact is not None
        assert fact.probes is not None
        if fact.dtype.is_floating_point():  # a Concat with zeros pads
            return np.full(self._shape(value, batch), NOWHERE)
        return fact.probes[probe]

    def _shape(self, value: ir.Value, batch: int) -> Dims:
        fact = self._facts[value]
        shape = None if fact is None else fact.at(batch)
        assert shape is not None, "regions hold only values of known shape"
        return shape

    def _dims(self, value: ir.Value) -> Dims:
        dims = self._facts.dims(value)
        assert dims is not None, "regions hold only values of known shape"
        return dims

    def _itemsize(self, value: ir.Value) -> int:
        fact = self._facts[value]
        assert fact is not None
        return max(1, fact.dtype.itemsize)

    def _cost(self, chosen: Iterable[Plan], region: Region) -> int:
        """Cost of a set of plans that share their common beginnings; Slices that tile an axis are one Split."""
        prefixes = {plan[: i + 1] for plan in chosen for i in range(len(plan))}
        source, itemsize = self._dims(region.source), self._itemsize(region.source)
        cost = sum(prefix[-1].cost(itemsize) for prefix in prefixes)
        return cost - LAUNCH * sum(len(tiles) - 1 for tiles in split_groups(prefixes, source).values())

    def _node_cost(self, node: ir.Node) -> int:
        """Cost of an operator that stands in the graph, by the same measure as a move's."""
        if node.op_type in _VIEWS:
            shape = node.inputs[1] if len(node.inputs) > 1 else None
            return VIEW if shape is None or self._facts.constant(shape) is not None else VIEW + LAUNCH
        itemsize = self._itemsize(node.outputs[0])
        dims = [self._facts.dims(output) or () for output in node.outputs]
        if node.op_type == "Gather" and node.inputs[1] is not None:
            indices = self._facts.dims(node.inputs[1]) or ()
            axis = node.attributes.get_int("axis", 0) % (len(dims[0]) - len(indices) + 1)
            row = elements(dims[0][axis + len(indices) :])
            return Move("Gather", dims[0], shape=indices, row=row).cost(itemsize)
        return LAUNCH + sum(elements(d) * itemsize for d in dims)

    def _is_profit(self, region: Region, sinks: Sequence[ir.Value], chosen: dict[ir.Value, Plan]) -> bool:
        if any(s.is_graph_output() and not chosen[s] and not _may_be_renamed(region.source) for s in sinks):
            return False  # an Identity would have to stand in its place
        freed = sum(self._node_cost(node) for node in _freed(region, sinks))
        return self._cost(chosen.values(), region) < freed

    def _emit(self, region: Region, chosen: dict[ir.Value, Plan]) -> None:
        prefixes = {plan[: i + 1] for plan in chosen.values() for i in range(len(plan))}
        splits = split_groups(prefixes, self._dims(region.source))
        made: dict[Plan, ir.Value] = {(): region.source}
        for sink, plan in chosen.items():
            anchor = sink.producer()  # sinks come in topological order: what they share stands before the first
            assert anchor is not None
            for i in range(len(plan)):
                prefix = plan[: i + 1]
                if prefix in made:
                    continue
                key = (plan[:i], plan[i].axis)
                if plan[i].op == "Slice" and key in splits:
                    self._emit_split(made, plan[:i], splits[key], anchor)
                else:
                    made[prefix] = self._builder.move(plan[i], made[plan[:i]], anchor)
            result = made[plan]
            if sink.is_graph_output() and not _may_be_renamed(result):
                result = self._builder.value("Identity", [result], anchor)
            replace(sink, result)
        remove_dead(self._graph, region.nodes)

    def _emit_split(self, made: dict[Plan, ir.Value], parent: Plan, tiles: list[Move], anchor: ir.Node) -> None:
        sizes = self._builder.constant(np.array([tile.values[1] for tile in tiles], np.int64))
        node = self._builder.node("Split", [made[parent], sizes], anchor, outputs=len(tiles), axis=tiles[0].axis)
        made.update(((*parent, tile), output) for tile, output in zip(tiles, node.outputs, strict=True))


def _may_be_renamed(value: ir.Value) -> bool:
    return value.producer() is not None and not value.is_graph_output()


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


def _freed(region: Region, sinks: Sequence[ir.Value]) -> list[ir.Node]:
    """Return the nodes that nothing reads once these sinks are read from elsewhere."""
    kept = set(region.sinks) - set(sinks)
    freed: set[ir.Node] = set()
    for node in reversed(region.nodes):
        if all(o in sinks or (o not in kept and freed.issuperset(o.consumers())) for o in node.outputs):
            freed.add(node)
    return [node for node in region.nodes if node in freed]
