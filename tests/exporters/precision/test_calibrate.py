from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest

from deploycli.exporters.graph.onnx_file import model_sha256, write_model
from deploycli.exporters.precision.calibrate import calibrate
from deploycli.exporters.precision.histogram import Histogram
from deploycli.exporters.precision.methods import METHODS, Method
from deploycli.exporters.precision.observed import observed
from deploycli.models.errors import EnvironmentUnsuitable, IntegrityError, NumericsError, UsageError
from deploycli.models.files import sha256_of
from tests.exporters.graph.test_onnx_file import WIDTH, linear
from tests.exporters.passes.graphs import parse
from tests.exporters.precision.samples_in_memory import InMemory
from tests.exporters.precision.test_histogram import facts

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

WEIGHT = np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)
ROWS = np.random.default_rng(2).standard_normal((11, 6)).astype(np.float32)
MAX = Method.of("max")
BATCH, FIXED = '"batch"', "4"


def mlp(batch: str = BATCH) -> onnx.ModelProto:
    return parse(
        f"""g (float[{batch.strip('"')}, 6] x) => (float[{batch.strip('"')}, 5] y, int64[{batch.strip('"')}, 1] best) {{
            hidden = MatMul(x, weight)
            active = Relu(hidden)
            y = Tanh(active)
            best = ArgMax<axis = 1>(y)
            nothing = Mul(active, zero)
            doubled = Mul(weight, two)
        }}""",
        weight=WEIGHT,
        zero=np.float32(0),
        two=np.float32(2),
    )


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return saved(tmp_path, mlp())


def truth(rows: Any = ROWS) -> dict[str, Any]:
    hidden = rows @ WEIGHT
    active = np.maximum(hidden, 0)
    return {"x": rows, "hidden": hidden, "active": active, "y": np.tanh(active)}


@pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 64])
def test_inputs_intermediate_values_and_outputs_are_measured(model_file: Path, batch_size: int) -> None:
    expected = truth()
    found = calibrate(model_file, list(expected), InMemory(ROWS), MAX, batch_size=batch_size)
    assert list(found.ranges) == list(found.histograms) == list(expected)
    assert (found.count, found.skipped, found.notes) == (11, (), ())
    for name, values in expected.items():
        assert found.ranges[name] == pytest.approx(np.abs(values).max(), rel=1e-5)
        assert found.histograms[name].count == values.size
        assert found.histograms[name].lowest == pytest.approx(values.min(), rel=1e-5, abs=1e-6)
    assert facts(found.histograms["x"]) == facts(Histogram.of(ROWS))


@pytest.mark.parametrize("method", METHODS)
def test_the_ranges_are_those_of_the_method(model_file: Path, method: str) -> None:
    found = calibrate(model_file, ["x", "hidden"], InMemory(ROWS), Method.of(method), batch_size=4)
    assert found.method == Method.of(method)
    assert found.ranges == {name: Method.of(method).amax(h) for name, h in found.histograms.items()}


def test_the_model_file_stays_as_it_is(model_file: Path) -> None:
    before = model_file.read_bytes()
    calibrate(model_file, ["hidden", "hidden", "y"], InMemory(ROWS), MAX, batch_size=4)
    assert model_file.read_bytes() == before
    assert list(model_file.parent.iterdir()) == [model_file]


def test_progress_counts_samples(model_file: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    calibrate(model_file, ["y"], InMemory(ROWS), MAX, batch_size=4, progress=lambda *args: seen.append(args))
    assert seen == [("calibration", 0, 11), ("calibration", 4, 11), ("calibration", 8, 11)]


def test_what_cannot_be_read_is_left_out(model_file: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    rows[7] = 1e6
    found = calibrate(model_file, ["x", "y"], InMemory(rows, unreadable=(7,)), MAX, batch_size=1)
    assert (found.count, found.skipped) == (199, ("row7",))
    assert found.ranges["x"] < 10


def test_a_fixed_batch_is_filled_and_the_filling_not_counted(tmp_path: Path) -> None:
    dynamic, fixed = tmp_path / "dynamic", tmp_path / "fixed"
    dynamic.mkdir()
    fixed.mkdir()
    samples = InMemory(ROWS)
    names = ["x", "hidden", "active", "y"]
    found = calibrate(saved(fixed, mlp(FIXED)), names, samples, MAX, batch_size=64)
    assert samples.sizes == [4]
    expected = calibrate(saved(dynamic, mlp()), names, InMemory(ROWS), MAX, batch_size=4)
    for name in names:
        assert found.histograms[name].count == expected.histograms[name].count
        assert found.ranges[name] == pytest.approx(expected.ranges[name], rel=1e-6)


def test_a_fixed_batch_in_any_axis(tmp_path: Path) -> None:
    """Filling is dropped wherever the batch is the outer part of an axis; elsewhere no value is lost."""
    model = parse(
        """g (float[4, 2, 3] x) => (float[2, 4, 3] y) {
            windows = Reshape(x, merged)
            y = Transpose<perm = [1, 0, 2]>(x)
            inner = Reshape(y, merged)
            one = ReduceMax<keepdims = 0>(x)
            table = Mul(constant, two)
        }""",
        merged=np.array([8, 3]),
        constant=np.arange(8, dtype=np.float32).reshape(4, 2),
        two=np.float32(2),
    )
    rows = np.arange(1, 31, dtype=np.float32).reshape(5, 2, 3)
    names = ["x", "windows", "y", "inner", "one", "table"]
    found = calibrate(saved(tmp_path, model), names, InMemory(rows), MAX, batch_size=4)
    assert {name: h.count for name, h in found.histograms.items()} == {
        **{"x": 30, "windows": 30, "y": 30},
        **{"inner": 48, "one": 2, "table": 16},
    }
    assert {name: h.amax for name, h in found.histograms.items()} == {**dict.fromkeys(names, 30), "table": 14}
    assert found.histograms["inner"].lowest == 1


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("writable", [True, False])
def test_external_data_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool, writable: bool) -> None:
    model, data = write_model(linear(), tmp_path / "model.onnx", "always")
    if not linked:
        monkeypatch.setattr(os, "link", _no_link)
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    rows = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    found = calibrate(model, ["m0", "y1", "y2"], InMemory(rows), MAX, batch_size=2)
    expected = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": rows})[0]
    assert found.ranges["y2"] == pytest.approx(np.abs(expected).max(), rel=1e-5)
    assert sorted(tmp_path.iterdir()) == [model, data]


def _no_link(source: Path, target: Path) -> None:
    raise OSError("no links here")


def test_the_hash_of_a_model_covers_its_external_data(tmp_path: Path, model_file: Path) -> None:
    assert model_sha256(model_file) == sha256_of(model_file)
    model, data = write_model(linear(), tmp_path / "large.onnx", "always")
    before = model_sha256(model)
    assert before == model_sha256(model)
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    assert model_sha256(model) != before
    data.unlink()
    with pytest.raises(IntegrityError):
        model_sha256(model)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (["hidden", "nonsense"], "nonsense"),
        (["weight"], "weight"),
        (["best"], "best (int64)"),
        ([], "0 tensors"),
    ],
)
def test_tensors_without_a_range_are_refused(model_file: Path, tensors: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        calibrate(model_file, tensors, InMemory(ROWS), MAX, batch_size=4)
    assert said in caught.value.found


def test_no_model_no_samples_no_batch(model_file: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        calibrate(model_file.with_name("other.onnx"), ["y"], InMemory(ROWS), MAX, batch_size=4)
    with pytest.raises(UsageError, match="no samples"):
        calibrate(model_file, ["y"], InMemory(ROWS[:0]), MAX, batch_size=4)
    with pytest.raises(UsageError, match="batch size 0"):
        calibrate(model_file, ["y"], InMemory(ROWS), MAX, batch_size=0)


def test_two_batch_sizes_are_refused(tmp_path: Path) -> None:
    model = parse("g (float[4, 1] x, float[2, 1] z) => (float[6, 1] y) { y = Concat<axis = 0>(x, z) }")
    with pytest.raises(UsageError, match="2, 4"):
        calibrate(saved(tmp_path, model), ["y"], InMemory(ROWS), MAX, batch_size=4)


def test_no_space_for_the_copy(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(EnvironmentUnsuitable, match="No space left"), observed(model_file, ["y"]):
        pass


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("fixed", [BATCH, FIXED])
def test_nonfinite_activations_name_the_tensor_and_the_samples(tmp_path: Path, bad: float, fixed: str) -> None:
    rows = ROWS.copy()
    rows[9, 0] = bad
    with pytest.raises(NumericsError) as caught:
        calibrate(saved(tmp_path, mlp(fixed)), ["hidden", "x"], InMemory(rows), MAX, batch_size=4)
    assert "hidden (" in caught.value.found
    assert "x (1 of" in caught.value.found
    assert caught.value.found.endswith("with the samples row8, row9, row10")


def test_constant_tensors_are_refused(model_file: Path) -> None:
    with pytest.raises(NumericsError) as caught:
        calibrate(model_file, ["hidden", "nothing", "y"], InMemory(ROWS), MAX, batch_size=4)
    assert "nothing (0)" in caught.value.found
    assert "exclude" in caught.value.hint
    with pytest.raises(NumericsError, match="x \\(3\\)"):
        calibrate(model_file, ["hidden", "x"], InMemory(np.full((3, 6), 3)), MAX, batch_size=4)


def test_ranges_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    model = parse("g (float[n, 6] x) => (float[n, 6] y) { y = Neg(x) z = Abs(x) }")
    with pytest.raises(NumericsError, match="x, y, z"):
        calibrate(saved(tmp_path, model), ["x", "y", "z"], InMemory(ROWS), MAX, batch_size=4)
