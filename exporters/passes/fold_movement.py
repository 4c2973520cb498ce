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

import math
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.builder import Builder
from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.lowerings import LAUNCH, VIEW, Move, Plan, plans
from deploycli.exporters.graph.regions import RegionMaps, find_regions
from deploycli.exporters.graph.rewiring import remove, replace, replace_all
from deploycli.exporters.graph.shapes import elements, item_bytes
from deploycli.exporters.graph.steps import Refusal
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass
from deploycli.exporters.passes.splits import joint_plans, split_groups, swaps_last_axes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Dims, Facts
    from deploycli.exporters.graph.regions import Region

_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


class FoldMovement(GraphPass):
    """Write every movement region in its cheapest form. Bit-equal: no number is computed."""

    def transform(self, graph: ir.Graph, facts: Facts) -> bool:
        """Run the pass; see the module's documentation."""
        folder = _Folder(graph, facts)
        modified = False
        for region in find_regions(graph, facts):
            modified |= folder.fold(region)
        self.refusals = folder.refusals
        return modified


class _Folder:
    """Folds regions one by one and remembers the maps and forms of those that look alike."""

    def __init__(self, graph: ir.Graph, facts: Facts) -> None:
        self._facts = facts
        self._builder = Builder(graph, facts)
        self._graph = graph
        self._maps = RegionMaps.of(facts)
        self.refusals: list[Refusal] = []

    def fold(self, region: Region) -> bool:
        """Rewrite a region as a whole, or else sink by sink, where that is cheaper."""
        forms, joint = self._forms(region)
        for sink, options in forms.items():
            if isinstance(options, str):
                producer = sink.producer()
                assert producer is not None
                self.refusals.append(Refusal(label(producer), options))
        chosen = self._choose(region, {sink: o for sink, o in forms.items() if not isinstance(o, str)}, joint)
        if len(chosen) == len(region.sinks) and self._take(region, chosen):
            return True
        modified = False
        while True:  # what two sinks share is freed with the last of them
            taken = [sink for sink, plan in chosen.items() if self._take(region, {sink: plan})]
            if not taken:
                return modified
            modified = True
            for sink in taken:
                del chosen[sink]

    def _take(self, region: Region, chosen: dict[ir.Value, Plan]) -> bool:
        """Write these sinks in these forms, if that costs less than what it frees."""
        freed = _freed(region, chosen)
        cost = self._cost(chosen, region) + VIEW * _identities(region, chosen)
        if cost >= sum(self._node_cost(node) for node in freed):
            return False
        self._emit(region, chosen)
        remove(self._graph, freed)
        return True

    def _choose(
        self, region: Region, options: dict[ir.Value, list[Plan]], joint: list[tuple[Plan, ...]]
    ) -> dict[ir.Value, Plan]:
        """Return the cheapest set of plans: each sink for itself, all as strided views, or all moved as one."""

        def rank(sink: ir.Value, plan: Plan) -> tuple[int, int, list[tuple[str, Dims]]]:
            return self._cost({sink: plan}, region), len(plan), [(m.op, m.dims) for m in plan]

        def each(options: dict[ir.Value, list[Plan]]) -> dict[ir.Value, Plan]:
            return {sink: min(plans, key=lambda plan: rank(sink, plan)) for sink, plans in options.items()}

        candidates = [each(options)]
        strided = {sink: [p for p in plans if not any(m.is_row_gather for m in p)] for sink, plans in options.items()}
        if len(options) > 1 and all(strided.values()):
            candidates.append(each(strided))  # they share a Split
        candidates += [dict(zip(region.sinks, plans, strict=True)) for plans in joint]
        return min(candidates, key=lambda chosen: self._cost(chosen, region))

    def _forms(self, region: Region) -> tuple[dict[ir.Value, list[Plan] | str], list[tuple[Plan, ...]]]:
        """Return the forms of every sink's index map, or the reason why it has none, and those of all sinks as one."""
        keys = self._maps.signatures(region)
        jointly = ("jointly", *(keys[sink] for sink in region.sinks))
        known = self._maps.forms
        if jointly not in known:
            source, maps = self._dims(region.source), self._maps(region)
            for sink, found in maps.items():
                if isinstance(found, IndexMap):
                    known[keys[sink]] = plans(found, source, self._dims(sink)) or (
                        "neither a strided view, nor rows gathered on one axis"
                    )
                else:
                    known[keys[sink]] = found
            index_maps = [found for found in maps.values() if isinstance(found, IndexMap)]
            is_joint = 1 < len(index_maps) == len(region.sinks)
            known[jointly] = list(joint_plans(index_maps, source)) if is_joint else []
        return {sink: known[keys[sink]] for sink in region.sinks}, known[jointly]

    def _dims(self, value: ir.Value) -> Dims:
        dims = self._facts.dims(value)
        assert dims is not None, "regions hold only values of known shape"
        return dims

    def _itemsize(self, value: ir.Value) -> int:
        fact = self._facts[value]
        assert fact is not None
        return math.ceil(item_bytes(fact.dtype))

    def _cost(self, chosen: Mapping[ir.Value, Plan], region: Region) -> int:
        """Cost of a set of plans that share their common beginnings; Slices that tile an axis are one Split."""
        prefixes = {plan[: i + 1] for plan in chosen.values() for i in range(len(plan))}
        source, itemsize = self._dims(region.source), self._itemsize(region.source)
        cost = sum(prefix[-1].cost(itemsize) for prefix in prefixes)
        for sink, plan in chosen.items():
            if plan and plan[-1].op == "Transpose" and _is_read_in_place(sink, plan[-1].values, region.nodes):
                cost += VIEW - plan[-1].cost(itemsize)
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
        if node.op_type == "Transpose" and _is_read_in_place(node.outputs[0], node.attributes.get_ints("perm", ())):
            return VIEW
        return LAUNCH + sum(elements(d) * itemsize for d in dims)

    def _emit(self, region: Region, chosen: dict[ir.Value, Plan]) -> None:
        prefixes = {plan[: i + 1] for plan in chosen.values() for i in range(len(plan))}
        splits = split_groups(prefixes, self._dims(region.source))
        made: dict[Plan, ir.Value] = {(): region.source}
        results: dict[ir.Value, ir.Value] = {}
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
            if sink.is_graph_output():
                replace(sink, result if _may_be_renamed(result) else self._builder.value("Identity", [result], anchor))
            else:
                results[sink] = result
        replace_all(results)

    def _emit_split(self, made: dict[Plan, ir.Value], parent: Plan, tiles: list[Move], anchor: ir.Node) -> None:
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


def _may_be_renamed(value: ir.Value) -> bool:
    return value.producer() is not None and not value.is_graph_output()


def _identities(region: Region, chosen: dict[ir.Value, Plan]) -> int:
    """Count the graph outputs that need an Identity, because their value cannot take their name."""
    plans_of_outputs = [plan for sink, plan in chosen.items() if sink.is_graph_output()]
    free = set(plans_of_outputs) - (set() if _may_be_renamed(region.source) else {()})
    return len(plans_of_outputs) - len(free)


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
