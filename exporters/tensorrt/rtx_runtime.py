"""Run a plan of TensorRT for RTX: what it does otherwise than TensorRT.

Its kernels are finished on the GPU, when a context is made and when a shape is first seen. Those for a shape are made
before it is run (eager), not while slower ones stand in: so `verify` judges the kernels that `bench` times. They are
kept, see `deploycli.exporters.tensorrt.kernel_cache`. CUDA graphs are the library's: it knows when its kernels are
ready.

Sources: TensorRT for RTX 1.7, Python API; "Working with runtime cache", "Working with dynamic shapes", "Working with
RTX CUDA graphs"; NVIDIA/TensorRT-RTX, samples/apiUsage/python/api_usage.py and demo/utils/engine.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycli.exporters.tensorrt.kernel_cache import kernel_cache
from deploycli.exporters.tensorrt.runtime import TensorRtRuntime
from deploycli.models.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    import tensorrt as trt

    from deploycli.exporters.bundle.engine import Sidecar
    from deploycli.exporters.tensorrt.kernel_cache import KernelCache


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
        cache: KernelCache | None = None,
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

    def _kept(self) -> KernelCache:
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
