"""Where casts go, what becomes of constants, and attention masks."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.policy import Policy
from deploycli.models.errors import UsageError
from tests.exporters.precision.casts import BF16, F16, F32, assert_close, feeds, source, typed, weights

W = weights(8, 8)
BLOCK = """g (float[2, 4, 8] x) => (float[2, 4, 8] y) {
    a = MatMul (x, w)
    n = LayerNormalization (a, gain, bias)
    moved = Reshape (n, shape)
    q = Transpose <perm = [0, 2, 1, 3]> (moved)
    k = Transpose <perm = [0, 2, 3, 1]> (moved)
    scores = MatMul (q, k)
    p = Softmax (scores)
    mixed = MatMul (p, q)
    back = Transpose <perm = [0, 2, 1, 3]> (mixed)
    flat = Reshape (back, whole)
    y = Add (flat, a)
}"""
CONSTANTS = {
    "w": W,
    "gain": np.linspace(0.5, 1.5, 8),
    "bias": np.linspace(-1, 1, 8),
    "shape": [2, 4, 2, 4],
    "whole": [2, 4, 8],
}


def test_a_block() -> None:
    graph = typed(source(BLOCK, **CONSTANTS))
    assert graph.notes == {
        "block.1/LayerNormalization": "layer-norm: adds up squares of the residual stream; TensorRT computes it in "
        "the type of its input",
    }
    assert graph.types == {
        **dict.fromkeys(("x", "y", "n", "gain", "bias"), F32),
        **dict.fromkeys(("w", "a", "moved", "q", "k", "scores", "p", "mixed", "back", "flat"), F16),
        **{cast: graph.types[cast] for cast in graph.types if "Cast" in cast or cast == "y.f16"},
        "shape": 7,
        "whole": 7,
    }
    assert [node.name for node in graph.proto.graph.node if node.op_type == "Cast"] == [
        "x/Cast",
        "block.0/Cast",
        "block.1/Cast",
        "block.10/Cast",
    ]
    assert_close(graph)


def test_bf16() -> None:
    graph = typed(source(BLOCK, **CONSTANTS), "bf16")
    assert graph.types["mixed"] == BF16
    assert_close(graph, 5e-2)


def test_ends_of_the_reduced_type() -> None:
    graph = typed(source(BLOCK, **CONSTANTS), io=True)
    assert (graph.types["x"], graph.types["y"]) == (F16, F16)
    assert graph.ops["Cast"] == 2
    assert_close(graph)


def test_the_softmax_of_an_attention_in_fp32_gives_the_same_numbers() -> None:
    reduced, kept = (typed(source(BLOCK, **CONSTANTS), keep=keep) for keep in ((), ("Softmax",)))
    assert kept.ops["Cast"] == reduced.ops["Cast"] + 2
    assert kept.types["p"] == F32
    inputs = feeds(kept.source)
    np.testing.assert_array_equal(kept.run(**inputs)["y"], reduced.run(**inputs)["y"])


def test_rules_that_are_switched_off() -> None:
    graph = typed(source(BLOCK, **CONSTANTS), allow=frozenset({"layer-norm", "softmax"}))
    assert graph.notes == {}
    assert graph.ops["Cast"] == 2
    assert graph.constant("gain").dtype == np.float16
    assert_close(graph, 1e-2)


STAY = "m = Transpose <perm = [0, 1, 2]>"  # movement that moves nothing


@pytest.mark.parametrize(
    ("text", "fp32", "casts"),
    [
        # FP32 -> movement -> FP32: nothing is rounded
        (f"a = Softmax (x) {STAY} (a) y = Softmax (m) z = Abs (x)", "am", 2),
        (f"{STAY} (x) y = Identity (m) z = Abs (x)", "m", 2),
        # FP32 -> movement -> both: cast behind the movement, once
        (f"a = Softmax (x) {STAY} (a) y = Softmax (m) b = Abs (m) c = Neg (m) z = Add (b, c)", "am", 2),
        # FP32 -> movement -> FP16, and the other way round: half the bytes are moved
        (f"a = Softmax (x) {STAY} (a) y = Abs (m) z = Neg (m)", "a", 3),
        (f"a = Abs (x) {STAY} (a) y = Softmax (m) z = Softmax (m)", "", 2),
        # both -> movement -> FP32: what was FP32 is not rounded
        ("a = Abs (x) b = Softmax (x) m = Concat <axis = 0> (a, b) d = Softmax (m) y, z = Split (d, s)", "bmd", 2),
        # both -> movement -> FP16
        ("a = Abs (x) b = Softmax (x) m = Concat <axis = 0> (a, b) d = Neg (m) y, z = Split (d, s)", "b", 4),
        # a constant that is moved stays exact for FP32, and is rounded otherwise
        ("m = Expand (g, e) y = LayerNormalization (x, m) z = Abs (x)", "m", 2),
        ("m = Expand (g, e) y = Add (x, m) z = Softmax (y)", "", 2),
        ("m = Expand (g, e) y = Mul (x, m) z = LayerNormalization (x, m)", "m", 3),
        # likewise what comes from integers and what is repeated
        ("i = Shape (x) m = Cast <to = 1> (i) n = ReduceMean (m) y = Mul (x, n) z = Abs (x)", "mn", 3),
        ("i = Shape (x) m = Cast <to = 1> (i) n = Gather (m, q) y = Mul (x, n) z = Abs (x)", "", 4),
        ("i = Shape (x) m = ConstantOfShape (i) y = Add (x, m) z = Softmax (m)", "m", 3),
        ("i = Shape (x) m = ConstantOfShape (i) y = Add (x, m) z = Abs (m)", "", 3),
        # what turns out to be FP32 is not rounded on its other way to FP32
        (
            "i = Shape (x) m = ConstantOfShape (i) a = Identity (m) b = Abs (x) c = Concat <axis = 1> (a, b)"
            " d = Slice (c, q, s4, h1) y = Identity (d) z = Identity (a)",
            "amcd",
            2,
        ),
        # a Shape reads anything
        ("a = Softmax (x) i = Shape (a) y = Reshape (a, i) z = Abs (x)", "a", 2),
        # a Split has several results, some of which are read in FP32
        ("a = Abs (x) b, c = Split <axis = 2> (a, h) y = Concat <axis = 2> (c, b) z = Softmax (y)", "", 2),
    ],
)
def test_movement(text: str, fp32: str, casts: int) -> None:
    constants = {"g": np.ones(8), "e": [8], "s": [2, 2], "h": [4, 4], "q": [0], "h1": [1], "s4": [4]}
    used = {name: value for name, value in constants.items() if re.search(rf"[(,] ?{name}[,)]", text)}
    graph = typed(source(f"g (float[2, 4, 8] x) => (float[2, 4, 8] y, float[2, 4, 8] z) {{ {text} }}", **used))
    assert {name for name in "abcdmn" if graph.types.get(name) == F32} == set(fp32)
    assert graph.ops["Cast"] == casts
    assert_close(graph)


# --- constants


def test_weights_that_overflow_keep_their_operator_fp32() -> None:
    large = W.copy()
    large[2, 3], large[1, 1] = 65520, -1e30
    text = "g (float[2, 8] x) => (float[2, 8] y) { a = MatMul (x, w) b = Tanh (a) y = MatMul (b, large) }"
    graph = typed(source(text, w=W, large=large))
    assert graph.notes == {"block.2/MatMul": "constant: 2 of 64 values of large are beyond 65504"}
    assert graph.constant("large").dtype == np.float32
    assert graph.ops["Cast"] == 2
    assert_close(graph)
    assert typed(graph.source, "bf16").notes == {}
    large[2, 3], large[1, 1] = 65519, -65504  # rounds to the largest
    assert typed(source(text, w=W, large=large)).notes == {}


def test_weights_that_become_zero_are_reported() -> None:
    small = W.copy()
    small[0, :5] = 1e-9
    text = "g (float[2, 8] x) => (float[2, 8] y) { a = MatMul (x, w) y = MatMul (a, small) }"
    graph = typed(source(text, w=W, small=small))
    assert graph.notes == {"small": "flush: 5 of 64 values become zero"}
    assert graph.constant("small").dtype == np.float16
    assert_close(graph)


def test_an_epsilon_that_would_vanish_keeps_its_operator_fp32() -> None:
    text = "g (float[2, 8] x) => (float[2, 8] y) { a = Relu (x) b = Add (a, eps) c = Log (b) y = Neg (c) }"
    graph = typed(source(text, eps=np.float32(1e-9)))
    assert graph.notes == {"block.1/Add": "constant: eps (1e-09) would become zero"}
    assert typed(graph.source, "bf16").notes == {}
    text = """g (float[2, 8] x) => (float[2, 8] y) {
        s = Shape (x) a = Relu (x) c = ConstantOfShape <value = float[1] {1e-9}> (s) b = Add (a, c) y = Neg (b)
    }"""
    graph = typed(source(text))
    assert graph.notes == dict.fromkeys(
        ("block.2/ConstantOfShape", "block.3/Add"), "constant: c (1e-09) would become zero"
    )
    assert (graph.types["c"], graph.types["b"]) == (F32, F32)


@pytest.mark.parametrize("variance", ["Pow (c, two)", "Mul (c, c)"])
@pytest.mark.parametrize("last", ["y = Div (c, f)", "r = Reciprocal (f) y = Mul (c, r)"])
def test_a_layer_normalization_in_pieces(variance: str, last: str) -> None:
    """Its variance overflows FP16 where values reach 256, and its epsilon is subnormal there or zero."""
    text = f"""g (float[2, 8] x) => (float[2, 8] z) {{
        a = Relu (x)
        m = ReduceMean <keepdims = 1> (a, axes)
        c = Sub (a, m)
        v = {variance}
        s = ReduceMean <keepdims = 1> (v, axes)
        e = Add (s, eps)
        f = Sqrt (e)
        {last}
        z = Mul (y, gain)
    }}"""
    constants = {"axes": [-1], "eps": np.float32(1e-6), "gain": np.ones(8)}
    if "two" in variance:
        constants["two"] = np.float32(2)
    graph = typed(source(text, **constants))
    assert {graph.types[name] for name in "mcvsefy"} == {F32}
    assert {graph.types[name] for name in ("a", "gain")} == {F16}
    assert graph.ops["Cast"] == 4  # x and y go down, a and z go up
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1, 2e4):
        assert_close(graph, x=(scale * rng.standard_normal((2, 8))).astype(np.float16).astype(np.float32))


def test_a_normalised_vector_in_pieces() -> None:
    text = """g (float[2, 8] x) => (float[2, 8] y) {
        a = Mul (x, k) n = ReduceL2 <keepdims = 1> (a, axes) m = Clip (n, eps) s = Expand (m, shape) b = Div (a, s)
        y = Relu (b)
    }"""
    graph = typed(source(text, axes=[-1], eps=np.float32(1e-12), shape=[2, 8], k=np.float32(1)))
    assert {graph.types[name] for name in "nmsb"} == {F32}
    zeros = np.zeros((2, 8), np.float32)
    assert (graph.run(x=zeros)["y"] == 0).all()
    assert_close(graph, x=np.full((2, 8), 1e-5, np.float32))


def test_a_softmax_in_pieces() -> None:
    text = """g (float[2, 8] x) => (float[2, 8] y) {
        a = Mul (x, k) e = Exp (a) s = ReduceSum <keepdims = 1> (e, axes) p = Div (e, s) y = MatMul (p, w)
    }"""
    graph = typed(source(text, axes=[-1], k=np.float32(1), w=W))
    assert {graph.types[name] for name in "esp"} == {F32}
    assert_close(graph, x=np.linspace(5, 20, 16, dtype=np.float32).reshape(2, 8))


# --- masks

MASKED = {
    "added": "m = Add (s, mask)",
    "subtracted": "m = Sub (s, positive)",
    "chosen": "m = Where (keep, s, fill)",
    "chosen, then added": "c = Where (keep, zero, fill) m = Add (s, c)",
    "moved, then added": "c = Unsqueeze (mask, axes) m = Add (s, c)",
    "cut off": "c = Add (s, mask) m = Max (c, fill)",
    "repeated": "i = Shape (s) f = ConstantOfShape <value = float[1] {0.0}> (i) m = Where (keep, s, f)",
}


@pytest.mark.parametrize("fill", [-np.inf, -3.4028234663852886e38, -1e9, -1e6, -65504.0, -40000.0])
@pytest.mark.parametrize("name", MASKED)
def test_a_mask_stays_finite(name: str, fill: float) -> None:
    keep = np.tril(np.ones((4, 4), bool))
    mask = np.where(keep, np.float32(0), np.float32(fill))
    text = MASKED[name]
    constants = {
        "mask": mask,
        "positive": -mask,
        "keep": keep,
        "fill": np.float32(fill),
        "zero": np.float32(0),
        "axes": [0],
    }
    used = {key: value for key, value in constants.items() if re.search(rf"\b{key}\b", text)}
    scores = "t = Transpose <perm = [0, 2, 1]> (q) s = MatMul (q, t)"
    model = source(f"g (float[2, 4, 8] q) => (float[2, 4, 4] p) {{ {scores} {text} p = Softmax (m) }}", **used)
    for node in model.graph.node:
        if node.op_type == "ConstantOfShape":  # the text of a graph has no infinity
            node.attribute[0].t.float_data[0] = fill
    graph = typed(model)
    reasons = [reason for reason in graph.notes.values() if not reason.startswith("softmax")]
    assert reasons
    assert all(re.fullmatch(r"mask: \d+ of \d+ values are clipped to 32752", reason) for reason in reasons)
    assert graph.types["m"] == F16
    for tensor in graph.proto.graph.initializer:
        if tensor.data_type == F16:
            assert np.abs(graph.constant(tensor.name)).max() <= 32752
    assert_close(graph)
    q = 5 * np.random.default_rng(1).standard_normal((2, 4, 8)).astype(np.float16).astype(np.float32)
    found = graph.run(q=q)["p"]
    assert (found[:, ~keep] == 0).all()
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-5)


def test_a_row_that_is_masked_throughout_is_no_nan() -> None:
    text = "g (float[2, 4] s) => (float[2, 4] p) { a = Add (s, mask) b = Add (a, mask) p = Softmax (b) }"
    mask = np.zeros((2, 4))
    mask[0] = -np.inf
    graph = typed(source(text, mask=mask))
    assert np.isnan(graph.run_source(s=np.ones((2, 4), np.float32))["p"][0]).all()
    np.testing.assert_array_equal(graph.run(s=np.ones((2, 4), np.float32))["p"], np.full((2, 4), 0.25))


def test_a_mask_that_leaves_the_graph_is_written_as_it_is() -> None:
    text = "g (float[4] s) => (float[4] p, float[4] m) { t = Neg (s) m = Where (c, k, t) p = Softmax (m) }"
    graph = typed(source(text, c=[True, False, False, False], k=np.float32(-1e9)))
    assert graph.notes["block.1/Where"] == "constant: 1 of 1 values of k are beyond 65504"
    assert graph.run(s=np.ones(4, np.float32))["m"][0] == -1e9


def test_the_mask_of_an_attention() -> None:
    text = """g (float[1, 1, 4, 8] q) => (float[1, 1, 4, 8] y) { y = Attention (q, q, q, mask) }"""
    graph = typed(source(text, 23, mask=np.where(np.tril(np.ones((4, 4))), 0, -np.inf)))
    assert graph.notes == {"mask": "mask: 6 of 16 values are clipped to 32752"}
    assert graph.result("Attention") == F16
    assert_close(graph)


def test_a_mask_that_is_computed_stays_fp32_up_to_its_softmax() -> None:
    text = """g (float[2, 4] s, float[2, 4] keep) => (float[2, 4] y) {
        k = Mul (s, two) i = Sub (one, keep) c = Mul (i, large) d = Unsqueeze (c, axes) e = Squeeze (d, axes)
        m = Add (k, e) p = Softmax (m) y = Mul (p, two)
    }"""
    model = source(text, one=np.float32(1), two=np.float32(2), large=np.float32(-1e9), axes=[0])
    graph = typed(model, allow=frozenset({"softmax"}))
    assert {graph.types[name] for name in "cdemp"} == {F32}
    assert {graph.types[name] for name in "ki"} == {F16}
    assert graph.notes["block.5/Add"].startswith("overflow: e is computed")
    assert graph.notes["block.6/Softmax"] == "overflow: m is computed from a constant beyond 65504, and may be as large"
    keep = np.float32([[1, 1, 0, 0], [0, 0, 0, 0]])
    assert_close(graph, s=np.ones((2, 4), np.float32), keep=keep)


def test_a_large_constant_that_is_no_mask() -> None:
    """It is read before the Softmax by something that multiplies."""
    text = "g (float[2, 4] s) => (float[2, 4] y) { a = Add (s, large) b = Mul (a, small) c = Softmax (b) y = Relu (c) }"
    graph = typed(source(text, large=np.full(4, -1e6), small=np.float32(0.5)))
    assert graph.notes["block.0/Add"] == "constant: 4 of 4 values of large are beyond 65504"


# --- the whole


def test_a_file_is_half_as_large() -> None:
    text = "g (float[2, 256] x) => (float[2, 256] y) { a = MatMul (x, w) b = Relu (a) y = MatMul (b, v) }"
    graph = typed(source(text, w=weights(256, 256), v=weights(256, 256)))
    sizes = [proto.ByteSize() for proto in (graph.source, graph.proto)]
    assert 0.5 <= sizes[1] / sizes[0] < 0.51


def test_expressions() -> None:
    graph = typed(source(BLOCK, **CONSTANTS), keep=(r"\.[57]/", "Add$"))
    assert {name for name, reason in graph.notes.items() if reason.startswith("user")} == {
        "block.5/MatMul",
        "block.7/MatMul",
        "block.10/Add",
    }
    assert graph.notes["block.10/Add"] == "user: matches 'Add$'"
    assert {graph.types[name] for name in ("scores", "mixed", "y")} == {F32}
    assert_close(graph)
    with pytest.raises(UsageError, match="no operator has a name that 'layers' finds"):
        cast(ir.from_proto(source(BLOCK, **CONSTANTS)), Policy(ir.DataType.FLOAT16, keep=(re.compile("layers"),)))
