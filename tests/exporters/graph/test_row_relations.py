"""What a relation says that an operator reads, held against what the operator computes."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from deploycli.exporters.graph import row_relations
from deploycli.exporters.graph.analysis import GROWTH, Analysis
from deploycli.exporters.graph.evaluate import evaluate
from deploycli.exporters.graph.row_relations import (
    IndexSet,
    View,
    covers,
    hull,
    is_whole,
    merge,
    relations,
    rows,
    sizes,
    volume,
    whole,
)
from deploycli.exporters.graph.shapes import BATCH, substitute
from tests.exporters.passes.graphs import END, Array, load

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.row_relations import IndexSets
    from deploycli.exporters.graph.shapes import Dims

RNG = np.random.default_rng(0)


def reals(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS: dict[str, Any] = {
    "w": reals(4, 6), "wt": reals(6, 4), "bias": reals(6), "gain": reals(4), "gains": reals(5, 4),
    "column": reals(5, 1),
    "new": reals(2, 1, 4), "indices": [[4, 0], [-1, 2]], "channels": [3, 3, 0], "zero": [0], "one": [1], "two": [2],
    "sizes": [2, 3], "heads": [2, 5, 2, 2], "tokens": [10, 4], "wide": [3, 1, 5, 4], "from": [4, 3], "to": [-9, 0],
    "at": [1, 2], "back": [-2, -1], "axis": 1, "three": [3], "end": [END],
    "least": [-END], "minus": [-1],
}  # fmt: skip

# x is [2, 5, 4]; beside each operator the axes of its result along which rows are computed one by one.
OPERATORS: dict[str, set[int]] = {
    "y = Add (x, column)": {0, 1, 2},
    "p = Less (x, column) y = Where (p, x, gain)": {0, 1, 2},
    "y = Pow (x, gain)": {0, 1, 2},
    "y = MatMul (x, w)": {0, 1, 2},
    "t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (x, t)": {0, 1, 2},
    "y = LayerNormalization (x, gain)": {0, 1},
    "y = LayerNormalization <axis: int = 1> (x, gains)": {0},
    "y = LayerNormalization <axis: int = 2> (x, gains)": {0, 1},  # each row has a gain of its own
    "y = Softmax <axis: int = -1> (x)": {0, 1},
    "y = Softmax <axis: int = 1> (x)": {0, 2},
    "y = ReduceMean <keepdims: int = 0> (x, one)": {0, 1},
    "y = ReduceMax (x, two)": {0, 1},
    "y = ReduceSum (x)": set(),
    "y = ArgMax <axis: int = 1, keepdims: int = 0> (x)": {0, 1},
    "y = Transpose <perm = [1, 2, 0]> (x)": {0, 1, 2},
    "y = Transpose (x)": {0, 1, 2},
    "y = Gather <axis: int = 1> (x, indices)": {0, 1, 2, 3},
    "y = Gather <axis: int = -1> (x, channels)": {0, 1, 2},
    "i = ArgMax <axis: int = 0> (x) y = Gather <axis: int = 0> (gains, i)": {0, 1, 2, 3},
    "y = Slice (x, from, to, at, back)": {0, 1, 2},
    "a, y = Split <axis: int = 1> (x, sizes)": {0, 1, 2},
    "y = Concat <axis: int = 1> (x, new, x)": {0, 1, 2},
    "y = Expand (x, wide)": {0, 1, 2, 3},
    "y = Reshape (x, heads)": {0, 1, 2, 3},
    "y = Flatten <axis: int = 2> (x)": {0, 1},
    "y = Unsqueeze (x, one)": {0, 1, 2, 3},
    "f = Reshape (x, tokens) y = Gemm <alpha: float = 0.5> (f, w, bias)": {0, 1},
    "f = Reshape (x, tokens) t = Transpose (f) y = Gemm <transA: int = 1, transB: int = 1> (t, wt)": {0, 1},
    "y = CumSum (x, axis)": set(),
}


def graph_of(text: str) -> ir.Graph:
    """A graph whose outputs have no shape: it follows."""
    plain = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    for output in plain.graph.output:
        output.type.tensor_type.ClearField("shape")
    words = set(re.findall(r"\w+", text))
    arrays = {name: np.asarray(value) for name, value in CONSTANTS.items() if name in words}
    plain.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return load(plain).graph


def last_node(text: str) -> tuple[ir.Node, list[Array], Analysis]:
    """Return the node that makes y, its operands, and the facts about a graph."""
    kind = "int64" if "y = ArgMax" in text else "float"
    graph = graph_of(f"g (float[2, 5, 4] x) => ({kind} y) {{ {text} }}")
    constants = {name: v.const_value.numpy() for name, v in graph.initializers.items() if v.const_value is not None}
    arrays: dict[str, Array] = {"x": reals(2, 5, 4), **constants}
    *before, node = graph
    for earlier in before:
        operands = [arrays[v.name or ""] for v in earlier.inputs if v is not None]
        arrays.update(
            zip([o.name or "" for o in earlier.outputs], evaluate(earlier, operands, {"": 20}, GROWTH), strict=True)
        )
    return node, [arrays[v.name or ""] for v in node.inputs if v is not None], Analysis(graph)


def select(array: Array, dims: Dims, part: IndexSets, batch: int = 2) -> Array:
    for axis, selected in enumerate(part):
        if selected is not None:
            split = tuple(substitute(d, batch) for d in (selected.outer, selected.size, selected.inner))
            array = array.reshape(*array.shape[:axis], *split, *array.shape[axis + 1 :]).take(selected.kept, axis + 1)
            array = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 3 :])
    assert array.shape == tuple(substitute(d, batch) for d in sizes(dims, part))
    return array


def spoilt(array: Array, dims: Dims, part: IndexSets | None) -> Array:
    """Change everything that is not read."""
    if array.dtype.kind != "f":
        return array
    kept = np.zeros(array.shape, bool)
    if part is not None:
        kept[np.ix_(*(range(d) if r is None else r.kept for r, d in zip(part, dims, strict=True)))] = True
    return np.where(kept, array, np.float32(np.nan))


def some_rows(dims: Dims, free: set[int], rng: np.random.Generator) -> IndexSets:
    kept = [rng.permutation(d)[: rng.integers(1, d + 1)] if i in free else range(d) for i, d in enumerate(dims)]
    return tuple(rows(d, map(int, k)) for d, k in zip(dims, kept, strict=True))


@pytest.mark.parametrize("text", OPERATORS)
def test_rows_follow_from_what_is_read(text: str) -> None:
    node, operands, analysis = last_node(text)
    position = next(i for i, output in enumerate(node.outputs) if output.name == "y")
    found = relations(node, analysis)[position]
    result = evaluate(node, operands, {"": 20}, GROWTH)[position]
    assert result is not None
    if found is None:
        assert not OPERATORS[text]
        return
    every = tuple(rows(d, [0]) for d in result.shape)
    free = {i for i, (a, b) in enumerate(zip(found.widen(every), every, strict=True)) if a == b and b is not None}
    assert free == {i for i in OPERATORS[text] if result.shape[i] > 1}
    rng = np.random.default_rng(1)
    for _ in range(20):
        part = some_rows(result.shape, free, rng)
        if found.widen(part) != part:
            assert isinstance(found, View)  # rows and columns of what was one axis
            continue
        reads = (*found.operands(part), *(None,) * len(operands))
        read_only = [spoilt(x, x.shape, read) for x, read in zip(operands, reads, strict=False)]
        again = evaluate(node, read_only, {"": 20}, GROWTH)[position]
        assert again is not None
        np.testing.assert_allclose(
            select(again, result.shape, part), select(result, result.shape, part), rtol=1e-6, atol=1e-6
        )


def test_a_product_reads_one_row_for_one_row() -> None:
    node, _, analysis = last_node("y = MatMul (x, w)")
    found = relations(node, analysis)[0]
    assert found is not None
    assert found.operands((None, rows(5, [3]), rows(6, [1, 4]))) == (
        (None, rows(5, [3]), None),
        (None, rows(6, [1, 4])),
    )


def test_statistics_that_are_read_too_end_the_relation() -> None:
    text = "y, mean = LayerNormalization (x, gain)"
    graph = graph_of(f"g (float[2, 5, 4] x) => (float y, float mean) {{ {text} }}")
    assert relations(graph[0], Analysis(graph))[0] is None
    graph = graph_of(f"g (float[2, 5, 4] x) => (float y) {{ {text} }}")
    assert relations(graph[0], Analysis(graph))[0] is not None


def test_samples_of_a_batch_are_not_selected() -> None:
    """Of a batch that may be of any size, the first three of all but one are no rows; all of it are."""
    parts = "p = Slice (x, zero, three, zero) q = Slice (x, end, least, zero, minus)"
    wholes = "r = Slice (x, zero, end, zero) s = Slice (x, end, least, one, minus)"
    graph = graph_of(f"g (float[batch, 5] x) => (float p, float q, float r, float s) {{ {parts} {wholes} }}")
    assert [relations(node, Analysis(graph))[0] is None for node in graph] == [True, True, False, False]


# --- views -----------------------------------------------------------------------------------------------------------


@st.composite
def views(draw: Any) -> tuple[Dims, Dims, IndexSets]:
    """Two groupings of the same factors, one of them the batch at times, and rows of the second."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    if draw(st.booleans()):
        factors.insert(draw(st.integers(0, len(factors))), BATCH)

    def grouped() -> Dims:
        cuts = sorted(draw(st.sets(st.integers(1, len(factors)))) | {0, len(factors)})
        return tuple(math.prod(factors[a:b]) for a, b in pairwise(cuts))

    source, result = grouped(), grouped()
    part = []
    for dim in result:
        if draw(st.booleans()):
            part.append(None)
            continue
        static = dim // BATCH if dim % BATCH == 0 else dim
        size = draw(st.sampled_from([k for k in range(1, static + 1) if static % k == 0]))
        kept = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
        if dim % BATCH:
            part.append(rows(dim, kept))
        else:  # the batch is on either side of the rows
            inner = draw(st.sampled_from([static // size * BATCH, 1]))
            part.append(None if len(kept) == size else IndexSet(dim // size // inner, size, inner, tuple(kept)))
    return source, result, tuple(part)


@settings(max_examples=400, deadline=None)
@given(views())
def test_a_view_of_what_is_read_is_what_was_wanted(view: tuple[Dims, Dims, IndexSets]) -> None:
    source, result, part = view
    found = View(source, result)
    wide = found.widen(part)
    assert covers(wide, part)
    assert found.widen(wide) == wide
    numbers = np.arange(math.prod(substitute(d, 2) for d in source)).reshape([substitute(d, 2) for d in source])
    (read,) = found.operands(wide)
    assert read is not None
    wanted = select(numbers.reshape([substitute(d, 2) for d in result]), result, wide)
    np.testing.assert_array_equal(select(numbers, source, read).reshape(-1), wanted.reshape(-1))


def test_tokens_and_images_on_one_axis_are_told_apart() -> None:
    """[N*B, C] -> [N, B, C], as torch.nn.MultiheadAttention writes it, and [B*N, C] -> [B, N, C]."""
    outer, inner = View((7 * BATCH, 4), (7, BATCH, 4)), View((7 * BATCH, 4), (BATCH, 7, 4))
    assert outer.operands((rows(7, [0]), None, None)) == ((IndexSet(1, 7, BATCH, (0,)), None),)
    assert inner.operands((None, rows(7, [0]), None)) == ((IndexSet(BATCH, 7, 1, (0,)), None),)


def test_rows_that_are_no_part_of_the_source_are_all_read() -> None:
    view = View((2, 3), (6,))
    assert view.widen((rows(6, [0, 3]),)) == (rows(6, [0, 3]),)
    assert is_whole(view.widen((rows(6, [0, 4]),)))


# --- index sets -------------------------------------------------------------------------------------------------------


def test_boxes_merge_where_that_costs_no_more() -> None:
    queries = (rows(6, [0]), rows(3, [0]))
    keys, values = ((None, rows(3, [r])) for r in (1, 2))
    assert merge((6, 3), [queries, keys, values]) == ((None, rows(3, [1, 2])), queries)
    halves = [(rows(6, [0, 2, 4]), None), (rows(6, [1, 3, 5]), None)]
    assert merge((6, 3), halves) == (whole((6, 3)),)
    assert merge((6, 3), []) == ()


@st.composite
def box_lists(draw: Any) -> tuple[Dims, list[IndexSets]]:
    dims = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    one = st.tuples(*(st.sets(st.integers(0, d - 1), min_size=1) for d in dims))
    return dims, [
        tuple(rows(d, k) for d, k in zip(dims, kept, strict=True)) for kept in draw(st.lists(one, max_size=5))
    ]


@settings(max_examples=300, deadline=None)
@given(box_lists())
def test_merged_boxes_cover_all_and_cost_no_more(case: tuple[Dims, list[IndexSets]]) -> None:
    dims, wanted = case
    merged = merge(dims, wanted)
    assert all(any(covers(have, part) for have in merged) for part in wanted)
    total = sum(volume(dims, part) for part in merged)
    assert total <= min(sum(volume(dims, part) for part in set(wanted)), volume(dims, whole(dims)))
    for have in merged:
        assert covers(hull(have, merged[0]), have)


def test_a_wrong_stride_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: rows of [outer, size, inner] are read as if inner stood outside."""
    real = row_relations.rows_within
    monkeypatch.setattr(
        row_relations, "rows_within", lambda dim, size, inner, kept: real(dim, size, dim // size // inner, kept)
    )
    with pytest.raises(AssertionError):
        test_a_view_of_what_is_read_is_what_was_wanted()
