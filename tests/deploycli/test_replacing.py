"""Exporting over a bundle, and adding to one that others add to: nothing is lost that still holds."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from deploycli.exporters.bundle.bundle import Bundle
from tests.deploycli.commands import assert_refused, files, start
from tests.exporters.lint.rtx import WHY

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

MODELS = """
import torch

def make(scale, outputs=4):
    layer = torch.nn.Linear(8, outputs)
    layer.weight.data = scale * torch.sin(torch.arange(8.0 * outputs)).reshape(outputs, 8)
    torch.nn.init.zeros_(layer.bias)
    return layer

def one(scale=1.0): return make(scale)
def two(): return make(2.0)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(MODELS)
    return tmp_path


def test_factories_are_called_after_their_module(folder: Path, deploycli: Command) -> None:
    for which in ("one", "two"):
        assert deploycli("export", f"nets.py:{which}", "--input", "x:2x8").code == 0
    assert sorted(path.name for path in (folder / "artifacts").iterdir()) == ["nets.one", "nets.two"]


def test_what_stays_and_what_goes(folder: Path, deploycli: Command) -> None:
    line = ("export", "nets.py:one", "--input", "x:2x8", "--name", "net")
    assert deploycli(*line).code == 0
    assert deploycli("cast", "net").code == 0
    assert deploycli("verify", "net", "--trust-factory").code == 0
    before = files(folder / "artifacts/net")
    again = deploycli(*line, "--json")
    assert again.json()["gone"] == []
    assert [artifact["precision"] for artifact in again.json()["artifacts"]] == ["fp32", "fp16"]
    after = files(folder / "artifacts/net")
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json"}
    assert deploycli("inspect", "net").out.count("verified: ok") == 2

    other = ("export", "nets.py:two", "--input", "x:2x8", "--name", "net")
    refused = deploycli(*other)
    assert_refused(refused, 2, "artifacts/net is a bundle of nets.py:one", "one of nets.py:two", "--replace")
    assert files(folder / "artifacts/net") == after
    assert "tracing" not in refused.err
    scaled = deploycli(*line, "--model-kwargs", '{"scale": 3.0}')
    assert scaled.code == 0
    assert "artifacts/net held another model.onnx; gone with it: model.fp16.onnx, reports/" in scaled.err
    replaced = deploycli(*other, "--replace")
    assert replaced.code == 0
    assert "gone with it" not in replaced.err  # there was nothing else
    assert Bundle.open(folder / "artifacts/net").manifest.spec.config["target"] == "nets.py:two"


def test_a_build_and_a_cast_at_the_same_time(true_bundle: Bundle, tmp_path: Path) -> None:
    """The build's folder lies in the bundle that the others replace meanwhile."""
    shutil.copytree(true_bundle.path, tmp_path / "artifacts/smallest")
    pytest.importorskip("tensorrt_rtx", reason=WHY)
    build = start("build-trt", "--compiler", "rtx", "--precision", "fp32", "--gpu", "ada", cwd=tmp_path)
    casts = [start("cast", "--precision", precision, cwd=tmp_path) for precision in ("fp16", "bf16")]
    for process in (build, *casts):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    bundle = Bundle.open(tmp_path / "artifacts/smallest")
    assert {artifact.precision for artifact in bundle.manifest.artifacts} == {"fp32", "fp16", "bf16"}
    (plan,) = (bundle.path / "engines").glob("*.plan")
    assert json.loads(plan.with_suffix(".json").read_text())["onnx_sha256"] == bundle.manifest.artifacts[0].sha256
    assert (bundle.path / "reports/build-fp32/builder.log").is_file()
    assert sorted(path.name for path in (tmp_path / "artifacts").iterdir()) == ["smallest"]
