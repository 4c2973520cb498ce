"""No command writes what TensorRT cannot read: exit 3, nothing left behind; --no-lint writes it all the same."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.deploycli.commands import assert_refused, files

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

MODULE = """
import torch
from torch import nn

class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(256, 32)
    def forward(self, x):
        return self.head(x.flatten(1)) + torch.linalg.det(x[:, :2, :2])[:, None]
"""


@pytest.fixture(autouse=True)
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "volume.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "volume", raising=False)


def test_export_cast_and_quantize(deploycli: Command, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((8, 16, 16)).astype(np.float32))
    (tmp_path / "artifacts").mkdir()
    before = files(tmp_path)
    for command in (
        ["export", "volume.py:Volume", "--name", "volume", "--input", "x:2x16x16"],
        ["cast", "volume"],
        ["quantize", "volume", "--calibrate", "rows.npy", "--high-precision", "none"],
    ):
        refused = deploycli(*command)
        assert_refused(
            refused, 3, "TensorRT 11.4 cannot read", "rule operator-support: ", "Det is not supported", "try: --no-lint"
        )
        kept = {name: content for name, content in files(tmp_path).items() if "__pycache__" not in name}
        assert kept == before
        written = deploycli(*command, "--no-lint")
        assert written.code == 0, written.err
        before = {name: content for name, content in files(tmp_path).items() if "__pycache__" not in name}
    assert {"model.onnx", "model.fp16.onnx", "model.int8.onnx"} <= {name.rpartition("/")[2] for name in before}
    assert deploycli("lint", "volume").code == 3
