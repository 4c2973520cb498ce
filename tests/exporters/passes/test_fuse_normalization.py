from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploycli.exporters.passes.fuse_normalization import FuseNormalization
from tests.exporters.passes.graphs import apply, ops, reasons
from tests.exporters.passes.written_out import RNG, fuse, parse_at

if TYPE_CHECKING:
    import onnx

fuse_norm = partial(fuse, FuseNormalization)

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


@pytest.mark.parametrize("shape", ["batch, tokens, 6", "?, ?, 6", "?, 4, 6", "5, tokens, 6"])
def test_what_is_normalised_may_have_axes_that_are_not_known(shape: str) -> None:
    plain = norm(NORM.replace("[batch, 4, 6]", f"[{shape}]"))
    assert fuse_norm(plain) == ({"LayerNormalization": 1}, [], True)


def test_doubles_stay_as_they_are_written() -> None:
    """The operator has its epsilon in FP32, and computes in it."""
    text = NORM.replace("float[", "double[")
    plain = parse_at(17, text, **{k: np.float64(v) for k, v in PARAMETERS.items() if k != "one"})
    rewritten, _, modified = apply(FuseNormalization, plain)
    assert (ops(rewritten), modified) == (ops(plain), False)
