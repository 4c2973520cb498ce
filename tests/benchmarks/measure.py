"""What the benchmarks measure, the same for every graph, whoever made it."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

COPIES = {"Concat", "Expand", "Gather", "GatherElements", "GatherND", "Pad", "Slice", "Split", "Tile", "Transpose"}
VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class GraphFigures:
    """A graph at batch 1.

    Attributes:
        nodes: all of them.
        movement_nodes: those that move data, views included.
        moved_bytes: written by those that copy.
        multiply_adds: of MatMul, Gemm and Conv.
    """

    nodes: int
    movement_nodes: int
    moved_bytes: int
    multiply_adds: int


def graph_figures(path: Path) -> GraphFigures:
    """Count a graph at batch 1, by ONNX's own shape inference."""
    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    for initializer in model.graph.initializer:  # large weights do not matter to shapes, and 2 GiB is a message's end
        if len(initializer.raw_data) > 4096:
            initializer.ClearField("raw_data")
            initializer.data_location = onnx.TensorProto.EXTERNAL
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    return GraphFigures(
        nodes=len(inferred.node),
        movement_nodes=sum(node.op_type in COPIES | VIEWS for node in inferred.node),
        moved_bytes=sum(
            4 * math.prod(shapes[name]) for node in inferred.node if node.op_type in COPIES for name in node.output
        ),
        multiply_adds=sum(_multiply_adds(node, shapes) for node in inferred.node),
    )


def _multiply_adds(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return 0
    result, first, second = shapes[node.output[0]], shapes[node.input[0]], shapes[node.input[1]]
    if node.op_type == "Conv":
        return math.prod(result) * math.prod(second[1:])  # [O, I / groups, kh, kw]
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(result) * first[0 if transposed else -1]


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run everything in turn, round after round; return the median seconds of each, so that drift hits all alike."""
    for run in runs.values():
        run()  # warm-up
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def onnxruntime_runner(path: Path, batch: int) -> Callable[[], object]:
    """Return a call that runs the file once in ONNX Runtime with all its optimisations."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (info,) = session.get_inputs()
    feed = {info.name: np.random.default_rng(0).standard_normal((batch, *info.shape[1:])).astype(np.float32)}
    return lambda: session.run(None, feed)
