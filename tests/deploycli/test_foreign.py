"""A researcher's own model, from the folder that it lies in."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import pytest

from deploycli.exporters.bundle.bundle import Bundle

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

RESEARCH = """
import torch
from torch import nn

class Fusion(nn.Module):
    '''Two images in, class scores and two feature maps out.'''
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.head = nn.Linear(4, classes)
    def forward(self, left, right):
        left, right = self.stem(left).roll(1, 2), self.stem(right)
        return {"scores": self.head((left + right).mean((2, 3))), "maps": [left, right]}

class Gate(nn.Module):
    def forward(self, x):
        return x if x.mean() > 0 else -x

class Spectrum(nn.Module):
    def forward(self, x):
        return torch.linalg.svd(x).S

def fusion(classes=3):
    return Fusion(classes)

def gated():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Gate())

def spectral():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Spectrum())

def baked():
    class Baked(nn.Module):
        def forward(self, x):
            return torch.cat([x[i : i + 1] for i in range(int(x.shape[0]))]).mean((2, 3))
    return Baked()

def unlucky():
    raise RuntimeError("no luck")
"""


@pytest.fixture(autouse=True)
def research(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "research.py").write_text(RESEARCH)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "research", raising=False)


FUSION = ["research:fusion", "--input", "left:2x3x16x16", "--input", "right:2x3x16x16"]


def test_several_inputs_and_outputs_are_exported_and_verified(deploycli: Command, tmp_path: Path) -> None:
    result = deploycli("export", *FUSION, "--model-kwargs", '{"classes": 7}', "--seed", 3)
    assert result.code == 0, result.err
    bundle = Bundle.open(tmp_path / "artifacts/research.fusion")
    assert bundle.manifest.spec.config == {"target": "research:fusion", "kwargs": {"classes": 7}}
    assert bundle.manifest.spec.outputs == ("scores", "maps_0", "maps_1")
    session = ort.InferenceSession(
        tmp_path / "artifacts/research.fusion/model.onnx", providers=["CPUExecutionProvider"]
    )
    image = np.ones((5, 3, 16, 16), np.float32)
    shapes = [output.shape for output in session.run(None, {"left": image, "right": image})]
    assert shapes == [(5, 7), (5, 4, 4, 4), (5, 4, 4, 4)]
    # The eager model is made again, by the recorded factory and arguments.
    reports = deploycli("verify", "--reference", "eager", "--json").json()
    assert [report["passed"] for report in reports] == [True]
    assert {c["name"] for stage in reports[0]["stages"] for c in stage["comparisons"]} == {"scores", "maps_0", "maps_1"}


def test_another_seed_would_be_noticed(deploycli: Command, tmp_path: Path) -> None:
    assert deploycli("export", *FUSION, "--seed", 3).code == 0
    manifest = tmp_path / "artifacts/research.fusion/manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 3', '"seed": 4'))
    assert deploycli("verify").code == 8


@pytest.mark.parametrize(
    ("arguments", "code", "messages"),
    [
        (
            ["research:gated"],
            3,
            ["in module 1 (Gate)", "aten.item", "`return x if x.mean() > 0 else -x`"],
        ),
        (["research:spectral"], 3, ["linalg_svd", "in module 1 (Spectrum)"]),
        (["research:baked"], 3, ["cannot be traced", "--batch N"]),
        (["research:unlucky"], 2, ["RuntimeError: no luck", "research.py"]),
        (["research:absent"], 2, ["research has no function 'absent'"]),
        (["nowhere.models:make"], 2, ["there is no module 'nowhere'", "run from the folder that holds it"]),
        (["research:fusion"], 2, ["does not run on images:2x3x224x224", "--input"]),
        (["research:fusion", "--window-size", "7"], 2, ["--model-kwargs"]),
        (["research:fusion", "--model-kwargs", "[1]"], 2, ["no JSON object"]),
        (["research:fusion", "--model-kwargs", "{"], 2, ["is not JSON"]),
        (["research:fusion", "--input", "left"], 2, ["name:2x3x224x224"]),
        (["research:fusion", "--input", "left:2x3x16x16"], 2, ["does not run on left:2x3x16x16", "'right'"]),
        (["swin_t", "--model-kwargs", "{}", "--input", "x:1x3x8x8"], 2, ["takes neither --model-kwargs nor --input"]),
        (["timm:no_such_model"], 2, ["timm has no model 'no_such_model'"]),
        (["hf:nothing/here/at/all"], 2, ["no transformers model"]),
    ],
)
def test_what_fails_is_one_message(
    deploycli: Command, tmp_path: Path, arguments: list[str], code: int, messages: list[str]
) -> None:
    from tests.peers import import_timm

    import_timm()
    result = deploycli("export", *arguments)
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    for message in messages:
        assert message in result.err
    assert not list(tmp_path.glob("artifacts/*"))
    assert not list(tmp_path.glob("artifacts/.*"))
