"""Run a plan of TensorRT for RTX: what it does otherwise than TensorRT.

Its kernels are finished on the GPU, when a context is made and when a shape is first seen. Those for a shape are made
before it is run (eager), not while slower ones stand in: so `verify` judges the kernels that `bench` times. CUDA graphs
are the library's: it knows when its kernels are ready.

Finished kernels are kept beside the engine for the next load. They are for one engine, version, GPU and driver, whose
key stands in the file; what does not fit it, or is damaged, is as good as no file. They only save time: a cache that
cannot be read or written is no error. The file is no part of what a bundle vouches for, as the engine is not.

Sources: TensorRT for RTX 1.7, Python API; "Working with runtime cache", "Working with dynamic shapes", "Working with
RTX CUDA graphs"; NVIDIA/TensorRT-RTX, samples/apiUsage/python/api_usage.py and demo/utils/engine.py.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycli.exporters.bundle.engine import PLAN_SUFFIX
from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.runtime import TensorRtRuntime
from deploycli.models.errors import DeployError, ExportError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    import tensorrt as trt

    from deploycli.exporters.bundle.engine import Sidecar


SUFFIX = ".kernels"

SIZE_LIMIT = 1 << 28
"""Largest file, bytes."""

_DIGEST_BYTES = hashlib.sha256().digest_size


class RtxRuntime(TensorRtRuntime):
    """A plan of TensorRT for RTX on a GPU. No GPU of the authors has run it: names and signatures are tested, as far as
    the library tells them without one.

    Args:
        folder: where plan and sidecar are, in the bundle.
        sidecar: the sidecar.
        cuda_graph: let the library replay a CUDA graph for a shape that it has seen.
        cache: where finished kernels are kept; by default beside the plan.

    Raises:
        IntegrityError, EnvironmentUnsuitable: see `TensorRtRuntime`.
    """

    _holds = ("_context", "_kernels", "_config", "_engine", "_runtime")

    def __init__(
        self,
        folder: Path,
        sidecar: Sidecar,
        *,
        cuda_graph: bool = False,
        cache: OnDisk | InMemory | None = None,
    ) -> None:
        self._cuda_graph = cuda_graph
        self._cache = cache
        self._found = b""
        self._place = folder, sidecar
        super().__init__(folder, sidecar)

    def capture(self) -> Callable[[], None]:
        """Return what starts an inference; see `TensorRtRuntime.capture`.

        Raises:
            ExportError: it was made without CUDA graphs.
        """
        if not self._cuda_graph:
            raise ExportError(f"{self.name} was loaded without CUDA graphs")
        return self.enqueue

    def _start(self) -> trt.Runtime:
        import tensorrt_rtx as rtx

        runtime: trt.Runtime = rtx.Runtime(self._log)
        return runtime

    def _make_context(self) -> trt.IExecutionContext | None:
        import tensorrt_rtx as rtx

        engine: rtx.ICudaEngine = self._engine
        config = engine.create_runtime_config()
        kernels = None if config is None else config.create_runtime_cache()
        if config is None or kernels is None:
            raise self._refused(f"{self.name} makes no configuration for the runtime")
        config.dynamic_shapes_kernel_specialization_strategy = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._cuda_graph:
            config.cuda_graph_strategy = rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._found = self._kept().read()
        if self._found:
            kernels.deserialize(self._found)  # what it refuses leaves the cache empty
        if not config.set_runtime_cache(kernels):
            raise self._refused(f"{self.name} takes no cache of kernels")
        self._config, self._kernels = config, kernels
        context: trt.IExecutionContext | None = engine.create_execution_context(config)
        return context

    def _kept(self) -> OnDisk | InMemory:
        """Return where kernels are kept; asked for once the GPU is open."""
        if self._cache is None:
            self._cache = kernel_cache(*self._place)
        return self._cache

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._keep()
        super().__exit__(kind, error, trace)

    def _keep(self) -> None:
        memory = self._kernels.serialize()
        kernels = b"" if memory is None else bytes(memory)
        if kernels and kernels != self._found:
            self._kept().write(kernels)


class InMemory:
    """No kernels at first, and no file."""

    def __init__(self) -> None:
        self._kernels = b""

    def read(self) -> bytes:
        """Return what was written last."""
        return self._kernels

    def write(self, kernels: bytes) -> None:
        """Keep them as long as this object lives."""
        self._kernels = kernels


@dataclass(frozen=True)
class OnDisk:
    """A file: the SHA-256 of the key and the kernels, and the kernels.

    Attributes:
        path: of the file.
        key: what the kernels are for.
    """

    path: Path
    key: str

    def read(self) -> bytes:
        """Return the kernels; nothing where there is no file, or one that is damaged or for something else."""
        if not self._is_ours():
            return b""
        try:
            with self.path.open("rb") as stream:
                content = stream.read(SIZE_LIMIT + 1)
        except OSError:
            return b""
        digest, kernels = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return kernels if len(content) <= SIZE_LIMIT and digest == self._digest(kernels) else b""

    def write(self, kernels: bytes) -> None:
        """Replace the file, whole or not at all, where that is possible."""
        if self._is_ours() and len(kernels) <= SIZE_LIMIT - _DIGEST_BYTES:
            with suppress(DeployError):
                write_whole(self.path, self._digest(kernels) + kernels)

    def _is_ours(self) -> bool:
        """Whether a file is here, or may be: a link, which is followed, may lead anywhere, and a pipe never ends."""
        return not self.path.is_symlink() and (self.path.is_file() or not self.path.exists())

    def _digest(self, kernels: bytes) -> bytes:
        return hashlib.sha256(self.key.encode() + b"\0" + kernels).digest()


def kernel_cache(folder: Path, sidecar: Sidecar) -> OnDisk:
    """Return where the kernels of an engine are kept: ``fp16-rtx1.7.1.116.sm89-nvidia-geforce-rtx-4090.kernels``.

    Args:
        folder: of the engine.
        sidecar: of the engine.

    Raises:
        EnvironmentUnsuitable: there is no GPU, or no TensorRT for RTX.
    """
    gpu = library.gpu()
    key = "\n".join((sidecar.sha256, library.version(sidecar.product), gpu.slug, gpu.driver))
    return OnDisk(folder / f"{sidecar.plan.removesuffix(PLAN_SUFFIX)}.{gpu.slug}{SUFFIX}", key)
