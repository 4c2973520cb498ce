"""Ranges are measured, kept with what they depend on, and an interrupted calibration gives the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.exporters.graph.onnx_file import model_sha256, write_model
from deploycli.exporters.precision import calibration as module
from deploycli.exporters.precision.calibration import (
    LARGEST,
    SMALLEST,
    Calibration,
    CalibrationCache,
    DataRecord,
    calibrate,
    load_state,
)
from deploycli.exporters.precision.methods import METHODS, Histogram, Method
from deploycli.exporters.precision.observed import observed
from deploycli.models.codec import decode
from deploycli.models.errors import DeployError, EnvironmentUnsuitable, IntegrityError, NumericsError, UsageError
from deploycli.models.files import sha256_of
from deploycli.models.spec import Preprocessing
from tests.exporters.graph.test_onnx_file import WIDTH, linear
from tests.exporters.passes.graphs import parse
from tests.exporters.precision.samples_in_memory import InMemory
from tests.exporters.precision.test_methods import facts

if TYPE_CHECKING:
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


TENSORS = ("x", "hidden", "active", "y")
SIZE = 4
STARTS = range(0, len(ROWS), SIZE)
ENTROPY = Method.of("entropy")
ROOT = Path(__file__).parents[3]


class StopError(Exception):
    """What ends a run."""


def run(
    model: Path, state: Path | None, samples: InMemory | None = None, key: str = "key", **changed: Any
) -> Calibration:
    arguments: dict[str, Any] = {"tensors": TENSORS, "method": ENTROPY, "batch_size": SIZE} | changed
    return calibrate(model, samples=samples or InMemory(ROWS), state=state, key=key, **arguments)


def result(calibration: Calibration) -> Any:
    histograms = {name: facts(h) for name, h in calibration.histograms.items()}
    return histograms, calibration.ranges, calibration.count, calibration.skipped


def stopped(model: Path, state: Path, at: int, error: type[BaseException] = StopError, **changed: Any) -> None:
    """Run until the batch that begins at sample ``at``."""

    def before(start: int) -> None:
        if start == at:
            raise error

    with pytest.raises(error):
        run(model, state, InMemory(ROWS, before=before), **changed)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path, mlp())


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "made" / "calibration.npz"


@pytest.mark.parametrize("batch", [BATCH, FIXED])
@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", STARTS)
def test_it_continues_from_every_batch(tmp_path: Path, state: Path, at: int, error: Any, batch: str) -> None:
    model = saved(tmp_path, mlp(batch))
    expected = run(model, None)
    stopped(model, state, at, error)
    assert state.exists() == (at > 0)
    samples = InMemory(ROWS)
    found = run(model, state, samples)
    assert result(found) == result(expected)
    assert samples.started_at == [at]
    assert not state.exists()
    assert found.notes == ((f"{state}: continued after {at} samples",) if at else ())


def test_it_continues_after_stopping_again_and_again(model: Path, state: Path) -> None:
    for at in STARTS:
        stopped(model, state, at)
    assert result(run(model, state)) == result(run(model, None))


def test_half_a_batch_leaves_no_trace(model: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(model, None)
    of, calls = Histogram.of, 0

    def interrupted(values: Any) -> Histogram:
        nonlocal calls
        calls += 1
        if calls == len(TENSORS) + 2:  # the second tensor of the second batch
            raise KeyboardInterrupt
        return of(values)

    with monkeypatch.context() as patch:
        patch.setattr(Histogram, "of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, state)
    samples = InMemory(ROWS)
    assert result(run(model, state, samples)) == result(expected)
    assert samples.started_at == [SIZE]


def test_a_killed_process_loses_what_was_not_saved(model: Path, state: Path) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from deploycli.exporters.precision import calibration
        from tests.exporters.precision.test_calibration import InMemory, ROWS, run

        def before(start):
            if start == {STARTS[-1]}:
                os.kill(os.getpid(), signal.SIGKILL)

        calibration._SAVE_EVERY = 0
        run(Path({str(model)!r}), Path({str(state)!r}), InMemory(ROWS, before=before))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    samples = InMemory(ROWS)
    assert result(run(model, state, samples)) == result(run(model, None))
    assert samples.started_at == [STARTS[-1]]


def test_it_saves_now_and_then(model: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run(model, state, InMemory(ROWS, before=lambda start: seen.append(state.exists())))
    assert seen == [False, False, False]
    monkeypatch.setattr(module, "_SAVE_EVERY", 0)
    run(model, state, InMemory(ROWS, before=lambda start: seen.append(state.exists())))
    assert seen[3:] == [False, True, True]


@pytest.mark.parametrize(
    "changed",
    [{"key": "another"}, {"batch_size": 3}, {"tensors": TENSORS[:3]}, {"samples": InMemory(ROWS[:9])}],
    ids=lambda changed: next(iter(changed)),
)
def test_the_state_of_another_calibration_is_ignored_and_replaced(
    model: Path, state: Path, changed: dict[str, Any]
) -> None:
    stopped(model, state, 8)
    found = run(model, state, **changed)
    assert result(found) == result(run(model, None, **changed))
    assert found.notes == (f"{state} is of another calibration: begun anew",)
    assert not state.exists()


def test_another_calibration_replaces_the_state(model: Path, state: Path) -> None:
    stopped(model, state, 4)
    stopped(model, state, 8, key="another")
    samples = InMemory(ROWS)
    run(model, state, samples, key="another")
    assert samples.started_at == [8]


def test_another_method_may_continue(model: Path, state: Path) -> None:
    stopped(model, state, 8)
    samples = InMemory(ROWS)
    found = run(model, state, samples, method=Method.of("mse"))
    assert samples.started_at == [8]
    assert result(found) == result(run(model, None, method=Method.of("mse")))


def test_a_damaged_state_is_ignored_with_a_note(model: Path, state: Path) -> None:
    stopped(model, state, 8)
    expected = result(run(model, None))
    whole = state.read_bytes()
    for damage in (b"", b"PK", b"no archive", whole[: len(whole) // 2], whole[:-1]):
        state.write_bytes(damage)
        found = run(model, state)
        assert result(found) == expected
        assert "is damaged" in found.notes[0]


def test_no_wrong_bit_is_believed(model: Path, state: Path) -> None:
    stopped(model, state, 8)
    whole = state.read_bytes()
    binding = {"key": "key", "tensors": TENSORS, "batch": SIZE, "samples": len(ROWS)}

    def loaded() -> Any:
        measured, note = load_state(state, binding, TENSORS)
        return note, measured.stop, {name: facts(h) for name, h in measured.histograms.items()}

    good = loaded()
    assert "continued" in good[0]
    for place in sorted({*range(0, len(whole), 997), *range(1200), *range(len(whole) - 300, len(whole))}):
        state.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        found = loaded()
        assert found == good or "is damaged" in found[0], place


def test_no_pickle_is_loaded(model: Path, state: Path) -> None:
    stopped(model, state, 8)
    with np.load(state) as file:
        arrays = dict(file)
    np.savez(state, **{**arrays, "header": np.array({"version": 1}, object)})
    (note,) = run(model, state).notes
    assert "is damaged" in note
    assert "allow_pickle=False" in note


def test_skipped_samples_are_remembered_and_counted(model: Path, state: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((100, 6)).astype(np.float32)

    def before(start: int) -> None:
        if start == 8:
            raise StopError

    with pytest.raises(StopError):
        run(model, state, InMemory(rows, unreadable=(2,), before=before))
    kept = state.read_bytes()
    found = run(model, state, InMemory(rows, unreadable=(2,)))
    assert (found.skipped, found.count) == (("row2",), 99)
    state.write_bytes(kept)
    with pytest.raises(UsageError, match="2 of 100 samples cannot be read: row2, row50"):
        run(model, state, InMemory(rows, unreadable=(2, 50)))


def test_a_state_that_cannot_be_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "file" / "state.npz"
    nowhere.parent.write_text("not a folder")
    stopped(model, nowhere, 8)  # what stopped it is told, not that the state is lost
    monkeypatch.setattr(module, "_SAVE_EVERY", 0)
    with pytest.raises(EnvironmentUnsuitable, match="cannot write"):
        run(model, nowhere)


MODEL, DATA = "1" * 64, "2" * 64
RECIPE = Preprocessing((224, 224)).to_json()
CACHE = CalibrationCache(
    MODEL,
    DataRecord("pictures in photos", 1, DATA, ("broken.png",), ("a.png", "broken.png")),
    json.loads(json.dumps(RECIPE)),
    Method.of("percentile"),
    False,
    "1.2.3",
    {"a": 0.1, "b": 2.0},
)
BOUND = {"model": MODEL, "preprocessing": RECIPE, "method": Method.of("percentile"), "data": DATA}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "calibration.json"


def spoiled(change: dict[str, Any]) -> dict[str, Any]:
    return CACHE.to_json() | change


def test_what_is_saved_is_loaded(path: Path) -> None:
    CACHE.save(path)
    assert CalibrationCache.load(path) == CACHE
    assert list(path.parent.iterdir()) == [path]


@given(st.dictionaries(st.text(), st.floats(SMALLEST, LARGEST), min_size=1))
@settings(deadline=None)
def test_ranges_keep_every_bit(ranges: dict[str, float]) -> None:
    cache = replace(CACHE, ranges=ranges)
    text = json.dumps(cache.to_json())
    if len(ranges) > 1 and len(set(ranges.values())) == 1:
        return
    assert decode(text, CalibrationCache, where="it", what="a calibration", version=1).ranges == ranges


def test_people_can_read_it(path: Path) -> None:
    replace(CACHE, ranges={"b": 2.0, "a": 0.1}, random=True).save(path)
    text = path.read_text("utf-8")
    data = json.loads(text)
    assert list(data["ranges"]) == ["a", "b"]
    assert data["method"] == {"name": "percentile", "parameters": {"percentile": 99.99}}
    assert data["random"] is True
    assert '\n    "a": 0.1,\n' in text


def test_random_stays(path: Path) -> None:
    replace(CACHE, random=True).save(path)
    CalibrationCache.load(path).save(path)
    assert CalibrationCache.load(path).random


def test_the_cache_of_a_calibration(tmp_path: Path, path: Path) -> None:
    model, samples = saved(tmp_path, mlp()), InMemory(ROWS)
    calibration = calibrate(model, ["y", "hidden"], samples, Method.of("mse"), batch_size=4)
    digest = model_sha256(model)
    cache = CalibrationCache.of(calibration, samples, model=digest, preprocessing=RECIPE, tool_version="1")
    cache.save(path)
    found = CalibrationCache.load(path)
    assert found == cache
    assert found.ranges == calibration.ranges
    assert found.data == DataRecord("rows", 11, samples.sha256, (), samples.names)
    found.check(
        model=digest, preprocessing=RECIPE, method=Method.of("mse"), data=samples.sha256, tensors=["hidden", "y"]
    )


def test_what_fits_passes() -> None:
    CACHE.check(**BOUND, tensors=["a"])
    CACHE.check(model=MODEL, preprocessing=RECIPE)
    replace(CACHE, preprocessing=None).check(model=MODEL, preprocessing=None)


@pytest.mark.parametrize(
    ("field", "value", "found", "expected"),
    [
        ("model", "3" * 64, MODEL, "3" * 64),
        ("data", "3" * 64, DATA, "3" * 64),
        ("method", Method.of("max"), "99.99", "max"),
        ("method", Method.of("percentile", percentile=99.990001), "99.99", "99.990001"),
        ("preprocessing", None, "bicubic", "null"),
        ("preprocessing", Preprocessing((224, 224), crop_pct=0.875).to_json(), "0.9", "0.875"),
    ],
)
def test_another_binding_is_refused(field: str, value: Any, found: str, expected: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        CACHE.check(**BOUND | {field: value})
    assert caught.value.exit_code == 8
    assert f"another {field}" in caught.value.found
    assert found in caught.value.found
    assert expected in caught.value.expected


def test_a_missing_range_is_refused() -> None:
    with pytest.raises(IntegrityError, match="no range of c, d"):
        CACHE.check(**BOUND, tensors=["a", "c", "d"])


def refusal(path: Path, content: Any) -> DeployError:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    with pytest.raises(DeployError) as caught:
        CalibrationCache.load(path)
    assert str(path) in caught.value.found or isinstance(caught.value, NumericsError)
    return caught.value


def test_there_is_no_such_file(path: Path) -> None:
    with pytest.raises(UsageError):
        CalibrationCache.load(path)


def test_another_schema_is_refused(path: Path) -> None:
    assert isinstance(refusal(path, spoiled({"schema_version": 2})), UsageError)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "1", "[" * 100_000),
        *({}, spoiled({"schema_version": "1"}), spoiled({"schema_version": True})),
        *(spoiled({"model": value}) for value in ("xyz", None, 5)),
        *(spoiled({"data": value}) for value in (None, {}, {**CACHE.to_json()["data"], "count": 0})),
        *(
            spoiled({"data": {**CACHE.to_json()["data"], **wrong}})
            for wrong in ({"sha256": "0"}, {"skipped": "ab"}, {"samples": [1]})
        ),
        *(spoiled({"method": value}) for value in (None, "max", {"name": "magic", "parameters": {}})),
        spoiled({"method": {"name": "percentile", "parameters": {"percentile": float("nan")}}}),
        spoiled({"preprocessing": []}),
        spoiled({"random": 0}),
        spoiled({"tool_version": None}),
        *(spoiled({"ranges": value}) for value in (None, {}, [1], {"a": "1"}, {"a": None}, {"a": True})),
        spoiled({"ranges": {"a": float("nan"), "b": 1.0}}),
        spoiled({"ranges": {"a": 10**400, "b": 1.0}}),
        {key: value for key, value in CACHE.to_json().items() if key != "random"},
    ],
)
def test_what_is_no_cache_is_refused(path: Path, content: Any) -> None:
    assert refusal(path, content).exit_code == 8


@pytest.mark.parametrize(
    ("ranges", "named"),
    [
        ({"a": 1.0, "zero": 0.0}, "zero (0)"),
        ({"a": 1.0, "minus": -1.0}, "minus (-1)"),
        ({"a": 1.0, "tiny": 1e-39}, "tiny (1e-39)"),
        ({"a": 1.0, "huge": 1e39}, "huge (1e+39)"),
        ({"a": 1.5, "b": 1.5, "c": 1.5}, "a, b, c"),
        ({f"t{i}": 0.0 for i in range(9)}, "t4 (0) and 4 more"),
    ],
)
def test_degenerate_ranges_are_refused(path: Path, ranges: dict[str, float], named: str) -> None:
    error = refusal(path, spoiled({"ranges": ranges}))
    assert isinstance(error, NumericsError)
    assert named in error.found


def test_one_range_may_stand_alone(path: Path) -> None:
    replace(CACHE, ranges={"a": 1.5}).save(path)
    assert CalibrationCache.load(path).ranges == {"a": 1.5}


def test_a_failed_save_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    CACHE.save(path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentUnsuitable, match="No space left"):
        replace(CACHE, random=True).save(path)
    assert CalibrationCache.load(path) == CACHE
    assert list(path.parent.iterdir()) == [path]


def test_no_range_that_is_no_number_is_written(path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        replace(CACHE, ranges={"a": float("nan")}).save(path)
    assert not path.exists()
