from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.exporters.passes import multiply_from_left as left
from deploycli.exporters.passes.multiply_from_left import MultiplyFromLeft
from deploycli.exporters.passes.pipeline import rewrite
from tests.exporters.passes.graphs import apply, differences, load, ops, parse, proto

if TYPE_CHECKING:
    import onnx

RNG = np.random.default_rng(0)

TALKING = """g (float[batch, 3, 5, 7] x) => (float[batch, 2, 5, 7] y) {
    turned = Transpose <perm = [0, 2, 3, 1]> (x)
    mixed = MatMul (turned, w)
    sum = Add (mixed, b)
    y = Transpose <perm = [0, 3, 1, 2]> (sum)
}"""
CONSTANTS: dict[str, Any] = {
    "w": RNG.uniform(1, 2, (3, 2)).astype(np.float32),
    "b": RNG.uniform(1, 2, 2).astype(np.float32),
}


def test_heads_that_talk_are_not_moved() -> None:
    plain = parse(TALKING, **CONSTANTS)
    rewritten, _, modified = apply(MultiplyFromLeft, plain)
    assert modified
    assert ops(rewritten) == {"Reshape": 2, "MatMul": 1, "Add": 1}
    assert differences(plain, rewritten, rtol=1e-5) == []
    assert not apply(MultiplyFromLeft, rewritten)[2]


def test_the_other_passes_leave_it() -> None:
    """Scores of heads that talk before and behind their Softmax."""
    text = """g (float[batch, 3, 5, 4] q, float[batch, 3, 4, 5] k) => (float[batch, 3, 5, 5] y) {
        x = MatMul (q, k)
        t = Transpose <perm = [0, 2, 3, 1]> (x)
        m = MatMul (t, w)
        s = Add (b, m)
        u = Transpose <perm = [0, 3, 1, 2]> (s)
        p = Softmax (u)
        v = Transpose <perm = [0, 2, 3, 1]> (p)
        n = MatMul (v, w)
        y = Transpose <perm = [0, 3, 1, 2]> (n)
    }"""
    weight = RNG.uniform(1e-4, 2e-4, (3, 3)).astype(np.float32)
    plain = parse(text, w=weight, b=RNG.uniform(1, 2, 3).astype(np.float32))
    model = load(plain)
    rewrite(model)
    assert "Transpose" not in ops(model)
    assert differences(plain, proto(model), rtol=1e-3) == []


@st.composite
def products(draw: st.DrawFn) -> onnx.ModelProto:
    """A product over any axis but the first and the last of a value of three to five axes."""
    rank = draw(st.integers(3, 5))
    dims = [draw(st.integers(1, 4)) for _ in range(rank - 1)]
    axis, made = draw(st.integers(1, rank - 2)), draw(st.integers(1, 4))
    perm = [i for i in range(rank) if i != axis] + [axis]
    result = [made if i == axis else size for i, size in enumerate(dims, 1)]
    has_bias = draw(st.booleans())
    text = f"""g (float[batch, {", ".join(map(str, dims))}] x) => (float[batch, {", ".join(map(str, result))}] y) {{
        t = Transpose <perm = {perm}> (x)
        m = MatMul (t, w)
        s = {"Add (b, m)" if has_bias else "Identity (m)"}
        y = Transpose <perm = {np.argsort(perm).tolist()}> (s)
    }}"""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    weight = rng.uniform(1, 2, (dims[axis - 1], made)).astype(np.float32)
    if has_bias:
        return parse(text, w=weight, b=rng.uniform(1, 2, made).astype(np.float32))
    return parse(text.replace("s = Identity (m)", "").replace("(s)", "(m)"), w=weight)


@settings(max_examples=40, deadline=None)
@given(products())
def test_any_axis(plain: onnx.ModelProto) -> None:
    rewritten, _, modified = apply(MultiplyFromLeft, plain)
    assert modified
    assert "Transpose" not in ops(rewritten)
    assert differences(plain, rewritten, (1, 3), rtol=1e-5) == []


TURNED = TALKING.replace("batch, 2, 5, 7] y", "batch, 2, 7, 5] y")


@pytest.mark.parametrize(
    "text",
    [
        TURNED.replace("perm = [0, 3, 1, 2]", "perm = [0, 3, 2, 1]"),
        TURNED.replace("perm = [0, 2, 3, 1]", "perm = [0, 3, 2, 1]"),
        TALKING.replace("y = Transpose", "more = Neg (sum) y = Transpose").replace("(sum)\n}", "(more)\n}"),
        TALKING.replace("sum =", "more = Neg (mixed) sum =").replace("7] y)", "7] y, float[batch, 5, 7, 2] more)"),
    ],
    ids=["it is not moved back", "others are moved, too", "something is between", "something else reads it"],
)
def test_what_is_left(text: str) -> None:
    _, _, modified = apply(MultiplyFromLeft, parse(text, **CONSTANTS))
    assert not modified


def test_many_channels_stay() -> None:
    text, weight = TALKING.replace("batch, 3", "batch, 17"), np.ones((17, 2), np.float32)
    _, _, modified = apply(MultiplyFromLeft, parse(text, w=weight, b=CONSTANTS["b"]))
    assert not modified


def test_a_weight_that_is_not_turned_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = left._Product

    def wrong(x: Any, axis: int, weight: Any, bias: Any, back: Any) -> Any:
        return real(x, axis, weight.T, bias, back)

    monkeypatch.setattr(left, "_Product", wrong)
    constants = {"w": RNG.uniform(1, 2, (3, 3)).astype(np.float32), "b": np.float32([1, 2, 3])}
    plain = parse(TALKING.replace("batch, 2", "batch, 3"), **constants)
    rewritten, _, _ = apply(MultiplyFromLeft, plain)
    assert differences(plain, rewritten, rtol=1e-5) != []
