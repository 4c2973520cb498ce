"""What the benchmarks measure, the same for every graph, whoever made it."""

import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.cost import graph_cost
from deploycli.exporters.graph.operators import COPIES, VIEWS

RESULTS = Path(__file__).parent / "RESULTS.md"


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
    """Count a graph at batch 1, as `deploycli inspect` does."""
    graph = ir.load(path).graph
    cost = graph_cost(graph, Analysis(graph))
    if cost.movement_bytes is None or cost.multiply_adds is None:
        raise ValueError(f"{path} has operators of unknown shape: it cannot be counted")
    return GraphFigures(
        nodes=graph.num_nodes(),
        movement_nodes=sum(node.op_type in COPIES | VIEWS for node in graph),
        moved_bytes=cost.movement_bytes,
        multiply_adds=cost.multiply_adds,
    )


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


def openvino_runner(path: Path, batch: int) -> Callable[[], object]:
    """Return a call that runs the file once in OpenVINO on the CPU, in FP32 where it is not INT8."""
    import openvino

    core = openvino.Core()
    request = core.compile_model(
        str(path), "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    ).create_infer_request()
    images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    return lambda: request.infer({0: images})


def runners() -> dict[str, Callable[[Path, int], Callable[[], object]]]:
    """Return what runs a file, by name: ONNX Runtime, and OpenVINO where it is installed."""
    openvino = {} if importlib.util.find_spec("openvino") is None else {"OpenVINO": openvino_runner}
    return {"ONNX Runtime": onnxruntime_runner, **openvino}


class Printed(list[str]):
    """Lines of Markdown, each printed as soon as it is measured."""

    def line(self, text: str) -> None:
        """Print one more line, or several."""
        print(text, flush=True)
        self.append(text)


def save(results: Any, path: Path) -> None:
    """Keep what was measured: whole, whenever the script is ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(results), indent=1).encode())


def write_block(benchmark: str, lines: Sequence[str]) -> None:
    """Put the lines of a benchmark into RESULTS.md, between the marks that it has there.

    Raises:
        ValueError: it has none.
    """
    start, end = f"<!-- benchmark: {benchmark} -->", "<!-- /benchmark -->"
    before, found, rest = RESULTS.read_text("utf-8").partition(start)
    if not found:
        raise ValueError(f"{RESULTS} has no line {start}")
    RESULTS.write_text("\n".join([f"{before}{start}", *lines, end + rest.partition(end)[2]]), "utf-8")
