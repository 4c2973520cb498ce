"""A stand-in for cuda-python: the GPU that ``FAKE_GPU`` describes, as ``name|major|minor``, or ``none``."""

from __future__ import annotations

import os
from enum import IntEnum
from types import SimpleNamespace


class cudaError_t(IntEnum):  # noqa: N801 - its name
    cudaSuccess = 0  # noqa: N815
    cudaErrorInvalidDevice = 101  # noqa: N815
    cudaErrorNoDevice = 100  # noqa: N815


def _gpu() -> str:
    return os.environ.get("FAKE_GPU", "NVIDIA L4|8|9")


def cudaGetDeviceCount() -> tuple[cudaError_t, int | None]:  # noqa: N802
    # The count is None where there is an error.
    return (cudaError_t.cudaErrorNoDevice, None) if _gpu() == "none" else (cudaError_t.cudaSuccess, 1)


def cudaGetDeviceProperties(device: int) -> tuple[cudaError_t, SimpleNamespace | None]:  # noqa: N802
    if device != 0:
        return cudaError_t.cudaErrorInvalidDevice, None
    name, major, minor = _gpu().split("|")
    found = SimpleNamespace(name=name.encode(), major=int(major), minor=int(minor), totalGlobalMem=24 << 30)
    return cudaError_t.cudaSuccess, found


def cudaDriverGetVersion() -> tuple[cudaError_t, int]:  # noqa: N802
    return cudaError_t.cudaSuccess, 13050
