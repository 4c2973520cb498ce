"""What the doubles remember: a flag that was set is set, a profile has the shapes that it was given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.tensorrt_api.doubles import Double, HostMemory, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.tensorrt_api.doubles import Fake

BEHAVIOUR: dict[str, Fake] = {}
"""Class.member -> what it does, given the double and the arguments by name."""


def fake(*targets: str) -> Callable[[Fake], Fake]:
    """Register a function as the behaviour of some members."""

    def register(function: Fake) -> Fake:
        BEHAVIOUR.update(dict.fromkeys(targets, function))
        return function

    return register


def _flags(*classes: str) -> None:
    """``flags``, a set of bits, and its three methods."""

    def change(double: Double, flag: object, *, on: bool) -> None:
        bit = 1 << int(flag)  # type: ignore[call-overload]
        double.state["flags"] = double.flags | bit if on else double.flags & ~bit

    for cls in classes:
        fake(f"{cls}.flags")(lambda double, _: double.state.get("flags", 0))
        fake(f"{cls}.set_flag")(lambda double, given: change(double, given["flag"], on=True))
        fake(f"{cls}.clear_flag")(lambda double, given: change(double, given["flag"], on=False))
        fake(f"{cls}.get_flag")(lambda double, given: bool(double.flags >> int(given["flag"]) & 1))


_flags("OnnxParser", "ISerializationConfig")
_flags("IBuilderConfig")
fake("IBuilderConfig.flags")(lambda c, _: c.state.get("flags", 1 << int(c._stage.classes["BuilderFlag"].TF32)))


@fake("Builder.create_network")
def create_network(builder: Double, given: Mapping[str, Any]) -> Any:
    return builder._stage.make("INetworkDefinition", flags=given.get("flags", 0), builder=builder)


fake("INetworkDefinition.get_flag")(lambda network, given: bool(network.flags >> int(given["flag"]) & 1))


def _network_tensors(output: bool) -> tuple[Fake, Fake]:
    def tensors(network: Double) -> list[Tensor]:
        return [tensor for tensor in network._stage.scenario.tensors if tensor.output == output]

    def get(network: Double, given: Mapping[str, Any]) -> Any:
        (place,) = given.values()
        if not 0 <= place < len(tensors(network)):
            return None
        tensor, stage = tensors(network)[place], network._stage
        dtype = getattr(stage.classes["DataType"], tensor.dtype)
        state = {"name": tensor.name, "shape": stage.dims(tensor.shape), "dtype": dtype}
        return stage.make("ITensor", **state, is_network_input=not output, is_network_output=output)

    return (lambda network, _: len(tensors(network))), get


BEHAVIOUR["INetworkDefinition.num_inputs"], BEHAVIOUR["INetworkDefinition.get_input"] = _network_tensors(False)
BEHAVIOUR["INetworkDefinition.num_outputs"], BEHAVIOUR["INetworkDefinition.get_output"] = _network_tensors(True)


@fake("OnnxParser.parse", "OnnxParser.parse_from_file", "OnnxParser.parse_model_proto", "OnnxParser.supports_model_v2")
@fake("OnnxParserRefitter.refit_from_file", "OnnxParserRefitter.refit_from_bytes")
def parse(parser: Double, _: Mapping[str, Any]) -> bool:
    return not parser._stage.scenario.parser_errors


fake("OnnxParser.num_errors", "OnnxParserRefitter.num_errors")(lambda p, _: len(p._stage.scenario.parser_errors))


@fake("OnnxParser.get_error", "OnnxParserRefitter.get_error")
def get_error(parser: Double, given: Mapping[str, Any]) -> Any:
    error = parser._stage.scenario.parser_errors[given["index"]]
    for name in error:
        getattr(parser._stage.classes["ParserError"], name)  # a scenario cannot say what no error says
    return parser._stage.make("ParserError", said=error)


def _said(name: str, otherwise: object) -> Fake:
    return lambda error, _: error.state["said"].get(name, otherwise)


for _name in ("desc", "file", "func", "node_name", "node_operator"):
    fake(f"ParserError.{_name}")(_said(_name, ""))
for _name in ("line", "node", "local_function_stack_size"):
    fake(f"ParserError.{_name}")(_said(_name, 0))
fake("ParserError.local_function_stack")(_said("local_function_stack", []))
fake("ParserError.code")(lambda e, _: e.state["said"].get("code", e._stage.classes["ErrorCode"].INTERNAL_ERROR))


def _table(cls: str, setter: str, getter: str, key: str, value: str, otherwise: Fake) -> None:
    """A setter of a value under a key, and its getter."""

    def put(double: Double, given: Mapping[str, Any]) -> None:
        double.state.setdefault(setter, {})[given[key]] = given[value]

    fake(f"{cls}.{setter}")(put)
    fake(f"{cls}.{getter}")(
        lambda double, given: double.state.get(setter, {}).get(given[key], otherwise(double, given))
    )


_table("IBuilderConfig", "set_memory_pool_limit", "get_memory_pool_limit", "pool", "pool_size", lambda *_: 1 << 30)
_table("IBuilderConfig", "set_preview_feature", "get_preview_feature", "feature", "enable", lambda *_: False)
fake("IBuilderConfig.builder_optimization_level")(lambda *_: 3)


@fake("IBuilderConfig.add_optimization_profile")
def add_optimization_profile(config: Double, given: Mapping[str, Any]) -> int:
    config.state.setdefault("profiles", []).append(given["profile"])
    return len(config.state["profiles"]) - 1


fake("IBuilderConfig.num_optimization_profiles")(lambda config, _: len(config.state.get("profiles", [])))


@fake("IOptimizationProfile.set_shape")
def set_shape(profile: Double, given: Mapping[str, Any]) -> None:
    profile.state.setdefault("shapes", {})[given["input"]] = [
        profile._stage.dims(given[name]) for name in ("min", "opt", "max")
    ]


fake("IOptimizationProfile.get_shape")(lambda profile, given: profile.state.get("shapes", {}).get(given["input"], []))
fake("IOptimizationProfile.__bool__")(lambda profile, _: bool(profile.state.get("shapes")))


@fake("IBuilderConfig.create_timing_cache")
def create_timing_cache(config: Double, given: Mapping[str, Any]) -> Any:
    return config._stage.make("ITimingCache", content=bytes(given["serialized_timing_cache"]))


@fake("IBuilderConfig.set_timing_cache")
def set_timing_cache(config: Double, given: Mapping[str, Any]) -> bool:
    config.state["cache"] = given["cache"]
    return True


fake("IBuilderConfig.get_timing_cache")(lambda config, _: config.state.get("cache"))


@fake("ITimingCache.serialize")
def serialize_timings(cache: Double, _: Mapping[str, Any]) -> HostMemory:
    timings = cache._stage.scenario.timings
    return HostMemory(cache.state.get("content", b"") if timings is None else timings)


def _tensor(attribute: Callable[[Double, Tensor], Any], otherwise: Callable[[Double], Any]) -> Fake:
    """What an engine says of a tensor, by its name; of one that it does not have, what a real one says."""

    def get(engine: Double, given: Mapping[str, Any]) -> Any:
        tensor = engine._stage.tensor(given["name"])
        return attribute(engine, tensor) if tensor else otherwise(engine)

    return get


def _enum(cls: str, member: str) -> Callable[[Double], Any]:
    return lambda double: getattr(double._stage.classes[cls], member)


def _mode(engine: Double, tensor: Tensor) -> Any:
    return _enum("TensorIOMode", "OUTPUT" if tensor.output else "INPUT")(engine)


def _profile_shape(engine: Double, given: Mapping[str, Any]) -> list[Any]:
    tensor, place = engine._stage.tensor(given["name"]), given["profile_index"]
    found = tensor.profile[place] if tensor and place < len(tensor.profile) else ()
    return [engine._stage.dims(shape) for shape in found]


fake("ICudaEngine.num_io_tensors")(lambda engine, _: len(engine._stage.scenario.tensors))
fake("ICudaEngine.num_optimization_profiles")(
    lambda engine, _: max((len(tensor.profile) for tensor in engine._stage.scenario.tensors), default=0) or 1
)
fake("ICudaEngine.get_tensor_name")(lambda engine, given: engine._stage.scenario.tensors[given["index"]].name)
fake("ICudaEngine.get_tensor_mode")(_tensor(_mode, _enum("TensorIOMode", "NONE")))
fake("ICudaEngine.get_tensor_dtype")(_tensor(lambda e, t: _enum("DataType", t.dtype)(e), _enum("DataType", "FLOAT")))
fake("ICudaEngine.get_tensor_shape")(_tensor(lambda e, t: e._stage.dims(t.shape), lambda e: e._stage.dims(())))
fake("ICudaEngine.get_tensor_location")(lambda engine, _: _enum("TensorLocation", "DEVICE")(engine))
fake("ICudaEngine.get_tensor_profile_shape")(_profile_shape)
fake("ICudaEngine.create_engine_inspector")(lambda engine, _: engine._stage.make("EngineInspector", engine=engine))
fake("ICudaEngine.create_execution_context")(lambda engine, _: engine._stage.make("IExecutionContext", engine=engine))
fake("EngineInspector.get_engine_information")(lambda inspector, _: inspector._stage.scenario.layers)


@fake("IExecutionContext.set_input_shape")
def set_input_shape(context: Double, given: Mapping[str, Any]) -> bool:
    tensor, shape = context._stage.tensor(given["name"]), tuple(given["shape"])
    fits = tensor is not None and not tensor.output and len(shape) == len(tensor.shape)
    if fits:
        context.state.setdefault("shapes", {})[given["name"]] = shape
    return fits


def _is_known(context: Double, tensor: Tensor) -> bool:
    return -1 not in tensor.shape or tensor.name in context.state.get("shapes", {})


@fake("IExecutionContext.infer_shapes")
def infer_shapes(context: Double, _: Mapping[str, Any]) -> list[str]:
    tensors: list[Tensor] = context._stage.scenario.tensors
    return [tensor.name for tensor in tensors if not tensor.output and not _is_known(context, tensor)]


@fake("IExecutionContext.get_tensor_shape")
def get_tensor_shape(context: Double, given: Mapping[str, Any]) -> Any:
    """An input's shape as it was set; in an output's, each -1 is the batch of the first input that was set."""
    stage, shapes = context._stage, context.state.get("shapes", {})
    tensor = stage.tensor(given["name"])
    if tensor is None:
        return stage.dims(())
    batch = next((shape[0] for shape in shapes.values()), -1)
    shape = shapes.get(tensor.name) or (
        tensor.shape if not tensor.output else [batch if n == -1 else n for n in tensor.shape]
    )
    return stage.dims(shape)


@fake("IExecutionContext.set_tensor_address")
def set_tensor_address(context: Double, given: Mapping[str, Any]) -> bool:
    name, address = given["name"], given["memory"]
    context.state.setdefault("addresses", {})[name] = address
    return context._stage.tensor(name) is not None


fake("IExecutionContext.get_tensor_address")(lambda c, given: c.state.get("addresses", {}).get(given["name"], 0))
