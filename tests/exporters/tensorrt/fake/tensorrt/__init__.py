"""A stand-in for TensorRT that builds nothing, in pure Python: it can crash, hang and lie, as ``FAKE_TENSORRT`` says.

Its public names are those of the bindings and no others; a test holds it. ``FAKE_TENSORRT_VERSION`` is its version. A
plan of it begins with the real header of 28 bytes; its description follows as JSON, with the path of the ONNX file, and
a hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from enum import IntEnum
from typing import Any

import onnx as _onnx

from tensorrt import _behaviour

__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "10.13.3.9")
_ELEVEN = __version__.startswith("11.")

NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 0 if _ELEVEN else 1})
_FLAGS = ("TF32", "REFIT", "REFIT_IDENTICAL", "STRIP_PLAN", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")
_FLAGS += ("ERROR_ON_TIMING_CACHE_MISS", "EDITABLE_TIMING_CACHE")
BuilderFlag = IntEnum("BuilderFlag", {name: n + (5 if _ELEVEN else 6) for n, name in enumerate(_FLAGS)})
MemoryPoolType = IntEnum("MemoryPoolType", {"WORKSPACE": 0})
ProfilingVerbosity = IntEnum("ProfilingVerbosity", {"LAYER_NAMES_ONLY": 0, "NONE": 1, "DETAILED": 2})
HardwareCompatibilityLevel = IntEnum(
    "HardwareCompatibilityLevel", {"NONE": 0, "AMPERE_PLUS": 1, "SAME_COMPUTE_CAPABILITY": 2}
)
LayerInformationFormat = IntEnum("LayerInformationFormat", {"ONELINE": 0, "JSON": 1})
TensorIOMode = IntEnum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2})
DataType = IntEnum("DataType", {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT32": 3, "BOOL": 4, "INT64": 8})
ErrorCode = IntEnum("ErrorCode", {"SUCCESS": 0, "UNSUPPORTED_NODE": 8})
_DTYPES = {1: DataType.FLOAT, 10: DataType.HALF, 7: DataType.INT64}


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    return isinstance(logger, ILogger) and namespace == ""


class ILogger:
    Severity = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError


class IHostMemory(bytes):
    pass


class ITensor:
    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape


class INetworkDefinition:
    def __init__(self) -> None:
        self._onnx, self._inputs, self._outputs = "", [], []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class ParserError:
    def node(self) -> int:
        return 7

    def node_name(self) -> str:
        return "blocks.0/attention"

    def node_operator(self) -> str:
        return "Einsum"

    def desc(self) -> str:
        return "no importer"

    def code(self) -> ErrorCode:
        return ErrorCode.UNSUPPORTED_NODE

    def func(self) -> str:
        return "parseNode"

    def local_function_stack(self) -> list[str]:
        return []


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self.num_errors = network, 0

    def parse_from_file(self, model: str) -> bool:
        if _behaviour.WANTED == "refuse":
            self.num_errors = 30
            return False
        graph = _onnx.load(model, load_external_data=False).graph
        self._network._onnx = model
        self._network._inputs = [_tensor(value) for value in graph.input]
        self._network._outputs = [_tensor(value) for value in graph.output]
        return True

    def get_error(self, index: int) -> ParserError:
        assert 0 <= index < self.num_errors
        return ParserError()


def _tensor(value: Any) -> ITensor:
    kind = value.type.tensor_type
    shape = tuple(-1 if axis.dim_param else axis.dim_value for axis in kind.shape.dim)
    return ITensor(value.name, _DTYPES[kind.elem_type], shape)


class TimingCacheKey:
    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


class TimingCacheValue:
    def __init__(self, tacticHash: int, timingMSec: float) -> None:  # noqa: N803 - their names
        self.tacticHash, self.timingMSec = tacticHash, timingMSec


class ITimingCache:
    def __init__(self, config: IBuilderConfig, data: bytes) -> None:
        stored = json.loads(data) if data else {"of": _behaviour.device(__version__), "entries": {}}
        self._config, self._of = config, stored["of"]
        self._entries: dict[str, list[Any]] = stored["entries"]

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if self._of != input_cache._of and not ignore_mismatch:
            return False
        self._entries = {**input_cache._entries, **self._entries}
        return True

    def serialize(self) -> IHostMemory:
        return IHostMemory(json.dumps({"of": self._of, "entries": self._entries}, sort_keys=True).encode())

    def queryKeys(self) -> list[TimingCacheKey]:  # noqa: N802
        if not self._config.get_flag(BuilderFlag.EDITABLE_TIMING_CACHE):
            raise RuntimeError("the timing cache is not editable")
        return [TimingCacheKey(text) for text in self._entries]

    def query(self, key: TimingCacheKey) -> TimingCacheValue:
        return TimingCacheValue(*self._entries.get(str(key), (0, float("nan"))))

    def update(self, key: TimingCacheKey, value: TimingCacheValue) -> bool:
        if str(key) not in self._entries or value.tacticHash == 0:
            return False
        self._entries[str(key)] = [value.tacticHash, value.timingMSec]
        return True


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002 - their names
        if not all(low <= best <= high for low, best, high in zip(min, opt, max, strict=True)):
            raise ValueError("shapes are not ordered")
        self._shapes[input] = (tuple(min), tuple(opt), tuple(max))

    def __bool__(self) -> bool:
        return bool(self._shapes)


class IBuilderConfig:
    def __init__(self) -> None:
        self._flags = {BuilderFlag.TF32}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self._workspace = 1 << 40
        self.builder_optimization_level, self.max_aux_streams = 3, -1
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.progress_monitor: IProgressMonitor | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def get_flag(self, flag: BuilderFlag) -> bool:
        return flag in self._flags

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._workspace = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        try:
            return ITimingCache(self, serialized_timing_cache)
        except (ValueError, TypeError, KeyError):
            return None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        fits = ignore_mismatch or cache._of == _behaviour.device(__version__)
        self._cache = cache if fits else None
        return fits

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if not profile:
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1


class Builder:
    def __init__(self, logger: ILogger) -> None:
        if _behaviour.WANTED == "no start":
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition | None:
        return INetworkDefinition() if flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED else None

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        severity = ILogger.Severity

        def say(message: str, level: int = severity.INFO) -> None:
            self._logger.log(severity(level), message)

        say("a verbose message", severity.VERBOSE)
        if not _behaviour.act(config.progress_monitor, say):
            return None
        cache = config._cache or ITimingCache(config, b"")
        for layer in range(_behaviour.layers()):
            key = (
                "0x" + hashlib.md5(f"{network._onnx} {layer} {config.builder_optimization_level}".encode()).hexdigest()
            )
            if key not in cache._entries and config.get_flag(BuilderFlag.ERROR_ON_TIMING_CACHE_MISS):
                say(f"timing cache miss: {key}", severity.ERROR)
                return None
            cache._entries.setdefault(key, [_behaviour.measure(key), 0.25])
        described = {
            "onnx": network._onnx,
            "tactics": {key: hex(tactic) for key, (tactic, _) in cache._entries.items()},
            "io": [
                [t.name, "INPUT", t.dtype.name, t.shape, config._profiles[0]._shapes[t.name]] for t in network._inputs
            ]
            + [[t.name, "OUTPUT", t.dtype.name, t.shape, []] for t in network._outputs],
            "flags": sorted(flag.name for flag in config._flags),
            "level": config.builder_optimization_level,
            "aux": config.max_aux_streams,
            "workspace": config._workspace,
            "hardware": config.hardware_compatibility_level.name,
            "verbosity": config.profiling_verbosity.name,
        }
        plan = _header() + json.dumps(described).encode()
        plan += hashlib.sha256(plan).digest()
        return IHostMemory(_behaviour.spoil(plan))


def _header() -> bytes:
    major, minor, patch, build = (int(part) for part in __version__.split("."))
    return struct.pack("<II16x4B", 0x74727466, 0, major, minor, patch, build & 0xFF)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger, self.engine_host_code_allowed = logger, False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        body, digest = serialized_engine[:-32], serialized_engine[-32:]
        if hashlib.sha256(body).digest() != digest:
            self._logger.log(ILogger.Severity.ERROR, "the plan is damaged")
            return None
        described = json.loads(body[28:])
        if "VERSION_COMPATIBLE" in described["flags"] and not self.engine_host_code_allowed:
            self._logger.log(ILogger.Severity.ERROR, "the plan has host code")
            return None
        return ICudaEngine(described)


class ICudaEngine:
    def __init__(self, described: dict[str, Any]) -> None:
        self._described = described
        self._io = {name: rest for name, *rest in described["io"]}
        self.name, self.num_layers, self.num_optimization_profiles = "", 3, 1
        self.num_io_tensors, self.num_aux_streams = len(self._io), 0
        self.device_memory_size_v2, self.streamable_weights_size = 4096, 0
        self.refittable = "REFIT_IDENTICAL" in described["flags"]
        self.hardware_compatibility_level = HardwareCompatibilityLevel[described["hardware"]]
        self.profiling_verbosity = ProfilingVerbosity[described["verbosity"]]

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

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:  # noqa: A002 - its name
        assert format == LayerInformationFormat.JSON
        layers = _layers(_onnx.load(self._engine._described["onnx"], load_external_data=False))
        return json.dumps({"Layers": layers, "Bindings": list(self._engine._io), "Built": self._engine._described})


def _layers(model: Any) -> list[dict[str, Any]]:
    """A layer for each product, as the engine inspector describes it; of the type that its weights have."""
    weights = {i.name: i.data_type for i in model.graph.initializer}
    return [
        {
            **{"Name": node.name, "LayerType": "gemm", "TacticName": "gemm", "StreamId": 0, "Outputs": []},
            "Inputs": [{"Name": node.input[0], "Dimensions": [-1], "Format/Datatype": kind}],
            "Metadata": f"[ONNX Layer: {node.name}]",
        }
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv")
        for kind in ["Half" if 10 in weights.values() and 1 not in map(weights.get, node.input) else "Float"]
    ]
