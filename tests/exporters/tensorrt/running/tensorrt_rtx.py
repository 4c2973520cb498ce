"""The stand-in as TensorRT for RTX: kernels are finished when a shape is first seen, unless a cache has them."""

from __future__ import annotations

import json
from enum import IntEnum
from typing import Any

import tensorrt as _base

__version__ = "1.7.1.116"

ILogger, IHostMemory = _base.ILogger, _base.IHostMemory
DynamicShapesKernelSpecializationStrategy = IntEnum(
    "DynamicShapesKernelSpecializationStrategy", {"LAZY": 0, "EAGER": 1, "NONE": 2}
)
CudaGraphStrategy = IntEnum("CudaGraphStrategy", {"DISABLED": 0, "WHOLE_GRAPH_CAPTURE": 1})


class IRuntimeCache:
    def __init__(self) -> None:
        self._kernels: list[str] = []

    def deserialize(self, blob: bytes) -> bool:
        try:
            self._kernels = json.loads(blob)
        except ValueError:
            return False
        return True

    def serialize(self) -> Any:
        return IHostMemory(json.dumps(self._kernels).encode())


class IRuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self._cache = IRuntimeCache()

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class Runtime(_base.Runtime):  # type: ignore[misc]
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        engine = super().deserialize_cuda_engine(serialized_engine)
        if engine is not None:
            engine.__class__ = ICudaEngine
        return engine


class ICudaEngine(_base.ICudaEngine):  # type: ignore[misc]
    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> Any:
        strategies = runtime_config.dynamic_shapes_kernel_specialization_strategy, runtime_config.cuda_graph_strategy
        _base._log_call(" ".join(strategy.name for strategy in strategies))
        context = super().create_execution_context()
        if context is not None:
            context.__class__ = IExecutionContext
            context._kernels = runtime_config._cache._kernels
        return context


class IExecutionContext(_base.IExecutionContext):  # type: ignore[misc]
    def execute_async_v3(self, stream_handle: int) -> bool:
        shapes = str(sorted(self._shapes.items()))
        if shapes not in self._kernels:
            _base._log_call("compile")
            self._kernels.append(shapes)
        return bool(super().execute_async_v3(stream_handle))
