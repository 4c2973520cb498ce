"""Rows keep one shape while they are worked on one by one.

Before -> after, for a network that works on [B, H, W, C] here and on [B, H*W, C] there::

    LayerNormalization [B, 56, 56, C], Reshape [B, 3136, C], MatMul, Add, Gelu, MatMul, Add, Reshape [B, 56, 56, C], Add
    -> LayerNormalization [B, 3136, C], MatMul, Add, Gelu, MatMul, Add, Add [B, 3136, C]

A normalisation over the channels, a product with a weight, a bias, an activation and the sum of two streams work on
each row of C channels by itself: the axes before the last are one list of rows to them, in whatever shape it is
written. The shapes are chosen so that fewest Reshapes are left, and so that products have three axes at most: TensorRT
adds a bias or a residual, and applies an activation, while it writes a product of two or three axes; of more, each is a
kernel. Refused, for one: another shape for a value that the graph returns, and for a sum with a constant that is not
the same for all rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.analysis import reshape_target
from deploycli.exporters.graph.builder import Builder, annotate
from deploycli.exporters.graph.operators import REDUCTIONS
from deploycli.exporters.graph.token_view import row_wise
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.shapes import Dims

_OF_ONE_RANK = frozenset({"ArgMax", "ArgMin", "Gemm", *REDUCTIONS})
"""Row-wise operators that count axes from the front, or take two."""

_DEEP = 4
"""As many Reshapes may be written as save a product from having more than three axes."""

_ROUNDS = 8
"""Improvements of single operators, after the best shape for all is found: a few suffice, and none makes it worse."""


@dataclass(eq=False)
class _Source:
    """A value with rows, whatever shapes it is read in.

    Attributes:
        value: the value itself.
        maker: the operator that makes it in any shape of rows, or None where its shape is given.
        free: it is the result of a Reshape, which can as well make another shape.
        gathered: the axes before and after those that a Gather's indices made, which could have another shape; or None.
        workers: operators that read it in the shape that they work in, with the operand's position.
        fixed: shapes that other operators read it in, each with the operators and the operand's position.
        viewers: Reshapes to something else than rows: they read any shape.
    """

    value: ir.Value
    maker: ir.Node | None
    free: bool
    gathered: tuple[Dims, Dims] | None
    workers: list[tuple[ir.Node, int]] = field(default_factory=list)
    fixed: dict[Dims, list[tuple[ir.Node, int]]] = field(default_factory=lambda: defaultdict(list))
    viewers: list[ir.Node] = field(default_factory=list)


class ShapeRows(GraphPass):
    """Let fewest Reshapes stand between operators that work on rows. Equal within a kernel's rounding."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        shaper = _Shaper(graph, analysis)
        modified = False
        for group in shaper.groups():
            modified |= shaper.shape(group)
        return modified


def _row_operands(node: ir.Node, analysis: Analysis) -> tuple[int, ...]:
    """Return the operands whose rows a node works on one by one, in whatever shape; none where it does not."""
    operator = row_wise(node, analysis)
    if operator is None or operator.varying or operator.result.is_graph_output() or node.op_type in _OF_ONE_RANK:
        return ()
    shared = [analysis.dims(value) for i, value in enumerate(node.inputs) if value and i not in operator.operands]
    most = 2 if node.op_type == "MatMul" else 1  # axes of what all rows share: with more, it is part of the shape
    return operator.operands if all(dims is not None and len(dims) <= most for dims in shared) else ()


class _Shaper:
    def __init__(self, graph: ir.Graph, analysis: Analysis) -> None:
        self._graph = graph
        self._analysis = analysis
        self._builder = Builder(graph, analysis)
        self._order: dict[ir.Node, int] = {}
        self._workers = {
            node: operands
            for node in graph
            if (operands := _row_operands(node, analysis)) and not self._is_read_inside(node.outputs[0])
        }
        self._own: dict[ir.Node, Dims] = {}
        """Shape of the rows that an operator works on."""
        self._sources: dict[ir.Value, _Source] = {}
        self._touched: dict[ir.Node, list[_Source]] = defaultdict(list)
        for node, operands in self._workers.items():
            self._own[node] = self._analysis.known_dims(node.outputs[0])[:-1]
            for value in [*(node.inputs[i] for i in operands), node.outputs[0]]:
                assert value is not None, "_row_operands looked at it"
                source = self._source(self._origin(value))
                if source not in self._touched[node]:
                    self._touched[node].append(source)

    def groups(self) -> list[list[ir.Node]]:
        """Return the operators that are connected, in the order of the graph."""
        groups: dict[ir.Node, list[ir.Node]] = {}
        seen = set[int]()
        for first in self._own:
            if first in groups:
                continue
            group: list[ir.Node] = []
            groups[first] = group
            waiting = [first]
            while waiting:
                node = waiting.pop()
                group.append(node)
                for source in self._touched[node]:
                    if id(source) in seen:  # one value may have thousands of readers
                        continue
                    seen.add(id(source))
                    for other in (source.maker, *(worker for worker, _ in source.workers)):
                        if other is not None and other not in groups:
                            groups[other] = group
                            waiting.append(other)
        return list({id(group): group for group in groups.values()}.values())

    def shape(self, group: list[ir.Node]) -> bool:
        """Choose a shape for every operator of a group, and write it."""
        sources = list({id(source): source for node in group for source in self._touched[node]}.values())
        own = {node: self._own[node] for node in group}
        cost = self._cost(sources, own) + self._deep(own, group)
        if not cost:
            return False
        near = [dims[:-1] for source in sources for dims in (self._analysis.known_dims(source.value), *source.fixed)]
        flat = [(shape[0], math.prod(shape[1:])) for shape in own.values() if len(shape) > 2]
        seen = dict.fromkeys([*own.values(), *near, *flat])
        shapes = [shape for shape in seen if reshape_target((*shape, 1)) is not None]
        chosen = dict(own)
        for shape in shapes:
            uniform = dict.fromkeys(group, shape)
            if (total := self._cost(sources, uniform) + self._deep(uniform, group)) < cost:
                chosen, cost = uniform, total
        self._improve(chosen, shapes)
        if chosen == own:
            return False
        self._write(sources, chosen)
        return True

    def _improve(self, chosen: dict[ir.Node, Dims], shapes: list[Dims]) -> None:
        """Let single operators take another shape where that saves a Reshape."""
        for _ in range(_ROUNDS):
            modified = False
            for node in chosen:
                touched, best = self._touched[node], chosen[node]
                least = self._cost(touched, chosen) + self._deep(chosen, [node])
                for shape in shapes if least else ():
                    chosen[node] = shape
                    total = self._cost(touched, chosen) + self._deep(chosen, [node])
                    if total < least:
                        best, least, modified = shape, total, True
                chosen[node] = best
            if not modified:
                return

    def _cost(self, sources: list[_Source], chosen: Mapping[ir.Node, Dims]) -> int:
        """Count the Reshapes that give every reader the shape it reads."""
        return sum(len(self._needed(source, chosen)) for source in sources)

    def _deep(self, chosen: Mapping[ir.Node, Dims], group: list[ir.Node]) -> int:
        """Return what products of more than three axes cost, in Reshapes."""
        return _DEEP * sum(node.op_type == "MatMul" and len(chosen[node]) > 2 for node in group)

    def _needed(self, source: _Source, chosen: Mapping[ir.Node, Dims]) -> set[Dims]:
        """Return the shapes that a value must be brought into."""
        dims = self._analysis.known_dims(source.value)
        needed = {(*chosen[node], dims[-1]) for node, _ in source.workers} | set(source.fixed)
        own = dims if source.maker is None else (*chosen[source.maker], dims[-1])
        if source.free:
            return needed
        if source.gathered is not None and own not in needed:
            head, tail = source.gathered
            fitting = sorted(d for d in needed if d[: len(head)] == head and d[len(d) - len(tail) :] == tail)
            return needed - set(fitting[:1])  # the indices take this shape when movement is folded
        return needed - {own}

    def _write(self, sources: list[_Source], chosen: Mapping[ir.Node, Dims]) -> None:
        """Bring the values into the shapes that were chosen; operators are rewired in the order of the graph."""
        made: dict[tuple[int, Dims], ir.Value] = {}
        readings: list[tuple[ir.Node, int, _Source, Dims | None]] = []
        for source in sources:
            channels = self._analysis.known_dims(source.value)[-1]
            readings += [(node, i, source, (*chosen[node], channels)) for node, i in source.workers]
            readings += [(node, i, source, dims) for dims, uses in source.fixed.items() for node, i in uses]
            readings += [(node, 0, source, None) for node in source.viewers]
        if any(node not in self._order for node, *_ in readings):  # nodes are inserted, none is ever moved
            self._order = {node: i for i, node in enumerate(self._graph)}
        for node, position, source, dims in sorted(readings, key=lambda r: (self._order[r[0]], r[1])):
            if dims is None:
                self._look(node, source)
                continue
            node.replace_input_with(position, self._view(source, dims, node, made))
            if node in chosen:
                if "axis" in node.attributes:  # counted from the start, it would be another one
                    node.attributes["axis"] = ir.AttrInt64("axis", -1)
                self._analysis.infer(node)
                annotate(node.outputs[0], self._analysis)

    def _view(self, source: _Source, dims: Dims, anchor: ir.Node, made: dict[tuple[int, Dims], ir.Value]) -> ir.Value:
        """Return a value in another shape."""
        value = source.value
        if self._analysis.known_dims(value) == dims:
            return value
        key = (id(source), dims)
        if key not in made:
            producer = value.producer()
            origin = producer.inputs[0] if source.free and producer is not None else value
            assert origin is not None, "a Reshape has an operand"
            made[key] = self._builder.reshape(origin, dims, anchor)
        return made[key]

    def _look(self, node: ir.Node, source: _Source) -> None:
        """Let a Reshape read a value in the shape that it has."""
        target = reshape_target(self._analysis.known_dims(node.outputs[0]))
        assert target is not None, "_source looked at it"
        node.replace_input_with(0, source.value)
        node.replace_input_with(1, self._builder.constant(np.array(target, np.int64)))

    def _origin(self, value: ir.Value) -> ir.Value:
        """Return what a value is a view of, as far as the rows stay rows."""
        while (node := value.producer()) is not None and self._keeps_rows(node):
            source = node.inputs[0]
            assert source is not None, "a Reshape has an operand"
            value = source
        return value

    def _keeps_rows(self, node: ir.Node) -> bool:
        """Say whether a node is a Reshape between two lists of the same rows."""
        if node.op_type != "Reshape" or node.domain != "" or node.outputs[0].is_graph_output():
            return False
        before, after = self._analysis.dims(node.inputs[0]), self._analysis.dims(node.outputs[0])
        if before is None or after is None or 0 in before or self._is_read_inside(node.outputs[0]):
            return False
        return min(len(before), len(after)) > 1 and before[-1] == after[-1]

    def _is_read_inside(self, value: ir.Value) -> bool:
        """Say whether a branch or a loop reads a value."""
        return any(reader.graph is not self._graph for reader in value.consumers())

    def _source(self, value: ir.Value) -> _Source:
        """Return who makes a value and who reads it, through views that keep the rows."""
        if value in self._sources:
            return self._sources[value]
        node = value.producer()
        maker = node if node in self._workers else None
        free = node is not None and self._takes_any_shape(node) and not value.is_graph_output()
        free = free and not self._is_read_inside(value)
        source = self._sources[value] = _Source(value, maker, free, self._gathered(node))
        for read in self._views(value):
            for reader, position in read.uses():
                if reader.graph is not self._graph or (self._keeps_rows(reader) and position == 0):
                    continue
                if position in self._workers.get(reader, ()):
                    source.workers.append((reader, position))
                elif self._takes_any_shape(reader) and position == 0:
                    source.viewers.append(reader)
                else:
                    source.fixed[self._analysis.known_dims(read)].append((reader, position))
        return source

    def _gathered(self, node: ir.Node | None) -> tuple[Dims, Dims] | None:
        """Return the axes of a gathered value before and after those of the indices."""
        if node is None or node.op_type != "Gather" or node.domain != "" or not self._analysis.only_moves(node):
            return None
        dims, indices = self._analysis.dims(node.outputs[0]), self._analysis.dims(node.inputs[1])
        if dims is None or not indices:
            return None
        axis = node.attributes.get_int("axis", 0) % (len(dims) - len(indices) + 1)
        return dims[:axis], dims[axis + len(indices) :]

    def _views(self, value: ir.Value) -> Iterator[ir.Value]:
        """Yield a value and its views that keep the rows."""
        yield value
        for reader, position in value.uses():
            if position == 0 and self._keeps_rows(reader):
                yield from self._views(reader.outputs[0])

    def _takes_any_shape(self, node: ir.Node) -> bool:
        """Say whether a node is a Reshape whose result does not depend on its operand's shape."""
        dims = self._analysis.dims(node.outputs[0])
        target = self._analysis.constant(node.inputs[1]) if node.op_type == "Reshape" and node.domain == "" else None
        return target is not None and dims is not None and 0 not in dims and reshape_target(dims) is not None
