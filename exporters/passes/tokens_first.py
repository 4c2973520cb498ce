"""The tokens of an attention stand first, the batch behind them: query, key and value are then read in place.

Before -> after, for windows of N tokens, G of them in a batch of samples of L tokens, h heads of d channels::

    x [B, L, C]: LN, MatMul(W [C, 3C]), Reshape, Transpose, Split -> q, k, v [G, h, N, d]; .. -> [B, L, C]
    -> x [N, G, C]: LN, MatMul(Wq), Reshape [N, G, h, d], Transpose [1, 2, 0, 3] -> q; k, v alike; .. -> [N, G, C]

TensorRT's fused attention reads an operand in place where one stride counts windows and heads: in [N, G, h, d] it does,
in [B, L, h, d] it does not. Three products by constants of one value are one kernel, each part of whose result is such
an operand, if nothing is added to them. :mod:`~deploycli.exporters.passes.fold_bias` comes before; what it leaves, as
there is no LayerNormalization in front that nothing else reads, is taken out here: what a key's bias adds is the same
for all keys, which a Softmax does not see; probabilities add up to one, so a value's bias goes through the projection
behind the attention into its bias; and a query's is a number for each key, ``sum_d k_d b_d``, that is added to the
scores. A product that is cut by a Split is copied, and so is one whose rows stand window by window.

What works row by row (normalisation, products by constants, residuals) works in whichever layout it finds its rows; so
a value is brought into the layout of an attention where that is asked for first, in front of its LayerNormalization,
and stays in it until something reads it otherwise: the next blocks of a ViT, and the MLP behind an attention. Where the
order of tokens changes, one kernel moves and normalises.

Equal within the rounding of a kernel that blocks its rows in another way: columns of weights are chosen, and rows
stand elsewhere. Refused, for one: a query that is changed after its projection (rotary embedding, cosine attention).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.attention import (
    IN_PLACE,
    TURNED_IN_PLACE,
    Attention,
    find_attention,
    is_product_of_activations,
    is_read_in_place,
)
from deploycli.exporters.graph.builder import Builder, annotate, let_read, replace
from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.operators import ELEMENTWISE, REDUCTIONS, is_onnx, only_reader, operand
from deploycli.exporters.graph.projections import Bias, bias_of
from deploycli.exporters.graph.regions import moved, moves_one
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.token_view import RowWise, row_wise
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.common.tidy import sweep
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.shapes import Dims

_MOST_STEPS = 8
"""Operators between the two products of an attention and its Softmax."""

_ANY_RANK = ELEMENTWISE | {"LayerNormalization", "MatMul"}
"""Row-wise operators that take rows of any number of axes as they are."""

BATCH_FIRST = 0
"""The layout in which values stand elsewhere; any other layout is the number of tokens that stand first."""


class TokensFirst(GraphPass):
    """Let attentions read query, key and value in place. Equal within rounding."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        attentions = []
        for node in graph:
            if is_onnx(node, "Softmax"):
                found = _find(node, analysis)
                if isinstance(found, str):
                    self.remarks.append(Remark(label(node), found))
                elif found is not None:
                    attentions.append(found)
        if attentions:
            _Writer(Builder(graph, analysis), attentions).write()
            sweep(graph)
        return bool(attentions)


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Queries, keys or values: heads of a projection.

    Attributes:
        result: what the projection gives; its rows are those of the sample in their order, window by window.
        product: ``MatMul(x, W)``.
        columns: which column of W each head has, [h, d].
        bias: what is added to them, [h, d], or None.
        windows: G, of the whole batch.
        tokens: N, of a window.
    """

    result: ir.Value
    product: ir.Node
    columns: Array
    bias: Array | None
    windows: int
    tokens: int

    @property
    def x(self) -> ir.Value:
        """What is projected, [B, L, C]."""
        value = self.product.inputs[0]
        assert value is not None, "a MatMul has two operands"
        return value


@dataclass(frozen=True)
class ProjectedAttention:
    """An attention whose operands are heads of projections.

    Attributes:
        softmax: the Softmax.
        scores: ``MatMul(q, k^T)``.
        mix: ``MatMul(probabilities, v)``.
        queries: q.
        keys: k.
        values: v.
        result: the heads side by side, [B, L, h*d], as moved from what ``mix`` gives.
        bias: that of the projection behind it, where a value's goes; None where it has none.
    """

    softmax: ir.Node
    scores: ir.Node
    mix: ir.Node
    queries: Heads
    keys: Heads
    values: Heads
    result: ir.Value
    bias: Bias | None


def _find(softmax: ir.Node, analysis: Analysis) -> ProjectedAttention | str | None:
    """Read the attention around a Softmax; None where there is none, or why its operands are not heads."""
    attention = find_attention(
        softmax,
        lambda node: _leads(node, analysis),
        lambda node: is_product_of_activations(node, analysis),
        _MOST_STEPS,
    )
    if attention is None or attention.probability != 0:
        return None
    (q, k), v = attention.scores.inputs, attention.mix.inputs[1]
    assert q is not None, "a MatMul has two operands"
    assert k is not None, "a MatMul has two operands"
    assert v is not None, "a MatMul has two operands"
    if all(_is_in_place(value, analysis) for value in (q, k, v)):
        return None
    found = (_read_heads(q, analysis), _read_heads(k, analysis, turned=True), _read_heads(v, analysis))
    for name, each in zip(("query", "key", "value"), found, strict=True):
        if isinstance(each, str):
            return f"its {name} {each}"
    queries, keys, values = (each for each in found if isinstance(each, Heads))
    alike = {(each.windows, each.columns.shape) for each in (queries, keys, values)}
    if len(alike) > 1 or keys.tokens != values.tokens:
        return "query, key and value are not of the same windows and heads"
    if not _is_read_by(attention, (queries, keys, values), analysis):
        return "its projection is read elsewhere too"
    if _multiplies_more((queries, keys, values)):
        return "heads share the columns of a projection"
    if not _is_one_to_one(attention, queries, keys, analysis):
        return "a query meets keys of other heads or windows"
    result = _read_result(attention, queries, analysis)
    if result is None:
        return "its heads are not put side by side"
    if keys.bias is not None and not all(_is_alike_for_keys(step.node, analysis) for step in attention.before):
        return "its key has a bias, and its scores are not only scaled and added to"
    bias = _bias_behind(result, analysis)
    if values.bias is not None and (bias is None or any(step.node.op_type != "Reshape" for step in attention.after)):
        return "its value has a bias, and no projection with one follows"
    return ProjectedAttention(softmax, attention.scores, attention.mix, queries, keys, values, result, bias)


def _is_alike_for_keys(node: ir.Node, analysis: Analysis) -> bool:
    """Say whether an operator on scores leaves what is the same for all keys of a query the same for all of them."""
    if is_onnx(node, "Add", "Reshape"):
        return True
    dims = analysis.dims(node.outputs[0])
    others = [analysis.dims(value) for value in node.inputs if analysis.dims(value) != dims]
    return is_onnx(node, "Div", "Mul") and all(other is not None and other[-1:] in ((), (1,)) for other in others)


def _bias_behind(result: ir.Value, analysis: Analysis) -> Bias | None:
    """Return the bias of the one projection that reads heads side by side."""
    node = only_reader(result)
    if node is None or not is_onnx(node, "MatMul") or node.inputs[0] is not result:
        return None
    weight, bias = analysis.constant(node.inputs[1]), bias_of(node, analysis)
    is_row = weight is not None and weight.ndim == 2 and bias is not None and bias.numbers.ndim == 1
    return bias if is_row else None


def _is_read_by(attention: Attention, operands: Iterable[Heads], analysis: Analysis) -> bool:
    """Say whether an attention is all that reads the projections of its operands."""
    mine = {(attention.scores, 0), (attention.scores, 1), (attention.mix, 1)}
    return all(set(_moved_readers(each.result, analysis)) <= mine for each in operands)


def _multiplies_more(operands: Iterable[Heads]) -> bool:
    """Say whether a product for each operand has more columns than there were: heads that share theirs were copied."""
    columns: dict[ir.Node, list[Array]] = {}
    for each in operands:
        columns.setdefault(each.product, []).append(each.columns.reshape(-1))
    return any(len(np.unique(found)) < len(found) for found in map(np.concatenate, columns.values()))


def _is_one_to_one(attention: Attention, queries: Heads, keys: Heads, analysis: Analysis) -> bool:
    """Say whether a product of the attention has one pair of operands a head and window: none is broadcast."""
    ways = (queries.windows, len(queries.columns))
    shape = (queries.tokens, keys.tokens)
    return all(
        dims is not None and dims[-2:] == shape and math.prod(dims[:-2]) == math.prod(ways)
        for dims in map(analysis.dims, (attention.scores.outputs[0], attention.mix.inputs[0]))
    )


def _is_in_place(value: ir.Value, analysis: Analysis) -> bool:
    origin, _ = _origin(value, analysis)
    return (product := origin.producer()) is not None and is_read_in_place(product, analysis)


def _leads(node: ir.Node, analysis: Analysis) -> tuple[int, ...] | None:
    """Return through which operands the way from a Softmax leads on: element by element, and through views."""
    if node.domain != "":
        return None
    if node.op_type == "Reshape":
        return (0,)
    if node.op_type not in ELEMENTWISE:
        return None
    return tuple(i for i, value in enumerate(node.inputs) if value is not None and analysis.constant(value) is None)


def _read_heads(value: ir.Value, analysis: Analysis, *, turned: bool = False) -> Heads | str:
    """Read a value [.., N, d] (``turned``: [.., d, N]) as heads of a projection, or say why it is none."""
    origin, way = _origin(value, analysis)
    (product, bias), dims = _product_of(origin, analysis), analysis.dims(origin)
    if product is None or not is_onnx(product, "MatMul"):
        return f"comes from {'an input' if product is None else product.op_type}, not straight from a product"
    weight = analysis.constant(product.inputs[1])
    if weight is None or weight.ndim != 2 or dims is None or len(dims) < 3:
        return "is not projected by constants, row by row"
    total, length = math.prod(dims[:-1]), math.prod(dims[1:-1])
    try:
        rows = IndexMap.coordinate((total, dims[-1]), 0).reshape(dims)
        channel, row = (_follow(way, start, analysis) for start in (IndexMap.coordinate(dims, len(dims) - 1), rows))
        if turned:
            channel, row = (each.swapaxes(-1, -2) for each in (channel, row))
        tokens, size = channel.shape[-2:]
        windows = total // tokens
        heads, rest = divmod(math.prod(channel.shape[:-2]), windows)
        if rest or length % tokens:
            return "does not have every token of a window once"
        shape = (windows, heads, tokens, size)
        of_heads = channel.reshape(shape).block()
        in_windows = IndexMap.identity((windows, tokens)).reshape((windows, 1, tokens, 1)).broadcast_to(shape)
        if row.reshape(shape).key != in_windows.key:
            return "does not have the tokens of a window one after the other"
        if of_heads.shape[0] != 1 or of_heads.shape[2] != 1:
            return "is not of the same channels in every token"
        columns = np.broadcast_to(of_heads.dense().reshape(of_heads.shape[1], of_heads.shape[3]), (heads, size))
    except ValueError as error:
        return str(error)
    own = None if bias is None or not bias[columns].any() else bias[columns]
    return Heads(origin, product, columns, own, windows, tokens)


def _product_of(origin: ir.Value, analysis: Analysis) -> tuple[ir.Node | None, Array | None]:
    """Return what makes a value, seen through the sum with a bias, and the bias, [M]."""
    node = origin.producer()
    for value in () if node is None else node.inputs:
        product = None if value is None else value.producer()
        if product is not None and is_onnx(product, "MatMul"):
            bias = bias_of(product, analysis)
            if bias is not None and bias.add is node:
                return product, bias.numbers.reshape(-1)
    return node, None


def _read_result(attention: Attention, queries: Heads, analysis: Analysis) -> ir.Value | None:
    """Return the last value in which the heads of a token stand side by side, [B, L, h*d]; None where none does."""
    (h, d), tokens, windows = queries.columns.shape, queries.tokens, queries.windows
    value = attention.mix.outputs[0]
    mixed = analysis.dims(value)
    if mixed is None or math.prod(mixed) != windows * h * tokens * d:
        return None
    wanted = IndexMap.identity((windows, h, tokens, d)).transpose(0, 2, 1, 3)
    index_map, result = IndexMap.identity(mixed), None
    while True:
        dims = analysis.dims(value)
        is_of_tokens = dims is not None and len(dims) > 2 and dims[-1] == h * d and math.prod(dims) == math.prod(mixed)
        if dims is not None and is_of_tokens and index_map.key == wanted.reshape(dims).key:
            result = value
        readers = list(value.consumers())
        if value.is_graph_output() or len(readers) != 1 or not moves_one(readers[0], analysis):
            return result
        try:
            (index_map,) = moved(readers[0], {value: index_map}, analysis)
        except ValueError:
            return result
        value = readers[0].outputs[0]


def _origin(value: ir.Value, analysis: Analysis) -> tuple[ir.Value, list[tuple[ir.Node, int]]]:
    """Return what a value was before it was moved, and the operators on the way with their outputs, in order."""
    way: list[tuple[ir.Node, int]] = []
    while (node := value.producer()) is not None and moves_one(node, analysis):
        way.insert(0, (node, list(node.outputs).index(value)))
        source = node.inputs[0]
        assert source is not None, "movement has an operand"
        value = source
    return value, way


def _follow(way: list[tuple[ir.Node, int]], index_map: IndexMap, analysis: Analysis) -> IndexMap:
    for node, output in way:
        assert node.inputs[0] is not None, "movement has an operand"
        index_map = moved(node, {node.inputs[0]: index_map}, analysis)[output]
    return index_map


def _moved_readers(value: ir.Value, analysis: Analysis) -> Iterator[tuple[ir.Node | None, int]]:
    """Yield what reads a value, through all movement; None for a graph output."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            yield None, 0
        for reader, position in value.uses():
            if position == 0 and moves_one(reader, analysis):
                waiting += reader.outputs
            else:
                yield reader, position


# --- writing ---------------------------------------------------------------------------------------------------------


class _Writer:
    """Goes through a graph in its order, and keeps every value in the layouts that it has been asked for in."""

    def __init__(self, builder: Builder, attentions: list[ProjectedAttention]) -> None:
        self._builder = builder
        self._analysis = builder.analysis
        self._scores = {each.scores: each for each in attentions}
        self._mixes = {each.mix: each for each in attentions}
        self._projections: dict[ir.Node, list[tuple[Heads, tuple[ir.Node, int]]]] = {}
        for each in attentions:
            for heads, reader in _readers_of(each):
                self._projections.setdefault(heads.product, []).append((heads, reader))
        self._heads: dict[tuple[ir.Node, int], ir.Value] = {}
        self._operators = {node: row_wise(node, self._analysis) for node in builder.graph}
        self._dims: dict[ir.Value, Dims] = {}
        self._at_hand: dict[ir.Value, dict[int, ir.Value]] = {}
        self._wanted = self._find_wanted(attentions)

    def write(self) -> None:
        """Rewrite the graph."""
        for node in list(self._builder.graph):
            if node in self._projections:
                self._write_projection(node)
            elif node in self._scores:
                self._write_scores(self._scores[node])
            elif node in self._mixes:
                self._write_mix(self._mixes[node])
            else:
                self._write_node(node)

    def _find_wanted(self, attentions: list[ProjectedAttention]) -> Mapping[ir.Value, int]:
        """Return in which layout values are asked for first: what attentions project, and what that is made of."""
        wanted: dict[ir.Value, int] = {}
        for each in attentions:
            for heads, _ in _readers_of(each):
                value = heads.x
                while value not in wanted:
                    wanted[value] = heads.tokens
                    producer = value.producer()
                    operator = None if producer is None else self._operators.get(producer)
                    if operator is None or operator.varying or len(operator.values()) != 1:
                        break
                    (value,) = operator.values()
        return wanted

    # --- attention ---

    def _write_projection(self, product: ir.Node) -> None:
        """Project tokens to the heads of each operand, without a bias, and turn them: they are read in place."""
        weight = self._analysis.constant(product.inputs[1])
        assert weight is not None, "_read_heads looked at it"
        for heads, reader in self._projections[product]:
            part = self._builder.constant(weight[:, heads.columns.reshape(-1)])
            h, d = heads.columns.shape
            # [N, G, C] -> [N, G, h*d] -> [N, G, h, d] -> [G, h, N, d], keys to [G, h, d, N]
            x = self._get(heads.x, heads.tokens, product)
            projected = self._builder.value("MatMul", [x, part], product)
            shaped = self._builder.reshape(projected, (heads.tokens, heads.windows, h, d), product)
            is_key = reader[0] in self._scores and reader[1] == 1
            perm = list(TURNED_IN_PLACE if is_key else IN_PLACE)
            self._heads[reader] = self._builder.value("Transpose", [shaped], product, perm=perm)

    def _write_scores(self, each: ProjectedAttention) -> None:
        """Multiply queries by keys, both read in place, and give the scores the shape that they had."""
        queries, keys = self._heads[each.scores, 0], self._heads[each.scores, 1]
        scores = self._builder.value("MatMul", [queries, keys], each.scores)
        if each.queries.bias is not None:
            scores = self._builder.value("Add", [scores, self._of_keys(each, keys)], each.scores)
        replace(each.scores.outputs[0], self._reshaped(scores, self._dims_of(each.scores.outputs[0]), each.scores))

    def _of_keys(self, each: ProjectedAttention, keys: ir.Value) -> ir.Value:
        """Return what the bias of the queries adds to the scores of every key, [G, h, 1, N]."""
        assert each.queries.bias is not None, "callers have looked"
        bias = self._builder.constant(each.queries.bias[:, :, None])  # [h, d, 1]
        scaled = self._builder.value("Mul", [keys, bias], each.scores)
        axes = self._builder.constant(np.array([-2], np.int64))
        return self._builder.value("ReduceSum", [scaled, axes], each.scores, keepdims=1)

    def _add_to_bias(self, each: ProjectedAttention) -> None:
        """Let the projection behind an attention add what the bias of its values gives."""
        if each.values.bias is None or each.bias is None:
            return
        product = each.bias.add.inputs[1 - each.bias.position]
        made = None if product is None else product.producer()
        weight = None if made is None else self._analysis.constant(made.inputs[1])
        assert weight is not None, "_bias_behind looked at it"
        moved = each.values.bias.astype(np.float64).reshape(-1) @ weight.astype(np.float64)
        numbers = (each.bias.numbers.astype(np.float64) + moved).astype(each.bias.numbers.dtype)
        let_read(each.bias.add, each.bias.position, self._builder.constant(numbers))

    def _write_mix(self, each: ProjectedAttention) -> None:
        """Multiply probabilities by values, and put the heads side by side, tokens first."""
        (h, d), windows = each.values.columns.shape, each.values.windows
        probabilities = each.mix.inputs[0]
        assert probabilities is not None, "a MatMul has two operands"
        shape = (windows, h, each.queries.tokens, each.values.tokens)
        operands = [self._reshaped(probabilities, shape, each.mix), self._heads[each.mix, 1]]
        mixed = self._builder.value("MatMul", operands, each.mix)
        # [G, h, N, d] -> [N, G, h, d] -> [N, G, h*d]
        turned = self._builder.value("Transpose", [mixed], each.mix, perm=[2, 0, 1, 3])
        result = self._builder.reshape(turned, (each.queries.tokens, windows, h * d), each.mix)
        dims = self._dims_of(each.result)
        self._at_hand[each.result] = at_hand = {each.queries.tokens: result}
        if not self._is_free(each.result):
            made = self._get(each.result, BATCH_FIRST, each.mix)
            self._dims[made], self._at_hand[made] = dims, at_hand
            replace(each.result, made)
        self._add_to_bias(each)

    def _reshaped(self, value: ir.Value, dims: Dims, anchor: ir.Node) -> ir.Value:
        return value if self._analysis.dims(value) == dims else self._builder.reshape(value, dims, anchor)

    # --- other operators ---

    def _write_node(self, node: ir.Node) -> None:
        """Let an operator read its operands in the layout that suits it."""
        operator = self._operators.get(node)
        if operator is not None:
            layout = self._choose(operator)
            if layout != BATCH_FIRST:
                self._compute(operator, layout)
                return
        elif self._select(node):
            return
        for position, value in enumerate(node.inputs):
            if value is not None and value in self._at_hand:
                let_read(node, position, self._get(value, BATCH_FIRST, node))

    def _choose(self, operator: RowWise) -> int:
        """Return the layout to compute in: the one that most operands are in, or that an attention asks for."""
        values, result = operator.values(), operator.result
        rank = len(self._dims_of(result))
        if (
            operator.varying
            or rank < 3
            or not self._is_free(result)
            or (rank > 3 and not self._takes_any_rank(operator))
        ):
            return BATCH_FIRST
        have = [set(self._at_hand.get(value, ())) for value in values]
        wanted = self._wanted.get(result, BATCH_FIRST)
        if len(values) == 1 and wanted != BATCH_FIRST:
            return wanted
        layouts = sorted(set[int]().union(*have) - {BATCH_FIRST})
        return max(layouts, key=lambda n: (sum(n in each for each in have), n == wanted), default=BATCH_FIRST)

    def _takes_any_rank(self, operator: RowWise) -> bool:
        """Say whether an operator makes rows of three axes where its operands have three, though they had more."""
        shared = [v for i, v in enumerate(operator.node.inputs) if v is not None and i not in operator.operands]
        return operator.node.op_type in _ANY_RANK and all(len(self._dims_of(value)) <= 3 for value in shared)

    def _compute(self, operator: RowWise, layout: int) -> None:
        """Compute an operator in a layout."""
        node = operator.node
        for position in operator.operands:
            value = node.inputs[position]
            assert value is not None, "it has rows"
            let_read(node, position, self._get(value, layout, node))
        if "axis" in node.attributes:  # the last one: a row-wise operator has no other
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
        self._turn(node, layout)

    def _select(self, node: ir.Node) -> bool:
        """Let tokens be chosen or summed up on axis 0, where all of a sample stand first; say whether they are."""
        value = operand(node, 0)
        layouts = {} if value is None else self._at_hand.get(value, {})
        dims = () if value is None else self._dims_of(value)
        result = self._dims_of(node.outputs[0])
        if len(dims) != 3 or dims[1] not in layouts or not result:
            return False
        if len(result) == 3 and not self._is_free(node.outputs[0]):
            return False
        axes = 3 if node.op_type == "Slice" else 1
        if is_onnx(node, "Slice", *REDUCTIONS) and _is_number(self._analysis.constant(operand(node, axes)), 1):
            let_read(node, axes, self._builder.constant(np.array([0], np.int64)))
        elif is_onnx(node, "Gather") and node.attributes.get_int("axis", 0) in (1, -2) and len(result) < 4:
            node.attributes["axis"] = ir.AttrInt64("axis", 0)
        else:
            return False
        let_read(node, 0, layouts[dims[1]])
        if len(result) == 3:
            self._turn(node, result[1])
        return True

    def _is_free(self, result: ir.Value) -> bool:
        """Say whether every reader of a value can be given another one."""
        graph = self._builder.graph
        return not result.is_graph_output() and all(reader.graph is graph for reader in result.consumers())

    def _turn(self, node: ir.Node, layout: int) -> None:
        """Note that what a node makes stands in a layout now."""
        (result,) = (output for output in node.outputs if output.name)
        self._dims_of(result)
        self._analysis.infer(node)
        annotate(result, self._analysis)
        self._at_hand[result] = {layout: result}

    # --- layouts ---

    def _dims_of(self, value: ir.Value) -> Dims:
        """Return the shape that a value has batch first, () where it is not known."""
        return self._dims.setdefault(value, self._analysis.dims(value) or ())

    def _get(self, value: ir.Value, layout: int, anchor: ir.Node) -> ir.Value:
        """Return a value in a layout, brought into it before the anchor if it has to be."""
        dims = self._dims_of(value)
        have = self._at_hand.setdefault(value, {BATCH_FIRST: value})
        if layout in have:
            return have[layout]
        batch, length, channels = dims[0], math.prod(dims[1:-1]), dims[-1]
        if layout == BATCH_FIRST:
            made = next(iter(have.values()))
            # [N, G, C] -> [G, N, C] -> [B, .., C]
            have[layout] = self._reshaped(
                self._builder.value("Transpose", [made], anchor, perm=[1, 0, 2]), dims, anchor
            )
        else:
            # [B, .., C] -> [G, N, C] -> [N, G, C]
            windows = (batch * length // layout, layout, channels)
            made = self._reshaped(self._get(value, BATCH_FIRST, anchor), windows, anchor)
            have[layout] = self._builder.value("Transpose", [made], anchor, perm=[1, 0, 2])
        return have[layout]


def _readers_of(each: ProjectedAttention) -> tuple[tuple[Heads, tuple[ir.Node, int]], ...]:
    """Return the operands of an attention, and which operand of which product they are."""
    return (each.queries, (each.scores, 0)), (each.keys, (each.scores, 1)), (each.values, (each.mix, 1))


def _is_number(constant: Array | None, number: int) -> bool:
    return constant is not None and constant.size == 1 and int(constant.reshape(())) == number
