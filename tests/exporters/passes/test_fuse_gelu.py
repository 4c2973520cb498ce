from __future__ import annotations

import math
from functools import partial

import numpy as np
import onnx
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from deploycli.exporters.passes import fuse_gelu as module
from deploycli.exporters.passes.fuse_gelu import FuseGelu
from tests.exporters.passes.graphs import apply, ops
from tests.exporters.passes.test_mutants import SEARCH
from tests.exporters.passes.written_out import deviation, fuse, parse_at

fuse_gelu = partial(fuse, FuseGelu)

NUMBERS = {
    "half": np.float32(0.5), "one": np.float32(1), "two": np.float32([2]), "three": np.float32(3),
    "root2": np.float32(math.sqrt(2)), "inv": np.float32(1 / math.sqrt(2)), "root": np.float32(math.sqrt(2 / math.pi)),
    "cubic": np.float32(0.044715), "near": np.float32(0.0447), "quick": np.float32(1.702),
}  # fmt: skip


def with_numbers(
    lines: str, opset: int = 20, rest: str = "y = Neg (g)", outputs: str = "float[batch, 4, 6] y"
) -> onnx.ModelProto:
    text = f"g (float[batch, 4, 6] a) => ({outputs}) {{ x = Abs (a) z = Sub (x, two) {lines} {rest} }}"
    used = {name: value for name, value in NUMBERS.items() if f" {name})" in text or f"({name}," in text}
    return parse_at(opset, text, **used)


EXACT = [
    "d = Div (z, root2) e = Erf (d) s = Add (e, one) m = Mul (z, s) g = Mul (m, half)",
    "d = Mul (inv, z) e = Erf (d) s = Add (one, e) m = Mul (s, half) g = Mul (z, m)",
    "d = Mul (z, inv) e = Erf (d) s = Add (e, one) h = Mul (half, z) g = Mul (h, s)",
    "d = Div (z, root2) e = Erf (d) s = Add (e, one) m = Mul (z, s) g = Div (m, two)",
]
TANH = [
    "p = Pow (z, three) c = Mul (p, cubic) a1 = Add (z, c) r = Mul (a1, root) e = Tanh (r) s = Add (e, one) "
    "m = Mul (z, s) g = Mul (m, half)",
    "q = Mul (z, z) p = Mul (q, z) c = Mul (cubic, p) a1 = Add (c, z) r = Mul (root, a1) e = Tanh (r) "
    "s = Add (one, e) h = Mul (half, z) g = Mul (h, s)",
    "w = Mul (z, root) q = Mul (z, z) c = Mul (q, cubic) a1 = Add (one, c) r = Mul (w, a1) e = Tanh (r) "
    "s = Add (e, one) h = Mul (z, half) g = Mul (h, s)",
]  # fmt: skip


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("lines", EXACT)
def test_an_exact_gelu_is_one_operator(lines: str, opset: int) -> None:
    assert fuse_gelu(with_numbers(lines, opset)) == ({"Abs": 1, "Sub": 1, "Gelu": 1, "Neg": 1}, [], True)


@pytest.mark.parametrize("lines", TANH)
def test_a_gelu_by_tanh_is_one_operator(lines: str) -> None:
    plain = with_numbers(lines)
    assert fuse_gelu(plain) == ({"Abs": 1, "Sub": 1, "Gelu": 1, "Neg": 1}, [], True)
    (gelu,) = [node for node in apply(FuseGelu, plain)[0].graph.node if node.op_type == "Gelu"]
    assert gelu.attribute[0].s == b"tanh"


def test_the_opset_is_raised_for_it() -> None:
    rewritten, _, _ = apply(FuseGelu, with_numbers(EXACT[0], 17))
    assert [opset.version for opset in rewritten.opset_import] == [20]
    assert rewritten.ir_version >= 9


@pytest.mark.parametrize(
    "lines",
    [
        EXACT[0].replace("half", "inv"),  # another factor
        EXACT[0].replace("(e, one)", "(e, half)"),
        EXACT[0].replace("root2", "half"),
        EXACT[0].replace("m = Mul (z, s)", "m = Mul (x, s)"),  # another value
        TANH[0].replace("cubic", "near"),  # nearly
        TANH[0].replace("Tanh", "Sigmoid"),
        "r = Mul (z, quick) e = Sigmoid (r) g = Mul (z, e)",  # another function
    ],
)
def test_another_function_stays(lines: str) -> None:
    plain = with_numbers(lines)
    counts, refusals, modified = fuse_gelu(plain)
    assert (counts, refusals, modified) == (ops(plain), [], False)


def test_what_somebody_else_reads_stays_beside_it() -> None:
    plain = with_numbers(
        EXACT[0], rest="y = Neg (g) y2 = Neg (d)", outputs="float[batch, 4, 6] y, float[batch, 4, 6] y2"
    )
    counts, _, modified = fuse_gelu(plain)
    assert (counts["Gelu"], counts["Div"], "Erf" in counts, modified) == (1, 1, False, True)


def test_a_sum_that_is_read_elsewhere_ends_the_search() -> None:
    plain = with_numbers(
        EXACT[0], rest="y = Neg (g) y2 = Neg (s)", outputs="float[batch, 4, 6] y, float[batch, 4, 6] y2"
    )
    assert fuse_gelu(plain)[0]["Erf"] == 1


def test_an_operator_that_would_change_its_meaning_is_a_reason() -> None:
    text = """g (float[batch, 4, 6] z) => (float[batch, 4, 6] y, float[batch, 4, 12] r) {
        d = Div (z, root2) e = Erf (d) s = Add (e, one) m = Mul (z, s) y = Mul (m, half)
        r = AveragePool <kernel_shape = [2], ceil_mode = 1> (z)
    }"""
    numbers = {name: NUMBERS[name] for name in ("root2", "one", "half")}
    plain = parse_at(17, text.replace("12] r", "5] r"), **numbers)
    counts, refusals, modified = fuse_gelu(plain)
    assert (counts, modified) == (ops(plain), False)
    assert refusals == ["AveragePool has another meaning in opset 20 than in 17"]


@pytest.mark.parametrize("wide", ["half", "one", "root2"])
def test_a_number_of_more_axes_makes_no_gelu(wide: str) -> None:
    text = with_numbers(EXACT[0], outputs="float[a, b, c] y")
    for tensor in text.graph.initializer:
        if tensor.name == wide:
            tensor.CopyFrom(numpy_helper.from_array(np.reshape(NUMBERS[wide], (1, 1, 1, 1)), wide))
    text.graph.output[0].type.tensor_type.shape.dim.add(dim_param="d")
    assert "Gelu" not in fuse_gelu(text)[0]


@pytest.mark.parametrize("shape", ["batch, tokens, 6", "?, ?, 6", "?, 4, 6", "5, tokens, 6"])
def test_what_is_activated_may_have_axes_that_are_not_known(shape: str) -> None:
    plain = with_numbers(EXACT[0], outputs="float[a, b, c] y")
    for value in plain.graph.input:
        value.CopyFrom(onnx.parser.parse_graph(f"g (float[{shape}] a) => () {{ }}").input[0])
    assert fuse_gelu(plain)[0]["Gelu"] == 1


@st.composite
def functions(draw: st.DrawFn) -> onnx.ModelProto:
    """GELUs with their products in any order, some with a number that is not right."""
    lines = draw(st.sampled_from(EXACT + TANH))
    if draw(st.booleans()):
        wrong = draw(st.sampled_from(sorted(NUMBERS)))
        right = draw(st.sampled_from([name for name in NUMBERS if f"{name})" in lines or f"({name}," in lines]))
        lines = lines.replace(f" {right})", f" {wrong})").replace(f"({right},", f"({wrong},")
    return with_numbers(lines)


def check(plain: onnx.ModelProto) -> bool:
    return deviation(plain, apply(FuseGelu, plain)[0]) < 1e-6


@settings(max_examples=60, deadline=None)
@given(functions())
def test_what_is_fused_is_a_gelu(plain: onnx.ModelProto) -> None:
    assert check(plain)


@pytest.mark.parametrize("mutant", ["compared at few points", "the other approximation"])
def test_the_property_finds_a_fault(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant == "compared at few points":
        monkeypatch.setattr(module, "_POINTS", np.array([0.0, 50.0]))
    else:
        real = module._SIGMOIDS
        monkeypatch.setattr(
            module, "_SIGMOIDS", {k: ("none" if v[0] == "tanh" else "tanh", v[1]) for k, v in real.items()}
        )

    def is_reported(plain: onnx.ModelProto) -> bool:
        try:
            return not check(plain)
        except Exception:  # an operator that no runtime takes is a report, too
            return True

    find(functions(), is_reported, settings=SEARCH)  # raises where nothing is reported
