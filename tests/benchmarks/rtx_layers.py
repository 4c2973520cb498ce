"""The layers that TensorRT for RTX makes of an ONNX file: compiled ahead of time, for one GPU and one batch."""

import math
from pathlib import Path

from deploycli.exporters.graph.steps import KernelFigures
from deploycli.exporters.tensorrt.compilers.rtx import as_inspector_json
from deploycli.exporters.tensorrt.inspector import EngineLayers, EngineTensor, parse_layers

GPU = "SM89"

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1, "uint8": 1, "bool": 1, "int64": 8}


def compiled_figures(path: Path, batch: int) -> KernelFigures:
    """Compile a file and count its kernels; the bytes are for one sample.

    Raises:
        ValueError: the compiler refuses it.
    """
    launched = compiled_layers(path, batch).launched
    moved = sum(_size(tensor) for layer in launched for tensor in (*layer.reads, *layer.writes)) / batch
    return KernelFigures(len(launched), math.ceil(moved), sum(layer.fused_attention for layer in launched))


def compiled_layers(path: Path, batch: int) -> EngineLayers:
    """Compile a file for one batch.

    Raises:
        ValueError: the compiler refuses it.
    """
    import tensorrt_rtx as trt

    class Log(trt.ILogger):
        layers = ""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if msg.startswith("Layers:\n"):
                self.layers = msg

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise ValueError(f"{path}: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, GPU), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        shape = tuple(batch if size == -1 else size for size in tuple(tensor.shape))
        profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        raise ValueError(f"{path}: the compiler makes no engine of it")
    return parse_layers(as_inspector_json(log.layers))


def _size(tensor: EngineTensor) -> int:
    return math.prod(tensor.shape) * _BYTES.get(tensor.dtype, 4)
