from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporters.rewrite import softmax_guard
from exporters.rewrite.softmax_guard import DropSoftmaxGuard
from tests.exporters.rewrite.graphs import apply, differences, ops, parse, reasons

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
    rewritten, graph_pass, modified = apply(DropSoftmaxGuard, plain)
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
    monkeypatch.setattr(softmax_guard, "_is_finite", lambda *_: True)
    plain = parse(GUARDED, **{**NUMBERS, "mask": np.where(FINITE < 0, -np.inf, FINITE).astype(np.float32)})
    assert differences(plain, apply(DropSoftmaxGuard, plain)[0]) != []
