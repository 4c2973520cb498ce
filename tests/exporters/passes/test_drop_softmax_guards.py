from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.exporters.passes import drop_softmax_guards as softmax_guard
from deploycli.exporters.passes.drop_softmax_guards import DropSoftmaxGuards
from tests.exporters.passes.graphs import apply, differences, ops, parse, reasons

GUARDED = """g (float[batch, 3, 4] x) => (float[batch, 3, 4] y) {
    small = Mul (x, c)
    t = Transpose <perm = [0, 2, 1]> (small)
    raw = MatMul (small, t)
    scaled = Mul (raw, c)
    scores = Add (scaled, mask)
    p = Softmax <axis = -1> (scores)
    none = IsNaN (p)
    kept = Where (none, zero, p)
    y = MatMul (kept, x)
}"""
FINITE = np.float32([[0, -100, 0], [0, 0, -100], [-100, -100, -100]])
NUMBERS = {"c": np.float32(0.1), "zero": np.float32(0), "mask": FINITE}


def run(text: str, **constants: Any) -> tuple[dict[str, int], list[str], bool]:
    plain = parse(text, **constants)
    rewritten, graph_pass, modified = apply(DropSoftmaxGuards, plain)
    assert differences(plain, rewritten) == []
    return ops(rewritten), reasons(graph_pass), modified


def test_finite_scores_need_no_guard() -> None:
    counts, refusals, modified = run(GUARDED, **NUMBERS)
    assert ({"IsNaN", "Where"} & set(counts), refusals, modified) == (set(), [], True)


def test_without_a_mask() -> None:
    text = GUARDED.replace("scores = Add (scaled, mask)", "").replace("(scores)", "(scaled)")
    assert run(text, c=NUMBERS["c"], zero=NUMBERS["zero"])[2]


def test_a_query_that_sees_no_key_needs_it() -> None:
    hidden = np.where(FINITE < 0, -np.inf, FINITE).astype(np.float32)
    counts, refusals, modified = run(GUARDED, **{**NUMBERS, "mask": hidden})
    assert (counts["Where"], refusals, modified) == (1, ["its mask may hide all keys from a query"], False)


def test_a_mask_that_is_computed_needs_it() -> None:
    text = GUARDED.replace("Add (scaled, mask)", "Add (scaled, n)").replace(
        "scores =", "l = Log (mask) n = Sub (l, raw) scores ="
    )
    counts, refusals, _ = run(text, **{**NUMBERS, "mask": np.float32(np.eye(3))})
    assert (counts["Where"], refusals) == (1, ["its mask may hide all keys from a query"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("IsNaN (p)", "IsInf (p)"),
        ("IsNaN (p)", "IsNaN (scores)"),
        ("Where (none, zero, p)", "Where (none, p, scores)"),
        ("Where (none, zero, p)", "Where (none, c, p)"),
        ("p = Softmax <axis = -1> (scores)", "p = Neg (scores)"),
    ],
)
def test_another_choice_stays(old: str, new: str) -> None:
    text = GUARDED.replace(old, new)
    counts, refusals, modified = run(text, **{k: v for k, v in NUMBERS.items() if f"{k})" in text or f" {k}," in text})
    assert (counts["Where"], refusals, modified) == (1, [], False)


def test_a_guard_that_is_always_dropped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: any mask is taken for a finite one."""
    monkeypatch.setattr(softmax_guard, "_is_safe", lambda *_: True)
    plain = parse(GUARDED, **{**NUMBERS, "mask": np.where(FINITE < 0, -np.inf, FINITE).astype(np.float32)})
    assert differences(plain, apply(DropSoftmaxGuards, plain)[0]) != []


LOWEST = float(np.finfo(np.float32).min)


def hidden(row: int, value: float) -> Any:
    mask = np.zeros((3, 3), np.float32)
    mask[row] = value
    return mask


@pytest.mark.parametrize(
    ("scores", "constants"),
    [
        ("a = Add (raw, one) scores = Add (a, two)", {"one": hidden(1, LOWEST), "two": hidden(1, LOWEST)}),
        ("a = Add (raw, one) scores = Mul (a, two)", {"one": hidden(1, -1e30), "two": np.float32(1e30)}),
        ("a = Sub (raw, one) scores = Div (a, two)", {"one": hidden(1, 1e30), "two": np.float32(1e-30)}),
        ("a = Add (raw, one) r = Reshape (a, s) b = Add (r, two) scores = Squeeze (b, axis)",
         {"one": hidden(1, LOWEST), "two": hidden(1, LOWEST), "s": [-1, 1, 3, 3], "axis": [1]}),
        ("h = Cast <to = 10> (raw) b = Add (h, one) scores = Cast <to = 1> (b)",
         {"one": hidden(1, -65504).astype(np.float16)}),
        ("a = Add (raw, one) b = Cast <to = 10> (a) scores = Cast <to = 1> (b)", {"one": hidden(1, -1e6)}),
        ("scores = Add (raw, one)", {"one": hidden(1, np.nan)}),
        ("scores = Add (raw, one)", {"one": hidden(1, np.inf)}),
    ],
)  # fmt: skip
def test_constants_that_are_finite_alone_may_overflow_together(scores: str, constants: dict[str, Any]) -> None:
    text = GUARDED.replace("scaled = Mul (raw, c)", "").replace("scores = Add (scaled, mask)", scores)
    counts, refusals, modified = run(text, c=NUMBERS["c"], zero=NUMBERS["zero"], **constants)
    assert (counts["Where"], refusals, modified) == (1, ["its mask may hide all keys from a query"], False)


IN_THE_PRODUCT = """g (float[batch, 3, 4] x) => (float[batch, 3, 4] y) {
    t = Transpose <perm = [0, 2, 1]> (x)
    OPERANDS
    raw = MatMul (q, k)
    p = Softmax <axis = -1> (raw)
    none = IsNaN (p)
    kept = Where (none, zero, p)
    y = MatMul (kept, x)
}"""


@pytest.mark.parametrize(
    ("operands", "constants"),
    [
        ("q = Mul (x, c) k = Mul (t, c)", {"c": np.float32(1e25)}),
        ("a = Mul (x, c) q = Neg (a) k = Div (t, d)", {"c": np.float32(1e25), "d": np.float32(1e-25)}),
        ("q = Add (x, c) k = Identity (t)", {"c": np.float32([[0], [LOWEST], [0]])}),
        ("q = Identity (x) k = Where (b, c, t)", {"b": np.eye(4, 3) > 0, "c": np.float32(-np.inf)}),
        ("q = MatMul (x, w) k = Mul (t, c)", {"w": 1e20 * np.eye(4, dtype=np.float32), "c": np.float32(1e20)}),
        ("q = Identity (w) k = Mul (t, c)", {"w": 1e20 * np.eye(3, 4, dtype=np.float32), "c": np.float32(1e20)}),
        ("q = Identity (w) k = Mul (t, c)", {"w": np.full((3, 4), np.nan, np.float32), "c": np.float32(1)}),
    ],
)
def test_constants_in_queries_and_keys_may_let_their_product_overflow(operands: str, constants: dict[str, Any]) -> None:
    text = IN_THE_PRODUCT.replace("OPERANDS", operands)
    counts, _, modified = run(text, zero=NUMBERS["zero"], **constants)
    assert (counts["IsNaN"], modified) == (1, False)


def test_usual_scales_and_weights_of_queries_and_keys_need_no_guard() -> None:
    operands = "n = LayerNormalization (x, g) q0 = MatMul (n, w) q1 = Add (q0, b) q = Mul (q1, c) k = Mul (t, c)"
    weights = {"g": np.float32([1, 2, 3, 4]), "w": np.eye(4, dtype=np.float32), "b": np.float32([1, -1, 30, 0])}
    assert run(IN_THE_PRODUCT.replace("OPERANDS", operands), zero=NUMBERS["zero"], c=np.float32(8), **weights)[2]


def test_a_long_way_to_a_product_has_no_bound() -> None:
    steps = " ".join(f"a{i + 1} = Add (a{i}, a{i})" for i in range(200))
    text = IN_THE_PRODUCT.replace("OPERANDS", f"a0 = Identity (x) {steps} q = Identity (a200) k = Identity (t)")
    assert not run(text, zero=NUMBERS["zero"])[2]


@pytest.mark.parametrize(
    "mask",
    [
        hidden(1, LOWEST),  # beside the lowest number scores are lost: they are all equal, and no NaN
        np.where(np.tril(np.ones((3, 3))) > 0, 0, -np.inf).astype(np.float32),  # causal: each query sees itself
        np.float32([-np.inf, 0, -np.inf]),
    ],
)
def test_a_mask_that_leaves_each_query_a_key_needs_no_guard(mask: Any) -> None:
    counts, refusals, modified = run(GUARDED, **{**NUMBERS, "mask": mask})
    assert ({"IsNaN", "Where"} & set(counts), refusals, modified) == (set(), [], True)


def test_the_axis_of_the_softmax_says_what_is_hidden() -> None:
    """Every query sees a key, but one key is seen by no query."""
    column = np.float32([[0, 0, -np.inf]])
    assert run(GUARDED, **{**NUMBERS, "mask": column})[2]
    assert not run(GUARDED.replace("Softmax <axis = -1>", "Softmax <axis = 1>"), **{**NUMBERS, "mask": column})[2]


NUMBERS_TO_ADD = st.sampled_from([0.0, 1.0, -1.0, -100.0, -1e30, 1e30, LOWEST, -LOWEST, -np.inf, 65504.0, -65504.0])


@st.composite
def guarded(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Scores that constants of any size and shape are combined with."""
    lines, constants, name = [], {"zero": np.float32(0), "c": np.float32(0.1)}, "raw"
    for i in range(draw(st.integers(1, 4))):
        op = draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Reshape", "Cast"]))
        if op == "Cast":
            lines.append(f"h{i} = Cast <to = 10> ({name}) s{i} = Cast <to = 1> (h{i})")
        elif op == "Reshape":
            lines.append(f"r{i} = Reshape ({name}, flat) s{i} = Reshape (r{i}, square)")
            constants |= {"flat": np.array([-1, 9]), "square": np.array([-1, 3, 3])}
        else:
            shape = draw(st.sampled_from([(), (3,), (3, 3), (1, 3, 1)]))
            size = int(np.prod(shape))
            numbers = NUMBERS_TO_ADD.filter(bool) if op == "Div" else NUMBERS_TO_ADD
            constants[f"k{i}"] = np.reshape(draw(st.lists(numbers, min_size=size, max_size=size)), shape)
            lines.append(f"s{i} = {op} ({name}, k{i})")
        name = f"s{i}"
    text = GUARDED.replace("scaled = Mul (raw, c)", "").replace("scores = Add (scaled, mask)", "\n".join(lines))
    return text.replace("(scores)", f"({name})"), {
        key: value if value.dtype == np.int64 else value.astype(np.float32) for key, value in constants.items()
    }


@settings(max_examples=200, deadline=None)
@given(guarded())
def test_a_guard_is_dropped_only_where_nothing_changes(case: tuple[str, dict[str, Any]]) -> None:
    text, constants = case
    plain = parse(text, **constants)
    with np.errstate(all="ignore"):
        assert differences(plain, apply(DropSoftmaxGuards, plain)[0]) == []
