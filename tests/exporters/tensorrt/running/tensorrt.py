"""A stand-in for TensorRT that runs the plans of `write_engine`: ONNX Runtime runs the model that each carries.

Its public names are those of the bindings and no others; a test holds it. Environment variables say what it does:

FAKE_ENGINE    zeros: answers zeros at batches above 1; refuse, no context, fail, no refit: what TensorRT does when it
               fails
FAKE_CALLS     a file that gets a line for each plan that is opened and each inference
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
from enum import IntEnum
from pathlib import Path
from typing import Any

import ml_dtypes as _ml_dtypes
import numpy as _np
import onnx as _onnx

__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "10.13.3.9")

TensorIOMode = IntEnum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2})
TensorLocation = IntEnum("TensorLocation", {"DEVICE": 0, "HOST": 1})
DataType = IntEnum("DataType", {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT32": 3, "BOOL": 4, "INT64": 8})
_TYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool", "INT8": "int8"}


def _wanted() -> str:
    return os.environ.get("FAKE_ENGINE", "")


def _log_call(text: str) -> None:
    if "FAKE_CALLS" in os.environ:
        with Path(os.environ["FAKE_CALLS"]).open("a") as file:
            file.write(text + "\n")


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    return isinstance(logger, ILogger) and namespace == ""


class ILogger:
    Severity = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IHostMemory(bytes):
    pass


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger, self.engine_host_code_allowed = logger, False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        assert type(serialized_engine) is bytes
        _log_call("deserialize")
        described = json.loads(serialized_engine[serialized_engine.index(b"{") :])
        if _wanted() == "refuse" or (described["host code"] and not self.engine_host_code_allowed):
            self._logger.log(ILogger.Severity.ERROR, "the engine plan file is not compatible")
            return None
        return ICudaEngine(described, self._logger)


class ICudaEngine:
    def __init__(self, described: dict[str, Any], logger: ILogger) -> None:
        self._io = {name: rest for name, *rest in described["io"]}
        self._logger, self._model = logger, base64.b64decode(described["model"])
        self.num_io_tensors, self.num_optimization_profiles = len(self._io), 1

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[self._io[name][0]]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._io[name][1]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._io[name][2])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert self.get_tensor_mode(name) == TensorIOMode.INPUT
        assert profile_index == 0
        return [tuple(shape) for shape in self._io[name][3]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def create_execution_context(self) -> IExecutionContext | None:
        if _wanted() == "no context":
            self._logger.log(ILogger.Severity.ERROR, "out of memory")
            return None
        assert self._model, "a stripped engine was not refitted"
        return IExecutionContext(self)


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        self._engine, self._content = engine, b""

    def get_missing_weights(self) -> list[str]:
        return [] if self._content else ["weight"]

    def refit_cuda_engine(self) -> bool:
        self._engine._model = self._content
        return _wanted() != "no refit"


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._refitter = refitter

    def refit_from_file(self, model_file: str) -> bool:
        _log_call("refit")
        self._refitter._content = _onnx.load(model_file).SerializeToString()
        return True


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(engine._model, options, providers=["CPUExecutionProvider"])
        self._engine, self._addresses, self._shapes = engine, {}, {}
        self._profile = -1

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle
        self._profile, self._shapes = profile_index, {}
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            self._engine._logger.log(ILogger.Severity.ERROR, "the shape is outside the profile")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        names = [name for name, rest in self._engine._io.items() if rest[0] == "INPUT"]
        return [name for name in names if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        batch = next(iter(self._shapes.values()))[0]
        return tuple(batch if size < 0 else size for size in self._engine.get_tensor_shape(name))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        import host_gpu

        if _wanted() == "fail":
            self._engine._logger.log(ILogger.Severity.ERROR, "an illegal memory access was encountered")
            return False
        assert stream_handle != 0, "the default stream waits for all others"
        addresses = dict(self._addresses)
        arrays = {name: self._view(name, addresses[name], host_gpu.LIVE) for name in self._engine._io}
        inputs = [name for name in arrays if name in self._shapes]

        def work() -> None:
            _log_call(f"execute {len(arrays[inputs[0]])}")
            found = self._session.run(None, {name: arrays[name] for name in inputs})
            for node, value in zip(self._session.get_outputs(), found, strict=True):
                wrong = _wanted() == "zeros" and len(value) > 1
                arrays[node.name][...] = 0 if wrong else value

        host_gpu.STREAMS[stream_handle].append(work)
        return True

    def _view(self, name: str, address: int, live: Any) -> Any:
        dtype = _np.dtype(_TYPES.get(self._engine.get_tensor_dtype(name).name, _ml_dtypes.bfloat16))
        shape = self.get_tensor_shape(name)
        size = int(_np.prod(shape)) * dtype.itemsize
        assert size <= len(live[address]), "memory that was freed, or too little of it"
        return _np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)
