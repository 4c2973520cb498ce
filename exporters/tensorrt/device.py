"""Memory and a stream of an NVIDIA GPU, through cuda-python, or through PyTorch where that is not installed.

cuda-python comes first, as in `deploycli.exporters.tensorrt.library.gpu`: the GPU that was described is the GPU that
is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deploycli.models.errors import EnvironmentUnsuitable, first_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import numpy.typing as npt
    from torch import Tensor

    Array = npt.NDArray[Any]


class Device(Protocol):
    """A GPU with one stream of its own: on the default stream every call would wait for every other."""

    @property
    def stream(self) -> int:
        """Handle of the stream."""

    def allocate(self, size: int) -> int:
        """Reserve ``size`` bytes until `free` or `close`; return their address."""

    def free(self, address: int) -> None:
        """Give memory back; the stream must be done with it."""

    def upload(self, address: int, array: Array) -> None:
        """Copy a C-contiguous array to the GPU, in the order of the stream; keep the array until `synchronize`."""

    def download(self, address: int, array: Array) -> None:
        """Fill a C-contiguous array from the GPU, in the order of the stream; it is filled after `synchronize`."""

    def synchronize(self) -> None:
        """Wait until the stream is done."""

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what is enqueued on the stream, and return what enqueues it again, in one call, until `close`."""

    def close(self) -> None:
        """Free everything."""


def open_device() -> Device:
    """Return the first GPU of this machine.

    Raises:
        EnvironmentUnsuitable: neither cuda-python nor PyTorch with CUDA, or no GPU.
    """
    try:
        from cuda.bindings import runtime as cudart
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: of another CUDA than its library
        return _torch_device(f"cuda-python cannot be imported ({first_line(error)})")
    status, count = cudart.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        raise EnvironmentUnsuitable(
            f"there is no GPU: cudaGetDeviceCount says {_name(status)}, {count or 0} devices",
            expected="an NVIDIA GPU and its driver",
            hint="nvidia-smi; in a container, docker run --gpus all",
        )
    return CudaDevice(cudart)


def _torch_device(reason: str) -> Device:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: installed, but a shared library is missing
        reason = f"{reason}; PyTorch cannot be imported ({first_line(error)})"
    else:
        if torch.cuda.is_available():
            return TorchDevice(torch)
        reason = f"{reason}; PyTorch sees no GPU"
    raise EnvironmentUnsuitable(
        f"there is no way to a GPU: {reason}",
        expected="an NVIDIA GPU, and cuda-python or PyTorch with CUDA",
        hint="pip install cuda-python",
    )


class CudaDevice:
    """A GPU through cuda-python.

    Args:
        cudart: the module ``cuda.bindings.runtime``.

    Raises:
        EnvironmentUnsuitable: CUDA makes no stream; as of every method, CUDA fails.
    """

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        self._addresses: set[int] = set()
        self._graphs: list[tuple[Any, Any]] = []
        self._stream: Any = None
        (self._stream,) = self._checked(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """Reserve bytes; return their address."""
        (address,) = self._checked(self._cudart.cudaMalloc(max(size, 1)))
        self._addresses.add(int(address))
        return int(address)

    def free(self, address: int) -> None:
        """Give memory back."""
        self._addresses.remove(address)
        self._checked(self._cudart.cudaFree(address))

    def upload(self, address: int, array: Array) -> None:
        """Copy an array to the GPU."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._checked(self._cudart.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self._stream))

    def download(self, address: int, array: Array) -> None:
        """Fill an array from the GPU."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked(self._cudart.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self._stream))

    def synchronize(self) -> None:
        """Wait until the stream is done."""
        self._checked(self._cudart.cudaStreamSynchronize(self._stream))

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record a CUDA graph."""
        cudart = self._cudart
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._checked(cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            enqueue()
        except BaseException:
            cudart.cudaStreamEndCapture(self._stream)  # what was captured is of no use
            raise
        (graph,) = self._checked(cudart.cudaStreamEndCapture(self._stream))
        (ready,) = self._checked(cudart.cudaGraphInstantiate(graph, 0))
        self._graphs.append((graph, ready))

        def replay() -> None:
            self._checked(cudart.cudaGraphLaunch(ready, self._stream))

        return replay

    def close(self) -> None:
        """Free everything, whatever fails; a failure is then raised."""
        cudart, results = self._cudart, []
        for graph, ready in self._graphs:
            results += [cudart.cudaGraphExecDestroy(ready), cudart.cudaGraphDestroy(graph)]
        results += [cudart.cudaFree(address) for address in self._addresses]
        if self._stream is not None:
            results.append(cudart.cudaStreamDestroy(self._stream))
        self._graphs, self._addresses, self._stream = [], set(), None
        for result in results:
            self._checked(result)

    def _checked(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what a call gave besides its status; a failure is an error here and not later."""
        status, *values = result
        if int(status) != 0:
            raise EnvironmentUnsuitable(
                f"CUDA failed: {_name(status)}", hint="nvidia-smi, to see what else uses the GPU and its memory"
            )
        return tuple(values)


class TorchDevice:
    """A GPU through PyTorch.

    Args:
        torch: the module.

    Raises:
        EnvironmentUnsuitable: of every method, CUDA fails.
    """

    def __init__(self, torch: ModuleType) -> None:
        self._torch = torch
        self._stream = torch.cuda.Stream()
        self._buffers: dict[int, Tensor] = {}
        self._graphs: list[Any] = []

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream.cuda_stream)

    def allocate(self, size: int) -> int:
        """Reserve bytes; return their address."""
        # On the stream that uses them: PyTorch gives memory that was freed to others of the same stream at once.
        with self._torch.cuda.stream(self._stream):
            buffer = self._guarded(lambda: self._torch.empty(max(size, 1), dtype=self._torch.uint8, device="cuda"))
        self._buffers[int(buffer.data_ptr())] = buffer
        return int(buffer.data_ptr())

    def free(self, address: int) -> None:
        """Give memory back to PyTorch."""
        del self._buffers[address]

    def upload(self, address: int, array: Array) -> None:
        """Copy an array to the GPU."""
        host = self._host(np.require(array, requirements="W"))  # PyTorch warns of arrays that cannot be written
        with self._torch.cuda.stream(self._stream):
            self._guarded(lambda: self._buffers[address][: host.numel()].copy_(host))

    def download(self, address: int, array: Array) -> None:
        """Fill an array from the GPU."""
        host = self._host(array)
        with self._torch.cuda.stream(self._stream):
            self._guarded(lambda: host.copy_(self._buffers[address][: host.numel()]))

    def synchronize(self) -> None:
        """Wait until the stream is done."""
        self._guarded(self._stream.synchronize)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record a CUDA graph."""
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


def _name(status: Any) -> str:
    return str(getattr(status, "name", status))
