"""Query, key and value before they have one scale: what they compute stays, and what is lost in INT8 does not grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.exporters.precision.balance import balance
from deploycli.exporters.precision.insert_qdq import insert
from deploycli.exporters.precision.placement import AUTO, place
from tests.exporters.precision.networks import (
    FLOAT,
    IN_PLACE_TEXT,
    Array,
    assert_valid,
    in_place,
    normal,
    ranges,
    run,
)  # fmt: skip

if TYPE_CHECKING:
    import onnx_ir as ir

X = {"x": normal(8, 3, 32, seed=9)}


def weights(model: ir.Model) -> dict[str, Array]:
    return {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items() if v.const_value is not None}


def balanced(model: ir.Model) -> list[str]:
    """Balance what `AUTO` chooses; return why not."""
    placement = place(model.graph, scheme=AUTO, high_precision=frozenset())
    assert all(site.alike for site in placement.sites)
    return [remark.reason for remark in balance(model.graph, placement)]


def attention(model: ir.Model) -> dict[str, Array]:
    """Scores, and what each head would add to the stream, in FP64, of the weights as they are stored."""
    norm = next(n for n in model.graph if n.name == "LayerNormalization")
    gamma, beta = (v.const_value.numpy().astype(np.float64) for v in norm.inputs[1:])  # type: ignore[union-attr]
    held = {name: array.astype(np.float64) for name, array in weights(model).items()}
    x = X["x"].astype(np.float64)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gamma + beta
    q, k, v = ((y @ held[name]).reshape(8, 3, 2, 16).transpose(1, 2, 0, 3) for name in ("wq", "wk", "wv"))
    return {"scores": q @ k.swapaxes(-1, -2), "heads": v @ held["wo"].reshape(2, 16, 32)}


SPREAD = st.lists(st.floats(-6, 6), min_size=32, max_size=32).map(lambda e: np.exp2(e).astype(np.float32))
"""Factors of the channels of a weight."""


@settings(max_examples=25, deadline=None)
@given(rows=SPREAD, query=SPREAD, key=SPREAD, value=SPREAD)
def test_nothing_else_changes(rows: Array, query: Array, key: Array, value: Array) -> None:
    """Whatever the channels are: in float64 scores and result are the same but for the rounding of the weights."""
    factors = {"wq": query, "wk": key, "wv": value}
    made = {name: (0.1 * normal(32, 32, seed=i) * rows[:, None] * f) for i, (name, f) in enumerate(factors.items())}
    model = in_place(g1=(1 / rows).astype(np.float32), z1=(0.1 / rows).astype(np.float32), **made)
    before = attention(model)
    assert balanced(model) == []
    for name, found in attention(model).items():
        assert np.abs(found - before[name]).max() <= 1e-5 * np.abs(before[name]).max()
    held = weights(model)
    columns = {name: np.abs(held[name]).max(axis=0) for name in factors}
    assert columns["wq"] == pytest.approx(columns["wk"], rel=1e-5)
    assert columns["wv"] == pytest.approx(np.full(32, columns["wq"].max()), rel=1e-5)


def test_dead_channels_stay_dead() -> None:
    def without(name: str, seed: int) -> Array:
        array = 0.3 * normal(32, 32, seed=seed)
        array[:, 3] = 0
        array[5] = 0
        return array

    model = in_place(**{name: without(name, i) for i, name in enumerate(("wq", "wk", "wv"))})
    before = attention(model)
    assert balanced(model) == []
    assert all(np.isfinite(array).all() for array in weights(model).values())
    assert attention(model)["heads"] == pytest.approx(before["heads"], rel=1e-5, abs=1e-6)


def test_what_it_is_for() -> None:
    """A network whose channels differ a hundredfold, in INT8 by its largest values."""
    spread = np.exp2(np.linspace(-3, 3, 32)).astype(np.float32)
    made = {"wq": 0.1 * normal(32, 32) * spread, "wk": 0.1 * normal(32, 32, seed=1) / spread}
    made["wv"] = 0.1 * normal(32, 32, seed=2) * spread
    made["wo"] = 0.1 * normal(32, 32, seed=3) / spread[:, None]
    truth = run(in_place(**made), X)["y"]

    def error(*, is_balanced: bool) -> float:
        model = in_place(**made)
        placement = place(model.graph, scheme=AUTO, high_precision=frozenset())
        if is_balanced:
            balance(model.graph, placement)
        insert(model, placement.sites, ranges(model, X), scale_type=FLOAT)
        assert_valid(model)
        return float(np.abs(run(model, X)["y"] - truth).max())

    assert error(is_balanced=True) < 0.3 * error(is_balanced=False)


def test_a_range_of_the_vector_as_it_was_is_not_taken_for_the_new_one() -> None:
    model = in_place()
    placement = place(model.graph, scheme=AUTO, high_precision=frozenset())
    assert placement.calibrated == ("n1",)
    balance(model.graph, placement)
    assert placement.calibrated == ("n1.balanced",)
    assert not {"g1", "z1"} & model.graph.initializers.keys()


def test_without_a_norm_the_columns_alone_are_balanced() -> None:
    model = in_place(IN_PLACE_TEXT.replace("LayerNormalization<axis=-1>(x, g1, z1)", "Mul(x, g1)"))
    before = run(model, X)["y"]
    assert balanced(model) == ["form: no LayerNormalization is in front of it"]
    assert run(model, X)["y"] == pytest.approx(before, rel=1e-4, abs=1e-4)
    held = weights(model)
    assert np.abs(held["wq"]).max(axis=0) == pytest.approx(np.abs(held["wk"]).max(axis=0), rel=1e-5)


def test_a_vector_of_which_a_part_is_moved_keeps_its_channels() -> None:
    text = IN_PLACE_TEXT.replace("n2 = Layer", "m = Transpose<perm=[1,0,2]>(n1)   n2 = Layer").replace(
        "=> (float[8,b,32] y)", "=> (float[8,b,32] y, float[b,8,32] m)"
    )
    assert balanced(in_place(text)) == ["form: its LayerNormalization is read elsewhere too"]


ELSEWHERE = {
    "the vector is read elsewhere": ("r = Add(x, o4)", "r0 = Add(x, o4)   r = Add(r0, n1)"),
    "the query is rotated": ("s = MatMul(q, kt)", "q2 = Mul(q, bo2)   s = MatMul(q2, kt)"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_would_be_written_twice_is_not_chosen(name: str) -> None:
    model = in_place(IN_PLACE_TEXT.replace(*ELSEWHERE[name]), bo2=np.float32(0.5))
    placement = place(model.graph, scheme=AUTO, high_precision=frozenset())
    assert placement.scheme == "gemm"
    before = weights(model)
    assert balance(model.graph, placement) == []
    assert all((array == before[name]).all() for name, array in weights(model).items())


def test_a_projection_that_is_quantised_keeps_its_range() -> None:
    model = in_place()
    placement = place(model.graph, scheme="full", high_precision=frozenset())
    projections = place(model.graph, scheme=AUTO, high_precision=frozenset())
    after = [site for site in placement.sites if site.node.name == "MatMul_5"]
    assert len(after) == 1
    before = weights(model)["wo"]
    both = type(placement)((*projections.sites, *after), (), AUTO)
    assert balance(model.graph, both) == []
    assert (weights(model)["wo"] == before).all()
