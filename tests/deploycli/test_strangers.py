"""Bundles from elsewhere: whatever a field of their JSON holds, a command works or names the field."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploycli.commands.inspect import show_bundle
from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.bundle.engine import Sidecar, sidecar_of
from deploycli.exporters.bundle.manifest import MANIFEST_NAME, CalibrationRecord, FileRecord
from deploycli.exporters.bundle.verification import REPORT_NAME
from deploycli.exporters.graph.steps import GraphCost
from deploycli.exporters.precision.calibration import CalibrationCache
from deploycli.models.errors import DeployError, IntegrityError, UsageError
from deploycli.models.spec import Preprocessing
from tests.exporters import engines
from tests.exporters.bundle import bundles
from tests.exporters.bundle.test_engine import SETTINGS
from tests.exporters.precision.test_calibration import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.deploycli.conftest import Command

HOLE = "<hole>"
DEEP = "[" * 100 + "]" * 100
WRONG = (
    *("null", "true", '"text"', '""', "0", "-1", "1.5", "7", f"{10**30}", str(2**63 - 1), "1e999", "NaN", "-Infinity"),
    *("[]", "{}", '[["x"]]', '{"x": {"y": 1}}', DEEP, '"\\ud800"', '"\\u001b[31m"', '"../x"', '"/etc/passwd"'),
    '"' + "x" * 5000 + '"',
)

Place = tuple[Any, ...]


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Yield where each value inside stands; of long lists, which are all alike, the first and the last."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items if isinstance(value, dict) else items[:1] + items[1:][-1:]:
        yield (*place, key)
        yield from places(inner, (*place, key))


def edited(data: Any, place: Place, change: Callable[[Any, Any], None]) -> str:
    """Return the JSON with the object or list that holds ``place`` changed."""
    copy = json.loads(json.dumps(data))
    holder = copy
    for key in place[:-1]:
        holder = holder[key]
    change(holder, place[-1])
    return json.dumps(copy)


def spoilt(data: Any) -> Iterator[tuple[str, str]]:
    """Yield what was done to a field, and the text with it; every field, every way."""
    for place in places(data):
        for wrong in WRONG:
            text = edited(data, place, lambda holder, key: holder.__setitem__(key, HOLE))
            yield f"{place} = {wrong[:20]}", text.replace(f'"{HOLE}"', wrong)
        yield f"no {place}", edited(data, place, lambda holder, key: holder.pop(key))
        if isinstance(place[-1], str):
            yield (
                f"more than {place}",
                edited(data, place, lambda holder, key: holder.update({"surprise": holder[key]})),
            )
            twice = edited(data, place, lambda holder, key: holder.update({HOLE: holder[key]}))
            yield f"twice {place}", twice.replace(f'"{HOLE}"', json.dumps(place[-1]))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle whose manifest has every field that there is."""
    bundle = bundles.make(tmp_path / "artifacts")
    (bundle.path / "ranges.json").write_text("{}")
    (fp32,) = bundle.manifest.artifacts
    shutil.copy(bundle.path / "model.onnx", bundle.path / "model.int8.onnx")
    record = CalibrationRecord(
        "mse", "here", ("a",), "0" * 64, ("b",), False, FileRecord.of(bundle.path, "ranges.json")
    )
    step = replace(fp32.steps[0], cost=GraphCost(1, None, 2), remark="a remark")
    int8 = replace(
        fp32,
        file=FileRecord.of(bundle.path, "model.int8.onnx"),
        precision="int8",
        source="model.onnx",
        steps=(step,),
        calibration=record,
        quantized=("one",),
        reverted=("two",),
    )
    weights = replace(bundle.manifest.weights, report={"loaded": 1})
    manifest = replace(
        bundle.manifest, artifacts=(fp32, int8), preprocessing=Preprocessing((224, 224)), weights=weights
    )
    (bundle.path / MANIFEST_NAME).write_text(manifest.dumps())
    return Bundle.open(bundle.path)


def ending(run: Callable[[], object]) -> DeployError | None:
    """Return how a command would end; anything but a documented error is the test's failure."""
    try:
        run()
    except DeployError as error:
        return error
    return None


def test_every_field_of_a_manifest(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle.path / MANIFEST_NAME
    worked, refused = 0, 0

    def inspect() -> None:
        opened = Bundle.open(bundle.path)
        json.dumps(opened.manifest.to_json(), allow_nan=False)
        if worked % 10 == 0:  # it takes longer than all else
            show_bundle(opened, list(opened.onnx_files()), verbose=True)

    of_a_file = ("has changed", "is missing", "a link that leaves")  # another path, hash or size
    for what, text in spoilt(json.loads(path.read_text())):
        path.write_bytes(text.encode())
        error = ending(inspect)
        capsys.readouterr()
        if error is None:
            worked += 1
        elif isinstance(error, UsageError):
            assert "schema version" in error.found, what
        else:
            refused += 1
            assert isinstance(error, IntegrityError), what
            assert any(word in error.found for word in (" at $", "no JSON", *of_a_file)), what
            assert len(error.found) < 10_000
    assert worked > 100
    assert refused > 1000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe{\0}\0", "utf-8"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "at $: it is no object"),
        (b"{}", "at $: it has no `schema_version`"),
        (b'{"schema_version": 1}', "at $: object missing required field"),
        (b'{"schema_version": "1"}', "at $.schema_version: it is no integer"),
        (b'{"schema_version": 1, "schema_version": 1}', "at $.schema_version: the key stands there twice"),
        (b"9" * 5000, "no JSON"),
    ],
)
def test_what_is_no_manifest(deploycli: Command, bundle: Bundle, content: bytes, reason: str) -> None:
    (bundle.path / MANIFEST_NAME).write_bytes(content)
    result = deploycli("inspect", bundle.path)
    assert result.code == 8
    assert result.out == ""
    assert reason in result.err


def test_every_field_of_a_sidecar(bundle: Bundle) -> None:
    sidecar = engines.build(bundle, settings=SETTINGS)
    path = sidecar_of(bundle.path / "engines" / sidecar.plan)
    refused = 0

    def read() -> None:
        found = Sidecar.load(path)
        found.dumps()
        found.check_host("10.13.3.9", (8, 9), "NVIDIA L4")

    for what, text in spoilt(json.loads(path.read_text())):
        path.write_bytes(text.encode())
        error = ending(read)
        if isinstance(error, IntegrityError):
            refused += 1
            assert any(word in error.found for word in (" at $", "no JSON", "names the plan")), what
    assert refused > 1000


def test_every_field_of_a_report(bundle: Bundle, deploycli: Command) -> None:
    (bundle.path / "model.int8.onnx").unlink()
    shutil.copy(bundle.path / "model.onnx", bundle.path / "model.int8.onnx")
    assert deploycli("verify", bundle.path, "--batches", "1,2").code == 0
    path = bundle.path / REPORT_NAME
    report = json.loads(path.read_text())
    report = {key: report[key] for key in ("schema_version", "tool_version", "time", "reference", "judged", "host")}
    for what, text in spoilt(report):
        path.write_bytes(text.encode())
        for file in bundle.onnx_files():
            assert file.verdict.passed or file.verdict.reason, what


@pytest.mark.parametrize(
    "change",
    [{"depths": "x"}, {"embed_dim": 0}, {"embed_dim": 10**9}, {"depths": [10**9]}, {"surprise": 1}, {"img_size": None}],
)
def test_arguments_that_make_no_model(
    deploycli: Command, true_bundle: Bundle, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = shutil.copytree(true_bundle.path, tmp_path / "artifacts" / "mine")
    path = folder / MANIFEST_NAME
    data = json.loads(path.read_text())
    data["spec"]["config"].update(change)
    path.write_text(json.dumps(data))
    result = deploycli("verify", folder, "--batches", 1)
    assert result.code in (2, 8), result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("source", ["pretrained", "checkpoint"])
@pytest.mark.parametrize(
    "path", ["", "a/b@../../../etc/passwd/x", "a/b@c/../../../../etc/passwd", "\0", "\ud800@a/b", "/"]
)
def test_weights_that_are_nowhere(deploycli: Command, bundle: Bundle, source: str, path: str) -> None:
    manifest = json.loads((bundle.path / MANIFEST_NAME).read_text())
    manifest["weights"] |= {"source": source, "path": path}
    (bundle.path / MANIFEST_NAME).write_text(json.dumps(manifest))
    (report,) = deploycli("verify", bundle.path, "--batches", 1, "--json").json()
    assert report["reference"] == "golden"
    assert "not at hand" in report["reference_note"]
    assert deploycli("verify", bundle.path, "--reference", "eager").code == 7


def test_every_field_of_a_calibration(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    CACHE.save(path)
    refused = 0
    for what, text in spoilt(json.loads(path.read_text())):
        path.write_bytes(text.encode())
        error = ending(lambda: CalibrationCache.load(path))
        refused += isinstance(error, IntegrityError)
        if isinstance(error, IntegrityError):
            assert " at $" in error.found or "no JSON" in error.found, what
    assert refused > 300


@given(st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_several_edits_at_once(bundle: Bundle, data: st.DataObject) -> None:
    """Whatever JSON takes the place of fields, anywhere, together: the manifest is read, or an error names a field."""
    path = bundle.path / MANIFEST_NAME
    before = bundle.manifest.dumps()
    values = json.loads(before)
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    )
    for _ in range(data.draw(st.integers(1, 3))):
        *where, last = data.draw(st.sampled_from(list(places(values))))
        holder = values
        for key in where:
            holder = holder[key]
        holder[last] = data.draw(anything)
    try:
        path.write_text(json.dumps(values))
        error = ending(lambda: Bundle.open(bundle.path))
        if isinstance(error, IntegrityError):
            assert len(error.found) < 10_000
        elif error is not None:
            assert isinstance(error, UsageError)
            assert "schema version" in error.found
        else:
            opened = Bundle.open(bundle.path)
            assert json.loads(opened.manifest.dumps()).keys() == json.loads(before).keys()
    finally:
        path.write_text(before)
