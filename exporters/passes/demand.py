"""Which rows of every value are read by anybody.

From the last node to the first, each value is asked for the boxes that its readers need. A value may be computed in
several versions, each a box of its own: the queries of one token, beside the keys and values of all. Then what does not
pay is given up again: selections are pinned, that is their values are computed whole, and the question is put anew.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from deploycli.exporters.graph.lowerings import LAUNCH, VIEW
from deploycli.exporters.graph.shapes import item_bytes
from deploycli.exporters.graph.steps import Refusal
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.axes import Relation, Take, View
from deploycli.exporters.passes.boxes import Box, covers, is_whole, merge, sizes, volume, whole
from deploycli.exporters.passes.relations import relations

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Dims, Facts
    from deploycli.exporters.graph.movement_ops import Array

PRODUCTS_PER_BYTE = 8
"""Multiply-adds that take the time of moving one byte: some 10 on a CPU, 100 on a GPU that is kept busy."""

Reads: TypeAlias = "list[tuple[ir.Value, Box] | None]"
"""What is read of each operand of a node; None where nothing."""

_PRODUCTS = frozenset({"Attention", "Gemm", "MatMul"})


class Demand:
    """Which boxes of every value of a graph are to be computed, so that the graph costs least.

    Attributes:
        versions: the boxes of every value that a node makes; none where nobody reads it.
        refusals: selections that do not pay.
    """

    def __init__(self, graph: ir.Graph, facts: Facts) -> None:
        self.versions: dict[ir.Value, tuple[Box, ...]] = {}
        self.refusals: list[Refusal] = []
        self._graph, self._facts = graph, facts
        self._nodes = list(graph)
        self._pinned: set[ir.Value] = set()
        self._demanded: dict[ir.Value, dict[Box, None]] = {}
        self._relations: dict[ir.Value, Relation | None] = {}
        for node in self._nodes:
            self._relations.update(zip(node.outputs, relations(node, facts), strict=True))
        self._spread()
        while pins := self._idle() or self._unprofitable():
            self._pinned |= pins
            self._spread()
        self._note_barriers()

    def relation(self, output: ir.Value) -> Relation | None:
        """Return how a value follows from what its operator reads."""
        return self._relations[output]

    def is_restricted(self, value: ir.Value) -> bool:
        """Say whether anything of a value is left out, or computed apart from the rest."""
        boxes = self.versions.get(value)
        if boxes is None:
            return False  # no node makes it
        return any(not is_whole(box) for box in boxes) or (not boxes and bool(value.uses()))

    def changes(self, node: ir.Node) -> bool:
        """Say whether a node has to be written anew."""
        return any(self.is_restricted(v) for v in (*node.outputs, *node.inputs) if v is not None)

    def reads(self, output: ir.Value, box: Box) -> Reads:
        """Return what a box of a result reads of each operand of its node; None where nothing."""
        node, related = output.producer(), self._relations[output]
        assert node is not None, "results have a node"
        boxes = () if related is None else related.operands(box)
        found: Reads = []
        for i, value in enumerate(node.inputs):
            if value is None:
                found.append(None)
            elif i >= len(boxes):
                found.append((value, whole(self._facts.dims(value) or ())))
            else:
                read = boxes[i]
                found.append(None if read is None else (value, read))
        return found

    def source(self, value: ir.Value, box: Box) -> Box:
        """Return the smallest box of a value that is computed and holds a given one."""
        fits = (version for version in self.versions.get(value, ()) if covers(version, box))
        everything = whole(box)
        return min(fits, key=lambda version: volume(self._dims(value), version), default=everything)

    def taken_from(self, value: ir.Value, box: Box, take: Take) -> Box:
        """Return what a Take has of its operand: the rows that it reads are not selected twice."""
        have = self.source(value, box)
        return tuple(b if i is None else h for i, b, h in zip(take.indices, box, have, strict=True))

    def _spread(self) -> None:
        self.versions = {}
        demanded: dict[ir.Value, dict[Box, None]] = defaultdict(dict)
        self._demanded = demanded
        for node in reversed(self._nodes):
            for output in node.outputs:
                self.versions[output] = boxes = self._boxes(output, demanded[output])
                for box in boxes:
                    for value, read in filter(None, self.reads(output, box)):
                        demanded[value][read] = None

    def _boxes(self, output: ir.Value, demanded: Iterable[Box]) -> tuple[Box, ...]:
        dims, related = self._facts.dims(output), self._relations[output]
        if dims is None or related is None or output in self._pinned or self._is_read_whole(output):
            return (whole(dims or ()),)
        boxes = merge(dims, demanded)
        while (widened := merge(dims, map(related.widen, boxes))) != boxes:
            boxes = widened  # two boxes that can be computed may have merged to one that cannot
        return boxes

    def _is_read_whole(self, value: ir.Value) -> bool:
        """Say whether a value is a result of the graph, or the graph inside an If or a Loop reads it."""
        return value.is_graph_output() or any(usage.node.graph is not self._graph for usage in value.uses())

    def _note_barriers(self) -> None:
        """Record the operators below a product that only a few rows are read of, and of which nothing is known."""
        multiplied: set[ir.Value] = set()
        for node in self._nodes:
            if node.op_type in _PRODUCTS or any(value in multiplied for value in node.inputs):
                multiplied.update(node.outputs)
            for output in node.outputs:
                dims, is_unknown = self._facts.dims(output), self._relations[output] is None
                if is_unknown and dims is not None and output in multiplied and not self._is_read_whole(output):
                    boxes = merge(dims, self._demanded.get(output, ()))
                    if any(not is_whole(box) for box in boxes):
                        reason = f"{node.op_type} is not known to keep rows apart, and few of them are read"
                        self.refusals.append(Refusal(label(node), reason))

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
        own = {selected for box in versions for selected in self._selected(output, box)}
        node = output.producer()
        assert node is not None, "it is restricted"
        return len(own) + sum(min(1, known.get(value, 0)) for value in node.inputs if value is not None)

    def _saved(self, output: ir.Value) -> int:
        """Count the multiply-adds that the operator of a value no longer does, for one sample."""
        dims = self._facts.dims(output)
        everything = 0 if dims is None else self._products(output, [whole(dims)])
        return everything - self._products(output, self.versions[output])

    def _products(self, output: ir.Value, boxes: Iterable[Box]) -> int:
        node = output.producer()
        if node is None or node.op_type not in _PRODUCTS or node.domain != "":
            return 0
        result, (left, right, *_) = self._facts.dims(output), map(self._facts.dims, node.inputs)
        if result is None or not left or not right:
            return 0
        elements = sum(volume(result, box) for box in boxes)
        if node.op_type == "Attention":  # each query [D] by all keys, and its probabilities by all values
            return elements * right[-2] * (left[-1] + result[-1]) // result[-1]
        return elements * left[0 if node.attributes.get_int("transA", 0) else -1]

    def _unprofitable(self) -> set[ir.Value]:
        """Return the restricted values of the selections that cost more than they save."""
        pins: set[ir.Value] = set()
        for nodes in self._components():
            outputs = [v for node in nodes for v in node.outputs if v.uses() or v.is_graph_output()]
            saved = sum(map(self._saved, outputs))
            before = sum(self._cost_of(v, whole(self._dims(v))) for v in outputs)
            after = sum(self._cost_of(v, box) for v in outputs for box in self.versions[v])
            selections = {s for output in outputs for box in self.versions[output] for s in self._selected(output, box)}
            after += sum(LAUNCH + self._bytes(value, box) for value, box in selections)
            if after >= before + saved / PRODUCTS_PER_BYTE:
                pins.update(filter(self.is_restricted, outputs))
                reason = f"saves {saved} multiply-adds, less than its operators and copies cost"
                self.refusals.append(Refusal(label(nodes[-1]), reason))
        return pins

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

    def _cost_of(self, output: ir.Value, box: Box) -> int:
        """Return what the operators cost that make a box of a value, in bytes, without their products."""
        related = self._relations[output]
        if isinstance(related, View):
            return VIEW
        if isinstance(related, Take):
            (read, *_) = self.reads(output, box)
            assert read is not None, "it takes of its first operand"
            if not takes(related, box, self.taken_from(*read, related)):
                return 0
        return LAUNCH + self._bytes(output, box)

    def _selected(self, output: ir.Value, box: Box) -> Iterator[tuple[ir.Value, Box]]:
        """Yield the boxes that a box of a result reads and that must be selected first."""
        related = self._relations[output]
        for value, read in filter(None, self.reads(output, box)[: 1 if isinstance(related, Take) else None]):
            have = self.source(value, read)
            if isinstance(related, Take):
                read = self.taken_from(value, read, related)
            is_constant = value.producer() is None and self._facts.constant(value) is not None
            if read != have and not is_constant:
                yield value, read

    def _bytes(self, value: ir.Value, box: Box) -> int:
        fact = self._facts[value]
        assert fact is not None, "it has been selected from"
        return math.ceil(item_bytes(fact.dtype) * volume(self._dims(value), box))

    def _dims(self, value: ir.Value) -> Dims:
        dims = self._facts.dims(value)
        assert dims is not None, "only values of known shape are selected from"
        return dims


def takes(take: Take, box: Box, have: Box) -> list[tuple[int, Array]]:
    """Return the rows that must be taken of an operand for a box of the result.

    Args:
        take: the relation.
        box: what is wanted of the result.
        have: what is there of the operand, no less than is read of it.

    Returns:
        Axis of the operand and positions there, of any shape, last axis first; without axes that are as they should be.
    """
    found: list[tuple[int, Array]] = []
    for axis, rows in enumerate(take.taken(box)):
        if rows is None:
            continue
        selected = have[axis]
        positions = rows if selected is None else np.searchsorted(selected.kept, rows)
        length = sizes(take.dims, have)[axis]
        if positions.ndim != 1 or not np.array_equal(positions, np.arange(length)):
            found.insert(0, (axis, positions))
    return found
