"""A stand-in for TensorRT whose plans run: the one in ``fake/``, and ONNX Runtime on the model that a plan carries.

Its public names are those of the bindings and no others; a test holds it. Environment variables say what it does:

FAKE_ENGINE    zeros: answers zeros at batches above 1; refuse, no context, fail: what TensorRT does when it fails;
               wide: the engine inspector says that every product is FP32
FAKE_CALLS     a file that gets a line for each plan that is opened and each inference
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import os
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes as _ml_dtypes
import numpy as _np
import onnx as _onnx

_BASE = Path(__file__).parents[2] / "fake" / "tensorrt"
__path__.append(str(_BASE))
exec(compile((_BASE / "__init__.py").read_text("utf-8"), str(_BASE / "__init__.py"), "exec"))

if TYPE_CHECKING:
    from tests.exporters.tensorrt.fake.tensorrt import *  # noqa: F403

_Builder, _Runtime, _Engine = Builder, Runtime, ICudaEngine  # noqa: F405
_TYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool", "INT8": "int8"}

TensorLocation = IntEnum("TensorLocation", {"DEVICE": 0, "HOST": 1})


def _wanted() -> str:
    return os.environ.get("FAKE_ENGINE", "")


def _log_call(text: str) -> None:
    if "FAKE_CALLS" in os.environ:
        with Path(os.environ["FAKE_CALLS"]).open("a") as file:
            file.write(text + "\n")


def _sealed(described: dict[str, Any], head: bytes) -> bytes:
    plan = head + json.dumps(described).encode()
    return plan + hashlib.sha256(plan).digest()


class Builder(_Builder):
    def build_serialized_network(self, network: Any, config: Any) -> Any:
        plan = super().build_serialized_network(network, config)
        if plan is None or not plan.startswith(b"ftrt") or len(plan) < 200:
            return plan
        described = json.loads(plan[28:-32])
        stripped = "STRIP_PLAN" in described["flags"]
        described["model"] = "" if stripped else _content(network._onnx)
        described["layers"] = _layers(_onnx.load(network._onnx, load_external_data=False))
        return IHostMemory(_sealed(described, plan[:28]))  # noqa: F405


def _content(path: str) -> str:
    return base64.b64encode(_onnx.load(path).SerializeToString()).decode()


def _layers(model: Any) -> list[dict[str, Any]]:
    """A layer for each product, as the engine inspector describes it; of the type that its weights have."""
    weights = {i.name: i.data_type for i in model.graph.initializer}
    dequantized = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    half = 10 in weights.values()
    found = []
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        narrow = "Int8" if dequantized & set(node.input) else "Half" if half else "Float"
        if any(weights.get(name) == 1 for name in node.input) or _wanted() == "wide":
            narrow = "Float"
        tensor = {"Name": node.input[0], "Dimensions": [-1]}
        tensor |= {"Format/Datatype": narrow} if not _ELEVEN else {"Format": "Row major linear", "DataType": narrow}  # noqa: F405
        layer = {"Name": node.name, "LayerType": "gemm", "Inputs": [tensor], "Outputs": [], "TacticName": "gemm"}
        found.append(layer | {"StreamId": 0, "Metadata": f"[ONNX Layer: {node.name}]"})
    return found


class Runtime(_Runtime):
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        assert type(serialized_engine) is bytes
        _log_call("deserialize")
        if _wanted() == "refuse":
            self._logger.log(ILogger.Severity.ERROR, "the engine plan file is not compatible")  # noqa: F405
            return None
        engine = super().deserialize_cuda_engine(serialized_engine)  # which is the one below
        if engine is not None:
            engine._logger = self._logger
        return engine


class ICudaEngine(_Engine):
    def __init__(self, described: dict[str, Any]) -> None:
        super().__init__(described)
        self._logger: Any = None
        self._model = base64.b64decode(described["model"])

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def create_execution_context(self) -> IExecutionContext | None:
        if _wanted() == "no context":
            self._logger.log(ILogger.Severity.ERROR, "out of memory")  # noqa: F405
            return None
        assert self._model, "a stripped engine was not refitted"
        return IExecutionContext(self)


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self.execution_context = engine, None

    def get_engine_information(self, format: Any) -> str:  # noqa: A002 - its name
        io = list(self._engine._io)
        described = [{"Name": name, "IOMode": "", "DataType": ""} for name in io]
        key, value = ("I/O Tensors", described) if _ELEVEN else ("Bindings", io)  # noqa: F405
        return json.dumps({"Layers": self._engine._described["layers"], key: value})


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
        self._refitter._content = base64.b64decode(_content(model_file))
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
            self._engine._logger.log(ILogger.Severity.ERROR, "the shape is outside the profile")  # noqa: F405
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
        from cuda.bindings import runtime

        if _wanted() == "fail":
            self._engine._logger.log(ILogger.Severity.ERROR, "an illegal memory access was encountered")  # noqa: F405
            return False
        assert stream_handle != 0, "the default stream waits for all others"
        addresses = dict(self._addresses)
        arrays = {name: self._view(name, addresses[name], runtime.LIVE) for name in self._engine._io}
        inputs = [name for name in arrays if name in self._shapes]

        def work() -> None:
            _log_call(f"execute {len(arrays[inputs[0]])}")
            found = self._session.run(None, {name: arrays[name] for name in inputs})
            for node, value in zip(self._session.get_outputs(), found, strict=True):
                wrong = _wanted() == "zeros" and len(value) > 1
                arrays[node.name][...] = 0 if wrong else value

        runtime.enqueue(stream_handle, work)
        return True

    def _view(self, name: str, address: int, live: Any) -> Any:
        dtype = _np.dtype(_TYPES.get(self._engine.get_tensor_dtype(name).name, _ml_dtypes.bfloat16))
        shape = self.get_tensor_shape(name)
        size = int(_np.prod(shape)) * dtype.itemsize
        assert size <= len(live[address]), "memory that was freed, or too little of it"
        return _np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)
