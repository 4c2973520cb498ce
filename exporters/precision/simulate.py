"""Compute FP16 and BF16 graphs on a CPU as a typed network computes them: every value is rounded.

ONNX Runtime's CPU provider has few FP16 kernels. It runs the others in FP32 and drops the casts in between, so what it
answers for an FP16 graph is nearly FP32: a value of 70000 survives. Here each operator computes in FP32, as a tensor
core accumulates, and its result goes through a pair of casts, which ONNX Runtime keeps in a graph of FP32 values::

    y: f16 = MatMul(x: f16, w: f16)  ->  y: f32 = Cast f32 (Cast f16 (MatMul(x: f32, w: f32)))

It is a simulation: the order of a kernel's additions is not, and a fused kernel may round less often.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from exporters.onnx_file import load_model, write_model
from exporters.rewrite.unique import Names, value_names
from exporters.runtimes import OrtRuntime

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    import numpy.typing as npt
    from typing_extensions import Self

_FLOAT = ir.DataType.FLOAT
_REDUCED = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

_EXACT = frozenset(
    {
        "Abs",
        "Clip",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Max",
        "MaxPool",
        "Min",
        "Neg",
        "Pad",
        "ReduceMax",
        "ReduceMin",
        "Relu",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
"""Operators whose results are among their operands' values, or their negatives: there is nothing to round."""


def reduced_type(model: ir.Model) -> ir.DataType | None:
    """Return FP16 or BF16 where a graph has values of that type, else None."""
    values = (value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None)
    return next((value.dtype for value in values if value.dtype in _REDUCED), None)


def simulate(model: ir.Model) -> None:
    """Turn a typed graph, in place, into an FP32 graph that rounds; graph inputs and outputs keep their types."""
    graph = model.graph
    names = Names(value_names(graph))
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _REDUCED:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=value.name)
            value.dtype = _FLOAT
    nodes = list(graph)
    outputs = {value: value.dtype for value in graph.outputs if value.dtype in _REDUCED}
    for value in graph.inputs:
        if value.dtype in _REDUCED:
            readers = tuple(value.uses())
            wide = _cast(value, _FLOAT, names)
            graph.insert_before(graph[0], wide.producer())  # type: ignore[arg-type]  # _cast makes its producer
            for reader, i in readers:
                reader.replace_input_with(i, wide)
    for node in nodes:
        _round(graph, node, names)
    for i, value in enumerate(graph.outputs):
        if value in outputs:
            name, value.name = value.name, names.unique(f"{value.name}_wide")
            narrow = _cast(value, outputs[value], names)
            graph.append(narrow.producer())  # type: ignore[arg-type]  # _cast makes its producer
            narrow.name = name
            graph.outputs[i] = narrow


def _round(graph: ir.Graph, node: ir.Node, names: Names) -> None:
    for attribute in ("to", "dtype", "output_dtype"):
        if node.attributes.get_int(attribute, 0) in _REDUCED:
            node.attributes[attribute] = ir.AttrInt64(attribute, int(_FLOAT))
    for output in node.outputs:
        if output.dtype not in _REDUCED:
            continue
        dtype, output.dtype = output.dtype, _FLOAT
        if node.op_type in _EXACT:
            continue
        readers = tuple(output.uses())
        narrow = _cast(output, dtype, names)
        wide = _cast(narrow, _FLOAT, names)
        graph.insert_after(node, [narrow.producer(), wide.producer()])  # type: ignore[list-item]  # _cast makes them
        for reader, i in readers:
            reader.replace_input_with(i, wide)
        if output.is_graph_output():
            wide.name, output.name = output.name, names.unique(f"{output.name}_exact")
            for i, value in enumerate(graph.outputs):
                if value is output:
                    graph.outputs[i] = wide


def _cast(value: ir.Value, dtype: ir.DataType, names: Names) -> ir.Value:
    """Return the result of a new Cast, which the caller inserts."""
    node = ir.node("Cast", [value], {"to": int(dtype)})
    result = node.outputs[0]
    result.name, result.dtype, result.shape = names.unique(f"{value.name}.{dtype.short_name()}"), dtype, value.shape
    return result


def open_runtime(path: Path, *, threads: int | None = None) -> OrtRuntime | SimulatedRuntime:
    """Return what runs an ONNX file on this CPU faithfully: ONNX Runtime, or the simulation where types are reduced.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is no ONNX file.
        EnvironmentUnsuitable: ONNX Runtime is missing.
        ExportError: the file cannot be loaded.
    """
    model = load_model(path)
    dtype = reduced_type(model)
    return OrtRuntime(path, threads=threads) if dtype is None else SimulatedRuntime(model, dtype, threads=threads)


class SimulatedRuntime:
    """Runs a typed ONNX file on a CPU with every value of a reduced type rounded; see the module's documentation.

    Args:
        model: a typed graph; it is used up.
        dtype: its reduced type.
        threads: of one operator; None leaves the choice to ONNX Runtime.
    """

    def __init__(self, model: ir.Model, dtype: ir.DataType, *, threads: int | None = None) -> None:
        self.name = f"ONNX Runtime, {'FP16' if dtype == ir.DataType.FLOAT16 else 'BF16'} simulated"
        simulate(model)
        with tempfile.TemporaryDirectory(prefix="deploycli-") as folder:
            self._runtime = OrtRuntime(write_model(model, Path(folder) / "simulated.onnx")[0], threads=threads)
        self.inputs, self.outputs = self._runtime.inputs, self._runtime.outputs

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run one batch; see `exporters.runtimes.Runtime.run`."""
        return self._runtime.run(inputs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runtime.__exit__(kind, error, trace)
