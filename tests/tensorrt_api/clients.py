"""What a program does with TensorRT, for the tests of this folder: run by `child.call`."""

from __future__ import annotations

from typing import Any

from tests.tensorrt_api.doubles import HostMemory, Scenario, Tensor, install


def facts() -> dict[str, Any]:
    import tensorrt as trt

    return {
        "version": trt.__version__,
        "typed": 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
        "dims": list(trt.Dims([1, 3, 224])),
        "has FP16 flag": hasattr(trt.BuilderFlag, "FP16"),
    }


def build(**options: Any) -> list[Any]:
    """Build an engine from a model, as TensorRT's samples do, and return what was done."""
    import tensorrt as trt

    recorder = install(Scenario(**options))
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file("model.onnx"):
        return [[error.desc(), error.node_name()] for error in map(parser.get_error, range(parser.num_errors))]
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 20)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    cache = config.create_timing_cache(b"")
    assert config.set_timing_cache(cache, ignore_mismatch=False)
    profile = builder.create_optimization_profile()
    for place in range(network.num_inputs):
        shape = tuple(network.get_input(place).shape)[1:]
        profile.set_shape(network.get_input(place).name, (1, *shape), (8, *shape), (16, *shape))
    assert config.add_optimization_profile(profile) == 0
    plan = builder.build_serialized_network(network=network, config=config)
    return [*recorder.plain(), None if plan is None else bytes(plan).decode()]


def build_nothing() -> list[Any]:
    return build(answers={"Builder.build_serialized_network": None})


def build_refused() -> list[Any]:
    return build(parser_errors=[{"desc": "no such operator", "node_name": "attention"}])


def run() -> dict[str, Any]:
    """Open an engine and run it."""
    import tensorrt as trt

    tensors = (
        Tensor("left", (-1, 3), profile=[((1, 3), (2, 3), (4, 3)), ((8, 3), (8, 3), (8, 3))]),
        Tensor("scores", (-1, 7), "HALF", output=True),
    )
    recorder = install(Scenario(tensors, layers='{"Layers": ["one"]}', answers={"ICudaEngine.name": "tiny"}))
    runtime = trt.Runtime(trt.Logger())
    assert isinstance(runtime, trt.Runtime)
    engine = runtime.deserialize_cuda_engine(HostMemory(b"plan"))
    assert isinstance(engine, trt.ICudaEngine)
    names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    before = context.infer_shapes()
    refused = context.set_input_shape("left", (4, 3, 1))
    assert context.set_input_shape("left", (4, 3))
    for place, name in enumerate(names):
        assert context.set_tensor_address(name, 4096 * (place + 1))
    assert context.execute_async_v3(stream_handle=7)
    inspector = engine.create_engine_inspector()
    return {
        "name": engine.name,
        "modes": [engine.get_tensor_mode(name).name for name in names],
        "dtypes": [engine.get_tensor_dtype(name).name for name in names],
        "profiles": engine.num_optimization_profiles,
        "largest": list(engine.get_tensor_profile_shape("left", 0)[2]),
        "before": before,
        "refused": refused,
        "out": list(context.get_tensor_shape("scores")),
        "layers": inspector.get_engine_information(trt.LayerInformationFormat.JSON),
        "run": recorder.plain("IExecutionContext.execute_async_v3"),
    }


MISTAKES = {
    "an unknown method": "builder.build_cuda_engine(network)",
    "an unknown attribute": "config.max_workspace_size",
    "setting an unknown attribute": "config.max_workspace_size = 1",
    "setting a method": "config.set_flag = 1",
    "an unknown argument": "config.set_flag(flags=trt.BuilderFlag.TF32)",
    "too few arguments": "builder.build_serialized_network(network)",
    "None for an object": "builder.build_serialized_network(None, config)",
    "the wrong object": "builder.build_serialized_network(config, network)",
    "an integer for an enum": "config.set_flag(6)",
    "a path for a string": "parser.parse_from_file(Path('model.onnx'))",
    "a float for an integer": "config.builder_optimization_level = 3.5",
    "a number for a shape": "profile.set_shape('images', 1, 8, 16)",
    "a keyword where there is none": "network.get_input(place=0)",
    "memory as a string": "plan.decode()",
    "the length of memory": "len(plan)",
    "a with block": "with builder: pass",
}


def mistakes() -> dict[str, str]:
    """What each mistake raises."""
    from pathlib import Path

    import tensorrt as trt

    install()
    logger = trt.Logger()
    builder = trt.Builder(logger)
    network, config = builder.create_network(), builder.create_builder_config()
    scope = {
        "trt": trt,
        "Path": Path,
        "builder": builder,
        "network": network,
        "config": config,
        "parser": trt.OnnxParser(network, logger),
        "profile": builder.create_optimization_profile(),
        "plan": builder.build_serialized_network(network, config),
    }

    def outcome(code: str) -> str:
        try:
            exec(code, dict(scope))
        except (AttributeError, TypeError) as error:
            return type(error).__name__
        return "nothing"

    return {name: outcome(code) for name, code in MISTAKES.items()}


def removed() -> list[bool]:
    """Whether names of TensorRT 10 are on the doubles."""
    import tensorrt as trt

    install()
    builder = trt.Builder(trt.Logger())
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(b"plan")
    config = builder.create_builder_config()
    return [
        hasattr(builder, "platform_has_fast_fp16"),
        hasattr(config, "set_calibration_profile"),
        hasattr(engine, "device_memory_size"),
        hasattr(engine, "device_memory_size_v2"),
    ]


def impossible_answer() -> str:
    try:
        install(Scenario(answers={"Builder.build_cuda_engine": None}))
    except AttributeError as error:
        return str(error)
    return "accepted"


def raising_answer() -> str:
    import tensorrt as trt

    install(Scenario(answers={"Builder.create_network": lambda builder, given: given["flags"] << 4}))
    assert trt.Builder(trt.Logger()).create_network(3) == 48
    install(Scenario(answers={"Builder.create_network": MemoryError("none left")}))
    try:
        trt.Builder(trt.Logger()).create_network()
    except MemoryError as error:
        return str(error)
    return "nothing"


def warning() -> None:
    import warnings

    warnings.warn("old", DeprecationWarning, stacklevel=1)


def unknown_behaviour() -> list[str]:
    """Members that the doubles imitate and that this version does not have."""
    import tensorrt

    from tests.tensorrt_api.behaviour import BEHAVIOUR

    pairs = [target.split(".") for target in BEHAVIOUR]
    return [f"{cls}.{member}" for cls, member in pairs if not hasattr(getattr(tensorrt, cls), member)]


def failing(divisor: int) -> float:
    return 1 / divisor


def class_names() -> list[str]:
    import tensorrt

    from tests.tensorrt_api.stubs import classes_of

    return list(classes_of(tensorrt.tensorrt))


def memory() -> dict[str, Any]:
    """What was set, read again."""
    import tensorrt as trt

    install()
    builder = trt.Builder(trt.Logger())
    config, network = (
        builder.create_builder_config(),
        builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)),
    )
    flags = [trt.BuilderFlag.TF32, trt.BuilderFlag.REFIT]
    before, level = [config.get_flag(flag) for flag in flags], config.builder_optimization_level
    config.clear_flag(flags[0])
    config.set_flag(flags[1])
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 4096)
    config.builder_optimization_level = 5
    cache = config.create_timing_cache(b"known")
    config.set_timing_cache(cache, False)
    profile = builder.create_optimization_profile()
    assert not profile
    profile.set_shape("x", (1, 2), [3, 4], trt.Dims([5, 6]))
    assert profile
    counts = [config.num_optimization_profiles]
    for _ in range(2):
        config.add_optimization_profile(profile)
        counts.append(config.num_optimization_profiles)
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(b"")
    context = engine.create_execution_context()
    context.set_tensor_address("images", 8)
    return {
        "tf32": [before[0], config.get_flag(flags[0])],
        "refit": [before[1], config.get_flag(flags[1])],
        "flags": config.flags == 1 << int(flags[1]),
        "workspace": config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
        "level": [level, config.builder_optimization_level],
        "timings": bytes(config.get_timing_cache().serialize()).decode(),
        "profile": [list(shape) for shape in profile.get_shape("x")],
        "profiles": counts,
        "same cache": config.get_timing_cache() is cache,
        "addresses": [context.get_tensor_address(name) for name in ("images", "logits")],
        "typed": network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
        "unknown tensor": [engine.get_tensor_mode("none").name, list(engine.get_tensor_shape("none"))],
    }


def callbacks() -> list[Any]:
    """A build that reports progress and logs, as a scenario tells it to."""
    import tensorrt as trt

    heard: list[Any] = []

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            heard.append([phase_name, num_steps])

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            heard.append(f"{severity.name}: {msg}")

    def build(builder: Any, given: Any) -> None:
        given["config"].progress_monitor.phase_start("phase", "", 3)
        builder.logger.log(trt.Logger.ERROR, "out of memory")

    install(Scenario(answers={"Builder.build_serialized_network": build}))
    builder = trt.Builder(Log())
    config = builder.create_builder_config()
    config.progress_monitor = Monitor()
    assert builder.build_serialized_network(builder.create_network(), config) is None
    return heard


def conversions() -> dict[str, Any]:
    """Where the real `Dims` and enums take or refuse another value than `Kind.accepts` says.

    One difference is meant: the real ones take a NumPy float for an integer, and cut it off.
    """
    from pathlib import Path

    import numpy as np
    import tensorrt as trt

    from tests.tensorrt_api.signatures import signatures

    values = [
        1,
        1.5,
        True,
        "1",
        b"1",
        None,
        np.int64(1),
        [1, 2],
        (1, 2),
        [1.5],
        Path("1"),
        trt.DataType.INT8,
    ]
    real = {
        "__init__ of Dims": (trt.Dims.__init__, trt.Dims),
        "__init__ of DataType": (trt.DataType.__init__, trt.DataType),
        "__init__ of Logger": (trt.Logger.__init__, trt.Logger),
        "__init__ of Permutation": (trt.Permutation.__init__, trt.Permutation),
    }
    classes = {"ILogger.Severity": trt.ILogger.Severity, "Dims": trt.Dims, "Permutation": trt.Permutation}
    different = {}
    for name, (function, cls) in real.items():
        overloads = [found.bound() for found in signatures("__init__", function.__doc__, classes)]
        for value in values:
            try:
                cls(value)
                taken = True
            except TypeError:
                taken = False
            said = any(not isinstance(found.bind((value,), {}, classes), str) for found in overloads)
            if taken != said:
                different[f"{name}({value!r})"] = taken
    return different
