"""What a finished engine says of itself, read back from the plan and not from what was asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.engine import IoTensor
from deploycli.models.errors import BuildError
from deploycli.models.spec import numpy_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    import tensorrt as trt

    from deploycli.exporters.target.settings import BuildSettings
    from deploycli.exporters.tensorrt.callbacks import Log


@dataclass(frozen=True)
class EngineReport:
    """What was read from an engine.

    Attributes:
        layers: JSON of the engine inspector, as it is, or None where the engine could not be inspected.
        io: inputs and outputs.
        facts: figures by name; memory in bytes.
    """

    layers: str | None
    io: tuple[IoTensor, ...]
    facts: Mapping[str, Any]


def inspect_engine(plan: bytes, log: Log, *, may_have_host_code: bool) -> EngineReport | None:
    """Load a plan that was just built and read what it is.

    Args:
        plan: its bytes.
        log: of TensorRT.
        may_have_host_code: a version compatible plan holds a lean runtime, and TensorRT does not load that while host
            code is forbidden. We never allow it: such a plan is not inspected.

    Returns:
        None for a plan with host code that TensorRT does not load for that reason.

    Raises:
        BuildError: TensorRT does not load the plan, or does not describe it.
    """
    import tensorrt as trt

    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        if may_have_host_code:
            log.write("the plan holds a lean runtime, which is host code: it is not loaded, and not inspected")
            return None
        raise BuildError(f"TensorRT cannot load the plan that it has just built: {log.last()}")
    inspector = engine.create_engine_inspector()
    if inspector is None:
        raise BuildError(f"TensorRT makes no engine inspector: {log.last()}")
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise BuildError(f"the engine inspector gives no JSON: {error}") from error
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return EngineReport(text, tuple(_io(engine, name) for name in names), _facts(engine))


def network_io(network: trt.INetworkDefinition, settings: BuildSettings) -> tuple[IoTensor, ...]:
    """Return inputs and outputs as the network has them, for an engine that is not inspected."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    profiles = settings.profile
    return (
        *(
            IoTensor(t.name, "input", numpy_name(t.dtype.name), tuple(t.shape), (p.min, p.opt, p.max))
            for t in inputs
            for p in [profiles[t.name]]
        ),
        *(IoTensor(t.name, "output", numpy_name(t.dtype.name), tuple(t.shape)) for t in outputs),
    )


def hardware_compatibility(level: trt.HardwareCompatibilityLevel) -> str:
    """Return a level as `deploycli.exporters.target.settings.HARDWARE_COMPATIBILITY` spells it."""
    return str(level.name).lower().replace("_plus", "+").replace("_", "-")


def _io(engine: trt.ICudaEngine, name: str) -> IoTensor:
    import tensorrt as trt

    is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    shapes = engine.get_tensor_profile_shape(name, 0) if is_input else []  # of inputs only
    return IoTensor(
        name,
        "input" if is_input else "output",
        numpy_name(engine.get_tensor_dtype(name).name),
        tuple(engine.get_tensor_shape(name)),
        tuple(tuple(shape) for shape in shapes),
    )


def _facts(engine: trt.ICudaEngine) -> dict[str, Any]:
    return {
        "name": engine.name,
        "layers": engine.num_layers,
        "optimization_profiles": engine.num_optimization_profiles,
        "aux_streams": engine.num_aux_streams,
        "device_memory": engine.device_memory_size_v2,
        "streamable_weights": engine.streamable_weights_size,
        "hardware_compatibility": hardware_compatibility(engine.hardware_compatibility_level),
        "profiling_verbosity": engine.profiling_verbosity.name,
        "refittable": engine.refittable,
    }
