"""What is said of a machine that lacks TensorRT, or some of it, or a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploycli.exporters.bundle.engine import GpuRecord
from deploycli.exporters.tensorrt import library
from deploycli.models.errors import EnvironmentUnsuitable

ROOT = Path(__file__).parents[3]


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """Put a package ``tensorrt`` of this source first."""
    (folder / "tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    with pytest.raises(EnvironmentUnsuitable, match="TensorRT is not installed") as caught:
        library.require()
    assert caught.value.exit_code == 7
    assert "pip install" in caught.value.hint
    assert "nvcr.io/nvidia/tensorrt" in caught.value.hint


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("__version__ = '10.9.0.34'", "TensorRT 10.9.0.34 is installed"),
        ("__version__ = '8.6.1'", "TensorRT 8.6.1 is installed"),
        ("raise ImportError('libnvinfer.so.10: cannot open shared object file')", "libnvinfer.so.10 is missing"),
        ("raise FileNotFoundError('Could not find: nvinfer')", "FileNotFoundError: Could not find"),
        ("import no_such_part", "it is broken: ModuleNotFoundError"),
        ("raise RuntimeError", "it is broken: RuntimeError"),
    ],
)
def test_it_is_old_or_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, what: str) -> None:
    install(monkeypatch, tmp_path, source)
    with pytest.raises(EnvironmentUnsuitable, match=what):
        library.require()
    sys.modules.pop("tensorrt", None)


@pytest.mark.parametrize("found", ["10.12.0.36", "10.13.3.9", "11.0.0.114", "12.1.0.1"])
def test_it_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: str) -> None:
    install(monkeypatch, tmp_path, f"__version__ = {found!r}")
    assert library.require().__version__ == library.version() == found
    sys.modules.pop("tensorrt", None)


def test_a_folder_of_that_name_is_not_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EnvironmentUnsuitable, match="is not NVIDIA's"):
        library.require()
    sys.modules.pop("tensorrt", None)


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = "import sys; from deploycli.exporters.tensorrt import build_engine, child, library\n"
    code += "print([name for name in ('tensorrt', 'polygraphy', 'torch') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(library, "has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(EnvironmentUnsuitable, match="built without CUDA") as caught:
        library.gpu()
    assert "pip install --force-reinstall torch --index-url" in caught.value.hint
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentUnsuitable, match="there is no GPU: PyTorch sees none"):
        library.gpu()
    found = SimpleNamespace(name="NVIDIA L4", major=8, minor=9, total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(library, "_driver", lambda: "550.54.14")
    assert library.gpu() == GpuRecord("NVIDIA L4", (8, 9), "550.54.14", 24 << 30)


def test_pytorch_without_cuda_on_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(library, "has_driver", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentUnsuitable, match="there is no GPU"):
        library.gpu()


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024", "550.54.14"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "570.86.15"),
        ("nothing", ""),
    ],
)
def test_the_driver(monkeypatch: pytest.MonkeyPatch, text: str, driver: str) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: text)
    assert library._driver() == driver
