"""Builds with the stand-in for TensorRT in ``fake/``, in the real child process; it needs TensorRT for RTX."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from onnx import TensorProto, helper

from deploycli.exporters.target.settings import BuildSettings, ShapeRange
from deploycli.exporters.tensorrt.child import run_build
from tests.exporters.lint.rtx import WHY

if TYPE_CHECKING:
    from deploycli.exporters.tensorrt.job import BuildResult

FOLDER, GPU = (Path(__file__).parent / name for name in ("fake", "gpu"))
PROFILE = {"image": ShapeRange((1, 3), (2, 3), (4, 3))}


def write_model(path: Path) -> Path:
    """Write the smallest model with a batch axis."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["batch", 3])
    node = helper.make_node("Cast", ["image"], ["logits"], to=TensorProto.FLOAT16)
    model = helper.make_model(helper.make_graph([node], "tiny", [image], [logits]))
    onnx.save(model, path)
    return path


class Bench:
    """A folder, a model, and the stand-in installed.

    Args:
        folder: an empty one.
        patch: to set the environment with.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.onnx = write_model(folder / "model.onnx")
        self.work = folder / "a b's work"
        self._patch = patch
        for path in (GPU, FOLDER):
            patch.syspath_prepend(str(path))
        folders = [str(FOLDER), str(GPU), os.environ.get("PYTHONPATH")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))

    def set(self, **values: str) -> None:
        """Set environment variables: ``FAKE_TENSORRT`` is what it does, see ``fake/``."""
        for name, value in values.items():
            self._patch.setenv(name, value)

    def build(
        self, does: str = "succeed", *, timeout: float = 60, progress: Any = lambda _: None, **settings: Any
    ) -> BuildResult:
        """Build with a stand-in that behaves so."""
        self.set(FAKE_TENSORRT=does)
        return run_build(
            self.onnx, BuildSettings(**{"profile": PROFILE, **settings}), self.work, timeout=timeout, progress=progress
        )

    def files(self) -> set[str]:
        """Names of all files in the work folder."""
        return {path.name for path in self.work.iterdir()}

    @property
    def log(self) -> str:
        """The builder's log."""
        return (self.work / "builder.log").read_text("utf-8")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    pytest.importorskip("tensorrt_rtx", reason=WHY)
    return Bench(tmp_path, monkeypatch)
