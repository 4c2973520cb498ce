"""What is said of weights, from the checkpoint to the package."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.models.swin import SwinTransformer
from tests.deploycli.commands import assert_refused
from tests.deploycli.conftest import SMALLEST
from tests.models.swins import golden_state
from tests.peers import import_timm

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command


@pytest.fixture
def both(tmp_path: Path) -> None:
    """A training script's last.pth, of a wrapped model with 7 classes: EMA weights beside plain ones."""
    plain = golden_state(SwinTransformer(**{**SMALLEST, "num_classes": 7}))
    average = {f"module.{key}": value * 0.99 for key, value in plain.items()}
    wrapped = {f"module.{key}": value for key, value in plain.items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "state_dict_ema": average}, tmp_path / "last.pth")


@pytest.mark.usefixtures("both")
def test_what_was_read_is_said_and_read_again(deploycli: Command, smallest: str, tmp_path: Path) -> None:
    line = "entry 'state_dict_ema', the EMA, prefix 'module.' stripped, 7 classes"
    result = deploycli("export", smallest, "--checkpoint", "last.pth")
    assert result.code == 0, result.err
    assert result.out.startswith("weights: checkpoint last.pth (sha256 ")
    assert line in result.out.splitlines()[0]
    assert "EMA weights were read, as timm does; the file also holds 'state_dict': --weights-entry" in result.err
    weights = Bundle.open(tmp_path / "artifacts" / smallest).manifest.weights
    assert (weights.entry, weights.others, weights.prefix) == ("state_dict_ema", ("state_dict",), "module.")
    assert weights.classes == 7
    shown = " ".join(deploycli("inspect", smallest).out.split())
    assert line in shown
    (report,) = deploycli("verify", "--reference", "eager", "--json").json()
    assert report["passed"]

    chosen = deploycli("export", smallest, "--checkpoint", "last.pth", "--weights-entry", "state_dict")
    assert "entry 'state_dict', prefix 'module.' stripped, 7 classes" in chosen.out
    assert "also holds" not in chosen.err
    (report,) = deploycli("verify", "--reference", "eager", "--json").json()
    assert report["passed"]


@pytest.mark.usefixtures("both")
def test_what_cannot_be_chosen(deploycli: Command, smallest: str, tmp_path: Path) -> None:
    export = ("export", smallest)
    assert_refused(
        deploycli(*export, "--checkpoint", "last.pth", "--weights-entry", "ema"), 2, "one of state_dict, state_dict_ema"
    )
    assert_refused(deploycli(*export, "--weights-entry", "ema"), 2, "--checkpoint FILE")
    assert_refused(
        deploycli(*export, "--checkpoint", "last.pth", "--num-classes", "5"), 2, "7 classes", "--num-classes 7"
    )
    (tmp_path / "no_keys.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    assert_refused(deploycli(*export, "--checkpoint", "no_keys.safetensors"), 2, "it has no keys")
    assert not list(tmp_path.glob("artifacts/*"))


def test_a_library_takes_the_number_of_classes(deploycli: Command, tmp_path: Path) -> None:
    import_timm()
    tiny = ["--model-kwargs", '{"depth": 1, "img_size": 32, "embed_dim": 24, "num_heads": 3}']
    result = deploycli("export", "timm:vit_tiny_patch16_224", *tiny, "--num-classes", 7, "--name", "tiny")
    assert result.code == 0, result.err
    bundle = Bundle.open(tmp_path / "artifacts/tiny")
    assert bundle.manifest.spec.config["kwargs"]["num_classes"] == 7
    assert "[batch, 7]" in " ".join(deploycli("inspect", "artifacts/tiny/model.onnx").out.split())


OWN = """
import torch
from torch import nn

class OwnWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)
        nn.init.constant_(self.linear.bias, VALUE)
    def forward(self, x):
        return self.linear(x)

class Drawn(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)
    def forward(self, x):
        return self.linear(x)
"""


def test_a_factorys_weights_are_its_own(deploycli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(value: float) -> None:
        (tmp_path / "own.py").write_text(OWN.replace("VALUE", str(value)))
        for name in [name for name in sys.modules if name == "own"]:
            monkeypatch.delitem(sys.modules, name)

    write(30.0)
    result = deploycli("export", "own.py:OwnWeights", "--input", "x:2x8", "--name", "own")
    assert result.code == 0, result.err
    weights = Bundle.open(tmp_path / "artifacts/own").manifest.weights
    assert result.out.startswith(
        f"weights of the factory (sha256 {weights.sha256[:12]}), 1 tensor drawn under seed 0\n"
    )
    assert "random" not in result.err
    assert f"weights of the factory (sha256 {weights.sha256[:12]})" in " ".join(deploycli("inspect", "own").out.split())
    assert deploycli("verify").code == 0
    packaged = deploycli("package", "own", "--triton", "models")
    assert packaged.code == 0, packaged.err
    assert (
        f"weights of the factory (sha256 {weights.sha256[:12]})" in (tmp_path / "models/own/config.pbtxt").read_text()
    )
    write(30.5)
    assert_refused(deploycli("verify"), 8, "the eager model is another one", weights.sha256)
    assert_refused(deploycli("verify", "--checkpoint", "own.py"), 2, "weights of the factory")
    assert deploycli("verify", "--reference", "golden").code == 0


def test_a_factory_that_draws_all_its_weights_has_random_ones(deploycli: Command, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN.replace("VALUE", "30.0"))
    result = deploycli("export", "own.py:Drawn", "--input", "x:2x8", "--name", "drawn")
    assert "weights: random, seed 0" in result.err
    assert deploycli("verify").code == 0
    assert_refused(deploycli("package", "drawn", "--triton", "models"), 2, "random weights (random, seed 0)")
