"""TensorRT and the GPU of this machine: what is there, and what to install where it is not.

Nothing of NVIDIA's is imported before it is asked for: every other command works on a machine without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from deploycli.exporters.target.product import PRODUCTS, RTX, TENSORRT
from deploycli.models.errors import EnvironmentUnsuitable, first_line

if TYPE_CHECKING:
    from types import ModuleType

    from deploycli.exporters.bundle.engine import GpuRecord
    from deploycli.exporters.target.product import CompilerName, Product
    from deploycli.exporters.tensorrt.callbacks import Log

_RTX_PYTHONS = ((3, 10), (3, 14))
"""The first and the last CPython that TensorRT for RTX 1.7 has wheels for."""


def choose(asked: CompilerName | None = None) -> Product:
    """Return the compiler that is asked for, or else the one for this machine: TensorRT where it and a GPU are there,
    else TensorRT for RTX, which needs no GPU, where that is installed. Whether it works is for `require` to say.
    """
    if asked is not None:
        return PRODUCTS[asked]
    if is_installed(TENSORRT):
        try:
            gpu()
        except EnvironmentUnsuitable:
            pass
        else:
            return TENSORRT
    return RTX if is_installed(RTX) else TENSORRT


def require(product: Product = TENSORRT) -> ModuleType:
    """Return a package of NVIDIA's. That there is a GPU is for `gpu` to say.

    Raises:
        EnvironmentUnsuitable: it is not installed, incomplete or too old.
    """
    expected, hint = product.expected, install_hint(product)
    try:
        trt = importlib.import_module(product.module)
    except ModuleNotFoundError as error:
        if error.name == product.module:
            raise _missing(product) from error
        raise _broken(error, product) from error
    except Exception as error:  # what an incomplete installation raises is not documented
        raise _broken(error, product) from error
    found = getattr(trt, "__version__", None)
    if not isinstance(found, str):  # such as a folder named tensorrt, which imports as an empty package
        where = next(iter(getattr(trt, "__path__", [])), "an unknown place")
        raise EnvironmentUnsuitable(
            f"the package {product.module} in {where} is not NVIDIA's", expected=expected, hint=hint
        )
    if _numbers(found) < product.minimum:
        raise EnvironmentUnsuitable(f"{product.title} {found} is installed", expected=expected, hint=hint)
    return trt


def require_installed(product: Product) -> None:
    """Refuse a machine without a package of NVIDIA's, which is not imported here.

    Raises:
        EnvironmentUnsuitable: it is not installed.
    """
    if not is_installed(product):
        raise _missing(product)


def use(product: Product) -> None:
    """Let ``import tensorrt`` mean a product, for the rest of this process: both have the same interface.

    Only for a process that serves one of them, such as the child that builds.

    Raises:
        EnvironmentUnsuitable: see `require`.
    """
    sys.modules[TENSORRT.module] = require(product)


def version(product: Product = TENSORRT) -> str:
    """Return the version of a package of NVIDIA's, four parts, such as ``10.13.3.9``.

    Raises:
        EnvironmentUnsuitable: see `require`.
    """
    return str(require(product).__version__)


def install_hint(product: Product) -> str:
    """Say what helps on this machine where a product is not there: without a driver, TensorRT does not."""
    if product is TENSORRT:
        if has_driver() or _no_rtx_wheel():
            return TENSORRT.install
        rtx = "--compiler rtx, which needs none" if is_installed(RTX) else RTX.install
        return f"without an NVIDIA driver: {rtx}; with one: {TENSORRT.install}"
    if lacking := _no_rtx_wheel():
        return f"{TENSORRT.install}: TensorRT for RTX has no wheel for {lacking}"
    return RTX.install


def is_installed(product: Product) -> bool:
    """Return whether a package of NVIDIA's is there; whether it works is for `require` to say."""
    try:
        return importlib.util.find_spec(product.module) is not None
    except (ImportError, ValueError):
        return False


def has_driver() -> bool:
    """Whether there are signs of an NVIDIA driver on this machine."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _no_rtx_wheel() -> str:
    """Return why TensorRT for RTX cannot be installed here, or an empty string."""
    machine, system, python = platform.machine(), platform.system(), platform.python_implementation()
    if system not in ("Linux", "Windows") or machine not in ("x86_64", "AMD64"):
        return f"{system} on {machine}, but for Linux and Windows on x86-64"
    first, last = _RTX_PYTHONS
    if python != "CPython" or not first <= sys.version_info[:2] <= last:
        return f"{python} {platform.python_version()}, but for CPython 3.{first[1]} to 3.{last[1]}"
    return ""


def log(product: Product = TENSORRT) -> Log:
    """Return a logger that keeps a product's last lines in memory; one process may run engines of both.

    Raises:
        EnvironmentUnsuitable: see `require`.
    """
    from deploycli.exporters.tensorrt.messages import Messages

    return cast("Log", type("Log", (Messages, require(product).ILogger), {})())


def gpu() -> GpuRecord:
    """Return the GPU that TensorRT would use: the first one visible.

    Raises:
        EnvironmentUnsuitable: there is none, or PyTorch is built without CUDA.
    """
    import torch  # slow

    if torch.version.cuda is None and has_driver():
        raise EnvironmentUnsuitable(
            f"there is no way to the GPU: PyTorch {torch.__version__} is built without CUDA",
            expected="PyTorch with CUDA",
            hint="pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128, or for "
            "another CUDA, see https://pytorch.org/get-started/locally",
        )
    if not torch.cuda.is_available():
        raise EnvironmentUnsuitable(
            "there is no GPU: PyTorch sees none",
            expected="an NVIDIA GPU and its driver",
            hint="nvidia-smi; in a container, docker run --gpus all",
        )
    from deploycli.exporters.bundle.engine import GpuRecord  # slow to import

    found = torch.cuda.get_device_properties(0)
    return GpuRecord(found.name, (found.major, found.minor), _driver(), found.total_memory)


def _missing(product: Product) -> EnvironmentUnsuitable:
    return EnvironmentUnsuitable(
        f"{product.title} is not installed", expected=product.expected, hint=install_hint(product)
    )


def _broken(error: Exception, product: Product) -> EnvironmentUnsuitable:
    missing = re.search(r"lib[\w+-]+\.so[.\d]*", str(error))
    found = f"its shared library {missing[0]} is missing" if missing else "it is broken"
    again = f"pip install --force-reinstall --no-cache-dir {product.module.replace('_', '-')}-cu12"
    return EnvironmentUnsuitable(
        f"{product.title} is installed, but {found}: {type(error).__name__}: {first_line(error)}",
        expected=f"{product.expected}, with its shared libraries where the loader finds them",
        hint=f"{product.install}; a tar installation needs LD_LIBRARY_PATH" if product is TENSORRT else again,
    )


def _driver() -> str:
    """Return the driver's release, such as ``550.54.14``, where the kernel tells, else nothing."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text("utf-8", "replace")
    except OSError:
        return ""
    found = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)*)\s", text)
    return found[1] if found else ""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:4])
