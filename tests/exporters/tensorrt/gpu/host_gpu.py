"""A stand-in for a GPU whose memory is the host's, with streams that run only when they must.

Work on a stream is done by the next synchronisation and not before: who reads an output too early reads nothing, and
who frees what a copy reads from is found out. An address that is not in live memory is an error. ``FAKE_GPU`` is its
name and compute capability, or ``none``; ``FAKE_DRIVER`` its driver; ``FAKE_MEMORY`` is how much can be reserved at
once, bytes.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.engine import GpuRecord
from deploycli.models.errors import EnvironmentUnsuitable

if TYPE_CHECKING:
    from collections.abc import Callable

LIVE: dict[int, Any] = {}
"""Address -> memory that is reserved now."""
ALLOCATED: list[int] = []
"""Sizes of all that was ever reserved."""
STREAMS: dict[int, list[Callable[[], None]]] = {}
"""Handle -> what waits on a stream."""


def gpu() -> GpuRecord:
    """Takes the place of `deploycli.exporters.tensorrt.library.gpu`."""
    text = os.environ.get("FAKE_GPU", "NVIDIA L4|8|9")
    if text == "none":
        raise EnvironmentUnsuitable("there is no GPU: PyTorch sees none")
    name, major, minor = text.split("|")
    return GpuRecord(name, (int(major), int(minor)), os.environ.get("FAKE_DRIVER", ""), 24 << 30)


class HostDevice:
    """Takes the place of `deploycli.exporters.tensorrt.runtime.Device`."""

    def __init__(self) -> None:
        self.stream = 1000 + len(STREAMS)
        STREAMS[self.stream] = []
        self._addresses: set[int] = set()

    def allocate(self, size: int) -> int:
        if size > int(os.environ.get("FAKE_MEMORY", 1 << 30)):
            raise EnvironmentUnsuitable("CUDA failed: out of memory")
        memory = (ctypes.c_ubyte * size)(*([0xAB] * min(size, 64)))  # not zero, so that nobody relies on it
        address = ctypes.addressof(memory)
        LIVE[address] = memory
        ALLOCATED.append(size)
        self._addresses.add(address)
        return address

    def free(self, address: int) -> None:
        self.synchronize()
        self._addresses.remove(address)
        del LIVE[address]

    def upload(self, address: int, array: Any) -> None:
        self._copy(address, address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: Any) -> None:
        self._copy(address, array.ctypes.data, address, array.nbytes)

    def synchronize(self) -> None:
        while STREAMS[self.stream]:
            STREAMS[self.stream].pop(0)()

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        waiting, STREAMS[self.stream] = STREAMS[self.stream], []
        enqueue()
        graph, STREAMS[self.stream] = STREAMS[self.stream], waiting
        return lambda: STREAMS[self.stream].extend(graph)

    def close(self) -> None:
        for address in list(self._addresses):
            self.free(address)
        del STREAMS[self.stream]

    def _copy(self, address: int, to: int, source: int, size: int) -> None:
        assert size <= len(LIVE[address]), "memory that was freed, or too little of it"

        def work() -> None:
            ctypes.memmove(to, source, size)

        STREAMS[self.stream].append(work)
