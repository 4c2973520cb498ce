"""From a bundle to a Triton model repository, as a user types it."""

from __future__ import annotations

import json
import stat
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import pytest

from deploycli.exporters.bundle.golden import load_golden
from deploycli.models.spec import Weights
from tests.deploycli.commands import assert_refused, files, run
from tests.deploycli.test_faults import without_the_right_to_ignore_permissions
from tests.exporters.bundle.bundles import make
from tests.exporters.serving.triton_schema import parse

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.bundle.bundle import Bundle
    from tests.deploycli.conftest import Command

PACKAGE = ("package", "--triton", "models")


def test_verify_keeps_its_report_and_inspect_shows_it(deploycli: Command, tmp_path: Path) -> None:
    make(tmp_path / "artifacts")
    assert "verified: not verified (it was never verified)" in deploycli("inspect", "linear").out
    (report,) = deploycli("verify", "--json").json()
    kept = json.loads((tmp_path / "artifacts/linear/reports/verify.json").read_text())
    assert kept == kept | report
    assert "verified: ok (reference: golden, 20" in deploycli("inspect", "linear").out
    assert deploycli("verify", "--rtol", "features:1e-12").code == 5
    assert "verified: failed (model.onnx in ONNX Runtime" in deploycli("inspect", "linear").out
    (verdict,) = deploycli("inspect", "linear", "--json").json()["verified"].values()
    assert verdict["status"] == "failed"


@pytest.mark.skipif(sys.platform != "linux", reason="permissions of root are dropped by a call of Linux")
def test_bundle_that_cannot_be_written_is_verified_all_the_same(tmp_path: Path) -> None:
    bundle = make(tmp_path / "artifacts")
    bundle.path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    result = run("verify", "--json", cwd=tmp_path, preexec=without_the_right_to_ignore_permissions)
    (report,) = result.json()
    assert report["passed"]
    assert "the report could not be kept: cannot write artifacts/linear/reports/verify.json" in result.err
    assert not (bundle.path / "reports").exists()


def test_package_says_what_it_wrote_and_what_comes_next(deploycli: Command, tmp_path: Path) -> None:
    make(tmp_path / "artifacts")
    assert deploycli("verify").code == 0
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    first = deploycli(*PACKAGE, "--labels", "classes.txt")
    assert first.code == 0, first.err
    assert first.out.splitlines()[0].startswith("models/linear/1 ")
    assert "verified: ok" in first.out
    assert first.out.splitlines()[-1] == "next: tritonserver --model-repository models"
    (second,) = deploycli(*PACKAGE, "linear", "--json", "--max-batch", 4).json()
    assert (second["version"], second["path"], second["max_batch_size"]) == (2, "models/linear/2", 4)
    assert sorted(files(tmp_path / "models")) == [
        f"linear/{name}" for name in ("1/model.onnx", "2/model.onnx", "config.pbtxt", "labels.txt")
    ]


def test_exit_codes_of_what_is_not_for_release(deploycli: Command, tmp_path: Path) -> None:
    make(tmp_path / "artifacts")
    assert_refused(deploycli(*PACKAGE), 2, "not verified", "deploycli verify linear", "--force")
    assert deploycli("verify", "--rtol", "features:1e-12").code == 5
    assert_refused(deploycli(*PACKAGE), 5, "failed", "'features'")
    make(tmp_path / "artifacts", samples=5)  # the same graph: what was found of it still holds
    assert_refused(deploycli(*PACKAGE), 5, "failed", "'features'")
    (tmp_path / "artifacts/linear/reports/verify.json").unlink()
    assert_refused(deploycli(*PACKAGE), 2, "never verified")
    assert not (tmp_path / "models").exists()
    forced = deploycli(*PACKAGE, "--force")
    assert forced.code == 0
    assert "NOT FOR RELEASE: not verified" in forced.out
    assert "# NOT FOR RELEASE: not verified" in (tmp_path / "models/linear/config.pbtxt").read_text()


def test_random_weights(deploycli: Command, tmp_path: Path) -> None:
    make(tmp_path / "artifacts", weights=Weights("random", seed=0))
    assert deploycli("verify", "--reference", "golden").code == 0
    assert_refused(deploycli(*PACKAGE), 2, "random weights (random, seed 0)", "--checkpoint")


def test_one_bundle_that_is_refused_keeps_all_from_being_written(deploycli: Command, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make(tmp_path / "artifacts", name)
    assert deploycli("verify", "one").code == 0
    assert_refused(deploycli(*PACKAGE), 2, "artifacts/two/model.onnx is not for release")
    assert not (tmp_path / "models").exists()
    assert deploycli("verify").code == 0
    assert [version["name"] for version in deploycli(*PACKAGE, "--json").json()] == ["one", "two"]


def test_two_bundles_are_not_one_model(deploycli: Command, tmp_path: Path) -> None:
    for root in ("a", "b"):
        make(tmp_path / root)
    assert_refused(deploycli(*PACKAGE, "a/linear", "b/linear"), 2, "several bundles would be the model 'linear'")
    make(tmp_path / "a", "other")
    assert_refused(deploycli(*PACKAGE, "a/linear", "a/other", "--name", "x"), 2, "would be the model 'x'")


def test_usage(deploycli: Command, tmp_path: Path) -> None:
    make(tmp_path / "artifacts")
    assert_refused(deploycli("package"), 2, "--triton")
    assert_refused(deploycli(*PACKAGE, "--version", 0), 2, "--version")
    assert_refused(deploycli(*PACKAGE, "--preferred-batch", "some"), 2, "batch sizes")
    assert_refused(deploycli(*PACKAGE, "--flavour", "tensorrt"), 2, "no TensorRT engine", "deploycli build-trt linear")
    (tmp_path / "file").write_text("kept")
    assert_refused(deploycli("package", "--triton", "file"), 2, "is a file")
    (tmp_path / "artifacts/linear/model.onnx").write_bytes(b"changed")
    assert_refused(deploycli(*PACKAGE, "--force"), 8, "model.onnx has changed")


@pytest.mark.skipif(sys.platform != "linux", reason="permissions of root are dropped by a call of Linux")
def test_repository_that_cannot_be_written(deploycli: Command, tmp_path: Path) -> None:
    make(tmp_path / "artifacts")
    assert deploycli("verify").code == 0
    (tmp_path / "models").mkdir()
    (tmp_path / "models").chmod(stat.S_IRUSR | stat.S_IXUSR)
    result = run(*PACKAGE, cwd=tmp_path, preexec=without_the_right_to_ignore_permissions)
    assert_refused(result, 7, "cannot write models/linear", "Permission denied")
    assert files(tmp_path / "models") == {}


def test_export_cast_verify_package(true_bundle: Bundle, deploycli: Command, tmp_path: Path) -> None:
    """The whole path with a Swin and weights from a file; the FP16 file reads and writes FP16."""
    root = ("-o", true_bundle.path.parent)
    name = true_bundle.path.name
    assert deploycli("cast", name, *root, "--io-types", "fp16").code == 0
    assert deploycli("verify", name, *root, "--reference", "golden").code == 0
    inputs, golden = load_golden(true_bundle.golden)
    for precision, dtype, error in (("fp32", np.float32, 1e-5), ("fp16", np.float16, 1e-2)):
        result = deploycli("package", name, *root, "--triton", "models", "--name", precision, "--precision", precision)
        assert result.code == 0, result.err
        config = parse((tmp_path / f"models/{precision}/config.pbtxt").read_text())
        types = {tensor.data_type for tensor in (*config.input, *config.output)}
        assert types == {11 if precision == "fp32" else 10}
        assert [list(tensor.dims) for tensor in (*config.input, *config.output)] == [[3, 16, 16], [5]]
        file = tmp_path / f"models/{precision}/1/model.onnx"
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"images": inputs["images"].astype(dtype)})
        assert logits.dtype == dtype
        assert np.abs(logits - golden["logits"]).max() < error * np.abs(golden["logits"]).max()
    assert deploycli("cast", name, *root).code == 0
    shown = deploycli("inspect", name, *root, "--json").json()["verified"]
    assert [verdict["status"] for verdict in shown.values()] == ["ok", "stale"]
    fp16 = ("package", name, *root, "--triton", "models", "--name", "fp16", "--precision", "fp16")
    assert_refused(deploycli(*fp16), 2, "model.fp16.onnx is not for release: stale: it has changed since")
    assert deploycli("verify", name, *root, "--reference", "golden").code == 0
    assert_refused(deploycli(*fp16), 2, "describes another interface", "TYPE_FP32")
