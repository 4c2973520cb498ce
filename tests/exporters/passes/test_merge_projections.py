from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.exporters.graph.builder import replace_all
from deploycli.exporters.passes import merge_projections as projections
from deploycli.exporters.passes.merge_projections import MergeProjections
from tests.exporters.passes.graphs import apply, differences, ops, parse, reasons, transform

if TYPE_CHECKING:
    import pytest

RNG = np.random.default_rng(0)


def constant(*shape: int) -> Any:
    """Small integers, whose sums of products are exact in any order."""
    return RNG.integers(-4, 5, shape).astype(np.float32)


merge = partial(transform, MergeProjections)


QKV = """g (float[batch, 3, 4] x) => (float[batch, 3, 6] q, float[batch, 3, 2] k, float[batch, 3, 5] v) {
    qm = MatMul (x, wq)
    q = Add (qm, bq)
    km = MatMul (x, wk)
    k = Add (bk, km)
    vm = MatMul (x, wv)
    v = Add (vm, bv)
}"""


def weights() -> dict[str, Any]:
    sizes = {"q": 6, "k": 2, "v": 5}
    return {f"w{n}": constant(4, s) for n, s in sizes.items()} | {f"b{n}": constant(s) for n, s in sizes.items()}


def test_query_key_and_value_are_projected_once() -> None:
    plain = parse(QKV, **weights())
    rewritten, graph_pass, modified = apply(MergeProjections, plain)
    assert differences(plain, rewritten) == []
    assert (ops(rewritten), modified, reasons(graph_pass)) == ({"MatMul": 1, "Add": 1, "Split": 1}, True, [])


def test_a_missing_bias_is_zero() -> None:
    text = QKV.replace("k = Add (bk, km)", "k = Identity (km)")
    constants = weights()
    del constants["bk"]
    plain = parse(text, **constants)
    rewritten, _, _ = apply(MergeProjections, plain)
    assert differences(plain, rewritten) == []
    assert ops(rewritten) == {"MatMul": 1, "Add": 1, "Split": 1, "Identity": 1}


def test_without_any_bias_none_is_added() -> None:
    text = """g (float[batch, 4] x) => (float[batch, 6] q, float[batch, 2] k) {
        q = MatMul (x, wq)
        k = MatMul (x, wk)
    }"""
    plain = parse(text, wq=constant(4, 6), wk=constant(4, 2))
    rewritten, _, _ = apply(MergeProjections, plain)
    assert differences(plain, rewritten) == []
    assert ops(rewritten) == {"MatMul": 1, "Split": 1}


def test_projections_of_different_values_stay() -> None:
    text = """g (float[batch, 4] x, float[batch, 4] y) => (float[batch, 6] q, float[batch, 2] k) {
        q = MatMul (x, wq)
        k = MatMul (y, wk)
    }"""
    assert merge(text, wq=constant(4, 6), wk=constant(4, 2)) == ({"MatMul": 2}, [], False)


def test_a_weight_that_is_read_elsewhere_is_refused() -> None:
    text = """g (float[batch, 4] x) => (float[batch, 6] q, float[batch, 2] k, float[4, 6] n) {
        q = MatMul (x, wq)
        k = MatMul (x, wk)
        n = Neg (wq)
    }"""
    counts, refusals, modified = merge(text, wq=constant(4, 6), wk=constant(4, 2))
    assert (counts, refusals, modified) == ({"MatMul": 2, "Neg": 1}, ["its weight is read elsewhere too"], False)


def test_a_product_that_is_read_without_its_bias_keeps_its_sum() -> None:
    """The bias belongs to one of two readers, so it stays where it is."""
    text = QKV.replace("=> (", "=> (float[batch, 3, 6] raw, ").replace(
        "q = Add (qm, bq)", "raw = Neg (qm) q = Add (qm, bq)"
    )
    plain = parse(text, **weights())
    rewritten, _, _ = apply(MergeProjections, plain)
    assert differences(plain, rewritten) == []
    assert ops(rewritten) == {"MatMul": 1, "Add": 2, "Neg": 1, "Split": 1}


def test_parts_that_go_to_the_wrong_readers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: each reader gets its neighbour's part of the Split."""

    def replace_by_next(values: dict[Any, Any]) -> None:
        replace_all(dict(zip(values, [*list(values.values())[1:], *list(values.values())[:1]], strict=True)))

    monkeypatch.setattr(projections, "replace_all", replace_by_next)
    text = """g (float[batch, 4] x) => (float[batch, 6] q, float[batch, 6] k) {
        q = MatMul (x, wq)
        k = MatMul (x, wk)
    }"""
    plain = parse(text, wq=constant(4, 6), wk=constant(4, 6))
    rewritten, _, _ = apply(MergeProjections, plain)
    assert differences(plain, rewritten) != []


def test_projections_of_projections() -> None:
    """One of what is merged is itself merged into: c and d read a part of the product that a and b became."""
    text = """g (float[batch, 4] x) => (float[batch, 4] y) {
        a = MatMul (x, wa) ab = Add (a, ba) b = MatMul (x, wb)
        c = MatMul (ab, wc) d = MatMul (ab, wd) e = MatMul (c, we) f = MatMul (c, wf)
        one = Add (b, d) two = Add (e, f) y = Add (one, two)
    }"""
    plain = parse(text, **{f"w{n}": constant(4, 4) for n in "abcdef"}, ba=constant(4))
    rewritten, _, modified = apply(MergeProjections, plain)
    assert differences(plain, rewritten) == []
    assert (ops(rewritten)["MatMul"], modified) == (3, True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=10))
def test_any_tree_of_projections(parents: list[tuple[int, bool]]) -> None:
    """Every projection reads x or an earlier one, with a bias or without."""
    lines, names, constants = [], ["x"], {}
    for i, (parent, has_bias) in enumerate(parents):
        constants[f"w{i}"] = RNG.integers(-1, 2, (3, 3)).astype(np.float32)
        lines.append(f"m{i} = MatMul ({names[parent % len(names)]}, w{i})")
        if has_bias:
            constants[f"b{i}"] = constant(3)
            lines.append(f"p{i} = Add (m{i}, b{i})")
        names.append(f"p{i}" if has_bias else f"m{i}")
    lines.append(f"y = Sum ({', '.join(names[1:])})")
    plain = parse(f"g (float[batch, 3] x) => (float[batch, 3] y) {{ {chr(10).join(lines)} }}", **constants)
    rewritten, _, _ = apply(MergeProjections, plain)
    assert differences(plain, rewritten, (1, 3)) == []
