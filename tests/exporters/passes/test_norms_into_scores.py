from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.exporters.passes import norms_into_scores as norms
from deploycli.exporters.passes.norms_into_scores import NormsIntoScores
from tests.exporters.passes.graphs import apply, differences, ops, parse

RNG = np.random.default_rng(0)
CONSTANTS: dict[str, Any] = {
    "last": np.array([-1]),
    "least": np.float32(1e-12),
    "scale": RNG.uniform(1, 9, (2, 1, 1)).astype(np.float32),
    "mask": RNG.normal(size=(2, 5, 7)).astype(np.float32),
}

Q = "nq = ReduceL2 (q, last) cq = Clip (nq, least) qn = Div (q, cq)"
K = "nk = ReduceL2 (k, last) ck = Clip (nk, least) kn = Div (k, ck)"
TURN = "kt = Transpose <perm = [0, 1, 3, 2]> (kn)"
SCORES = "s = MatMul (qn, kt) ss = Mul (s, scale) sm = Add (ss, mask) p = Softmax (sm) y = MatMul (p, v)"
HEAD = "g (float[batch, 2, 5, 4] q, float[batch, 2, 7, 4] k, float[batch, 2, 7, 4] v) => (float[batch, 2, 5, 4] y)"


def graph(*parts: str, head: str = HEAD, **changed: Any) -> Any:
    text = f"{head} {{ {' '.join(parts)} }}"
    return parse(text, **{name: value for name, value in (CONSTANTS | changed).items() if name in text})


def test_scores_are_divided_by_the_norms_of_queries_and_keys() -> None:
    plain = graph(Q, K, TURN, SCORES)
    rewritten, _, modified = apply(NormsIntoScores, plain)
    assert differences(plain, rewritten, rtol=1e-4) == []
    assert modified
    found = {node.output[0]: node for node in rewritten.graph.node}
    product = next(node for node in rewritten.graph.node if node.op_type == "MatMul")
    assert product.input[0] == "q"
    assert found[product.input[1]].input[0] == "k"
    assert "Div" not in ops(rewritten)


def test_one_of_the_two_is_enough() -> None:
    plain = graph(Q, "kt = Transpose <perm = [0, 1, 3, 2]> (k)", SCORES)
    rewritten, _, modified = apply(NormsIntoScores, plain)
    assert differences(plain, rewritten, rtol=1e-4) == []
    assert modified


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["Div", "Mul"]), st.sampled_from(["Div", "Mul"]), st.booleans(), st.integers(0, 99))
def test_any_factor_of_each_row(one: str, other: str, swapped: bool, seed: int) -> None:
    """A factor stands on either side; it is computed, so that it is another one for each sample."""
    q = f"nq = ReduceL2 (q, last) qn = {one} (q, nq)"
    k = f"nk = ReduceL2 (k, last) kn = {other} (k, nk)"
    if swapped and one == "Mul":
        q = q.replace("(q, nq)", "(nq, q)")
    scale = np.random.default_rng(seed).uniform(0.001, 0.01, (2, 1, 1)).astype(np.float32)
    plain = graph(q, k, TURN, SCORES, scale=scale)
    rewritten, _, modified = apply(NormsIntoScores, plain)
    assert modified
    # Products of two norms are large, and a Softmax of large scores has two values that are far apart.
    assert differences(plain, rewritten, batches=(1, 2), rtol=2e-3) == []


@pytest.mark.parametrize(
    ("parts", "left"),
    [
        (("qn = Mul (q, each)", K, TURN, SCORES), ["qn", "k"]),
        ((Q, K, TURN, SCORES.replace("Softmax", "Relu")), ["qn", "kn"]),
        ((Q.replace("last", "third"), K.replace("last", "third"), TURN, SCORES), ["qn", "kn"]),
    ],
    ids=["a factor of channels", "no Softmax", "a norm of tokens"],
)
def test_what_is_no_norm_of_rows_stays(parts: tuple[str, ...], left: list[str]) -> None:
    each = RNG.uniform(1, 2, 4).astype(np.float32)
    plain = graph(*parts, third=np.array([2]), each=each, scale=np.full((2, 1, 1), 1e-3, np.float32))
    rewritten, _, _ = apply(NormsIntoScores, plain)
    assert differences(plain, rewritten, batches=(1, 2), rtol=1e-3) == []
    found = {name: node for node in rewritten.graph.node for name in node.output}
    query, key = next(node.input for node in rewritten.graph.node if node.op_type == "MatMul")
    assert [query, found[key].input[0]] == left


def test_a_norm_that_is_not_turned_with_its_keys_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: norms of queries divide keys, and the other way round."""
    real = norms._read

    def read(scores: Any, position: int, analysis: Any) -> Any:
        found, other = (real(scores, i, analysis) for i in (position, 1 - position))
        if found is None or other is None:
            return found
        return norms._Norm(position, found.x, other.norm, found.divides, found.turn)

    monkeypatch.setattr(norms, "_read", read)
    head = HEAD.replace("float[batch, 2, 5, 4] q", "float[batch, 2, 7, 4] q").replace(
        "(float[batch, 2, 5", "(float[batch, 2, 7"
    )
    plain = graph(Q, K, TURN, SCORES, head=head, mask=RNG.normal(size=(2, 7, 7)).astype(np.float32))
    rewritten, _, _ = apply(NormsIntoScores, plain)
    assert differences(plain, rewritten, rtol=1e-3) != []
