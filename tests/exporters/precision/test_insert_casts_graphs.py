"""Graphs that must not break: operators, operands and ends that are unlike the rest."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from deploycli.exporters.graph.onnx_file import load_model, write_model
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.models.errors import UsageError
from tests.exporters.precision.casts import BF16, F16, F32, Double, assert_close, check, plain, source, typed, weights

W = weights(8, 8)

IO = "float[2, 4, 8] x"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "multiplied": ("(IO) => (float[2, 4, 8] y) { y = MatMul (x, w) }", {"w": W}),
    "gather": (
        "(IO) => (float[2, 2, 8] y) { a = MatMul (x, w) y = Gather <axis = 1> (a, i) }",
        {"w": W, "i": np.array([3, 0])},
    ),
    "clip": (
        "(IO) => (float[2, 4, 8] y) {"
        " a = MatMul (x, w) b = Clip (a, low, high) c = Clip (b, , high) y = Clip (c, low) }",
        {"w": W, "low": np.float32(-0.3), "high": np.float32(0.7)},
    ),
    "pow": ("(IO) => (float[2, 4, 8] y) { a = MatMul (x, w) y = Pow (a, three) }", {"w": W, "three": np.float32(3)}),
    "topk": (
        "(IO) => (float[2, 4, 3] y, int64[2, 4, 3] i) { a = Mul (x, w) y, i = TopK (a, k) }",
        {"w": np.full(8, 2.0), "k": np.array([3])},
    ),
    "where": (
        "(IO) => (float[2, 4, 8] y) { a = MatMul (x, w) b = Greater (a, zero) y = Where (b, a, zero) }",
        {"w": W, "zero": np.float32(0)},
    ),
    "split": (
        "(IO) => (float[2, 4, 8] y, float[2, 4, 2] z) {"
        " a = MatMul (x, w) p, q, z = Split <axis = 2> (a, sizes) r = Relu (p) y = Concat <axis = 2> (r, q, z) }",
        {"w": W, "sizes": np.array([4, 2, 2])},
    ),
    "identity": ("(IO) => (float[2, 4, 8] y) { a = Identity (x) b = MatMul (a, w) y = Identity (b) }", {"w": W}),
    "gemm": (
        "(float[4, 8] x) => (float[4, 8] y, float[4, 8] z) { y = Gemm <transB = 1> (x, w, c) z = Gemm (y, w) }",
        {"w": W, "c": np.ones(8)},
    ),
    "conv": (
        "(float[2, 3, 8, 8] x) => (float[2, 4, 2, 2] y) { y = Conv <strides = [4, 4]> (x, w, b) }",
        {"w": weights(4, 3, 4, 4), "b": np.ones(4, np.float32)},
    ),
    "resize": (
        "(float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y) {"
        ' a = Mul (x, two) y = Resize <mode = "linear"> (a, , scales) }',
        {"two": np.float32(2), "scales": np.float32([1, 1, 2, 2])},
    ),
    "resize to a size": (
        "(float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y) { a = Mul (x, two) y = Resize (a, , , sizes) }",
        {"two": np.float32(2), "sizes": np.array([1, 2, 8, 8])},
    ),
    "from integers": (
        "(IO, int64[8] n) => (float[2, 4, 8] y) { f = Cast <to = 1> (n) y = Mul (x, f) }",
        {},
    ),
    "to integers": (
        "(IO) => (int64[2, 4, 8] y, float[2, 4, 8] z) {"
        " a = Mul (x, two) b = Floor (a) y = Cast <to = 7> (b) z = Neg (x) }",
        {"two": np.float32(2)},
    ),
    "cast to itself": ("(IO) => (float[2, 4, 8] y) { a = Cast <to = 1> (x) b = Neg (a) y = Cast <to = 1> (b) }", {}),
    "cast like": ("(IO, int64[8] n) => (float[2, 4, 8] y) { f = CastLike (n, x) y = Mul (x, f) }", {}),
    "double": (
        "(IO) => (float[2, 4, 8] y) { a = Neg (x) d = Cast <to = 11> (a) e = Mul (d, three) f = Cast <to = 1> (e)"
        " y = MatMul (f, w) }",
        {"w": W, "three": Double(3.0)},
    ),
    "constant of shape": (
        "(IO) => (float[2, 4, 8] y) { a = Neg (x) s = Shape (a) c = ConstantOfShape <value = float[1] {3.0}> (s)"
        " z = ConstantOfShape (s) b = Add (a, c) y = Sub (b, z) }",
        {},
    ),
    "range": (
        "(IO) => (float[2, 4, 8] y) { r = Range (zero, eight, one) y = Mul (x, r) }",
        {"zero": np.float32(0), "eight": np.float32(8), "one": np.float32(1)},
    ),
    "mean of all": ("(IO) => (float[1, 1, 1] y) { a = Neg (x) y = ReduceMean (a) }", {}),
    "normalised": (
        "(IO) => (float[2, 4, 8] y) { a = MatMul (x, w) y = LayerNormalization (a, g) }",
        {"w": W, "g": np.ones(8)},
    ),
    "constant nodes": (
        "(IO) => (float[2, 4, 8] y) { c = Constant <value_float = 2.5> () d = Constant <value = float[2] {1.0, 2.0}> ()"
        " f = Constant <value_floats = [0.5]> () i = Constant <value_ints = [0, 0, 0, 0, 1, 0, 1, 0]> ()"
        " e = Gather (d, i) a = Mul (x, c) b = Add (a, e) y = Add (b, f) }",
        {},
    ),
    "variadic": (
        "(IO) => (float[2, 4, 8] y) { a = Neg (x) b = Relu (x) y = Max (a, b, x, c) }",
        {"c": np.float32(0.2)},
    ),
    "einsum": ('(IO) => (float[2, 8, 8] y) { y = Einsum <equation = "bij,bik->bjk"> (x, x) }', {}),
    "one-hot": (
        "(int64[3] i, float[5] x) => (float[3, 5] y) { h = OneHot (i, depth, values) y = Mul (h, x) }",
        {"depth": np.array(5), "values": np.float32([0, 1])},
    ),
    "sequence": (
        "(IO) => (float[2, 4, 8] y) { a = Neg (x) s = SequenceConstruct (a, x) b = SequenceAt (s, n) y = Relu (b) }",
        {"n": np.array(0)},
    ),
    "dropout": ("(IO) => (float[2, 4, 8] y) { a = Neg (x) y = Dropout (a, ratio) }", {"ratio": np.float32(0.5)}),
}


@pytest.mark.parametrize("io", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_graph(name: str, io: bool) -> None:
    text, constants = CASES[name]
    assert_close(typed(source(f"g {text.replace('IO', IO)}", **constants), io=io))


@pytest.mark.parametrize("opset", [13, 14, 16, 17, 18, 19, 21, 22, 23, 24])
def test_opset(opset: int) -> None:
    text = """g (float[2, 3, 8, 8] x) => (float[2, 5] y) {
        a = Conv <strides = [4, 4]> (x, w, b)
        flat = Flatten (a)
        m = MatMul (flat, v)
        e = Erf (m)
        p = Softmax <axis = -1> (e)
        y = Gemm (p, u, c)
    }"""
    shapes = {"w": (4, 3, 4, 4), "b": (4,), "v": (16, 6), "u": (6, 5), "c": (5,)}
    model = source(text, opset, **{name: weights(*shape) for name, shape in shapes.items()})
    graph = typed(model)
    assert graph.ops["Cast"] == 4  # in, out, and around Softmax
    assert_close(graph)
    bf16 = typed(model, "bf16")
    assert bf16.result("Conv") == (BF16 if opset >= 22 else F32)
    assert_close(bf16, 5e-2)


@pytest.mark.parametrize(("opset", "op"), [(17, "LayerNormalization"), (20, "Gelu"), (23, "RMSNormalization")])
def test_operators_of_new_opsets(opset: int, op: str) -> None:
    operands = "a" if op == "Gelu" else "a, g"
    text = f"g ({IO}) => (float[2, 4, 8] y) {{ a = MatMul (x, w) b = {op} ({operands}) y = Add (b, g) }}"
    graph = typed(source(text, opset, w=W, g=np.ones(8)))
    assert graph.result(op) == (F16 if op == "Gelu" else F32)
    assert_close(graph)


def test_a_condition_and_a_loop_read_through_casts_what_is_fp16_outside() -> None:
    text = """g (float[2, 4, 8] x, bool c, int64 n) => (float[2, 4, 8] y) {
        a = MatMul (x, w)
        moved = Transpose (a)
        back = Transpose (moved)
        b = If (c) <
            then_branch = yes () => (float[2, 4, 8] p) { p0 = Neg (back) p = Add (p0, k) },
            else_branch = no () => (float[2, 4, 8] q) {
                q = If (c) <
                    then_branch = inner () => (float[2, 4, 8] r) { r = Relu (a) },
                    else_branch = other () => (float[2, 4, 8] s) { s = Sub (x, a) }
                >
            }
        >
        d = MatMul (b, w)
        y = Loop (n, , d) <body = body (int64 i, bool go, float[2, 4, 8] t) => (bool more, float[2, 4, 8] u) {
            more = Identity (go)
            v = Mul (t, k)
            u = Add (v, a)
        }>
    }"""
    graph = typed(source(text, w=W, k=np.float32(0.5)))
    assert graph.notes == {
        "block.3/If": "control-flow: the graphs inside If are left as they are",
        "block.5/Loop": "control-flow: the graphs inside Loop are left as they are",
    }
    assert graph.ops["Cast"] == 5  # x and b go down; a, back and d go up, a once for three readers
    x = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)
    for c in (True, False):
        assert_close(graph, x=x, c=np.array(c), n=np.array(3))


def test_movement_that_only_an_inner_graph_reads_does_not_round_what_is_fp32() -> None:
    text = """g (float[2, 4, 8] x, bool c) => (float[2, 4, 8] y, float[2, 4, 8] z) {
        a = Transpose <perm = [0, 1, 2]> (x)
        y = If (c) <
            then_branch = yes () => (float[2, 4, 8] p) { p = Neg (a) },
            else_branch = no () => (float[2, 4, 8] q) { q = Relu (a) }
        >
        z = MatMul (x, w)
    }"""
    graph = typed(source(text, w=W))
    assert graph.types["a"] == F32
    assert graph.ops["Cast"] == 2


def test_operators_of_unknown_domains_and_functions_stay_fp32() -> None:
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20, "other" : 1, "local" : 1]>
        g ({IO}) => (float[2, 4, 8] y) <float[2, 4, 8] b, float[2, 4, 8] c> {{
            a = Neg (x)
            b = other.Half (a)
            c = local.twice (b)
            y = Relu (c)
        }}
        <domain: "local", opset_import: ["" : 20]>
        twice (u) => (v) {{ v = Add (u, u) }}
    """)
    graph = typed(model)
    assert graph.notes == {
        "Half": "unsupported: ONNX does not define other.Half",
        "twice": "unsupported: ONNX does not define local.twice",
    }
    assert [node.name for node in graph.proto.graph.node] == [
        "x/Cast",
        "Neg",
        "Cast",
        "Half",
        "twice",
        "Cast_1",
        "Relu",
        "Cast_2",
    ]
    assert len(graph.proto.functions) == 1


def test_an_element_type_that_nobody_knows() -> None:
    """What an unknown operator makes may be anything: its readers are left alone."""
    text = f"g ({IO}) => (float[2, 4, 8] y, z) {{ a = Neg (x) b = other.Half (a) z = Relu (b) y = Exp (a) }}"
    model = ir.from_proto(source(text))
    notes = {note.node: note.reason for note in cast(model, Policy(ir.DataType.FLOAT16))}
    assert "block.2/Relu" not in notes  # it reads and writes no FP32 that is known of
    relu = next(node for node in model.graph if node.op_type == "Relu")
    assert relu.inputs[0].name == "b"


def test_a_constant_that_two_precisions_read_is_stored_in_both() -> None:
    text = f"g ({IO}) => (float[2, 4, 8] y) {{ a = Mul (x, g) b = LayerNormalization (a, g) y = Mul (b, g) }}"
    graph = typed(source(text, g=np.linspace(0.1, 1, 8)))
    assert {t.name: t.data_type for t in graph.proto.graph.initializer} == {"g": F32, "g.f16": F16}
    assert_close(graph)


def test_constant_nodes_become_constants_of_the_graph() -> None:
    text = f"""g ({IO}) => (float[2, 4, 8] y) {{
        w = Constant <value_floats = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]> () low = Constant <value_float = -1e9> ()
        a = Mul (x, w) z = Constant <value_float = 0.0> () c = Greater (a, z) b = Where (c, a, low) y = Softmax (b)
    }}"""
    graph = typed(source(text))
    assert graph.ops == {"Cast": 2, "Mul": 1, "Greater": 1, "Where": 1, "Softmax": 1}
    assert {t.name: t.data_type for t in graph.proto.graph.initializer} == dict.fromkeys(("w", "low", "z"), F16)
    assert graph.notes["low"] == "mask: 1 of 1 values are clipped to 32752"


def test_what_a_normalization_also_makes_keeps_its_own_type() -> None:
    text = f"""g ({IO}) => (float[2, 4, 8] y, float[2, 4, 1] z) <float[2, 4, 1] mean> {{
        a, mean = LayerNormalization (x, g) y = Neg (a) z = Neg (mean)
    }}"""
    graph = typed(source(text, g=np.ones(8)), allow=frozenset({"layer-norm"}))
    assert (graph.types["a"], graph.types["mean"]) == (F16, F32)
    bf16 = typed(graph.source, "bf16", allow=frozenset({"layer-norm"}))
    assert (bf16.types["a"], bf16.types["mean"]) == (BF16, F32)


def test_constants_keep_their_names() -> None:
    text = f"g ({IO}) => (float[2, 4, 8] y) {{ a = MatMul (x, w) b = LayerNormalization (a, g) y = Add (b, c) }}"
    graph = typed(source(text, w=W, g=np.ones(8), c=np.ones(8)))
    assert {t.name: t.data_type for t in graph.proto.graph.initializer} == {"g": F32, "w": F16, "c": F16}


ENDS = f"g ({IO}, float[8] default) => (float[2, 4, 8] y, float[8] stored, float[2, 4, 8] z, float[8] default) {{"


@pytest.mark.parametrize("io", [False, True])
def test_ends_that_are_constants_or_read_inside(io: bool) -> None:
    """An input with a default, which is an output as well; a constant that is one; an output that is read."""
    text = f"{ENDS} y = Mul (x, default) a = Add (y, stored) z = LayerNormalization (a, stored) }}"
    model = source(text, stored=np.ones(8), default=np.full(8, 1.25))
    graph = typed(model, io=io)
    types = graph.types
    assert [types[name] for name in ("y", "stored", "z", "default")] == [F16 if io else F32] * 4
    assert graph.constant("default").dtype == (np.float16 if io else np.float32)
    assert_close(graph)
    x, other = (np.full(shape, 3, np.float16 if io else np.float32) for shape in ((2, 4, 8), (8,)))
    assert (plain(graph.proto, x=x, default=other)["y"] == 9).all(), "the caller's value counts"


@pytest.mark.parametrize("io", [False, True])
def test_an_input_and_a_constant_that_are_outputs_as_they_are(io: bool) -> None:
    text = "g (float[8] x) => (float[8] x, float[8] c, float[8] y) { y = Mul (x, c) }"
    graph = typed(source(text, c=np.full(8, 2.0)), io=io)
    assert graph.ops["Cast"] == (0 if io else 2)
    assert_close(graph)


def test_graph_without_node_names() -> None:
    text = f"g ({IO}) => (float[2, 4, 8] y) {{ a = MatMul (x, w) b = Softmax (a) y = MatMul (b, w) }}"
    graph = typed(source(text, is_named=False, w=W))
    names = [node.name for node in graph.proto.graph.node]
    assert names == ["x/Cast", "MatMul", "Cast", "Softmax", "Cast_1", "MatMul_1", "Cast_2"]
    assert graph.notes == {"Softmax": "softmax: exponentials and their sum"}


def test_names_that_are_taken_in_an_inner_graph() -> None:
    text = """g (float[4] x, bool c) => (float[4] y) {
        a = Neg (x)
        y = If (c) <
            then_branch = yes () => (float[4] p) { Cast = Relu (a) p = Exp (Cast) },
            else_branch = no () => (float[4] q) { Cast_1 = Relu (a) q = Exp (Cast_1) }
        >
    }"""
    model = source(text, is_named=False)
    inner = model.graph.node[1].attribute[0].g
    inner.node[0].name = "x/Cast"
    graph = typed(model)
    names = {name for node in graph.proto.graph.node for name in node.output}
    assert not names & {"Cast", "Cast_1"}
    assert graph.proto.graph.node[0].name == "x/Cast_1"


def test_a_graph_whose_file_says_no_element_types_and_shapes() -> None:
    text = """g (float[N, M] x) => (float[P, Q] y) {
        a = MatMul (x, w) s = Softmax (a) b = Compress <axis = 1> (s, c) y = Relu (b)
    }"""
    model = source(text, w=W, c=np.array([True, False, True]))
    assert not model.graph.value_info
    graph = typed(model)
    assert graph.ops["Cast"] == 4
    assert graph.result("Compress") == F16


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("g (float16[4] x) => (float16[4] y) { y = Neg (x) }", "the graph has FLOAT16 values already"),
        (
            "g (float[4] x) => (float[4] y) { a = Cast <to = 16> (x) b = Neg (a) y = Cast <to = 1> (b) }",
            "the graph has BFLOAT16 values already",
        ),
        ("g (int64[4] x) => (int64[4] y) { y = Neg (x) }", "nothing is left to cast to FLOAT16: 0 operators"),
        ("g (float[4] x) => (float[4] y) { y = Identity (x) }", "nothing is left to cast to FLOAT16: 0 operators"),
        ("g (float[4] x) => (float[4] y) { y = Softmax (x) }", "such as block.0/Softmax (softmax: exponentials"),
    ],
)
def test_refused(text: str, found: str) -> None:
    with pytest.raises(UsageError, match=re.escape(found)):
        cast(ir.from_proto(source(text)), Policy(ir.DataType.FLOAT16))


def test_fp16_inputs_of_an_fp32_graph() -> None:
    """Their Cast has nothing left to do."""
    text = "g (float16[4] x, float[4] k) => (float[4] y) { a = Cast <to = 1> (x) b = Mul (a, k) y = Mul (b, k) }"
    graph = typed(source(text))
    assert [node.op_type for node in graph.proto.graph.node] == ["Cast", "Mul", "Mul", "Cast"]


def test_external_data(tmp_path: Any) -> None:
    text = f"g ({IO}) => (float[2, 4, 8] y) {{ a = MatMul (x, w) y = LayerNormalization (a, g) }}"
    path = write_model(ir.from_proto(source(text, w=weights(8, 8), g=np.ones(8))), tmp_path / "m.onnx", "always")[0]
    before = path.read_bytes()
    model = load_model(path)
    cast(model, Policy(REDUCED_TYPES["fp16"]))
    found = write_model(model, tmp_path / "n.onnx", "always")[0]
    proto = onnx.load(found)
    check(proto)
    assert path.read_bytes() == before
    kept = {t.name: numpy_helper.to_array(t, str(tmp_path)) for t in proto.graph.initializer}
    np.testing.assert_array_equal(kept["w"], W.astype(np.float16))
