"""TensorRT and the GPU of this machine: what is there, and what to install where it is not.

Nothing of NVIDIA's is imported before it is asked for: every other command works on a machine without it.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.tensorrt.sidecar import GpuRecord
from models.errors import EnvironmentUnsuitable, first_line

if TYPE_CHECKING:
    from types import ModuleType

    from exporters.tensorrt.callbacks import Log

MINIMUM = (10, 12)
"""First TensorRT whose strongly typed networks NVIDIA recommends. Source: NVIDIA/TensorRT, strong typing migration."""

INSTALL = 'pip install "tensorrt>=10.12", or work in the container nvcr.io/nvidia/tensorrt'
_EXPECTED = "TensorRT 10.12 or later"


def require() -> ModuleType:
    """Return the package ``tensorrt``. That there is a GPU is for `gpu` to say.

    Raises:
        EnvironmentUnsuitable: it is not installed, incomplete or too old.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        if error.name == "tensorrt":
            raise EnvironmentUnsuitable("TensorRT is not installed", expected=_EXPECTED, hint=INSTALL) from error
        raise _broken(error) from error
    except Exception as error:  # what an incomplete installation raises is not documented
        raise _broken(error) from error
    found = getattr(trt, "__version__", None)
    if not isinstance(found, str):  # such as a folder named tensorrt, which imports as an empty package
        where = next(iter(getattr(trt, "__path__", [])), "an unknown place")
        raise EnvironmentUnsuitable(
            f"the package tensorrt in {where} is not NVIDIA's", expected=_EXPECTED, hint=INSTALL
        )
    if _numbers(found) < MINIMUM:
        raise EnvironmentUnsuitable(f"TensorRT {found} is installed", expected=_EXPECTED, hint=INSTALL)
    return trt


def version() -> str:
    """Return the version of TensorRT, four parts, such as ``10.13.3.9``.

    Raises:
        EnvironmentUnsuitable: see `require`.
    """
    return str(require().__version__)


def log() -> Log:
    """Return a logger that keeps TensorRT's last lines in memory.

    Raises:
        EnvironmentUnsuitable: see `require`.
    """
    require()
    from exporters.tensorrt.callbacks import Log

    return Log()


def gpu() -> GpuRecord:
    """Return the GPU that TensorRT would use: the first one visible.

    cuda-python is asked first: PyTorch takes seconds to import.

    Raises:
        EnvironmentUnsuitable: there is none, or nothing that could tell.
    """
    try:
        from cuda.bindings import runtime as cudart
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: of another CUDA than its library
        return _torch_gpu(f"cuda-python cannot be imported ({first_line(error)})")
    status, count = cudart.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        name = getattr(status, "name", status) if int(status) else "0 devices"
        raise _no_gpu(f"CUDA says {name}")
    status, found = cudart.cudaGetDeviceProperties(0)
    if int(status) != 0:
        raise _no_gpu(f"CUDA cannot describe it: {getattr(status, 'name', status)}")
    text = found.name.decode("utf-8", "replace") if isinstance(found.name, bytes) else str(found.name)
    capability = (int(found.major), int(found.minor))
    return GpuRecord(text.strip("\0 "), capability, _driver(_cuda_version(cudart)), int(found.totalGlobalMem))


def _torch_gpu(reason: str) -> GpuRecord:
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = f"{reason}; PyTorch cannot be imported ({first_line(error)})"
        raise EnvironmentUnsuitable(
            f"there is no way to ask for the GPU: {reason}",
            expected="cuda-python, or PyTorch with CUDA",
            hint="pip install cuda-python",
        ) from error
    if torch.version.cuda is None:
        raise EnvironmentUnsuitable(
            f"there is no way to ask for the GPU: {reason}; PyTorch {torch.__version__} is built without CUDA",
            expected="cuda-python, or PyTorch with CUDA",
            hint="pip install cuda-python",
        )
    if not torch.cuda.is_available():
        raise _no_gpu("PyTorch sees none")
    found = torch.cuda.get_device_properties(0)
    return GpuRecord(found.name, (found.major, found.minor), _driver(""), found.total_memory)


def _broken(error: Exception) -> EnvironmentUnsuitable:
    missing = re.search(r"lib[\w+-]+\.so[.\d]*", str(error))
    found = f"its shared library {missing[0]} is missing" if missing else "it is broken"
    return EnvironmentUnsuitable(
        f"TensorRT is installed, but {found}: {type(error).__name__}: {first_line(error)}",
        expected=f"{_EXPECTED}, with its shared libraries where the loader finds them",
        hint=f"{INSTALL}; a tar installation needs LD_LIBRARY_PATH",
    )


def _no_gpu(reason: str) -> EnvironmentUnsuitable:
    return EnvironmentUnsuitable(
        f"there is no GPU: {reason}",
        expected="an NVIDIA GPU and its driver",
        hint="nvidia-smi; in a container, docker run --gpus all",
    )


def _driver(fallback: str) -> str:
    """Return the driver's release, such as ``550.54.14``, where the kernel tells."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text("utf-8", "replace")
    except OSError:
        return fallback
    found = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)*)\s", text)
    return found[1] if found else fallback


def _cuda_version(cudart: Any) -> str:
    status, number = cudart.cudaDriverGetVersion()  # 13050 for 13.5
    return f"CUDA {number // 1000}.{number % 1000 // 10}" if int(status) == 0 and number else ""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:4])
