from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import onnx
import pytest

from deploycli.exporters.bundle.bundle import Bundle, OnnxFile
from deploycli.exporters.bundle.manifest import FileRecord
from deploycli.exporters.bundle.verification import REPORT_NAME, Verification
from deploycli.exporters.verification.report import keep
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.errors import EnvironmentUnsuitable
from tests.exporters import engines
from tests.exporters.bundle.bundles import extend_bundle, graph, make, record_again, with_external_data, write_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.bundle.manifest import Artifact


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path)


def proven(bundle: Bundle, **options: object) -> OnnxFile:
    """Verify the bundle, and return its first file."""
    keep(bundle, verify(bundle, VerifyOptions(reference="golden", **options)))  # type: ignore[arg-type]  # passed through
    return first(bundle)


def first(bundle: Bundle) -> OnnxFile:
    return next(bundle.onnx_files())


def only(bundle: Bundle) -> Artifact:
    (artifact,) = bundle.manifest.artifacts
    return artifact


def test_kept_report_is_the_report_and_what_was_judged(bundle: Bundle) -> None:
    report = verify(bundle, VerifyOptions(reference="golden"))
    path = keep(bundle, report)
    data = json.loads(path.read_text())
    assert path == bundle.path / "reports/verify.json"
    assert data == data | json.loads(json.dumps(report.to_json()))
    assert data["tool_version"] == version("deploycli")
    assert data["versions"]["onnxruntime"] == version("onnxruntime")
    assert set(data["host"]) == {"name", "system", "python"}
    (judged,) = data["judged"]
    assert judged["files"] == [FileRecord.of(bundle.path, "model.onnx").__dict__]
    assert judged["passed"]
    assert judged["runtimes"] == ["ONNX Runtime"]
    file = first(bundle)
    assert file.verdict.passed
    assert (file.verification.reference, file.verification.obstacle) == ("golden", "")
    assert file.verification.time.endswith("Z")
    assert file.verdict.reason == ""


def test_report_is_not_in_the_manifest_and_changes_nothing_else(bundle: Bundle) -> None:
    before = {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    proven(bundle)
    assert {path.name: path.read_bytes() for path in bundle.path.iterdir() if path.is_file()} == before
    assert Bundle.open(bundle.path) == bundle
    assert [path.name for path in (bundle.path / "reports").iterdir()] == ["verify.json"]


def test_without_a_report_nothing_is_verified(bundle: Bundle) -> None:
    verdict = first(bundle).verdict
    assert (verdict.status, verdict.passed) == ("not verified", False)
    assert "never verified" in verdict.reason


def spoilt(data: dict[str, object]) -> list[bytes]:
    judged = data["judged"][0]  # type: ignore[index]
    outside = {**judged["files"][0], "path": "../model.onnx"}
    variants: list[object] = [
        [],
        {},
        data | {"schema_version": 99},
        data | {"judged": 1},
        data | {"judged": [judged | {"passed": "yes"}]},
        data | {"judged": [judged | {"files": []}]},
        data | {"judged": [judged | {"files": [outside]}]},
        data | {"judged": [{"files": judged["files"]}]},
    ]
    return [b"", b"\xff\xfe", b"{", b"[" * 100_000, *(json.dumps(variant).encode() for variant in variants)]


def test_malformed_report_proves_nothing(bundle: Bundle) -> None:
    proven(bundle)
    path = bundle.path / REPORT_NAME
    for text in spoilt(json.loads(path.read_text())):
        path.write_bytes(text)
        verdict = first(bundle).verdict
        assert verdict.status == "not verified"
        assert REPORT_NAME in verdict.reason
    path.unlink()
    path.mkdir()
    assert "cannot be read" in Verification.load(bundle.path).obstacle


def test_failed_report_says_which_output(bundle: Bundle) -> None:
    verdict = proven(bundle, rtol={"features": 1e-12}).verdict
    assert verdict.status == "failed"
    assert "output 'features'" in verdict.reason
    assert "logits" not in verdict.reason


def test_each_artifact_has_its_own_verdict(bundle: Bundle) -> None:
    wrong = graph([onnx.helper.make_node("Mul", ["raw.logits", "three"], ["logits"])])

    def add(folder: Path) -> Artifact:
        (folder / "model.fp16.onnx").write_bytes(wrong.SerializeToString())
        return replace(only(bundle), file=FileRecord.of(folder, "model.fp16.onnx"), precision="fp16")

    both = extend_bundle(bundle, add)
    proven(both)
    assert [file.verdict.status for file in (*both.onnx_files(), *both.engines())] == ["ok", "failed"]


def test_artifact_that_was_added_later_is_not_verified_and_the_others_stay_so(bundle: Bundle) -> None:
    proven(bundle)

    def add(folder: Path) -> Artifact:
        shutil.copy(bundle.path / "model.onnx", folder / "model.fp16.onnx")
        return replace(only(bundle), file=FileRecord.of(folder, "model.fp16.onnx"), precision="fp16")

    both = extend_bundle(bundle, add)
    exported, added = (*both.onnx_files(), *both.engines())
    assert exported.verdict.passed
    assert added.verdict.status == "not verified"
    assert added.verification.time in added.verdict.reason


def test_artifact_that_was_written_again_is_stale(bundle: Bundle) -> None:
    proven(bundle)

    def again(folder: Path) -> Artifact:
        model = onnx.load(bundle.path / "model.onnx")
        model.producer_name = "somebody else"
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return replace(only(bundle), file=FileRecord.of(folder, "model.onnx"))

    changed = extend_bundle(bundle, again)
    verdict = first(changed).verdict
    assert verdict.status == "stale"
    assert "has changed since" in verdict.reason
    assert proven(changed).verdict.passed


def test_other_external_data_is_another_model(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, "external", with_external_data)
    file = proven(bundle)
    assert file.verdict.passed
    other = replace(file.external[0], sha256="0" * 64)
    assert replace(file, external=(other,)).verdict.status == "stale"
    assert replace(file, external=()).verdict.status == "stale"


def test_looser_budget_is_recorded(bundle: Bundle) -> None:
    (judged,) = proven(bundle, rtol={"logits": 0.5, "features": 1e-5}).verification.judged.values()
    assert judged.tolerances == {"logits": 0.5}
    (judged,) = proven(bundle).verification.judged.values()
    assert judged.tolerances == {}


def test_engine_is_judged_as_its_sidecar_records_it(bundle: Bundle) -> None:
    engines.build(bundle)
    engines.verify_engines(bundle, "fp16")
    (engine,) = bundle.engines()
    assert engine.verdict.passed
    engines.build(bundle, capability=(8, 6))  # another one beside it
    assert [found.verdict.status for found in bundle.engines()] == ["not verified", "ok"]
    again = engine.path.read_bytes() + b"built again"
    engine.path.write_bytes(again)
    replace(engine.sidecar, sha256=hashlib.sha256(again).hexdigest(), size=len(again)).save(engine.path.parent)
    assert [found.verdict.status for found in bundle.engines()] == ["not verified", "stale"]


def test_folder_of_reports_that_is_a_link_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    proven(bundle)
    (bundle.path / "reports").rename(tmp_path / "elsewhere")
    (bundle.path / "reports").symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere/verify.json").read_bytes()
    assert "link that leaves the bundle" in Verification.load(bundle.path).obstacle
    with pytest.raises(EnvironmentUnsuitable, match="link that leaves the bundle"):
        proven(bundle)
    assert (tmp_path / "elsewhere/verify.json").read_bytes() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_writing_leaves_the_old_report(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    proven(bundle)
    before = (bundle.path / REPORT_NAME).read_bytes()

    def failing(_: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(EnvironmentUnsuitable if isinstance(error, OSError) else type(error)):
            proven(bundle, rtol={"": 1e-12})
    assert (bundle.path / REPORT_NAME).read_bytes() == before
    assert [path.name for path in (bundle.path / "reports").iterdir()] == ["verify.json"]


def test_changed_file_is_found_by_its_hash_even_where_the_manifest_was_changed_too(bundle: Bundle) -> None:
    proven(bundle)
    model = onnx.load(bundle.path / "model.onnx")
    model.producer_name = "somebody else"
    (bundle.path / "model.onnx").write_bytes(model.SerializeToString())
    assert first(record_again(bundle)).verdict.status == "stale"
