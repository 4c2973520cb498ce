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
    """Nodes in all, nodes that move data (views included), and bytes written by those that copy, for one image."""

    nodes: int
    movement_nodes: int
    moved_bytes: int


def graph_figures(path: Path) -> GraphFigures:
    """Count a graph at batch 1, by ONNX's own shape inference."""
    model = onnx.load(path)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    sizes = {v.name: math.prod(d.dim_value for d in v.type.tensor_type.shape.dim) for v in inferred.value_info}
    moved = 0
    for node in inferred.node:
        if node.op_type in COPIES:
            missing = [name for name in node.output if name not in sizes]
            if missing:
                raise ValueError(f"no shape for {missing}")
            moved += 4 * sum(sizes[name] for name in node.output)
    movement = sum(node.op_type in COPIES | VIEWS for node in inferred.node)
    return GraphFigures(len(inferred.node), movement, moved)


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
