from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.exporters.graph.onnx_file import model_sha256
from deploycli.exporters.precision.calibrate import calibrate
from deploycli.exporters.precision.calibration_cache import CalibrationCache, DataRecord
from deploycli.exporters.precision.methods import Method
from deploycli.exporters.precision.ranges import LARGEST, SMALLEST
from deploycli.models.codec import decode
from deploycli.models.errors import DeployError, EnvironmentUnsuitable, IntegrityError, NumericsError, UsageError
from deploycli.models.spec import Preprocessing
from tests.exporters.precision.samples_in_memory import InMemory
from tests.exporters.precision.test_calibrate import ROWS, mlp, saved

if TYPE_CHECKING:
    from pathlib import Path

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
