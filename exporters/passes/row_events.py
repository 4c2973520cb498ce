"""A graph read as what happens to rows: they are moved, computed one by one, reduced, or read as they stand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.regions import RegionMaps, find_regions
from deploycli.exporters.graph.rows import reduced_axes, row_wise, rows_of
from deploycli.exporters.graph.shapes import elements, item_bytes
from deploycli.exporters.passes.order_plan import Compute, Matrix, ReadAsIs, Reduce, Shuffle

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Facts
    from deploycli.exporters.graph.regions import Region
    from deploycli.exporters.passes.order_plan import Event


def read_events(graph: ir.Graph, facts: Facts) -> list[Event]:
    """Return what happens to rows, in the order of the graph."""
    return _Reader(graph, facts).events()


class _Reader:
    def __init__(self, graph: ir.Graph, facts: Facts) -> None:
        self._graph = graph
        self._facts = facts
        self._maps = RegionMaps.of(facts)
        self._place = {node: i for i, node in enumerate(graph)}

    def events(self) -> list[Event]:
        regions = {region.source: region for region in find_regions(self._graph, self._facts)}
        moved = {node for region in regions.values() for node in region.nodes}
        events: list[Event] = []
        shuffles: dict[ir.Value, list[Shuffle]] = {}
        for source, region in regions.items():
            shuffles[source] = self._shuffles(region)
            events += shuffles[source]
        events += [e for node in self._graph if node not in moved and (e := self._compute(node)) is not None]
        made = [event.result for event in events if isinstance(event, (Compute, Shuffle))]
        computing = {event.operator.node for event in events if isinstance(event, Compute)}
        for matrix in made:
            read = regions.get(matrix.value)
            if read is not None and len(shuffles[matrix.value]) < len(read.sinks):
                first = next(node for node in read.nodes if matrix.value in node.inputs)
                uses = [(u.node, u.idx) for u in matrix.value.uses() if u.node in read.nodes]
                events.append(ReadAsIs(matrix, tuple(uses), first))
            for usage in matrix.value.uses():
                if usage.node in moved or usage.node in computing or usage.node not in self._place:
                    continue
                events.append(
                    self._reduce(matrix, usage.node) or ReadAsIs(matrix, ((usage.node, usage.idx),), usage.node)
                )
        return sorted(events, key=lambda event: self._place[event.anchor])

    def _matrix(self, value: ir.Value) -> Matrix:
        fact = self._facts[value]
        assert fact is not None
        assert fact.dims is not None, "events are on values of known shape"
        rows, channels = rows_of(fact.dims) or (1, elements(fact.dims))
        return Matrix(value, fact.dims, rows, channels, math.ceil(item_bytes(fact.dtype)))

    def _is_pinned(self, value: ir.Value) -> bool:
        """Say whether a value is read where its readers cannot be rewired: outside, or in an inner graph."""
        return value.is_graph_output() or any(reader not in self._place for reader in value.consumers())

    def _compute(self, node: ir.Node) -> Compute | None:
        operator = row_wise(node, self._facts)
        if operator is None:
            return None
        read = tuple(self._matrix(value) for value in operator.values())
        return Compute(operator, read, self._matrix(operator.result), self._is_pinned(operator.result))

    def _shuffles(self, region: Region) -> list[Shuffle]:
        source, found = self._matrix(region.source), []
        for sink, index_map in self._maps(region).items():
            anchor, sample = sink.producer(), None if isinstance(index_map, str) else index_map.sample()
            if sample is None or anchor is None or rows_of(self._facts.dims(sink)) is None:
                continue
            result, unit = self._matrix(sink), source.channels
            moves = sample.reshape((result.rows, result.channels))
            by_rows = source.rows > 1 and sample.unit % unit == 0 and result.channels % unit == 0
            if by_rows:
                index = sample.rows(1, unit)
                assert index is not None, "its unit is a multiple"
                moves = IndexMap.of(index.reshape(result.rows, -1), source.rows)
            pinned = self._is_pinned(sink)
            found.append(Shuffle(source, result, moves, unit if by_rows else 1, by_rows, pinned, anchor))
        return found

    def _reduce(self, matrix: Matrix, node: ir.Node) -> Reduce | None:
        """Read a node as a reduction over groups of whole rows that follow one another."""
        axes = reduced_axes(node, len(matrix.dims), self._facts)
        if axes is None or axes[0] == 0 or axes != tuple(range(axes[0], len(matrix.dims) - 1)):
            return None
        return Reduce(matrix, math.prod(matrix.dims[axes[0] : -1]), node)
