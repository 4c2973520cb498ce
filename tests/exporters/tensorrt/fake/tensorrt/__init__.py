"""A stand-in for TensorRT on top of TensorRT for RTX: what that does without a GPU is real, such as parser, network,
configuration and profiles; what measures on a GPU, or loads an engine there, is imitated. It can crash, hang and lie,
as ``FAKE_TENSORRT`` says; ``FAKE_TENSORRT_VERSION`` is its version.

A plan of it begins with the real header of 28 bytes; its description follows as JSON, and a hash.
"""

from __future__ import annotations

import builtins as _builtins
import hashlib
import json
import os
import struct
from typing import Any

import host_gpu as _host_gpu
import onnx as _onnx
import tensorrt_rtx as _real

from deploycli.exporters.tensorrt import library as _library
from tensorrt import _behaviour

globals().update({n: value for n, value in vars(_real).items() if not n.startswith("_") and n not in vars(_builtins)})

_library.gpu = _host_gpu.gpu  # in the child that builds

__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "10.13.3.9")
_Flag, _Severity = _real.BuilderFlag, _real.ILogger.Severity


def init_libnvinfer_plugins(logger: Any, namespace: str) -> bool:
    return isinstance(logger, _real.ILogger) and namespace == ""


class OnnxParser(_real.OnnxParser):  # type: ignore[misc]
    parsed = ""

    def parse_from_file(self, model: str) -> bool:
        OnnxParser.parsed = model
        return bool(super().parse_from_file(model))


class ITimingCache:
    def __init__(self, config: IBuilderConfig, data: bytes) -> None:
        stored = json.loads(data) if data else {"of": _behaviour.device(__version__), "entries": {}}
        self._config, self._of = config, stored["of"]
        self._entries: dict[str, list[Any]] = stored["entries"]

    def serialize(self) -> bytes:
        return json.dumps({"of": self._of, "entries": self._entries}, sort_keys=True).encode()


class IBuilderConfig:
    """The real one, but for timings, and for a level that TensorRT for RTX has not."""

    def __init__(self, real: Any) -> None:
        own = {"_real": real, "_cache": None, "_profiles": []}
        vars(self).update(own, hardware_compatibility_level=_real.HardwareCompatibilityLevel.NONE)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(self._real, name, value)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        try:
            return ITimingCache(self, serialized_timing_cache)
        except (ValueError, TypeError, KeyError):
            return None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        fits = ignore_mismatch or cache._of == _behaviour.device(__version__)
        self._cache = cache if fits else None
        return fits

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return int(self._real.add_optimization_profile(profile))


class Builder(_real.Builder):  # type: ignore[misc]
    def create_builder_config(self) -> Any:
        return IBuilderConfig(super().create_builder_config())

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        def say(message: str, level: int = _Severity.INFO) -> None:
            self.logger.log(_Severity(level), message)

        say("a verbose message", _Severity.VERBOSE)
        if not _behaviour.act(config.progress_monitor, say):
            return None
        cache = config._cache or ITimingCache(config, b"")
        for layer in range(3):
            text = f"{OnnxParser.parsed} {layer} {config.builder_optimization_level}"
            key = "0x" + hashlib.md5(text.encode()).hexdigest()
            if key not in cache._entries and config.get_flag(_Flag.ERROR_ON_TIMING_CACHE_MISS):
                say(f"timing cache miss: {key}", _Severity.ERROR)
                return None
            cache._entries.setdefault(key, [_behaviour.measure(key), 0.25])
        (profile,) = config._profiles
        inputs = [network.get_input(place) for place in range(network.num_inputs)]
        outputs = [network.get_output(place) for place in range(network.num_outputs)]
        described = {
            "onnx": OnnxParser.parsed,
            "io": [
                *(
                    [t.name, "INPUT", t.dtype.name, list(t.shape), list(map(list, profile.get_shape(t.name)))]
                    for t in inputs
                ),
                *([t.name, "OUTPUT", t.dtype.name, list(t.shape), []] for t in outputs),
            ],
            "flags": sorted(name for name, flag in _Flag.__members__.items() if config.get_flag(flag)),
            "level": config.builder_optimization_level,
            "aux": config.max_aux_streams,
            "workspace": config.get_memory_pool_limit(_real.MemoryPoolType.WORKSPACE),
            "hardware": config.hardware_compatibility_level.name,
            "verbosity": config.profiling_verbosity.name,
        }
        version = [int(part) & 0xFF for part in __version__.split(".")]
        plan = struct.pack("<II16x4B", 0x74727466, 0, *version) + json.dumps(described).encode()
        return _behaviour.spoil(plan + hashlib.sha256(plan).digest())


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger, self.engine_host_code_allowed = logger, False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        body, digest = serialized_engine[:-32], serialized_engine[-32:]
        if hashlib.sha256(body).digest() != digest:
            self._logger.log(_Severity.ERROR, "the plan is damaged")
            return None
        described = json.loads(body[28:])
        if "VERSION_COMPATIBLE" in described["flags"] and not self.engine_host_code_allowed:
            self._logger.log(_Severity.ERROR, "the plan has host code")
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
        self.hardware_compatibility_level = _real.HardwareCompatibilityLevel.__members__[described["hardware"]]
        self.profiling_verbosity = _real.ProfilingVerbosity.__members__[described["verbosity"]]

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return _real.TensorIOMode.__members__[self._io[name][0]]

    def get_tensor_dtype(self, name: str) -> Any:
        return _real.DataType.__members__[self._io[name][1]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._io[name][2])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert profile_index == 0
        return [tuple(shape) for shape in self._io[name][3]]

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:  # noqa: A002 - its name
        assert format == _real.LayerInformationFormat.JSON
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
