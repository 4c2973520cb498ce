"""A stand-in for cuda-python with one GPU whose memory is the host's, and streams that run only when they must.

Work on a stream is done by the next synchronisation and not before: who reads an output too early reads nothing, and
who frees what a copy reads from is found out. An address that is not in live memory is an error.
"""

from __future__ import annotations

import ctypes
import os
from enum import IntEnum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class cudaError_t(IntEnum):  # noqa: N801 - its name
    cudaSuccess = 0  # noqa: N815
    cudaErrorInvalidValue = 1  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorNoDevice = 100  # noqa: N815
    cudaErrorStreamCaptureUnsupported = 900  # noqa: N815


class cudaMemcpyKind(IntEnum):  # noqa: N801
    cudaMemcpyHostToDevice = 1  # noqa: N815
    cudaMemcpyDeviceToHost = 2  # noqa: N815


class cudaStreamCaptureMode(IntEnum):  # noqa: N801
    cudaStreamCaptureModeThreadLocal = 1  # noqa: N815


cudaStreamNonBlocking = 1  # noqa: N816
_OK = cudaError_t.cudaSuccess

LIVE: dict[int, Any] = {}
"""Address -> memory that is reserved now."""
ALLOCATED: list[int] = []
"""Sizes of all that was ever reserved."""
STREAMS: dict[int, list[Callable[[], None]]] = {}
"""Handle -> what waits on a stream."""
CAPTURING: dict[int, list[Callable[[], None]]] = {}
"""Handle -> what a stream records in place of doing it."""
GRAPHS: dict[int, list[Callable[[], None]]] = {}
"""Handle -> what a graph does."""


def enqueue(stream: int, work: Callable[[], None]) -> None:
    """What the stand-in for TensorRT does, too."""
    CAPTURING.get(stream, STREAMS[stream]).append(work)


def _gpu() -> str:
    return os.environ.get("FAKE_GPU", "NVIDIA L4|8|9")


def cudaGetDeviceCount() -> tuple[cudaError_t, int | None]:  # noqa: N802
    return (cudaError_t.cudaErrorNoDevice, None) if _gpu() == "none" else (_OK, 1)


def cudaGetDeviceProperties(device: int) -> tuple[cudaError_t, SimpleNamespace]:  # noqa: N802
    name, major, minor = _gpu().split("|")
    found = SimpleNamespace(name=name.encode(), major=int(major), minor=int(minor), totalGlobalMem=24 << 30)
    return _OK, found


def cudaDriverGetVersion() -> tuple[cudaError_t, int]:  # noqa: N802
    return _OK, 13050


def cudaStreamCreateWithFlags(flags: int) -> tuple[cudaError_t, int]:  # noqa: N802
    assert flags == cudaStreamNonBlocking
    handle = 1000 + len(STREAMS)
    STREAMS[handle] = []
    return _OK, handle


def cudaStreamSynchronize(stream: int) -> tuple[cudaError_t]:  # noqa: N802
    if stream in CAPTURING:
        return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
    while STREAMS[stream]:
        STREAMS[stream].pop(0)()
    return (_OK,)


def cudaStreamDestroy(stream: int) -> tuple[cudaError_t]:  # noqa: N802
    cudaStreamSynchronize(stream)
    del STREAMS[stream]
    return (_OK,)


def cudaMalloc(size: int) -> tuple[cudaError_t, int | None]:  # noqa: N802
    if size > int(os.environ.get("FAKE_MEMORY", 1 << 30)):
        return cudaError_t.cudaErrorMemoryAllocation, None
    memory = (ctypes.c_ubyte * size)(*([0xAB] * min(size, 64)))  # not zero, so that nobody relies on it
    LIVE[ctypes.addressof(memory)] = memory
    ALLOCATED.append(size)
    return _OK, ctypes.addressof(memory)


def cudaFree(address: int) -> tuple[cudaError_t]:  # noqa: N802
    for stream in STREAMS:
        cudaStreamSynchronize(stream)
    return (_OK if LIVE.pop(address, None) is not None else cudaError_t.cudaErrorInvalidValue,)


def cudaMemcpyAsync(to: int, source: int, size: int, kind: cudaMemcpyKind, stream: int) -> tuple[cudaError_t]:  # noqa: N802
    on_device = to if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else source
    if on_device not in LIVE or size > len(LIVE[on_device]):
        return (cudaError_t.cudaErrorInvalidValue,)
    enqueue(stream, lambda: void(ctypes.memmove(to, source, size)))
    return (_OK,)


def cudaStreamBeginCapture(stream: int, mode: cudaStreamCaptureMode) -> tuple[cudaError_t]:  # noqa: N802
    CAPTURING[stream] = []
    return (_OK,)


def cudaStreamEndCapture(stream: int) -> tuple[cudaError_t, int]:  # noqa: N802
    handle = 5000 + len(GRAPHS)
    GRAPHS[handle] = CAPTURING.pop(stream)
    return _OK, handle


def cudaGraphInstantiate(graph: int, flags: int) -> tuple[cudaError_t, int]:  # noqa: N802
    assert flags == 0
    return _OK, graph


def cudaGraphLaunch(ready: int, stream: int) -> tuple[cudaError_t]:  # noqa: N802
    STREAMS[stream].extend(GRAPHS[ready])
    return (_OK,)


def cudaGraphExecDestroy(ready: int) -> tuple[cudaError_t]:  # noqa: N802
    return (_OK,)


def cudaGraphDestroy(graph: int) -> tuple[cudaError_t]:  # noqa: N802
    del GRAPHS[graph]
    return (_OK,)


def void(_result: object) -> None:
    pass
