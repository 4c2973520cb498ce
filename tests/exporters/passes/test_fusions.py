from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from deploycli.exporters.passes import fusions
from deploycli.exporters.passes.fusions import FuseGelu, FuseNormalization
from tests.exporters.passes.graphs import apply, ops, reasons, session
from tests.exporters.passes.test_mutants import SEARCH

RNG = np.random.default_rng(0)


def parse_at(opset: int, text: str, **constants: Any) -> onnx.ModelProto:
    """Parse a graph of an older opset."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def deviation(plain: onnx.ModelProto, rewritten: onnx.ModelProto) -> float:
    """Largest difference on random data, relative to the largest value; what is no number must be none in both."""
    shapes = [[d.dim_value or 3 for d in value.type.tensor_type.shape.dim] for value in plain.graph.input]
    feeds = {
        v.name: 3 * RNG.standard_normal(s).astype(np.float32) for v, s in zip(plain.graph.input, shapes, strict=True)
    }
    results = [session(model).run(None, feeds) for model in (plain, rewritten)]
    found = 0.0
    for x, y in zip(*results, strict=True):
        if not np.array_equal(np.isnan(x), np.isnan(y)):
            return math.inf
        found = max(found, float(np.nanmax(np.abs(x - y), initial=0) / np.nanmax(np.abs(x), initial=1e-9)))
    return found


def fuse(make: Any, plain: onnx.ModelProto) -> tuple[dict[str, int], list[str], bool]:
    rewritten, graph_pass, modified = apply(make, plain)
    assert deviation(plain, rewritten) < 1e-6
    assert not apply(make, rewritten)[2], "a second run changes something"
    return ops(rewritten), reasons(graph_pass), modified


fuse_gelu = partial(fuse, FuseGelu)
fuse_norm = partial(fuse, FuseNormalization)

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
        r = Resize <mode = "nearest"> (z, , scales)
    }"""
    numbers = {name: NUMBERS[name] for name in ("root2", "one", "half")}
    plain = parse_at(17, text, scales=np.float32([1, 1, 2]), **numbers)
    counts, refusals, modified = fuse_gelu(plain)
    assert (counts, modified) == (ops(plain), False)
    assert refusals == ["Resize has another meaning in opset 20 than in 17"]


# --- layer normalisation ---------------------------------------------------------------------------------------------

NORM = """g (float[batch, 4, 6] x) => (float[batch, 4, 6] y) {
    mean = ReduceMean <axes = [-1]> (x)
    d = Sub (x, mean)
    square = Pow (d, two)
    variance = ReduceMean <axes = [-1]> (square)
    shifted = Add (variance, eps)
    root = Sqrt (shifted)
    n = Div (d, root)
    scaled = Mul (n, gamma)
    y = Add (scaled, beta)
}"""
PARAMETERS: dict[str, Any] = {
    "gamma": RNG.standard_normal(6).astype(np.float32), "beta": RNG.standard_normal(6).astype(np.float32),
    "two": np.float32(2), "eps": np.float32(1e-3), "one": np.float32(1),
}  # fmt: skip


def norm(text: str, opset: int = 17, **more: Any) -> onnx.ModelProto:
    constants = {k: v for k, v in (PARAMETERS | more).items() if f" {k})" in text or f"({k}," in text}
    return parse_at(opset, text, **constants)


@pytest.mark.parametrize("opset", [13, 16, 17])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("Pow (d, two)", "Mul (d, d)"),
        ("square = Pow (d, two)", "d2 = Sub (x, mean) square = Pow (d2, two)"),
        ("Add (variance, eps)", "Add (eps, variance)"),
        ("n = Div (d, root)", "inverse = Reciprocal (root) n = Mul (d, inverse)"),
        ("n = Div (d, root)", "inverse = Div (one, root) n = Mul (inverse, d)"),
        ("Mul (n, gamma)", "Mul (gamma, n)"),
        ("Add (scaled, beta)", "Add (beta, scaled)"),
        ("[-1]", "[2]"),
    ],
)
def test_a_normalisation_is_one_operator(old: str, new: str, opset: int) -> None:
    assert fuse_norm(norm(NORM.replace(old, new), opset)) == ({"LayerNormalization": 1}, [], True)


def test_reductions_of_new_opsets_take_their_axes_as_an_operand() -> None:
    text = NORM.replace("ReduceMean <axes = [-1]> (x)", "ReduceMean (x, axes)")
    text = text.replace("ReduceMean <axes = [-1]> (square)", "ReduceMean (square, axes)")
    assert fuse_norm(norm(text, 18, axes=[-1])) == ({"LayerNormalization": 1}, [], True)


def test_a_normalisation_over_two_axes() -> None:
    text = NORM.replace("[-1]", "[1, 2]").replace("batch, 4, 6] y", "batch, 4, 6] y")
    plain = norm(text, gamma=RNG.standard_normal((4, 6)).astype(np.float32))
    assert fuse_norm(plain) == ({"LayerNormalization": 1}, [], True)


def test_without_scale_and_shift() -> None:
    text = NORM.replace("scaled = Mul (n, gamma)", "").replace("y = Add (scaled, beta)", "y = Neg (n)")
    assert fuse_norm(norm(text)) == ({"LayerNormalization": 1, "Neg": 1}, [], True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Sub (x, mean)", "Sub (mean, x)"),
        ("square = Pow (d, two)", "square = Pow (x, two)"),  # no variance
        ("square = Pow (d, two)", "square = Pow (d, eps)"),
        ("variance = ReduceMean <axes = [-1]>", "variance = ReduceMean <axes = [1]>"),
        ("variance = ReduceMean", "variance = ReduceSum"),
        ("n = Div (d, root)", "n = Div (x, root)"),
        ("n = Div (d, root)", "n = Div (root, d)"),
        ("n = Div (d, root)", "inverse = Div (two, root) n = Mul (inverse, d)"),
    ],
)
def test_another_formula_stays(old: str, new: str) -> None:
    text = NORM.replace(old, new)
    assert text != NORM
    if "ReduceSum" in text:
        text = text.replace("ReduceSum <axes = [-1]> (square)", "ReduceSum (square, axes)")
    if "[1]> (square)" in text:
        text = text.replace("4, 6]", "6, 6]")
    plain = norm(text, axes=[-1])
    rewritten, graph_pass, modified = apply(FuseNormalization, plain)
    assert (ops(rewritten), reasons(graph_pass), modified) == (ops(plain), [], False)


def test_a_normalisation_over_the_channels_of_an_image_stays() -> None:
    """ConvNeXt: the operator normalises the last axes only."""
    plain = norm(NORM.replace("[-1]", "[1]"))
    assert fuse_norm(plain)[2] is False


def test_a_scale_along_another_axis_stays_outside() -> None:
    plain = norm(NORM, gamma=RNG.standard_normal((4, 1)).astype(np.float32))
    assert fuse_norm(plain) == ({"LayerNormalization": 1, "Mul": 1, "Add": 1}, [], True)


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize(("constant", "lines"), [("eps", ""), ("two", ""), ("eps", "square = Mul (d, d)")])
def test_a_number_of_more_axes_makes_no_normalisation(constant: str, lines: str, opset: int) -> None:
    """The result has as many; `fuse` compares the shapes that come out."""
    text = NORM.replace("[batch, 4, 6] y", "[a, b, c, d] y")
    text = text.replace("square = Pow (d, two)", lines or "square = Pow (d, two)")
    counts, _, modified = fuse_norm(norm(text, opset, **{constant: np.reshape(PARAMETERS[constant], (1, 1, 1, 1))}))
    assert ("LayerNormalization" in counts, modified) == (False, False)


@pytest.mark.parametrize(("constant", "left"), [("gamma", {"Mul": 1, "Add": 1}), ("beta", {"Add": 1})])
def test_a_scale_or_shift_of_more_axes_stays_outside(constant: str, left: dict[str, int]) -> None:
    text = NORM.replace("[batch, 4, 6] y", "[a, b, c, d] y")
    plain = norm(text, **{constant: np.reshape(PARAMETERS[constant], (1, 1, 1, 6))})
    assert fuse_norm(plain) == ({"LayerNormalization": 1, **left}, [], True)


@pytest.mark.parametrize("wide", ["half", "one", "root2"])
def test_a_number_of_more_axes_makes_no_gelu(wide: str) -> None:
    text = with_numbers(EXACT[0], outputs="float[a, b, c] y")
    for tensor in text.graph.initializer:
        if tensor.name == wide:
            tensor.CopyFrom(numpy_helper.from_array(np.reshape(NUMBERS[wide], (1, 1, 1, 1)), wide))
    text.graph.output[0].type.tensor_type.shape.dim.add(dim_param="d")
    assert "Gelu" not in fuse_gelu(text)[0]


@pytest.mark.parametrize("shape", ["batch, tokens, 6", "?, ?, 6", "?, 4, 6", "5, tokens, 6"])
def test_what_is_normalised_may_have_axes_that_are_not_known(shape: str) -> None:
    plain = norm(NORM.replace("[batch, 4, 6]", f"[{shape}]"))
    assert fuse_norm(plain) == ({"LayerNormalization": 1}, [], True)
    gelu = with_numbers(EXACT[0], outputs="float[a, b, c] y")
    for value in gelu.graph.input:
        value.CopyFrom(onnx.parser.parse_graph(f"g (float[{shape}] a) => () {{ }}").input[0])
    assert fuse_gelu(gelu)[0]["Gelu"] == 1


def test_doubles_stay_as_they_are_written() -> None:
    """The operator has its epsilon in FP32, and computes in it."""
    text = NORM.replace("float[", "double[")
    plain = parse_at(17, text, **{k: np.float64(v) for k, v in PARAMETERS.items() if k != "one"})
    rewritten, _, modified = apply(FuseNormalization, plain)
    assert (ops(rewritten), modified) == (ops(plain), False)


# --- properties ------------------------------------------------------------------------------------------------------


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
        monkeypatch.setattr(fusions, "_POINTS", np.array([0.0, 50.0]))
    else:
        real = fusions._SIGMOIDS
        monkeypatch.setattr(
            fusions, "_SIGMOIDS", {k: ("none" if v[0] == "tanh" else "tanh", v[1]) for k, v in real.items()}
        )

    def is_reported(plain: onnx.ModelProto) -> bool:
        try:
            return not check(plain)
        except Exception:  # an operator that no runtime takes is a report, too
            return True

    find(functions(), is_reported, settings=SEARCH)  # raises where nothing is reported
