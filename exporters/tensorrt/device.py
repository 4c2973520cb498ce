"""Memory and a stream of an NVIDIA GPU, through PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deploycli.models.errors import EnvironmentUnsuitable, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    from torch import Tensor

    Array = npt.NDArray[Any]


class Device:
    """The first GPU, with one stream of its own: on the default stream every call would wait for every other.

    Raises:
        EnvironmentUnsuitable: of every method, CUDA fails.
    """

    def __init__(self) -> None:
        import torch  # slow

        self._torch = torch
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._buffers: dict[int, Tensor] = {}
        self._graphs: list[Any] = []

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream.cuda_stream)

    def allocate(self, size: int) -> int:
        """Reserve ``size`` bytes until `free` or `close`; return their address."""
        # On the stream that uses them: PyTorch gives memory that was freed to others of the same stream at once.
        with self._torch.cuda.stream(self._stream):
            buffer = self._guarded(lambda: self._torch.empty(max(size, 1), dtype=self._torch.uint8, device="cuda"))
        self._buffers[int(buffer.data_ptr())] = buffer
        return int(buffer.data_ptr())

    def free(self, address: int) -> None:
        """Give memory back to PyTorch; the stream must be done with it."""
        del self._buffers[address]

    def upload(self, address: int, array: Array) -> None:
        """Copy a C-contiguous array to the GPU, in the order of the stream; keep the array until `synchronize`."""
        host = self._host(np.require(array, requirements="W"))  # PyTorch warns of arrays that cannot be written
        with self._torch.cuda.stream(self._stream):
            self._guarded(lambda: self._buffers[address][: host.numel()].copy_(host))

    def download(self, address: int, array: Array) -> None:
        """Fill a C-contiguous array from the GPU, in the order of the stream; it is filled after `synchronize`."""
        host = self._host(array)
        with self._torch.cuda.stream(self._stream):
            self._guarded(lambda: host.copy_(self._buffers[address][: host.numel()]))

    def synchronize(self) -> None:
        """Wait until the stream is done."""
        self._guarded(self._stream.synchronize)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what is enqueued on the stream, and return what enqueues it again, in one call, until `close`."""
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, stream=self._stream):
            enqueue()
        self._graphs.append(graph)

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                self._guarded(graph.replay)

        return replay

    def close(self) -> None:
        """Free everything."""
        self._graphs.clear()
        self._buffers.clear()

    def _host(self, array: Array) -> Tensor:
        tensor: Tensor = self._torch.from_numpy(array.reshape(-1).view(np.uint8))
        return tensor

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Return what a call gives; PyTorch raises CUDA's errors as RuntimeError."""
        try:
            return call()
        except RuntimeError as error:
            raise EnvironmentUnsuitable(
                f"CUDA failed: {first_line(error)}", hint="nvidia-smi, to see what else uses the GPU and its memory"
            ) from error
