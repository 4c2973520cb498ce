from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import onnx
import pytest

from deploycli.exporters.bundle.bundle import Bundle, extend_bundle, write_bundle
from deploycli.exporters.bundle.manifest import FileRecord
from deploycli.exporters.verification.record import PROOF_NAME, Proof, keep
from deploycli.exporters.verify import verify
from deploycli.models.errors import EnvironmentUnsuitable
from tests.exporters.bundle.bundles import filler, graph, make, record_again

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.bundle.manifest import Artifact, Manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path)


def proven(bundle: Bundle, **options: object) -> Proof:
    keep(bundle, verify(bundle, reference="golden", **options))  # type: ignore[arg-type]  # passed through
    return Proof.load(bundle)


def only(bundle: Bundle) -> Artifact:
    (artifact,) = bundle.manifest.artifacts
    return artifact


def test_kept_report_is_the_report_and_what_was_judged(bundle: Bundle) -> None:
    report = verify(bundle, reference="golden")
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
    proof = Proof.load(bundle)
    assert proof.passed(only(bundle))
    assert (proof.reference, proof.obstacle) == ("golden", "")
    assert proof.time.endswith("Z")
    assert proof.verdict(only(bundle)).reason == ""


def test_report_is_not_in_the_manifest_and_changes_nothing_else(bundle: Bundle) -> None:
    before = {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    proven(bundle)
    assert {path.name: path.read_bytes() for path in bundle.path.iterdir() if path.is_file()} == before
    assert Bundle.open(bundle.path) == bundle
    assert [path.name for path in (bundle.path / "reports").iterdir()] == ["verify.json"]


def test_without_a_report_nothing_is_verified(bundle: Bundle) -> None:
    verdict = Proof.load(bundle).verdict(only(bundle))
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
    path = bundle.path / PROOF_NAME
    for text in spoilt(json.loads(path.read_text())):
        path.write_bytes(text)
        verdict = Proof.load(bundle).verdict(only(bundle))
        assert verdict.status == "not verified"
        assert PROOF_NAME in verdict.reason
    path.unlink()
    path.mkdir()
    assert "cannot be read" in Proof.load(bundle).obstacle


def test_failed_report_says_which_output(bundle: Bundle) -> None:
    verdict = proven(bundle, rtol={"features": 1e-12}).verdict(only(bundle))
    assert verdict.status == "failed"
    assert "output 'features'" in verdict.reason
    assert "logits" not in verdict.reason


def test_each_artifact_has_its_own_verdict(bundle: Bundle) -> None:
    wrong = graph([onnx.helper.make_node("Mul", ["raw.logits", "three"], ["logits"])])

    def add(folder: Path) -> Artifact:
        (folder / "model.fp16.onnx").write_bytes(wrong.SerializeToString())
        return replace(only(bundle), file=FileRecord.of(folder, "model.fp16.onnx"), precision="fp16")

    both = extend_bundle(bundle, add)
    proof = proven(both)
    assert [proof.verdict(a).status for a in both.manifest.artifacts] == ["ok", "failed"]
    assert proof.to_json(both)["model.onnx"] == {"status": "ok", "reason": ""}


def test_artifact_that_was_added_later_is_not_verified_and_the_others_stay_so(bundle: Bundle) -> None:
    proven(bundle)

    def add(folder: Path) -> Artifact:
        shutil.copy(bundle.path / "model.onnx", folder / "model.fp16.onnx")
        return replace(only(bundle), file=FileRecord.of(folder, "model.fp16.onnx"), precision="fp16")

    both = extend_bundle(bundle, add)
    proof = Proof.load(both)
    first, second = (proof.verdict(artifact) for artifact in both.manifest.artifacts)
    assert first.passed
    assert second.status == "not verified"
    assert proof.time in second.reason


def test_artifact_that_was_written_again_is_stale(bundle: Bundle) -> None:
    proven(bundle)

    def again(folder: Path) -> Artifact:
        model = onnx.load(bundle.path / "model.onnx")
        model.producer_name = "somebody else"
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return replace(only(bundle), file=FileRecord.of(folder, "model.onnx"))

    changed = extend_bundle(bundle, again)
    verdict = Proof.load(changed).verdict(only(changed))
    assert verdict.status == "stale"
    assert "has changed since" in verdict.reason
    assert proven(changed).passed(only(changed))


def with_external_data(folder: Path) -> Manifest:
    manifest = filler()(folder)
    model = folder / "model.onnx"
    data = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 0}
    onnx.save(onnx.load(model), model, **data)
    (artifact,) = manifest.artifacts
    external = (FileRecord.of(folder, "model.onnx.data"),)
    return replace(
        manifest, artifacts=(replace(artifact, file=FileRecord.of(folder, "model.onnx"), external=external),)
    )


def test_other_external_data_is_another_model(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, "external", with_external_data)
    proof = proven(bundle)
    artifact = only(bundle)
    assert proof.passed(artifact)
    other = replace(artifact.external[0], sha256="0" * 64)
    assert proof.verdict(replace(artifact, external=(other,))).status == "stale"
    assert proof.verdict(replace(artifact, external=())).status == "stale"


def test_looser_budget_is_recorded(bundle: Bundle) -> None:
    (judged,) = proven(bundle, rtol={"logits": 0.5, "features": 1e-5}).judged.values()
    assert judged.tolerances == {"logits": 0.5}
    (judged,) = proven(bundle).judged.values()
    assert judged.tolerances == {}


def test_file_that_the_manifest_does_not_know_is_judged_as_it_lies_there(bundle: Bundle) -> None:
    plan = bundle.path / "engines/fp16.plan"
    plan.parent.mkdir()
    plan.write_bytes(b"an engine")
    report = verify(bundle, reference="golden", engines="none")
    stages = tuple(replace(stage, artifact="engines/fp16.plan", precision="fp16") for stage in report.stages)
    keep(bundle, replace(report, stages=stages))
    assert Proof.load(bundle).verdict_of(FileRecord.of(bundle.path, "engines/fp16.plan")).passed
    plan.write_bytes(b"another one")
    assert Proof.load(bundle).verdict_of(FileRecord.of(bundle.path, "engines/fp16.plan")).status == "stale"
    plan.unlink()
    with pytest.raises(EnvironmentUnsuitable, match=r"fp16\.plan"):
        keep(bundle, replace(report, stages=stages))


def test_folder_of_reports_that_is_a_link_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    proven(bundle)
    (bundle.path / "reports").rename(tmp_path / "elsewhere")
    (bundle.path / "reports").symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere/verify.json").read_bytes()
    assert "link that leaves the bundle" in Proof.load(bundle).obstacle
    with pytest.raises(EnvironmentUnsuitable, match="link that leaves the bundle"):
        proven(bundle)
    assert (tmp_path / "elsewhere/verify.json").read_bytes() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_writing_leaves_the_old_report(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    proven(bundle)
    before = (bundle.path / PROOF_NAME).read_bytes()

    def failing(_: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(EnvironmentUnsuitable if isinstance(error, OSError) else type(error)):
            proven(bundle, rtol={"": 1e-12})
    assert (bundle.path / PROOF_NAME).read_bytes() == before
    assert [path.name for path in (bundle.path / "reports").iterdir()] == ["verify.json"]


def test_changed_file_is_found_by_its_hash_even_where_the_manifest_was_changed_too(bundle: Bundle) -> None:
    proven(bundle)
    model = onnx.load(bundle.path / "model.onnx")
    model.producer_name = "somebody else"
    (bundle.path / "model.onnx").write_bytes(model.SerializeToString())
    assert Proof.load(bundle).verdict(only(record_again(bundle))).status == "stale"
