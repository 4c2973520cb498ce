from __future__ import annotations

import re
import tracemalloc
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploycli.exporters.graph.analysis import SCRATCH, Analysis
from deploycli.exporters.graph.shapes import BATCH
from tests.exporters.passes.graphs import load, parse

B = BATCH


def fact(text: str, name: str, **constants: Any) -> Any:
    model = load(parse(text, **constants))
    analysis = Analysis(model.graph)
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    return analysis[next(value for value in values if value.name == name)]


@pytest.mark.parametrize(
    ("node", "dims"),
    [
        ("Relu (x)", (B, 6, 4)),
        ("Transpose <perm: ints = [1, 2, 0]> (x)", (6, 4, B)),
        ("Reshape (x, merged)", (6 * B, 4)),
        ("Reshape (x, flat)", (24 * B,)),
        ("Flatten (x)", (B, 24)),
        ("Concat <axis: int = 0> (x, x)", (2 * B, 6, 4)),
        ("Expand (x, two)", (2, B, 6, 4)),
        ("Conv <kernel_shape: ints = [1], strides: ints = [2]> (x, kernel)", (B, 5, 2)),
        ("MatMul (x, weight)", (B, 6, 7)),
        ("Slice (x, zero, end, zero)", (B, 6, 4)),
        ("Slice (x, zero, one, zero)", (1, 6, 4)),
        ("Gather <axis: int = 0> (x, i0)", (6, 4)),
        ("Shape (x)", (3,)),
        ("Size (x)", ()),
    ],
)
def test_shapes_are_multiples_of_the_batch(node: str, dims: tuple[int, ...]) -> None:
    found = fact(
        f"g (float[batch, 6, 4] x) => (float[batch, 6, 4] y) {{ v = {node} y = Abs (x) }}",
        "v", merged=[-1, 4], flat=[-1], two=[2, 1, 1, 1], kernel=np.zeros((5, 6, 1), np.float32),
        weight=np.zeros((4, 7), np.float32), zero=[0], one=[1], end=[2**63 - 1], i0=0,
    )  # fmt: skip
    assert found.dims == dims


@pytest.mark.parametrize(
    "node",
    [
        "Slice (x, zero, three, zero)",  # min(B, 3)
        "Slice (x, three, end, zero)",  # max(B - 3, 0)
        "Slice (x, zero, end, zero, two)",  # B / 2, rounded up
        "Pad (x, pads)",  # B + 1
        "NonZero (x)",  # whatever the data say
    ],
)
def test_a_shape_that_is_no_multiple_of_the_batch_is_not_known(node: str) -> None:
    found = fact(
        f"g (float[batch, 6] x) => (float[batch, 6] y) {{ v = {node} y = Abs (x) }}",
        "v", zero=[0], three=[3], two=[2], end=[2**63 - 1], pads=[1, 0, 0, 0],
    )  # fmt: skip
    assert found is None or found.dims is None


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [
        (("batch, 3",), [(B, 3)]),
        (("3, batch",), [(3, B)]),
        (("-1, 3",), [(B, 3)]),  # the only one: whatever it is, it is the batch
        (("?, 3",), [(B, 3)]),
        (("4, -1",), [(4, B)]),
        (("-1, -1",), [(None, None)]),
        (("?, -1",), [(None, None)]),
        (("-1, 3", "-1, 3"), [(None, 3), (None, 3)]),  # nobody says that they are equal
        (("batch, -1",), [(B, None)]),
        (("batch, tokens", "batch, 2"), [(B, None), (B, 2)]),
        (("tokens, 2", "batch, tokens"), [(B, 2), (None, B)]),
        (("3, other", "batch, 2"), [(3, None), (B, 2)]),
    ],
)
def test_one_symbol_is_followed_and_no_axis_that_is_declared_otherwise(
    shapes: tuple[str, ...], axes: list[tuple[int | None, ...]]
) -> None:
    inputs = ", ".join(f"float[{shape}] x{i}" for i, shape in enumerate(shapes))
    outputs = ", ".join(f"float[?, ?] y{i}" for i in range(len(shapes)))
    body = " ".join(f"y{i} = Neg (x{i})" for i in range(len(shapes)))
    model = ir.from_proto(onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {body} }}'
    ))  # fmt: skip
    analysis = Analysis(model.graph)
    assert [analysis.axes(output) for output in model.graph.outputs] == axes


@pytest.mark.parametrize("dim", ["-1", "?", "tokens"])
@pytest.mark.parametrize(
    ("node", "axes"),
    [
        ("Transpose <perm: ints = [2, 0, 1]> (x)", (4, B, None)),
        ("Concat <axis: int = 2> (x, x)", (B, None, 8)),
        ("Concat <axis: int = 1> (x, x)", (B, None, 4)),
        ("MatMul (x, weight)", (B, None, 7)),
        ("Reshape (x, flat)", (B, None)),
        ("Slice (x, zero, two, one)", (B, None, 4)),
        ("ReduceSum (x, one)", (B, 1, 4)),
    ],
)
def test_what_follows_of_the_axes_that_are_known(node: str, axes: tuple[int | None, ...], dim: str) -> None:
    text = f"g (float[batch, {dim}, 4] x, float[batch] z) => (float[?, ?, ?] y) {{ v = {node} y = Abs (x) }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    constants = {"weight": np.zeros((4, 7), np.float32), "flat": [0, -1], "zero": [0], "one": [1], "two": [2]}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(v), k) for k, v in constants.items())
    loaded = load(model)
    assert Analysis(loaded.graph).axes(next(iter(loaded.graph)).outputs[0]) == axes


# --- what is weighed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "c = ConstantOfShape <value: tensor = int64[1] {1}> (huge) v = Add (c, one)",
        "c = ConstantOfShape (huge) v = Cos (c)",
        "c = ConstantOfShape (huge) v = ReduceSum (c)",
        "c = Expand (number, huge) v = Reshape (c, flat)",
        "v = Tile (number, huge)",
        "v = Range (i0, i36, i1)",
        "c = ConstantOfShape (wide) t = Transpose (c) v = MatMul (c, t)",
        "v = Pad (number, pads)",
        "v = OneHot (one, huge, pair)",
        "a = Unsqueeze (row, one) v = Add (a, row)",
        "v = Gather (rows, many)",
        "a = Concat <axis: int = 0> (row, row) b = Neg (a) c = Abs (a) d = Concat <axis: int = 0> (b, c) "
        "e = Neg (d) f = Abs (d) g1 = Concat <axis: int = 0> (e, f) h = Neg (g1) i = Abs (g1) "
        "j = Concat <axis: int = 0> (h, i) k = Neg (j) l = Abs (j) v = Concat <axis: int = 0> (k, l)",
    ],
)
def test_what_a_few_bytes_ask_for_is_weighed_before_it_is_made(body: str) -> None:
    text = f"g (float[batch, 4] x) => (float[batch, 4] y) {{ {body} s = Shape (v) y = Abs (x) }}"
    constants: dict[str, Any] = {
        "huge": [2**36], "one": [1], "number": np.float32([1]), "flat": [-1], "i0": 0, "i36": 2**36, "i1": 1,
        "wide": [2**16, 2**16], "pads": [0, 2**36], "pair": np.float32([0, 1]),
        "many": np.zeros((2**14, 2**8), np.int64), "rows": np.ones((2, 2**8), np.float32),
        "row": np.arange(2**21, dtype=np.float32),
    }  # fmt: skip
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    used = {name: value for name, value in constants.items() if re.search(rf"\b{name}\b", body)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(v), k) for k, v in used.items())
    loaded = load(model)
    tracemalloc.start()
    try:
        analysis = Analysis(loaded.graph)
        assert tracemalloc.get_traced_memory()[1] < 2 * SCRATCH
    finally:
        tracemalloc.stop()
    value = next(output for node in loaded.graph for output in node.outputs if output.name == "v")
    assert analysis.constant(value) is None
    assert analysis.weighed


def test_views_cost_nothing_and_zeros_are_known_for_zeros() -> None:
    model = load(parse(
        "g (float[batch, 4] x) => (float[batch, 4] y) { c = ConstantOfShape (huge) t = Transpose (c) y = Abs (x) }",
        huge=[2**20, 2**20],
    ))  # fmt: skip
    analysis = Analysis(model.graph)
    zeros = [output for node in model.graph for output in node.outputs if output.name in ("c", "t")]
    assert [analysis.is_zero(value) for value in zeros] == [True, True]
    assert [analysis.constant(value) for value in zeros] == [None, None]


def test_a_dimension_that_looks_like_the_batch_is_not_taken_for_it() -> None:
    found = fact(f"g (float[{B}, 2] x) => (float[{B}, 2] y) {{ v = Neg (x) y = Abs (v) }}", "v")
    assert found is None or found.dims is None


def test_inputs_of_two_symbols_are_not_both_the_batch() -> None:
    text = (
        "g (float[batch, 2] x, float[other, 2] z) => (float[batch, 2] y, float[other, 2] w) { y = Abs (x) w = Abs (z) }"
    )
    assert fact(text, "y").dims == (B, 2)
    assert fact(text, "w").axes == (None, 2)
    assert fact(text, "w").dims is None


def test_an_input_without_a_shape_is_unknown() -> None:
    assert fact("g (float x, float[batch] z) => (float[batch] y) { y = Add (x, z) }", "z").dims == (B,)


@pytest.mark.parametrize(
    ("attributes", "low", "high"),
    [
        ("", [1, 6, 4], [B, 6, 4]),
        ("<start: int = 1>", [6, 4], [6, 4]),
        ("<start: int = -1>", [4], [4]),
        ("<end: int = -1>", [1, 6], [B, 6]),
        ("<start: int = 0, end: int = 1>", [1], [B]),
        ("<start: int = -99, end: int = 99>", [1, 6, 4], [B, 6, 4]),
        ("<start: int = 2, end: int = 1>", [], []),
    ],
)
def test_shape_reads_its_attributes(attributes: str, low: list[int], high: list[int]) -> None:
    found = fact(f"g (float[batch, 6, 4] x) => (int64[n] y) {{ v = Shape {attributes} (x) y = Abs (v) }}", "v")
    assert [value.tolist() for value in found.extremes] == [low, high]
    assert (found.constant is not None) == (low == high)


def test_a_value_is_known_for_every_batch_size() -> None:
    text = """g (float[batch, 6] x) => (int64[1] y) {
        s = Shape <start: int = 0, end: int = 1> (x) a = Mul (s, seven) v = Sub (a, three) y = Abs (v)
    }"""
    found = fact(text, "v", seven=[7], three=[3])
    assert [found.value(batch).tolist() for batch in (1, 2, 9)] == [[4], [11], [60]]


def test_narrow_integers_are_passed_on_and_not_computed_with() -> None:
    """The product would overflow at the batch size that stands for all."""
    text = """g (float[batch, 6] x) => (int64[1] y) {
        s = Shape <start: int = 0, end: int = 1> (x) n = Cast <to: int = 6> (s) v = Cast <to: int = 7> (n)
        w = Mul (n, many) y = Abs (v)
    }"""
    many = np.array([5000], np.int32)
    assert fact(text, "v", many=many).value(9).tolist() == [9]
    assert fact(text, "w", many=many).extremes is None


def test_size_of_a_shape_with_two_dynamic_axes_is_not_known() -> None:
    text = "g (float[batch, batch] x) => (int64 y) { v = Size (x) y = Abs (v) }"
    found = fact(text, "v")
    assert found is None or found.extremes is None


@pytest.mark.parametrize(
    ("node", "zero"),
    [
        ("ConstantOfShape (s)", True),
        ("ConstantOfShape <value: tensor = float[1] {2}> (s)", False),
        ("Expand (nothing, s)", True),
        ("Expand (something, s)", False),
        ("Expand (negative, s)", False),
        ("Relu (x)", False),
    ],
)
def test_zeros_are_known_whatever_their_number(node: str, zero: bool) -> None:
    model = load(
        parse(
            f"g (float[batch, 6] x) => (float[batch, 6] y) {{ s = Shape (x) v = {node} y = Abs (v) }}",
            nothing=np.float32(0), something=np.float32(1), negative=np.float32(-0.0),
        )
    )  # fmt: skip
    value = next(output for n in model.graph for output in n.outputs if output.name == "v")
    assert Analysis(model.graph).is_zero(value) is zero


def test_a_node_that_is_not_valid_is_not_known() -> None:
    plain = parse("g (float[batch, 6] x) => (float[batch, 6] y) { v = Neg (x) y = Abs (v) }")
    plain.graph.node[0].op_type = "NoSuchOperator"
    model = load(plain)
    analysis = Analysis(model.graph)
    assert [analysis[output] for node in model.graph for output in node.outputs] == [None, None]
