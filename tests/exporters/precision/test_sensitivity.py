"""One graph with a switch for every group: the same numbers as the graphs that it stands for, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.exporters.precision.placement import place
from deploycli.exporters.precision.sensitivity import GatedRuntime
from deploycli.exporters.runtime.runtimes import OrtRuntime
from tests.exporters.precision.networks import FLOAT, HALF, block, graph, normal, proto_of, quantized, ranges, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx_ir as ir

X = {"x": normal(3, 8, 32)}
GROUPS = place(block().graph, scheme="full", high_precision=frozenset()).groups


def gated(model: ir.Model, dtype: ir.DataType = FLOAT, **options: Any) -> GatedRuntime:
    placement = place(model.graph, scheme="full", high_precision=frozenset())
    return GatedRuntime(model, placement, ranges(block(), X), scale_type=dtype, output="y", **options)


@pytest.fixture(scope="module")
def runtime() -> Iterator[GatedRuntime]:
    with gated(block(), optimize=False) as runtime:
        yield runtime


def written(groups: tuple[str, ...], dtype: ir.DataType = FLOAT) -> bytes:
    found: bytes = run(quantized(block, X, groups=groups, scale_type=dtype)[0], X)["y"].tobytes()
    return found


def test_all_off_is_the_graph_itself(runtime: GatedRuntime) -> None:
    for batch in (1, 3):
        inputs = {"x": X["x"][:batch]}
        assert runtime.logits(inputs, ()).tobytes() == run(block(), inputs)["y"].tobytes()


def test_all_on_is_the_graph_that_is_written(runtime: GatedRuntime) -> None:
    assert runtime.logits(X, GROUPS).tobytes() == written(GROUPS)
    assert written(GROUPS) != written(())


@pytest.mark.parametrize("group", GROUPS)
def test_one_on_is_the_graph_with_this_one_in_int8(runtime: GatedRuntime, group: str) -> None:
    found = runtime.logits(X, (group,)).tobytes()
    assert found == written((group,))
    assert found != written(())


@settings(max_examples=10, deadline=None)
@given(st.sets(st.sampled_from(GROUPS)))
def test_any_of_them(groups: set[str]) -> None:
    with gated(block(), optimize=False) as runtime:
        assert runtime.logits(X, groups).tobytes() == written(tuple(groups))


def test_scales_of_another_type() -> None:
    with gated(block(), HALF, optimize=False) as runtime:
        assert runtime.logits(X, GROUPS).tobytes() == written(GROUPS, HALF)
    assert written(GROUPS, HALF) != written(GROUPS)


def test_optimised_it_differs_by_rounding(tmp_path: Path) -> None:
    """A sum in another order may move a value to the next level; all levels together make no more than this."""
    (tmp_path / "model.onnx").write_bytes(proto_of(block()).SerializeToString())
    with gated(block()) as fast, OrtRuntime(tmp_path / "model.onnx") as plain:
        truth = plain.run(X)["y"]
        np.testing.assert_allclose(fast.logits(X, ()), truth, atol=1e-5 * np.abs(truth).max())
        exact = run(quantized(block, X)[0], X)["y"]
        np.testing.assert_allclose(fast.logits(X, GROUPS), exact, atol=1e-2 * np.abs(truth).max())


def test_names_that_are_taken() -> None:
    model = graph("(float[b,16] gate_0) => (float[] gated) { n = Relu(gate_0) gated = MatMul(n, w) }", w=normal(16, 16))
    placement = place(model.graph, scheme="gemm", high_precision=frozenset())
    with GatedRuntime(model, placement, {"n": 3.0}, scale_type=FLOAT, output="gated") as runtime:
        inputs = {"gate_0": normal(2, 16)}
        expected = np.maximum(inputs["gate_0"], 0) @ normal(16, 16)
        np.testing.assert_allclose(runtime.logits(inputs, ()), expected, rtol=1e-5, atol=1e-5)
        assert (runtime.logits(inputs, ("MatMul",)) != expected).any()
