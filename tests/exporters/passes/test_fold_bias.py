from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from deploycli.exporters.passes import fold_bias
from deploycli.exporters.passes.fold_bias import FoldBias, best_shift
from tests.exporters.passes.graphs import Array, apply, ops, parse, reasons, session
from tests.exporters.passes.test_mutants import SEARCH

if TYPE_CHECKING:
    import onnx

C, N, H = 8, 5, 2
D = C // H

NORM = "y = LayerNormalization <axis = -1, epsilon = 0.01> (x, gamma, beta)"
MERGED = """
    m = MatMul (y, w)
    a = Add (m, b)
    r = Reshape (a, five)
    t = Transpose <perm = [2, 0, 3, 1, 4]> (r)
    q5, k5, v5 = Split <axis = 0, num_outputs = 3> (t)
    q = Squeeze (q5, zero)
    k = Squeeze (k5, zero)
    v = Squeeze (v5, zero)"""
APART = "".join(
    f"""
    m{i} = MatMul (y, w{i})
    a{i} = Add ({"b" if i == "k" else "m"}{i}, {"m" if i == "k" else "b"}{i})
    r{i} = Reshape (a{i}, four)
    {i} = Transpose <perm = [0, 2, 1, 3]> (r{i})"""
    for i in "qkv"
)
ATTENTION = """
    kt = Transpose <perm = [0, 1, 3, 2]> (k)
    s = MatMul (q, kt)
    p = Softmax <axis = -1> (s)
    o = MatMul (p, v)
    z = Identity (o)"""
SHAPES = {"five": [0, -1, 3, H, D], "four": [0, -1, H, D], "zero": [0]}


def graph(*parts: str, more: str = "", dtype: str = "double", **changed: Any) -> onnx.ModelProto:
    """A LayerNormalization and what reads it; constants that the text does not read are left out."""
    results = ", ".join([f"{dtype}[batch, {H}, n, {D}] z", *([more] if more else [])])
    text = f"g ({dtype}[batch, {N}, {C}] x) => ({results}) {{ {' '.join(parts)} }}"
    kind = {"double": np.float64, "float": np.float32, "float16": np.float16}[dtype]
    constants = {name: np.asarray(a, kind if isinstance(a, np.ndarray) else None) for name, a in numbers(0).items()}
    constants = {name: np.asarray(value) for name, value in {**constants, **SHAPES, **changed}.items()}
    words = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    return parse(text, **{name: value for name, value in constants.items() if name in words})


def numbers(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    draw = partial(rng.normal, 0, 1)
    made: dict[str, Array] = {"gamma": 1 + draw(size=C), "beta": draw(size=C), "w": draw(size=(C, 3 * C))}
    made |= {f"w{i}": draw(size=(C, C)) for i in "qkv"} | {f"b{i}": draw(size=C) for i in "qkv"}
    return {**made, "b": draw(size=3 * C), "w1": draw(size=(C, 3)), "b1": draw(size=3)}


def deviation(plain: onnx.ModelProto, rewritten: onnx.ModelProto) -> float:
    """The largest difference, as a part of the largest number of an output."""
    names = [value.name for value in plain.graph.output]
    worst = 0.0
    for batch in (1, 3):
        kind = np.float64 if plain.graph.input[0].type.tensor_type.elem_type == TensorProto.DOUBLE else np.float32
        x = np.random.default_rng(batch).normal(1, 2, (batch, N, C)).astype(kind)
        for one, other in zip(*(session(m).run(names, {"x": x}) for m in (plain, rewritten)), strict=True):
            assert one.shape == other.shape
            worst = max(worst, float(np.abs(one - other).max() / np.abs(one).max()))
    return worst


def shift_of(model: onnx.ModelProto) -> float:
    """What is added to a normalised vector in all channels."""
    (norm,) = (node for node in model.graph.node if node.op_type == "LayerNormalization")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert (constants[norm.input[1]] == 1).all()
    values = constants[norm.input[2]] if len(norm.input) > 2 else np.zeros(1)
    assert len(set(values.tolist())) == 1
    return float(values[0])


# --- what is folded --------------------------------------------------------------------------------------------------

ROWS = {
    "every row": "",
    "gathered": "y = Gather <axis = 1> (n, order)",
    "as an image": "i = Reshape (n, image) y = Reshape (i, tokens)",
    "one row": "y = Slice (n, one, two, one)",
    "turned about": "i = Transpose <perm = [1, 0, 2]> (n) y = Transpose <perm = [1, 0, 2]> (i)",
}
MOVED = {"order": [4, 2, 0, 1, 3], "image": [-1, 1, N, C], "tokens": [-1, N, C], "one": [1], "two": [2]}


@pytest.mark.parametrize("rows", ROWS.values(), ids=list(ROWS))
@pytest.mark.parametrize(("projections", "adds"), [(MERGED, 1), (APART, 3)], ids=["merged", "apart"])
def test_biases_of_query_key_and_value_go_into_the_weights(projections: str, adds: int, rows: str) -> None:
    norm = NORM.replace("y =", "n =") if rows else NORM
    plain = graph(norm, rows, projections, ATTENTION, **MOVED)
    rewritten, done, modified = apply(FoldBias, plain)
    assert (modified, reasons(done)) == (True, [])
    assert {**ops(plain), "Add": 0} == {**ops(rewritten), "Add": ops(rewritten).get("Add", 0)}
    assert ops(plain)["Add"] == adds
    assert deviation(plain, rewritten) < 1e-12
    assert shift_of(rewritten) != 0
    assert not apply(FoldBias, rewritten)[2]


@pytest.mark.parametrize(
    "norm",
    [
        "y = LayerNormalization <axis = -1> (x, gamma)",
        "y = LayerNormalization <axis = 2, epsilon = 0.5> (x, gamma, beta)",
        "y = LayerNormalization <axis = -1, stash_type = 11> (x, gamma, beta)",
    ],
    ids=["no beta", "axis from the front", "stash type"],
)
def test_every_form_of_the_normalisation(norm: str) -> None:
    plain = graph(norm, MERGED, ATTENTION)
    rewritten, done, _ = apply(FoldBias, plain)
    assert (reasons(done), "Add" in ops(rewritten), deviation(plain, rewritten) < 1e-12) == ([], False, True)


FC1 = "f = MatMul (y, w1) g = Add (f, b1)"
FC1_RESULT = f"double[batch, {N}, 3] g"


def test_another_product_of_the_same_vector_takes_its_part_and_keeps_its_bias() -> None:
    plain = graph(NORM, FC1, MERGED, ATTENTION, more=FC1_RESULT)
    rewritten, done, _ = apply(FoldBias, plain)
    assert (reasons(done), ops(rewritten)["Add"]) == ([], 1)
    assert deviation(plain, rewritten) < 1e-12


@pytest.mark.parametrize("dims", [(1, 1, 3 * C), (1, 3 * C)])
def test_a_bias_may_have_axes_of_length_one(dims: tuple[int, ...]) -> None:
    plain = graph(NORM, MERGED, ATTENTION, b=numbers(1)["b"].reshape(dims))
    rewritten, _, _ = apply(FoldBias, plain)
    assert ("Add" in ops(rewritten), deviation(plain, rewritten) < 1e-12) == (False, True)


def test_biases_of_zero_add_nothing_to_a_normalised_vector() -> None:
    plain = graph(NORM, MERGED, ATTENTION, b=np.zeros(3 * C), beta=np.zeros(C))
    rewritten, _, _ = apply(FoldBias, plain)
    assert ("Add" in ops(rewritten), shift_of(rewritten)) == (False, 0)
    assert deviation(plain, rewritten) < 1e-12


def test_types_stay() -> None:
    plain = graph(NORM, MERGED, ATTENTION, dtype="float16")
    rewritten, _, modified = apply(FoldBias, plain)
    kinds = {t.data_type for t in rewritten.graph.initializer} - {TensorProto.INT64}
    assert (modified, kinds) == (True, {TensorProto.FLOAT16})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-3, 3), st.floats(-4, 2), st.sampled_from([MERGED, APART]))
def test_any_weights(seed: int, bias: float, weight: float, projections: str) -> None:
    assert folded_deviation(seed, bias, weight, projections) < 1e-11


def folded_deviation(seed: int, bias: float, weight: float, projections: str) -> float:
    made = {k: v * 10 ** {"b": bias, "w": weight}.get(k[0], 0) for k, v in numbers(seed).items()}
    made["beta"] = numbers(seed)["beta"]
    plain = graph(NORM, projections, ATTENTION.replace("MatMul (p, v)", "MatMul (s, v)"), **made)
    return deviation(plain, apply(FoldBias, plain)[0])


# --- what is not -----------------------------------------------------------------------------------------------------

NEG = f"double[batch, {N}, {C}] g"


@pytest.mark.parametrize(
    ("parts", "more", "changed", "reason"),
    [
        ((NORM, "g = Add (x, y)", MERGED), NEG, {}, "it is read by Add as well"),
        ((NORM, MERGED), f"double[batch, {N}, {C}] y", {}, "it is read by an output as well"),
        (
            (NORM.replace("y =", "n ="), "y = Gather <axis = 1> (n, order)", MERGED),
            f"double[batch, {N}, {C}] y", MOVED, "it is read by an output as well",
        ),
        ((NORM.replace("y =", "y, mean ="), MERGED), f"float[batch, {N}, 1] mean", {},
         "it is read by an output as well"),
        ((NORM, "g = MatMul (x, w)", MERGED), f"double[batch, {N}, {3 * C}] g", {}, "a weight is read elsewhere too"),
        ((NORM, "yt = Transpose <perm = [0, 2, 1]> (y) g = MatMul (yt, w5)", MERGED), f"double[batch, {C}, 3] g",
         {"w5": np.ones((N, 3))}, "it is read by Transpose as well"),
        ((NORM, "g = Pad (y, pads)", MERGED), f"double[batch, {N + 1}, {C}] g", {"pads": [0, 1, 0, 0, 0, 0]},
         "it is read by Pad as well"),
        ((NORM, MERGED), "", {"gamma": np.ones(1)}, "its scale is not one number for each channel"),
        ((NORM, MERGED), "", {"gamma": np.full(C, np.inf)}, "its weights are not all finite"),
        ((NORM, MERGED), "", {"b": np.full(3 * C, np.nan)}, "its weights are not all finite"),
    ],
    ids=["residual", "output", "moved output", "mean", "shared weight", "turned", "padded", "gamma", "inf", "nan"],
)  # fmt: skip
def test_a_refusal_says_why(parts: tuple[str, ...], more: str, changed: dict[str, Any], reason: str) -> None:
    plain = graph(*parts, ATTENTION, more=more, **changed)
    rewritten, done, modified = apply(FoldBias, plain)
    assert (reasons(done), modified, ops(rewritten)) == ([reason], False, ops(plain))


def test_weights_that_a_short_type_cannot_hold_are_refused() -> None:
    gamma, w = (np.full(dims, 300, np.float16) for dims in ((C,), (C, 3 * C)))
    w[0] = -300
    plain = graph(NORM, MERGED, ATTENTION, dtype="float16", gamma=gamma, w=w)
    _, done, modified = apply(FoldBias, plain)
    assert (reasons(done), modified) == (["its weights would be too large for their type"], False)


@pytest.mark.parametrize(
    ("parts", "changed"),
    [
        ((NORM, MERGED), {"b": np.ones((N, 3 * C))}),
        ((NORM, MERGED.replace("a = Add (m, b)", "e = Add (m, b) a = Relu (e)")), {}),
        (
            (NORM, "m = MatMul (y, wq) a = Add (m, bq) o = Reshape (a, four) z = Transpose <perm = [0, 2, 1, 3]> (o)"),
            {},
        ),
    ],
    ids=["a bias for each token", "changed before the attention", "no attention"],
)  # fmt: skip
def test_what_no_attention_reads_stays_without_a_word(parts: tuple[str, ...], changed: dict[str, Any]) -> None:
    plain = graph(*parts, *([ATTENTION] if "z =" not in " ".join(parts) else []), **changed)
    rewritten, done, modified = apply(FoldBias, plain)
    assert (reasons(done), modified, ops(rewritten)) == ([], False, ops(plain))


def test_the_root_of_the_mean_square_is_another_normalisation() -> None:
    """Its vector does not sum to zero."""
    plain = graph(NORM.replace(", beta", ""), MERGED, ATTENTION)
    plain.opset_import[0].version = 23
    plain.graph.node[0].op_type = "RMSNormalization"
    rewritten, done, modified = apply(FoldBias, plain)
    assert (reasons(done), modified, ops(rewritten)) == ([], False, ops(plain))


def test_what_a_branch_reads_is_left_alone() -> None:
    branch = """g = If (flag) <
        then_branch = one () => (double[a, b, c] u) { u = MatMul (y, w1) },
        else_branch = two () => (double[a, b, c] t) { t = MatMul (y, w1) }
    >"""
    plain = graph(NORM, branch, MERGED, ATTENTION, more="double[a, b, c] g", flag=True)
    rewritten, done, modified = apply(FoldBias, plain)
    assert (reasons(done), modified, ops(rewritten)) == (["it is read by MatMul as well"], False, ops(plain))


# --- the number that is added ----------------------------------------------------------------------------------------


def weights(seed: int, channels: int, scale: float, bias: float) -> tuple[Array, Array, Array, Array]:
    """gamma, beta, W, b of a projection in realistic sizes, times two factors."""
    rng = np.random.default_rng(seed)
    w = rng.normal(0, scale * channels**-0.5, (channels, 3 * channels))
    return rng.uniform(0.2, 1.5, channels), rng.normal(0, 0.2, channels), w, rng.normal(0, bias, 3 * channels)


def parts_of(gamma: Array, beta: Array, w: Array, b: Array) -> tuple[Array, Array]:
    scaled = gamma[:, None] * w
    return scaled - scaled.mean(0), beta @ w + b


CASES = st.tuples(
    st.integers(0, 2**32 - 1), st.sampled_from([8, 48, 96]), st.floats(0.3, 3), st.sampled_from([0.003, 0.1, 0.5, 2.0])
)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_the_shift_is_near_the_best(case: tuple[int, int, float, float]) -> None:
    assert steps_from_the_best(case) <= 1


def steps_from_the_best(case: tuple[int, int, float, float]) -> float:
    """How many times two the shift is from the one of the least error, found by trying."""
    centred, bias = parts_of(*weights(*case))
    tried = 2.0 ** np.arange(-4, 2.01, 0.05)
    # y = n + t and W' = G + B / (t C): rounding errors grow with the squares
    errors = [(1 + t * t) * float(np.square(centred + bias / (t * len(centred))).sum()) for t in tried]
    return abs(math.log2(best_shift([(centred, bias)], len(centred)) / tried[int(np.argmin(errors))]))


def test_a_shift_is_held_between_two_bounds() -> None:
    ones = np.diag(np.ones(4)) - 0.25
    assert best_shift([(ones, np.full(4, 1e9))], 4) == 4
    assert best_shift([(ones, np.full(4, 1e-9))], 4) == 2**-4
    assert best_shift([(np.zeros((4, 4)), np.ones(4))], 4) == 4
    assert best_shift([(ones, np.zeros(4))], 4) == 0


@settings(max_examples=25, deadline=None)
@given(CASES)
def test_rounding_is_as_it_was(case: tuple[int, int, float, float]) -> None:
    """Numbers of 16 bits, products summed up in more: with a bias, and with the bias in the weights."""
    gamma, beta, w, b = weights(*case)
    x = np.random.default_rng(1).normal(0, 1, (200, len(gamma)))
    n = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    exact = (n * gamma + beta) @ w + b
    usual = half(half(n * gamma + beta) @ half(w) + half(b))
    centred, bias = parts_of(gamma, beta, w, b)
    t = best_shift([(centred, bias)], len(gamma))
    folded = half(half(n + t) @ half(centred + bias / (t * len(gamma))))
    assert np.square(folded - exact).mean() ** 0.5 <= 1.15 * np.square(usual - exact).mean() ** 0.5


def half(a: Array) -> Array:
    return a.astype(np.float16).astype(np.float64)


# --- faults that have to be found ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["not centred", "bias of the wrong columns", "beta is forgotten"])
def test_a_fault_in_the_weights_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fold_bias._parts

    def parts(reader: Any, gamma: Array, beta: Array | None) -> tuple[Array, Array]:
        centred, bias = real(reader, gamma, None if fault == "beta is forgotten" else beta)
        if fault == "not centred":
            centred = gamma[:, None] * reader.weight
        return centred, np.roll(bias, 1) if fault == "bias of the wrong columns" else bias

    monkeypatch.setattr(fold_bias, "_parts", parts)
    assert folded_deviation(0, 0, 0, MERGED) > 1e-3


@pytest.mark.parametrize("factor", [0.25, 4])
def test_a_shift_that_is_not_the_best_is_found(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = best_shift
    monkeypatch.setitem(globals(), "best_shift", lambda *a: factor * real(*a))
    find(CASES, lambda case: steps_from_the_best(case) > 1, settings=SEARCH)
