"""What rounds to which number of a format, against the list of all its numbers and against ONNX Runtime."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deploycli.exporters.precision.number_format import FP8, INT8, NumberFormat, format_of
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.models.errors import UsageError
from tests.exporters.precision.networks import Array, graph, run

BYTES = np.arange(256, dtype=np.uint8)
NUMBERS = {
    "fp8": np.unique([n for n in BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float64) if np.isfinite(n)]),
    "int8": np.arange(-127.0, 128.0),
}
FLOATS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False) | st.floats(-2.0, 2.0, width=16)


def nearest(values: Array, number_format: NumberFormat) -> Array:
    """By brute force: of two numbers that are as near, the one whose last bit is zero."""
    numbers = NUMBERS[number_format.name]
    distance = np.abs(values.astype(np.float64)[:, None] - numbers)
    is_near = distance == distance.min(axis=1, keepdims=True)
    odd = numbers.astype(number_format.dtype.numpy()).view(np.uint8) & 1
    return numbers[np.argmin(np.where(is_near, odd[None], 2), axis=1)]


@pytest.mark.parametrize("number_format", [FP8, INT8], ids=lambda each: each.name)
@given(values=hnp.arrays(np.float32, 16, elements=FLOATS))
def test_the_nearest_number(number_format: NumberFormat, values: Array) -> None:
    found = number_format.round(values)
    assert found.dtype == number_format.dtype.numpy()
    assert (found.astype(np.float64) == nearest(values, number_format)).all()


@pytest.mark.parametrize("number_format", [FP8, INT8], ids=lambda each: each.name)
def test_all_numbers_and_what_is_half_way(number_format: NumberFormat) -> None:
    numbers = NUMBERS[number_format.name]
    assert numbers.max() == number_format.largest
    values = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2, [-1e4, 1e4]]).astype(np.float32)
    assert (number_format.round(values).astype(np.float64) == nearest(values, number_format)).all()


@pytest.mark.parametrize("optimize", [False, True])
def test_onnx_runtime_rounds_as_we_do(optimize: bool, tmp_path: Path) -> None:
    """Every finite FP16 value: what is written for a weight is what a pair makes of an activation."""
    model = graph(
        "(float[n] x) => (float[n] y) { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }",
        s=np.float32(0.25), z=np.zeros((), ml_dtypes.float8_e4m3fn),
    )  # fmt: skip
    values = np.arange(65536, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)].astype(np.float32)
    ir.save(model, tmp_path / "model.onnx")
    with OrtRuntime(tmp_path / "model.onnx", optimize=optimize, move_qdq=False) as runtime:
        found = runtime.run({"x": values})["y"]
    assert (found == 0.25 * FP8.round(values / np.float32(0.25)).astype(np.float32)).all()
    assert (found == run(model, {"x": values})["y"]).all()


def test_a_precision_without_a_format() -> None:
    assert format_of("fp8") is FP8
    with pytest.raises(UsageError, match="nothing is quantised to 'fp16'"):
        format_of("fp16")
