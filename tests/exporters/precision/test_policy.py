"""Each rule: what it keeps in FP32, what it does not, and what it says."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from deploycli.exporters.precision import policy as policy_module
from deploycli.exporters.precision.dtypes import fill_types
from deploycli.exporters.precision.policy import OPTIONAL_RULES, RULES, Policy, decide
from deploycli.models.errors import UsageError
from tests.exporters.precision.casts import INT8, QUANTIZED, Double, assert_close, source, typed, weights

if TYPE_CHECKING:
    from collections.abc import Mapping

W = weights(8, 8)


def decisions(
    text: str, opset: int = 20, *, target: str = "FLOAT16", policy: Any = None, **constants: Any
) -> Mapping[str, str]:
    """Operator type -> why it stays FP32; a rule's name stands for each."""
    model = ir.from_proto(source(text, opset, **constants))
    fill_types(model)
    kept = decide(model.graph, Policy(ir.DataType[target], **(policy or {})))
    return {node.op_type: reason for node, reason in kept.items()}


def rules(text: str, opset: int = 20, **options: Any) -> dict[str, str]:
    return {op: reason.partition(":")[0] for op, reason in decisions(text, opset, **options).items()}


X = "float[2, 4, 8] x"

KEPT: dict[str, list[tuple[str, dict[str, str], dict[str, Any]]]] = {
    "control-flow": [
        (
            "(float[4] x, bool c) => (float[4] y) { y = If (c) <"
            " then_branch = a () => (float[4] p) { p = Neg (x) },"
            " else_branch = b () => (float[4] q) { q = Abs (x) }> }",
            {"If": "control-flow"},
            {},
        ),
        (  # a graph without nodes is false
            "(bool c) => (float[2] y) { y = If (c) <"
            " then_branch = a () => (float[2] p) <float[2] p = {1, 2}> { },"
            " else_branch = b () => (float[2] q) <float[2] q = {3, 4}> { }> }",
            {"If": "control-flow"},
            {},
        ),
        (
            "(float[4] x, int64 n) => (float[4] y) { y = Loop (n, , x) <"
            " body = b (int64 i, bool c, float[4] t) => (bool d, float[4] u) { d = Identity (c) u = Abs (t) }> }",
            {"Loop": "control-flow"},
            {},
        ),
    ],
    "unsupported": [
        (f"({X}) => (float[2, 4, 8] y) {{ y = other.Half (x) }}", {"Half": "unsupported"}, {}),
        (f"({X}) => (float[2, 4, 8] y) {{ y = com.microsoft.Gelu (x) }}", {"Gelu": "unsupported"}, {}),
        (
            "(float[1, 6, 4] x, float[1, 1, 6] c) => (int64[K, 3] y) { y = NonMaxSuppression (x, c) }",
            {"NonMaxSuppression": "unsupported"},
            {},
        ),
        (
            "(float a, float b, float c) => (float[N] y) { y = Range (a, b, c) }",
            {"Range": "unsupported"},
            {},
        ),
        ("() => (float[4] y) { y = RandomNormal <shape = [4]> () }", {"RandomNormal": "unsupported"}, {}),
        (
            "(int64[4, 4] n) => (float[4, 4] y) { y = EyeLike <dtype = 1> (n) }",
            {"EyeLike": "unsupported"},
            {},
        ),
        (
            "(float[2, 8] x) => (float[2, 8] y) { y = Gemm <alpha = 0.5> (x, w) }",
            {"Gemm": "unsupported"},
            {"w": W},
        ),
        (
            "(float[2, 8] x) => (float[2, 8] y) { y = Gemm <beta = 2.0> (x, w, c) }",
            {"Gemm": "unsupported"},
            {"w": W, "c": np.ones(8)},
        ),
        (
            f"({X}) => (float[2, 4, 8] y) {{ s = SequenceConstruct (x) y = SequenceAt (s, n) }}",
            {"SequenceConstruct": "unsupported", "SequenceAt": "unsupported"},
            {"n": np.array(0)},
        ),
        (
            f"({X}) => (float[2, 4, 8] y) {{ a = other.Half (x) y = Mul (x, a) }}",
            {"Half": "unsupported", "Mul": "unsupported"},
            {},
        ),
    ],
    "layer-norm": [
        (
            f"({X}) => (float[2, 4, 8] y) {{ y = LayerNormalization (x, g) }}",
            {"LayerNormalization": "layer-norm"},
            {"g": np.ones(8)},
        ),
        (
            f"({X}) => (float[2, 4, 8] y) {{ y = InstanceNormalization (x, g, g) }}",
            {"InstanceNormalization": "layer-norm"},
            {"g": np.ones(4)},
        ),
        (f"({X}) => (float[2, 4, 8] y) {{ y = LpNormalization (x) }}", {"LpNormalization": "layer-norm"}, {}),
        (
            f"({X}) => (float[2, 4, 8] y) {{ y = BatchNormalization (x, g, g, g, g) }}",
            {"BatchNormalization": "layer-norm"},
            {"g": np.ones(4)},
        ),
    ],
    "softmax": [
        (f"({X}) => (float[2, 4, 8] y) {{ y = Softmax (x) }}", {"Softmax": "softmax"}, {}),
        (f"({X}) => (float[2, 4, 8] y) {{ y = LogSoftmax (x) }}", {"LogSoftmax": "softmax"}, {}),
        (
            f"({X}) => (float[2, 4, 8] y) {{ p = Softmax (x) y = MatMul (p, w) }}",
            {"Softmax": "softmax"},
            {"w": np.ones((8, 8))},
        ),
        (f"({X}, float[2, 8, 8] v) => (float[2, 4, 8] y) {{ p = Softmax (x) y = MatMul (p, v) }}", {}, {}),
        (
            f"({X}, float[2, 8, 8] v) => (float[2, 4, 8] y) {{ p = Softmax (x) d = Dropout (p) y = MatMul (d, v) }}",
            {},
            {},
        ),
        (
            f"({X}, float[2, 8, 8] v) => (float[2, 4, 8] y, float[2, 4, 8] p) {{ p = Softmax (x) y = MatMul (p, v) }}",
            {"Softmax": "softmax"},
            {},
        ),
        (
            f"({X}) => (float y) {{ a = Exp (x) y = ReduceSum <keepdims = 0> (a) }}",
            {"Exp": "softmax", "ReduceSum": "reduction"},
            {},
        ),
    ],
    "reduction": [
        (f"({X}) => (float[2, 4, 8] y) {{ y = CumSum (x, n) }}", {"CumSum": "reduction"}, {"n": np.array(1)}),
        (
            "(float[1, 2, 4, 4] x) => (float[1, 2, 1, 1] y) { y = GlobalAveragePool (x) }",
            {"GlobalAveragePool": "reduction"},
            {},
        ),
        (
            f"({X}) => (float y) {{ a = Pow (x, n) y = ReduceMean <keepdims = 0> (a) }}",
            {"Pow": "reduction", "ReduceMean": "reduction"},
            {"n": np.float32(2)},
        ),
        (
            f"({X}) => (float y) {{ a = Mul (x, x) y = ReduceMean <keepdims = 0> (a) }}",
            {"Mul": "reduction", "ReduceMean": "reduction"},
            {},
        ),
        (
            f"({X}) => (float[2, 4, 8] y) {{ a = ReduceMean (x) y = Sub (x, a) }}",
            {"ReduceMean": "reduction", "Sub": "reduction"},
            {},
        ),
    ],
    "integer": [
        (
            f"({X}) => (int64[2, 4, 8] y) {{ a = Mul (x, k) b = Floor (a) c = Identity (b) y = Cast <to = 7> (c) }}",
            {"Mul": "integer", "Floor": "integer", "Identity": "integer"},
            {"k": np.float32(3)},
        ),
        (
            "(int64[4] n) => (int64[4] y) { f = Cast <to = 1> (n) a = Div (f, k) y = Cast <to = 7> (a) }",
            {"Cast": "integer", "Div": "integer"},
            {"k": np.float32(3)},
        ),
    ],
    "constant": [
        (f"({X}) => (float[2, 4, 8] y) {{ y = Mul (x, k) }}", {"Mul": "constant"}, {"k": np.float32(70000)}),
        (f"({X}) => (float[2, 4, 8] y) {{ y = Add (x, k) }}", {"Add": "constant"}, {"k": np.float32(1e-12)}),
        (f"({X}) => (float[2, 4, 8] y) {{ y = Max (x, k) }}", {"Max": "constant"}, {"k": np.float32(-np.inf)}),
    ],
    "overflow": [
        (
            f"({X}) => (float[2, 4, 8] y) {{ a = Mul (x, k) s = Shape (a) b = Mul (a, l) y = Reshape (b, s) }}",
            {"Mul": "overflow"},
            {"k": np.float32(1e6), "l": np.float32(1e-6)},
        ),
        (
            f"({X}) => (float[2, 4, 8] y) {{ a = Mul (x, k) b = Add (a, x) y = Softmax (b) }}",
            {"Mul": "constant", "Add": "overflow", "Softmax": "softmax"},
            {"k": np.float32(-1e9)},
        ),
    ],
}

UNTOUCHED = [
    (f"({X}) => (float[2, 4, 8] y) {{ y = Mul (x, k) }}", {"k": np.float32(65504)}),
    (f"({X}) => (float[2, 4, 8] y) {{ y = Mul (x, k) }}", {"k": np.float32([1e-12] * 7 + [1])}),
    (f"({X}) => (float[1, 1, 1] y) {{ y = ReduceMax (x) }}", {}),
    (f"({X}) => (float[2, 4, 8] y) {{ y = Mul (x, x) }}", {}),
    (f"({X}) => (float[2, 4, 8] y) {{ y = Pow (x, k) }}", {"k": np.float32(2)}),
    (f"({X}) => (float[2, 4, 8] y) {{ y = Exp (x) }}", {}),
    (f"({X}) => (bool[2, 4, 8] y) {{ a = Mul (x, k) y = Cast <to = 9> (a) }}", {"k": np.float32(2)}),
    (f"({X}) => (int64[2, 4, 8] y, float[2, 4, 8] a) {{ a = Floor (x) y = Cast <to = 7> (a) }}", {}),
    ("(float[2, 8] x) => (float[2, 8] y) { y = Gemm <alpha = 1.0, transB = 1> (x, w, c) }", {"w": W, "c": np.ones(8)}),
    ("(float[2, 8] x) => (float[2, 8] y) { y = Gemm <beta = 2.0> (x, w) }", {"w": W}),
    ("(int64[2] n) => (float[N, M] y) { y = ConstantOfShape (n) }", {}),
    ("(float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y) { y = Resize (x, , s) }", {"s": np.float32([1, 1, 2, 2])}),
]


@pytest.mark.parametrize(("text", "expected", "constants"), [case for cases in KEPT.values() for case in cases])
def test_kept(text: str, expected: dict[str, str], constants: dict[str, Any]) -> None:
    assert rules(f"g {text}", **constants) == expected


@pytest.mark.parametrize(("text", "constants"), UNTOUCHED)
def test_not_kept(text: str, constants: dict[str, Any]) -> None:
    assert decisions(f"g {text}", **constants) == {}


def test_every_rule_has_a_case() -> None:
    assert set(KEPT) | {"user", "range"} == set(RULES)


@pytest.mark.parametrize("name", sorted(OPTIONAL_RULES - {"range"}))
def test_a_rule_that_is_switched_off(name: str) -> None:
    for text, expected, constants in KEPT[name]:
        found = rules(f"g {text}", policy={"allow": frozenset({name})}, **constants)
        assert name not in found.values()
        assert set(found.values()) <= set(expected.values()) - {name}


@pytest.mark.parametrize("name", ["layernorm", "user", "constant", "overflow", "unsupported", "control-flow", ""])
def test_rules_that_nobody_can_switch_off(name: str) -> None:
    with pytest.raises(UsageError, match=f"no rule '{name}' that could be switched off") as caught:
        Policy(ir.DataType.FLOAT16, allow=frozenset({name, "softmax"}))
    assert caught.value.expected == "integer, layer-norm, range, reduction, softmax"


def test_what_a_reason_says() -> None:
    assert decisions(f"g ({X}) => (float[2, 4, 8] y) {{ y = other.Half (x) }}")["Half"] == (
        "unsupported: ONNX does not define other.Half"
    )
    assert decisions(f"g ({X}) => (float[2, 4, 8] y) {{ y = Mish (x) }}", 22, target="BFLOAT16")["Mish"] == (
        "unsupported: TensorRT has no Mish in BFLOAT16"
    )
    assert decisions(f"g ({X}) => (float[2, 4, 8] y) {{ y = Mish (x) }}", 22) == {}
    conv = "g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) { y = Conv (x, w) }"
    kernel = weights(2, 2, 1, 1)
    assert decisions(conv, 20, target="BFLOAT16", w=kernel) == {
        "Conv": "unsupported: Conv of opset 20 takes no BFLOAT16"
    }
    assert decisions(conv, 22, target="BFLOAT16", w=kernel) == {}
    zeros = "g (int64[2] n) => (float[N, M] y) { y = ConstantOfShape (n) }"
    assert decisions(zeros, 19, target="BFLOAT16")["ConstantOfShape"].endswith(
        "ConstantOfShape of opset 19 makes no BFLOAT16"
    )
    assert decisions(zeros, 20, target="BFLOAT16") == {}
    assert decisions(QUANTIZED, 18, **INT8, t=np.full(8, 2.0**-6)) == dict.fromkeys(
        ("QuantizeLinear", "DequantizeLinear"), "unsupported: its scale is FP32 in opset 18; from 19 on it may be FP16"
    )


def test_integers_that_bf16_counts() -> None:
    text = f"g ({X}) => (int64[2, 4, 8] y) {{ a = Floor (x) y = Cast <to = 7> (a) }}"
    assert decisions(text)["Floor"] == "integer: its result becomes an integer; FLOAT16 counts to 2048"
    assert decisions(text, target="BFLOAT16")["Floor"].endswith("BFLOAT16 counts to 256")


def test_positions_are_computed_in_fp32() -> None:
    text = """g (int64[4] n, float[8] x) => (int64[4] y, float[8] z) {
        f = Cast <to = 1> (n) a = Mul (f, k) b = Floor (a) y = Cast <to = 7> (b) z = Neg (x)
    }"""
    graph = typed(source(text, k=np.float32(0.5)))
    assert_close(graph, n=np.array([4097, 70001, 2049, 3]), x=np.ones(8, np.float32))


def test_the_users_expressions_come_first() -> None:
    text = f"g ({X}) => (float[2, 4, 8] y) {{ a = Softmax (x) y = Neg (a) }}"
    keep = tuple(re.compile(text) for text in ("nothing|^block.1", "Softmax"))
    assert decisions(text, policy={"keep": keep}) == {
        "Softmax": "user: matches 'Softmax'",
        "Neg": "user: matches 'nothing|^block.1'",
    }


def test_values_near_the_end_of_fp16() -> None:
    text = f"g ({X}) => (float[2, 4, 8] y) {{ a = Neg (x) b = Abs (a) y = Relu (b) }}"
    seen = {"x": 1.0, "a": 32752.0, "b": 60000.0, "y": 3.0}
    assert decisions(text, policy={"magnitudes": seen}) == {
        "Abs": "range: b reaches 6e+04 in the data; FLOAT16 ends at 65504",
        "Relu": "range: b reaches 6e+04 in the data; FLOAT16 ends at 65504",
    }
    assert decisions(text, policy={"magnitudes": seen, "allow": frozenset({"range"})}) == {}
    assert decisions(text, target="BFLOAT16", policy={"magnitudes": seen}) == {}


def test_data_show_whether_a_large_constant_matters() -> None:
    text = f"g ({X}) => (float[2, 4, 8] y) {{ a = Mul (x, k) b = Abs (a) y = Relu (b) }}"
    assert rules(text, k=np.float32(1e6)) == {"Mul": "constant", "Abs": "overflow"}
    assert rules(text, k=np.float32(1e6), policy={"magnitudes": {"a": 10.0}}) == {"Mul": "constant"}
    found = rules(text, k=np.float32(1e6), policy={"magnitudes": {"a": 1e6, "b": 1e6}})
    assert found == {"Mul": "range", "Abs": "range", "Relu": "range"}


def test_a_mask_that_is_clipped_is_not_near_the_end() -> None:
    text = """g (float[2, 4] s, bool[2, 4] c) => (float[2, 4] y) {
        a = Mul (s, k) b = Where (c, zero, large) d = Unsqueeze (b, axes) e = Squeeze (d, axes)
        m = Add (a, e) y = Softmax (m)
    }"""
    constants = {"k": np.float32(2), "zero": np.float32(0), "large": np.float32(-1e9), "axes": [0]}
    seen = dict.fromkeys(("b", "d", "e", "m"), 1e9) | {"a": 2.0, "y": 1.0, "s": 1.0}
    assert rules(text, policy={"magnitudes": seen}, **constants) == {"Softmax": "softmax"}
    found = rules(text, policy={"magnitudes": seen | {"a": 40000.0}}, **constants)
    assert found == {"Mul": "range", "Add": "range", "Softmax": "softmax"}
    dynamic = text.replace("Where (c, zero, large)", "Where (c, zero, s)")
    del constants["large"]
    found = rules(dynamic, policy={"magnitudes": seen | {"b": np.inf, "m": np.inf}}, **constants)
    assert found == {"Where": "range", "Unsqueeze": "range", "Squeeze": "range", "Add": "range", "Softmax": "softmax"}


def test_double_is_nobodys_business() -> None:
    text = f"g ({X}) => (float[2, 4, 8] y) {{ d = Cast <to = 11> (x) e = Mul (d, k) y = Cast <to = 1> (e) }}"
    assert decisions(text, k=Double(1e300)) == {}


def test_rules_are_small() -> None:
    """A rule is to be read at a glance; the longest lists what types depend on."""
    lengths = {name: len(inspect.getsource(rule).splitlines()) for name, rule in RULES.items()}
    assert max(length for name, length in lengths.items() if name != "unsupported") <= 14
    assert policy_module.__doc__
