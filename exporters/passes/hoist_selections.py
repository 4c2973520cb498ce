"""Selections move up.

Before -> after, for a classifier that reads the class token (of N tokens) behind its last block::

    LayerNormalization(x), MatMul(Wqkv), Split -> q, k, v [B, N, C]; attention, + x, MLP [B, N, C], Gather(token 0)
    -> LayerNormalization(x), MatMul(Wkv), Split -> k, v [B, N, C]; Slice(token 0), MatMul(Wq) -> q [B, 1, C];
       attention, + Slice(x, token 0), MLP [B, 1, C], Reshape

It is backward slicing. From the last node to the first, each value is asked which of its rows anybody reads. Where
these are not all, and the operator is row-wise (see :mod:`deploycli.exporters.graph.row_relations`), they alone are
computed; masks and weights are cut to them. A value may be computed in several versions, each a set of rows of its own:
the queries of one token, beside the keys and values of all. Where rows of a value are read whose other rows somebody
else needs, they are taken once. Then what does not pay is kept whole, and the question is put anew. Each row that is
left is the same sum of the same products; a kernel may add them in another order, so the result is equal within
rounding.

Refused, for one: a selection that saves fewer multiply-adds than its copies and additional operators cost. A selection
above which there is no product stays where it is, and so does one of samples of a batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from deploycli.exporters.graph.builder import Builder, remove_dead, replace
from deploycli.exporters.graph.lowerings import LAUNCH, VIEW, MovementOp
from deploycli.exporters.graph.products import COUNTED, multiply_adds
from deploycli.exporters.graph.row_relations import (
    IndexSet,
    IndexSets,
    Join,
    Relation,
    Take,
    View,
    covers,
    is_whole,
    merge,
    relations,
    sizes,
    volume,
    whole,
)
from deploycli.exporters.graph.shapes import item_bytes
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.shapes import Dims

PRODUCTS_PER_BYTE = 8
"""Multiply-adds that take the time of moving one byte: some 10 on a CPU, 100 on a GPU that is kept busy."""

Reads: TypeAlias = "list[tuple[ir.Value, IndexSets] | None]"
"""What is read of each operand of a node; None where nothing."""


class HoistSelections(GraphPass):
    """Compute the rows that are read, no others. Equal within rounding."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        slicing = BackwardSlicing(graph, analysis)
        self.remarks = slicing.remarks
        changed = [node for node in graph if slicing.changes(node)]
        writer = _Writer(slicing, Builder(graph, analysis))
        for node in changed:
            writer.rewrite(node)
        remove_dead(graph, changed)
        return bool(changed)


class _Writer:
    """Writes nodes anew, for the parts that are wanted of them."""

    def __init__(self, slicing: BackwardSlicing, builder: Builder) -> None:
        self._slicing = slicing
        self._builder = builder
        self._made: dict[ir.Value, dict[IndexSets, ir.Value]] = {}

    def rewrite(self, node: ir.Node) -> None:
        """Write a node once for each version of each of its results. What it reads has been written before."""
        for output in node.outputs:
            for part in self._slicing.versions[output]:
                made = self._write(output, part, node)
                if is_whole(part):
                    if output.is_graph_output() and (made.producer() is None or made.is_graph_output()):
                        made = self._builder.value("Identity", [made], node)
                    replace(output, made)
                else:
                    self._made.setdefault(output, {})[part] = made

    def _write(self, output: ir.Value, part: IndexSets, node: ir.Node) -> ir.Value:
        related = self._slicing.relation(output)
        reads = self._slicing.reads(output, part)
        if isinstance(related, Take):
            return self._taken(related, part, reads, node)
        operands = [None if read is None else self._read(*read, node) for read in reads]
        present = [value for value in operands if value is not None]
        analysis = self._builder.analysis
        result = sizes(analysis.known_dims(output), part)
        if isinstance(related, View):
            is_there = result == analysis.known_dims(present[0])
            return present[0] if is_there else self._builder.reshape(present[0], result, node)
        if isinstance(related, Join) and len(present) == 1:
            return present[0]
        if isinstance(related, Join):
            operands = list(present)
        if node.op_type == "Expand":
            operands[1] = self._builder.constant(self._target(node, result))
        return self._builder.value(node.op_type, operands, node, **node.attributes)

    def _taken(self, take: Take, part: IndexSets, reads: Reads, node: ir.Node) -> ir.Value:
        (read, *_) = reads
        assert read is not None, "it takes of its first operand"
        have = self._slicing.taken_from(*read, take)
        value = self._read(read[0], have, node)
        for axis, positions in takes(take, part, have):
            value = self._take(value, axis, positions, node)
        return value

    def _target(self, node: ir.Node, result: Dims) -> Array:
        """Cut the target of an Expand to what is left of the axes that it repeats."""
        target = self._builder.analysis.constant(node.inputs[1])
        assert target is not None, "others are not restricted"
        left = np.array(result, np.int64)[len(result) - target.size :]
        return np.where(target == 1, 1, left)

    def _read(self, value: ir.Value, part: IndexSets, anchor: ir.Node) -> ir.Value:
        """Return a part of a value: a version of it, or a selection from one."""
        if is_whole(part):
            return value
        constant = self._builder.analysis.constant(value) if value.producer() is None else None
        if constant is not None:
            return self._cut(constant, part, value.name or "constant")
        versions = self._made.setdefault(value, {})
        if part not in versions:
            have = self._slicing.source(value, part)
            versions[part] = self._select(versions.get(have, value), have, part, anchor)
        return versions[part]

    def _cut(self, constant: Array, part: IndexSets, name: str) -> ir.Value:
        for axis, selected in enumerate(part):
            if selected is not None:
                constant = constant.take(selected.kept, axis)
        return self._builder.constant(constant, name)

    def _select(self, value: ir.Value, have: IndexSets, want: IndexSets, anchor: ir.Node) -> ir.Value:
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
        self, value: ir.Value, axis: int, selected: IndexSet, size: int, positions: Array, anchor: ir.Node
    ) -> ir.Value:
        if selected.outer == selected.inner == 1:
            return self._take(value, axis, positions, anchor)
        dims = self._builder.analysis.known_dims(value)
        # [..., outer * size * inner, ...] -> [..., outer, size, inner, ...] -> [..., outer * kept * inner, ...]
        split = (*dims[:axis], selected.outer, size, selected.inner, *dims[axis + 1 :])
        taken = self._take(self._builder.reshape(value, split, anchor), axis + 1, positions, anchor)
        return self._builder.reshape(taken, (*dims[:axis], selected.length, *dims[axis + 1 :]), anchor)

    def _take(self, value: ir.Value, axis: int, positions: Array, anchor: ir.Node) -> ir.Value:
        """Take rows of one axis, as a Slice where they follow each other."""
        if positions.ndim == 1 and np.array_equal(positions, np.arange(positions[0], positions[0] + positions.size)):
            dims = self._builder.analysis.known_dims(value)
            dims = (*dims[:axis], positions.size, *dims[axis + 1 :])
            return self._builder.move(
                MovementOp("Slice", dims, axis, (int(positions[0]), positions.size)), value, anchor
            )
        indices = self._builder.constant(np.asarray(positions, np.int64))
        return self._builder.value("Gather", [value, indices], anchor, axis=axis)


# --- which rows are read ---------------------------------------------------------------------------------------------


class BackwardSlicing:
    """Which parts of every value of a graph are to be computed, so that the graph costs least.

    Attributes:
        versions: the parts of every value that a node makes; none where nobody reads it.
        remarks: selections that do not pay.
    """

    def __init__(self, graph: ir.Graph, analysis: Analysis) -> None:
        self.versions: dict[ir.Value, tuple[IndexSets, ...]] = {}
        self.remarks: list[Remark] = []
        self._graph, self._analysis = graph, analysis
        self._nodes = list(graph)
        self._kept_whole: set[ir.Value] = set()
        self._wanted: dict[ir.Value, dict[IndexSets, None]] = {}
        self._relations: dict[ir.Value, Relation | None] = {}
        for node in self._nodes:
            self._relations.update(zip(node.outputs, relations(node, analysis), strict=True))
        self._spread()
        while idle := self._idle() or self._unprofitable():
            self._kept_whole |= idle
            self._spread()
        self._note_barriers()

    def relation(self, output: ir.Value) -> Relation | None:
        """Return how a value follows from what its operator reads."""
        return self._relations[output]

    def is_restricted(self, value: ir.Value) -> bool:
        """Say whether anything of a value is left out, or computed apart from the rest."""
        parts = self.versions.get(value)
        if parts is None:
            return False  # no node makes it
        return any(not is_whole(part) for part in parts) or (not parts and bool(value.uses()))

    def changes(self, node: ir.Node) -> bool:
        """Say whether a node has to be written anew."""
        return any(self.is_restricted(v) for v in (*node.outputs, *node.inputs) if v is not None)

    def reads(self, output: ir.Value, part: IndexSets) -> Reads:
        """Return what a part of a result reads of each operand of its node; None where nothing."""
        node, related = output.producer(), self._relations[output]
        assert node is not None, "results have a node"
        parts = () if related is None else related.operands(part)
        found: Reads = []
        for i, value in enumerate(node.inputs):
            if value is None:
                found.append(None)
            elif i >= len(parts):
                found.append((value, whole(self._analysis.dims(value) or ())))
            else:
                read = parts[i]
                found.append(None if read is None else (value, read))
        return found

    def source(self, value: ir.Value, part: IndexSets) -> IndexSets:
        """Return the smallest part of a value that is computed and holds a given one."""
        fits = (version for version in self.versions.get(value, ()) if covers(version, part))
        everything = whole(part)
        return min(fits, key=lambda version: volume(self._analysis.known_dims(value), version), default=everything)

    def taken_from(self, value: ir.Value, part: IndexSets, take: Take) -> IndexSets:
        """Return what a Take has of its operand: the rows that it reads are not selected twice."""
        have = self.source(value, part)
        return tuple(b if i is None else h for i, b, h in zip(take.indices, part, have, strict=True))

    def _spread(self) -> None:
        self.versions = {}
        wanted: dict[ir.Value, dict[IndexSets, None]] = defaultdict(dict)
        self._wanted = wanted
        for node in reversed(self._nodes):
            for output in node.outputs:
                self.versions[output] = parts = self._parts(output, wanted[output])
                for part in parts:
                    for value, read in filter(None, self.reads(output, part)):
                        wanted[value][read] = None

    def _parts(self, output: ir.Value, wanted: Iterable[IndexSets]) -> tuple[IndexSets, ...]:
        dims, related = self._analysis.dims(output), self._relations[output]
        if dims is None or related is None or output in self._kept_whole or self._is_read_whole(output):
            return (whole(dims or ()),)
        parts = merge(dims, wanted)
        while (widened := merge(dims, map(related.widen, parts))) != parts:
            parts = widened  # two parts that can be computed may have merged to one that cannot
        return parts

    def _is_read_whole(self, value: ir.Value) -> bool:
        """Say whether a value is a result of the graph, or the graph inside an If or a Loop reads it."""
        return value.is_graph_output() or any(usage.node.graph is not self._graph for usage in value.uses())

    def _note_barriers(self) -> None:
        """Record the operators below a product that only a few rows are read of, and of which nothing is known."""
        multiplied: set[ir.Value] = set()
        for node in self._nodes:
            if node.op_type in COUNTED or any(value in multiplied for value in node.inputs):
                multiplied.update(node.outputs)
            for output in node.outputs:
                dims, is_unknown = self._analysis.dims(output), self._relations[output] is None
                if is_unknown and dims is not None and output in multiplied and not self._is_read_whole(output):
                    parts = merge(dims, self._wanted.get(output, ()))
                    if any(not is_whole(part) for part in parts):
                        reason = f"{node.op_type} is not known to keep rows apart, and few of them are read"
                        self.remarks.append(Remark(label(node), reason))

    # --- what does not pay ------------------------------------------------------------------------------------------

    def _idle(self) -> set[ir.Value]:
        """Return restricted values above which no multiply-add is saved, and that do not serve others for nothing."""
        gains: set[ir.Value] = set()
        selections: dict[ir.Value, int] = {}
        for node in self._nodes:
            for output in filter(self.is_restricted, node.outputs):
                if self._saved(output) or any(value in gains for value in node.inputs):
                    gains.add(output)
                else:
                    # Several selections of operands are worse than one of the result, which is then computed whole.
                    selections[output] = self._selections(output, selections)
        serves: set[ir.Value] = set()
        for node in reversed(self._nodes):
            if any(v in gains or v in serves for v in node.outputs):
                serves.update(v for v in node.inputs if v in selections)
        return {v for v, count in selections.items() if count > 1 or len(self.versions[v]) > 1 or v not in serves}

    def _selections(self, output: ir.Value, known: dict[ir.Value, int]) -> int:
        """Count the selections that a value needs which gains nothing, of itself and of such operands."""
        versions = self.versions[output]
        own = {selected for part in versions for selected in self._selected(output, part)}
        node = output.producer()
        assert node is not None, "it is restricted"
        return len(own) + sum(min(1, known.get(value, 0)) for value in node.inputs if value is not None)

    def _saved(self, output: ir.Value) -> int:
        """Count the multiply-adds that the operator of a value no longer does, for one sample."""
        node, dims = output.producer(), self._analysis.dims(output)
        if node is None or not dims or not (elements := volume(dims, whole(dims))):
            return 0
        inputs = [None if value is None else self._analysis.dims(value) for value in node.inputs]
        products = multiply_adds(node, inputs, dims) or 0
        # The same number for each element: of an Attention too, whose queries are multiplied with all keys.
        return products - products * sum(volume(dims, part) for part in self.versions[output]) // elements

    def _unprofitable(self) -> set[ir.Value]:
        """Return the restricted values of the selections that cost more than they save."""
        idle: set[ir.Value] = set()
        for nodes in self._components():
            outputs = [v for node in nodes for v in node.outputs if v.uses() or v.is_graph_output()]
            saved = sum(map(self._saved, outputs))
            before = sum(self._cost_of(v, whole(self._analysis.known_dims(v))) for v in outputs)
            after = sum(self._cost_of(v, part) for v in outputs for part in self.versions[v])
            selections = {
                s for output in outputs for part in self.versions[output] for s in self._selected(output, part)
            }
            after += sum(LAUNCH + self._bytes(value, part) for value, part in selections)
            if after >= before + saved / PRODUCTS_PER_BYTE:
                idle.update(filter(self.is_restricted, outputs))
                reason = f"saves {saved} multiply-adds, less than its operators and copies cost"
                self.remarks.append(Remark(label(nodes[-1]), reason))
        return idle

    def _components(self) -> list[list[ir.Node]]:
        """Return the nodes that change, those together that share restricted values."""
        parents: dict[ir.Node, ir.Node] = {}

        def root(node: ir.Node) -> ir.Node:
            while (parent := parents.setdefault(node, node)) is not node:
                parents[node] = parents.setdefault(parent, parent)  # halves the path
                node = parent
            return node

        components: dict[ir.Node, list[ir.Node]] = defaultdict(list)
        changed = [node for node in self._nodes if self.changes(node)]
        for node in changed:
            for producer in self._restricted_producers(node):
                parents[root(producer)] = root(node)
        for node in changed:
            components[root(node)].append(node)
        return list(components.values())

    def _restricted_producers(self, node: ir.Node) -> Iterator[ir.Node]:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and value is not None and self.is_restricted(value):
                yield producer

    def _cost_of(self, output: ir.Value, part: IndexSets) -> int:
        """Return what the operators cost that make a part of a value, in bytes, without their products."""
        related = self._relations[output]
        if isinstance(related, View):
            return VIEW
        if isinstance(related, Take):
            (read, *_) = self.reads(output, part)
            assert read is not None, "it takes of its first operand"
            if not takes(related, part, self.taken_from(*read, related)):
                return 0
        return LAUNCH + self._bytes(output, part)

    def _selected(self, output: ir.Value, part: IndexSets) -> Iterator[tuple[ir.Value, IndexSets]]:
        """Yield the parts that a part of a result reads and that must be selected first."""
        related = self._relations[output]
        for value, read in filter(None, self.reads(output, part)[: 1 if isinstance(related, Take) else None]):
            have = self.source(value, read)
            if isinstance(related, Take):
                read = self.taken_from(value, read, related)
            is_constant = value.producer() is None and self._analysis.constant(value) is not None
            if read != have and not is_constant:
                yield value, read

    def _bytes(self, value: ir.Value, part: IndexSets) -> int:
        fact = self._analysis[value]
        assert fact is not None, "it has been selected from"
        return math.ceil(item_bytes(fact.dtype) * volume(self._analysis.known_dims(value), part))


def takes(take: Take, part: IndexSets, have: IndexSets) -> list[tuple[int, Array]]:
    """Return the rows that must be taken of an operand for a part of the result.

    Args:
        take: the relation.
        part: what is wanted of the result.
        have: what is there of the operand, no less than is read of it.

    Returns:
        Axis of the operand and positions there, of any shape, last axis first; without axes that are as they should be.
    """
    found: list[tuple[int, Array]] = []
    for axis, rows in enumerate(take.taken(part)):
        if rows is None:
            continue
        selected = have[axis]
        positions = rows if selected is None else np.searchsorted(selected.kept, rows)
        length = sizes(take.dims, have)[axis]
        if positions.ndim != 1 or not np.array_equal(positions, np.arange(length)):
            found.insert(0, (axis, positions))
    return found
