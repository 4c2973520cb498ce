"""A graph at the level of tokens: which operators compute every token by itself, and what moves, reduces or reads them.

A value of shape ``[B, *tokens, C]`` is, for one sample, a matrix of rows, one a token, with C channels. An operator is
row-wise if row i of its result depends on row i of its operands alone: it computes the same numbers in whichever layout
the rows stand. Every other operator either permutes rows, reduces groups of them, or needs them as they stand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.lowerings import MOST_ROWS
from deploycli.exporters.graph.movement_ops import MOVEMENT, NOWHERE
from deploycli.exporters.graph.operators import REDUCTIONS
from deploycli.exporters.graph.regions import RegionMaps, find_regions
from deploycli.exporters.graph.row_relations import Links, relations
from deploycli.exporters.graph.shapes import BATCH, elements, item_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.regions import Region
    from deploycli.exporters.graph.shapes import Dims


@dataclass(frozen=True)
class RowWise:
    """A row-wise operator.

    Attributes:
        node: the operator.
        operands: positions of the operands that have rows.
        varying: positions of constants that are another number in another row.
    """

    node: ir.Node
    operands: tuple[int, ...]
    varying: tuple[int, ...] = ()

    @property
    def result(self) -> ir.Value:
        """What it makes."""
        return self.node.outputs[0]

    def values(self) -> list[ir.Value]:
        """Return the operands that have rows, each once."""
        return list(dict.fromkeys(v for i in self.operands if (v := self.node.inputs[i]) is not None))


def rows_of(dims: Dims | None) -> tuple[int, int] | None:
    """Return the rows and channels of one sample, or None where a value is no rows of a batch.

    Without a symbolic batch the whole tensor is the sample.
    """
    if dims is None or len(dims) < 2 or 0 in dims or any(d % BATCH == 0 for d in dims[1:]):
        return None
    rows = elements(dims[:-1])
    return (rows, dims[-1]) if 1 < rows <= MOST_ROWS else None


def row_wise(node: ir.Node, analysis: Analysis) -> RowWise | None:
    """Read a node as a row-wise operator, or return None: by its relation, all axes but the last are row-wise."""
    dims = analysis.dims(node.outputs[0]) if node.outputs else None
    if dims is None or rows_of(dims) is None or node.op_type in MOVEMENT:
        return None
    related, *_ = relations(node, analysis)
    if not isinstance(related, Links) or not related.free.issuperset(range(len(dims) - 1)):
        return None
    operands, varying = [], []
    for i, (value, linked) in enumerate(zip(node.inputs, related.inputs, strict=True)):
        if value is None:
            continue
        shape = analysis.dims(value)
        assert shape is not None, "it has a relation"
        places = zip(shape[:-1], linked[:-1], range(len(dims) - len(shape), len(dims) - 1), strict=True)
        is_aligned = all(dim == 1 or axis == place for dim, axis, place in places)
        if analysis.constant(value) is None:
            if not is_aligned or shape[:-1] != dims[:-1] or rows_of(shape) is None:
                return None
            operands.append(i)
        elif any(axis is not None and axis < len(dims) - 1 for axis in linked):
            if not is_aligned or not _is_one_row_each(shape, dims):
                return None
            varying.append(i)
    # Two values of one token each look aligned, but a product multiplies the rows of the one by all of the other.
    if node.op_type == "MatMul" and operands != [0]:
        return None
    return RowWise(node, tuple(operands), tuple(varying)) if operands else None


def _is_one_row_each(constant: Dims, dims: Dims) -> bool:
    """Say whether a constant has one row for each of a sample's; what repeats itself would have to be spelled out."""
    # Without a symbolic batch the first axis is one of rows.
    whole = (1, *dims[1:-1]) if dims[0] == BATCH else dims[:-1]
    fits = constant[:-1] == whole or (whole[0] == 1 and constant[:-1] == whole[1:])
    return fits and (dims[0] % BATCH != 0 or dims[0] == BATCH)


# --- the view --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A value seen as rows.

    Attributes:
        value: the value.
        dims: its shape.
        rows: rows of one sample.
        channels: elements of a row.
        itemsize: bytes of an element.
    """

    value: ir.Value
    dims: Dims
    rows: int
    channels: int
    itemsize: int


@dataclass(frozen=True)
class Permute:
    """Movement from one value to another.

    Attributes:
        source: what is moved; where it has no rows that are moved as wholes, it is read as it stands.
        result: what comes out.
        moves: for every piece of ``unit`` elements of a result row, which piece of the source it is.
        unit: elements of a piece: a row of the source, or 1.
        by_rows: pieces are rows of the source.
        fixed: the result is read where layouts cannot be told: it has to stand as it does.
        anchor: the operator that makes the result.
    """

    source: Tokens
    result: Tokens
    moves: IndexMap
    unit: int
    by_rows: bool
    fixed: bool
    anchor: ir.Node

    @cached_property
    def index(self) -> Array:
        """Which row of the source each piece of the result is, or NOWHERE; only where pieces are rows."""
        return self.moves.dense().reshape(-1)

    def pieces(self, source: Array | None, result: Array) -> IndexMap:
        """Return the map where source and result stand in other layouts; None for the layout that is."""
        if not self.by_rows:
            return self.moves.take(result, 0)
        return IndexMap.of(self.rows(source, result), self.moves.source)

    def rows(self, source: Array | None, result: Array) -> Array:
        """Return the index where source and result stand in other layouts; None for the layout that is."""
        # [rows * pieces] -> [rows, pieces] -> reordered -> flat
        moved = self.index.reshape(self.result.rows, -1)[result].reshape(-1)
        if source is None:
            return moved
        place = np.argsort(source, kind="stable")
        return np.where(moved == NOWHERE, NOWHERE, place[moved])


@dataclass(frozen=True)
class Compute:
    """A row-wise operator; its operands must all stand in one layout, in which its result then stands."""

    operator: RowWise
    operands: tuple[Tokens, ...]
    result: Tokens
    fixed: bool

    @property
    def anchor(self) -> ir.Node:
        """The operator."""
        return self.operator.node


@dataclass(frozen=True)
class FixedLayout:
    """Readers that need a value in the order in which it stood: attention, a graph output, anything not understood."""

    source: Tokens
    usages: tuple[tuple[ir.Node, int], ...]
    anchor: ir.Node


@dataclass(frozen=True)
class Reduce:
    """A reduction over groups of consecutive rows: the layout within a group does not matter."""

    source: Tokens
    group: int
    anchor: ir.Node


TokenOp: TypeAlias = "Permute | Compute | FixedLayout | Reduce"


def operands(op: TokenOp) -> tuple[Tokens, ...]:
    """Return what an operation reads."""
    return op.operands if isinstance(op, Compute) else (op.source,)


def token_view(graph: ir.Graph, analysis: Analysis) -> list[TokenOp]:
    """Return what happens to rows, in the order of the graph."""
    return _Reader(graph, analysis).ops()


class _Reader:
    def __init__(self, graph: ir.Graph, analysis: Analysis) -> None:
        self._graph = graph
        self._analysis = analysis
        self._maps = RegionMaps.of(analysis)
        self._place = {node: i for i, node in enumerate(graph)}

    def ops(self) -> list[TokenOp]:
        regions = {region.source: region for region in find_regions(self._graph, self._analysis)}
        moved = {node for region in regions.values() for node in region.nodes}
        ops: list[TokenOp] = []
        permutes: dict[ir.Value, list[Permute]] = {}
        for source, region in regions.items():
            permutes[source] = self._permutes(region)
            ops += permutes[source]
        ops += [e for node in self._graph if node not in moved and (e := self._compute(node)) is not None]
        made = [op.result for op in ops if isinstance(op, (Compute, Permute))]
        computing = {op.operator.node for op in ops if isinstance(op, Compute)}
        for tokens in made:
            read = regions.get(tokens.value)
            if read is not None and len(permutes[tokens.value]) < len(read.sinks):
                first = next(node for node in read.nodes if tokens.value in node.inputs)
                uses = [(u.node, u.idx) for u in tokens.value.uses() if u.node in read.nodes]
                ops.append(FixedLayout(tokens, tuple(uses), first))
            for usage in tokens.value.uses():
                if usage.node in moved or usage.node in computing or usage.node not in self._place:
                    continue
                ops.append(
                    self._reduce(tokens, usage.node) or FixedLayout(tokens, ((usage.node, usage.idx),), usage.node)
                )
        return sorted(ops, key=lambda op: self._place[op.anchor])

    def _tokens(self, value: ir.Value) -> Tokens:
        fact = self._analysis[value]
        assert fact is not None
        assert fact.dims is not None, "operations are on values of known shape"
        rows, channels = rows_of(fact.dims) or (1, elements(fact.dims))
        return Tokens(value, fact.dims, rows, channels, math.ceil(item_bytes(fact.dtype)))

    def _is_fixed(self, value: ir.Value) -> bool:
        """Say whether a value is read where its readers cannot be rewired: outside, or in an inner graph."""
        return value.is_graph_output() or any(reader not in self._place for reader in value.consumers())

    def _compute(self, node: ir.Node) -> Compute | None:
        operator = row_wise(node, self._analysis)
        if operator is None:
            return None
        read = tuple(self._tokens(value) for value in operator.values())
        return Compute(operator, read, self._tokens(operator.result), self._is_fixed(operator.result))

    def _permutes(self, region: Region) -> list[Permute]:
        source, found = self._tokens(region.source), []
        for sink, index_map in self._maps(region).items():
            anchor, sample = sink.producer(), None if isinstance(index_map, str) else index_map.sample()
            if sample is None or anchor is None or rows_of(self._analysis.dims(sink)) is None:
                continue
            result, unit = self._tokens(sink), source.channels
            moves = sample.reshape((result.rows, result.channels))
            by_rows = source.rows > 1 and sample.unit % unit == 0 and result.channels % unit == 0
            if by_rows:
                index = sample.rows(1, unit)
                assert index is not None, "its unit is a multiple"
                moves = IndexMap.of(index.reshape(result.rows, -1), source.rows)
            fixed = self._is_fixed(sink)
            found.append(Permute(source, result, moves, unit if by_rows else 1, by_rows, fixed, anchor))
        return found

    def _reduce(self, tokens: Tokens, node: ir.Node) -> Reduce | None:
        """Read a node as a reduction over groups of whole rows that follow one another."""
        if node.op_type not in REDUCTIONS:
            return None
        related, *_ = relations(node, self._analysis)
        if not isinstance(related, Links):
            return None
        axes = [i for i, axis in enumerate(related.inputs[0]) if axis is None]
        if axes[0] == 0 or axes != list(range(axes[0], len(tokens.dims) - 1)):
            return None
        return Reduce(tokens, math.prod(tokens.dims[axes[0] : -1]), node)
