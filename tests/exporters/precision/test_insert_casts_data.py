"""What calibration data show: values near the end of FP16, and values that are none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from deploycli.exporters.cast import cast_bundle
from deploycli.exporters.precision.observed import magnitudes
from deploycli.exporters.precision.options import CalibrationData, CastOptions
from deploycli.models.errors import NumericsError, UsageError
from tests.exporters.bundle import bundles
from tests.exporters.precision.casts import Double, assert_close, source, typed, weights
from tests.exporters.precision.samples_in_memory import InMemory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deploycli.exporters.bundle.bundle import Bundle


def measure(
    tmp_path: Path, text: str, rows: Any, unreadable: tuple[int, ...] = (), **constants: Any
) -> tuple[dict[str, float], list[tuple[int, int]]]:
    path, calls = tmp_path / "model.onnx", []
    onnx.save(source(text, **constants), path)
    found = magnitudes(path, InMemory(rows, unreadable), progress=lambda _, done, total: calls.append((done, total)))
    return found, calls


def test_magnitudes_of_all_samples(tmp_path: Path) -> None:
    text = """g (float[N, 2] x) => (float[N, 2] y, int64[M] i) {
        a = Mul (x, k) i = Shape (a) d = Cast <to = 11> (a) e = Cast <to = 1> (d) y = Neg (e)
    }"""
    found, calls = measure(tmp_path, text, [[1, 2], [-30, 4], [5, 6]], k=np.float32(10))
    assert found == {"x": 30.0, "a": 300.0, "e": 300.0, "y": 300.0}
    assert calls == [(0, 3), (1, 3), (2, 3)]
    found, _ = measure(tmp_path, text, [[1, 2], [-30, 4], [5, 6]], (1,), k=np.float32(10))
    assert found["a"] == 60.0


def test_a_fixed_batch_and_a_default(tmp_path: Path) -> None:
    text = "g (float[2, 2] x, float[2] d) => (float[2, 2] y) { a = Mul (x, d) y = Neg (a) }"
    found, _ = measure(tmp_path, text, [[1, 2], [3, 4], [100, 100]], d=np.full(2, 2.0))
    assert found == {"x": 4.0, "a": 8.0, "y": 8.0}
    with pytest.raises(UsageError, match="no batch of 2 samples can be read"):
        measure(tmp_path, text, [[1, 2]], d=np.full(2, 2.0))


@pytest.mark.parametrize(
    ("text", "name"), [("a = Log (x) y = Neg (a)", "a"), ("a = Exp (x) b = Relu (a) y = Neg (b)", "a")]
)
def test_values_that_are_none_in_fp32(tmp_path: Path, text: str, name: str) -> None:
    rows = [[1, 2], [3, -1 if "Log" in text else 200]]
    with pytest.raises(NumericsError, match=f"{name} is NaN or infinite in FP32, at sample row1"):
        measure(tmp_path, f"g (float[N, 2] x) => (float[N, 2] y) {{ {text} }}", rows)


def test_a_mask_may_be_infinite(tmp_path: Path) -> None:
    text = """g (float[N, 2] x) => (float[N, 2] y) {
        c = Greater (x, zero) low = Constant <value_float = -3e38> () inf = Mul (low, ten)
        m = Where (c, x, inf) y = Softmax (m)
    }"""
    found, _ = measure(tmp_path, text, [[1, -2]], zero=np.float32(0), ten=np.float32(10))
    assert found == {"x": 2.0, "inf": np.inf, "m": np.inf, "y": 1.0}
    with pytest.raises(NumericsError, match="y is NaN"):
        measure(tmp_path, text, [[-1, -2]], zero=np.float32(0), ten=np.float32(10))


def large(*, scalable: bool = False) -> onnx.ModelProto:
    """The outputs are those of the bundle's truth; on the way values are 62500 times as large, and compared."""
    text = """g (float[batch, 12] images) => (float[batch, 5] logits, float[batch, 5] features) {
        a = Mul (images, gain) b = Mul (a, gain) COMPARED c = Mul (b, loss) d = Mul (c, loss)
        l = MatMul (d, weight) logits = Identity (l) features = Tanh (l)
    }""".replace("COMPARED", "" if scalable else "above = Greater (b, gain)")
    return source(text, gain=np.float32(250), loss=np.float32(1 / 250), weight=bundles.WEIGHT)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return bundles.make(tmp_path / "artifacts", model=large())


def ones(count: int = 4) -> Callable[[], Any]:
    class Data:
        def __iter__(self) -> Any:
            return iter([{"images": np.full(12, 1 - i / 100, np.float32)} for i in range(count)])

    return Data


def reasons(bundle: Bundle, **options: Any) -> dict[str, str]:
    derived = cast_bundle(bundle, CastOptions(**options.pop("typing", {})), **options)
    return {refusal.node: refusal.reason for step in derived.artifact.steps for refusal in step.refusals}


def test_an_operator_whose_values_are_large_on_data_stays_fp32(bundle: Bundle) -> None:
    with pytest.raises(NumericsError, match="the fp16 graph gives no usable numbers") as caught:
        cast_bundle(bundle, CastOptions())
    assert "--calibrate DATA to find them" in caught.value.hint
    found = reasons(bundle, data=CalibrationData(ones()()))
    expected = "range: b reaches 6.25e+04 in the data; FLOAT16 ends at 65504"
    assert found == {f"block.{i}": expected for i in ("1/Mul", "2/Greater", "3/Mul")}
    assert reasons(bundle, typing={"keep": ("block.[123]/",)}) == dict.fromkeys(found, "user: matches 'block.[123]/'")
    with pytest.raises(NumericsError):
        cast_bundle(bundle, CastOptions(allow=frozenset({"range"})), data=CalibrationData(ones()()))
    assert reasons(bundle, typing={"type": "bf16"}, data=CalibrationData(ones()())) == {}


def test_a_value_that_is_large_on_data_is_scaled_where_it_can_be(tmp_path: Path) -> None:
    bundle = bundles.make(tmp_path, model=large(scalable=True))
    with pytest.raises(NumericsError):
        cast_bundle(bundle, CastOptions())
    derived = cast_bundle(bundle, CastOptions(), data=CalibrationData(ones()()))
    said = {refusal.node: refusal.reason for step in derived.artifact.steps for refusal in step.refusals}
    assert said == {"block.*": "rescaled: b, up to 6.25e+04, stored as x/8: 2 Mul"}
    assert all(comparison.passed for comparison in derived.comparisons)


def test_what_is_asked_is_checked_before_the_data_are_run(bundle: Bundle) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("ran")

    data = CalibrationData(ones()())
    for typing, found in (
        (CastOptions(keep=("(",)), "is no regular expression"),
        (CastOptions(allow=frozenset({"x"})), "no rule"),
    ):
        with pytest.raises(UsageError, match=found):
            cast_bundle(bundle, typing, data=data, progress=forbidden)


def test_a_graph_of_double(tmp_path: Path) -> None:
    text = """g (float[N, 2] x) => (float[N, 2] y) {
        d = Cast <to = 11> (x) e = Mul (d, k) f = Cast <to = 1> (e) y = MatMul (f, w)
    }"""
    found, _ = measure(tmp_path, text, [[1, 2]], k=Double(1e4), w=weights(2, 2))
    assert set(found) == {"x", "f", "y"}
    assert_close(typed(source(text.replace("N", "2"), k=Double(2.0), w=weights(2, 2))))
