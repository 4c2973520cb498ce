"""Memory and a stream of an NVIDIA GPU, through PyTorch where it has CUDA, else through cuda-python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from models.errors import EnvironmentUnsuitable

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


class Device(Protocol):
    """A GPU with one stream of its own: on the default stream every call would wait for every other."""

    name: str

    @property
    def stream(self) -> int:
        """Handle of the stream."""

    def allocate(self, size: int) -> int:
        """Reserve ``size`` bytes until `close`; return their address."""

    def upload(self, address: int, array: Array) -> None:
        """Copy a C-contiguous array to the GPU, in the order of the stream."""

    def download(self, address: int, array: Array) -> None:
        """Fill a C-contiguous array from the GPU, in the order of the stream."""

    def synchronize(self) -> None:
        """Wait until the stream is done."""

    def close(self) -> None:
        """Free everything."""


def open_device() -> Device:
    """Return the GPU that this machine has.

    Raises:
        EnvironmentUnsuitable: neither PyTorch with CUDA nor cuda-python, or no GPU.
    """
    try:
        import torch

        if torch.cuda.is_available():
            return TorchDevice()
        reason = "PyTorch sees no GPU"
    except (ImportError, OSError) as error:  # OSError: installed, but a shared library is missing
        reason = f"PyTorch cannot be imported ({error})"
    try:
        from cuda.bindings import runtime as cudart
    except ImportError as error:
        raise EnvironmentUnsuitable(
            f"there is no way to a GPU: {reason}; cuda-python cannot be imported ({error})",
            expected="an NVIDIA GPU, and PyTorch with CUDA or cuda-python",
            hint="pip install cuda-python",
        ) from error
    status, count = cudart.cudaGetDeviceCount()
    if int(status) != 0 or count < 1:
        raise EnvironmentUnsuitable(
            f"there is no GPU: {reason}; cudaGetDeviceCount says {status}", expected="an NVIDIA GPU and its driver"
        )
    return CudaDevice(cudart)


class TorchDevice:
    """A GPU through PyTorch."""

    name = "PyTorch CUDA"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        self._buffers: dict[int, torch.Tensor] = {}

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream.cuda_stream)

    def allocate(self, size: int) -> int:
        """Reserve bytes; return their address."""
        buffer = self._torch.empty(max(size, 1), dtype=self._torch.uint8, device="cuda")
        self._buffers[buffer.data_ptr()] = buffer
        return int(buffer.data_ptr())

    def upload(self, address: int, array: Array) -> None:
        """Copy an array to the GPU."""
        host = self._torch.from_numpy(array.reshape(-1).view(np.uint8))
        with self._torch.cuda.stream(self._stream):
            self._buffers[address][: host.numel()].copy_(host)

    def download(self, address: int, array: Array) -> None:
        """Fill an array from the GPU."""
        host = self._torch.from_numpy(array.reshape(-1).view(np.uint8))
        with self._torch.cuda.stream(self._stream):
            host.copy_(self._buffers[address][: host.numel()])

    def synchronize(self) -> None:
        """Wait until the stream is done."""
        self._stream.synchronize()

    def close(self) -> None:
        """Free everything."""
        self._buffers.clear()


class CudaDevice:
    """A GPU through cuda-python.

    Args:
        cudart: the module ``cuda.bindings.runtime``.
    """

    name = "CUDA"

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        self._addresses: list[int] = []
        (self._stream,) = self._checked(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """Reserve bytes; return their address."""
        (address,) = self._checked(self._cudart.cudaMalloc(max(size, 1)))
        self._addresses.append(int(address))
        return int(address)

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

    def close(self) -> None:
        """Free everything."""
        for address in self._addresses:
            self._checked(self._cudart.cudaFree(address))
        self._addresses.clear()
        self._checked(self._cudart.cudaStreamDestroy(self._stream))

    def _checked(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what a call gave besides its status; a failure is an error here and not later."""
        status, *values = result
        if int(status) != 0:
            raise EnvironmentUnsuitable(f"CUDA failed: {status}", hint="nvidia-smi, to see what else uses the GPU")
        return tuple(values)
