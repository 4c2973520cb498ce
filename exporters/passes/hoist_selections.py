"""Selections move up.

Before -> after, for a classifier that reads the class token (of N tokens) behind its last block::

    LayerNormalization(x), MatMul(Wqkv), Split -> q, k, v [B, N, C]; attention, + x, MLP [B, N, C], Gather(token 0)
    -> LayerNormalization(x), MatMul(Wkv), Split -> k, v [B, N, C]; Slice(token 0), MatMul(Wq) -> q [B, 1, C];
       attention, + Slice(x, token 0), MLP [B, 1, C], Reshape

From the last node to the first, each value is asked which of its rows anybody reads. Where these are not all, and the
operator is row-wise (see :mod:`deploycli.exporters.passes.relations`), they alone are computed; masks and weights are
cut to
them. Where rows of a value are read whose other rows somebody else needs, they are taken once. Each row that is left is
the same sum of the same products; a kernel may add them in another order, so the result is equal within rounding.

Refused, for one: a selection that saves fewer multiply-adds than its copies and additional operators cost. A selection
above which there is no product stays where it is, and so does one of samples of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.builder import Builder
from deploycli.exporters.graph.lowerings import Move
from deploycli.exporters.graph.rewiring import remove_dead, replace
from deploycli.exporters.passes.axes import Join, Take, View
from deploycli.exporters.passes.boxes import Box, Rows, is_whole, sizes
from deploycli.exporters.passes.demand import Demand, Reads, takes
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Dims, Facts
    from deploycli.exporters.graph.movement_ops import Array


class HoistSelections(GraphPass):
    """Compute the rows that are read, no others. Equal within rounding."""

    def transform(self, graph: ir.Graph, facts: Facts) -> bool:
        """Run the pass; see the module's documentation."""
        demand = Demand(graph, facts)
        self.refusals = demand.refusals
        changed = [node for node in graph if demand.changes(node)]
        writer = _Writer(demand, Builder(graph, facts))
        for node in changed:
            writer.rewrite(node)
        remove_dead(graph, changed)
        return bool(changed)


class _Writer:
    """Writes nodes anew, for the boxes that are demanded of them."""

    def __init__(self, demand: Demand, builder: Builder) -> None:
        self._demand = demand
        self._builder = builder
        self._made: dict[ir.Value, dict[Box, ir.Value]] = {}

    def rewrite(self, node: ir.Node) -> None:
        """Write a node once for each version of each of its results. What it reads has been written before."""
        for output in node.outputs:
            for box in self._demand.versions[output]:
                made = self._write(output, box, node)
                if is_whole(box):
                    if output.is_graph_output() and (made.producer() is None or made.is_graph_output()):
                        made = self._builder.value("Identity", [made], node)
                    replace(output, made)
                else:
                    self._made.setdefault(output, {})[box] = made

    def _write(self, output: ir.Value, box: Box, node: ir.Node) -> ir.Value:
        related = self._demand.relation(output)
        reads = self._demand.reads(output, box)
        if isinstance(related, Take):
            return self._taken(related, box, reads, node)
        operands = [None if read is None else self._read(*read, node) for read in reads]
        present = [value for value in operands if value is not None]
        result = sizes(self._dims(output), box)
        if isinstance(related, View):
            return present[0] if result == self._dims(present[0]) else self._builder.reshape(present[0], result, node)
        if isinstance(related, Join) and len(present) == 1:
            return present[0]
        if isinstance(related, Join):
            operands = list(present)
        if node.op_type == "Expand":
            operands[1] = self._builder.constant(self._target(node, result))
        return self._builder.value(node.op_type, operands, node, **node.attributes)

    def _taken(self, take: Take, box: Box, reads: Reads, node: ir.Node) -> ir.Value:
        (read, *_) = reads
        assert read is not None, "it takes of its first operand"
        have = self._demand.taken_from(*read, take)
        value = self._read(read[0], have, node)
        for axis, positions in takes(take, box, have):
            value = self._take(value, axis, positions, node)
        return value

    def _target(self, node: ir.Node, result: Dims) -> Array:
        """Cut the target of an Expand to what is left of the axes that it repeats."""
        target = self._builder.facts.constant(node.inputs[1])
        assert target is not None, "others are not restricted"
        left = np.array(result, np.int64)[len(result) - target.size :]
        return np.where(target == 1, 1, left)

    def _read(self, value: ir.Value, box: Box, anchor: ir.Node) -> ir.Value:
        """Return a box of a value: a version of it, or a selection from one."""
        if is_whole(box):
            return value
        constant = self._builder.facts.constant(value) if value.producer() is None else None
        if constant is not None:
            return self._cut(constant, box, value.name or "constant")
        versions = self._made.setdefault(value, {})
        if box not in versions:
            have = self._demand.source(value, box)
            versions[box] = self._select(versions.get(have, value), have, box, anchor)
        return versions[box]

    def _cut(self, constant: Array, box: Box, name: str) -> ir.Value:
        for axis, selected in enumerate(box):
            if selected is not None:
                constant = constant.take(selected.kept, axis)
        return self._builder.constant(constant, name)

    def _select(self, value: ir.Value, have: Box, want: Box, anchor: ir.Node) -> ir.Value:
        for axis, (mine, selected) in enumerate(zip(have, want, strict=True)):
            if selected is None or selected == mine:
                continue
            kept = np.array(selected.kept)
            positions = kept if mine is None else np.searchsorted(mine.kept, kept)
            value = self._select_on(
                value, axis, selected, selected.size if mine is None else len(mine.kept), positions, anchor
            )
        return value

    def _select_on(
        self, value: ir.Value, axis: int, selected: Rows, size: int, positions: Array, anchor: ir.Node
    ) -> ir.Value:
        if selected.outer == selected.inner == 1:
            return self._take(value, axis, positions, anchor)
        dims = self._dims(value)
        # [..., outer * size * inner, ...] -> [..., outer, size, inner, ...] -> [..., outer * kept * inner, ...]
        split = (*dims[:axis], selected.outer, size, selected.inner, *dims[axis + 1 :])
        taken = self._take(self._builder.reshape(value, split, anchor), axis + 1, positions, anchor)
        return self._builder.reshape(taken, (*dims[:axis], selected.length, *dims[axis + 1 :]), anchor)

    def _take(self, value: ir.Value, axis: int, positions: Array, anchor: ir.Node) -> ir.Value:
        """Take rows of one axis, as a Slice where they follow each other."""
        if positions.ndim == 1 and np.array_equal(positions, np.arange(positions[0], positions[0] + positions.size)):
            dims = self._dims(value)
            dims = (*dims[:axis], positions.size, *dims[axis + 1 :])
            return self._builder.move(Move("Slice", dims, axis, (int(positions[0]), positions.size)), value, anchor)
        indices = self._builder.constant(np.asarray(positions, np.int64))
        return self._builder.value("Gather", [value, indices], anchor, axis=axis)

    def _dims(self, value: ir.Value) -> Dims:
        dims = self._builder.facts.dims(value)
        assert dims is not None, "only values of known shape are restricted"
        return dims
