"""Compute FP16 and BF16 graphs on a CPU as a typed network computes them: every value is rounded.

ONNX Runtime's CPU provider has few FP16 kernels. It runs the others in FP32 and drops the casts in between, so what it
answers for an FP16 graph is nearly FP32: a value of 70000 survives. Here each operator computes in FP32, as a tensor
core accumulates, and its result goes through a pair of casts, which ONNX Runtime keeps in a graph of FP32 values::

    y: f16 = MatMul(x: f16, w: f16)  ->  y: f32 = Cast f32 (Cast f16 (MatMul(x: f32, w: f32)))

A QuantizeLinear rounds to INT8 and to FP8 in ONNX Runtime as it does in ONNX, so what is quantised is left as it is.

It is a simulation: the order of a kernel's additions is not, and a fused kernel may round less often.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploycli.exporters.bundle.files import temporary_folder
from deploycli.exporters.graph.movement_ops import MOVEMENT
from deploycli.exporters.graph.onnx_file import load_model, map_external, write_model
from deploycli.exporters.graph.operators import QDQ, is_onnx
from deploycli.exporters.graph.unique import Names, value_names
from deploycli.exporters.precision.dtypes import REDUCED, drop_idle_casts, fill_types, type_of
from deploycli.exporters.runtime.runtimes import Closing, OrtRuntime

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

    Array = npt.NDArray[Any]

_FLOAT = ir.DataType.FLOAT

_EXACT = frozenset(
    {
        "Abs",
        "Constant",
        "ConstantOfShape",
        "If",
        "Loop",
        "Max",
        "MaxPool",
        "Min",
        "Neg",
        "Relu",
        "Scan",
        "Where",
        *MOVEMENT,
    }
)
"""Operators whose results are among their operands' values, or their negatives: there is nothing to round."""

_TYPE_ATTRIBUTES = ("dtype", "output_dtype", "to")
_TENSOR_ATTRIBUTES = ("value",)


def reduced_type(model: ir.Model) -> ir.DataType | None:
    """Return FP16 or BF16 where a graph computes values of that type, else None."""
    fill_types(model)
    values = (value for node in model.graph.all_nodes() for value in (*node.inputs, *node.outputs))
    return next((dtype for value in values if (dtype := type_of(value)) in REDUCED), None)


def holds_fp8(model: ir.Model) -> bool:
    """Whether a graph quantises to FP8, or reads what is stored in it."""
    values = (value for node in model.graph.all_nodes() if is_onnx(node, *QDQ) for value in node.inputs)
    return any(type_of(value) == ir.DataType.FLOAT8E4M3FN for value in values)


def computed_precision(model: ir.Model) -> str:
    """Return which of `deploycli.exporters.bundle.manifest.PRECISIONS` a graph from anywhere was made as."""
    if holds_fp8(model):
        return "fp8"
    if any(is_onnx(node, *QDQ) for node in model.graph.all_nodes()):
        return "int8"
    reduced = reduced_type(model)
    return "fp32" if reduced is None else "fp16" if reduced == ir.DataType.FLOAT16 else "bf16"


def simulate(model: ir.Model) -> None:
    """Turn a typed graph, in place, into an FP32 graph that rounds.

    Graph inputs and outputs of a reduced type become FP32: inputs must be rounded by who feeds them, outputs are.
    """
    if model.functions:
        common.InlinePass()(model)
    fill_types(model)
    names = Names(value_names(model.graph))
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in (*graph.inputs, *graph.initializers.values()):
            _widen(value)
        for node in list(graph):
            _round(graph, node, names)
        drop_idle_casts(graph)


def _widen(value: ir.Value) -> None:
    """Store what a graph reads as FP32, which holds every FP16 and BF16 number."""
    if type_of(value) not in REDUCED:
        return
    value.type = ir.TensorType(_FLOAT)
    if value.const_value is not None:
        value.const_value = _wide(value.const_value)


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return a tensor in FP32, made when it is asked for: it is twice as large, and there may be gigabytes of them."""

    def widened() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(widened, _FLOAT, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _round(graph: ir.Graph, node: ir.Node, names: Names) -> None:
    """Let a node compute in FP32, and let everything read its rounded results, under their names."""
    for name in _TYPE_ATTRIBUTES:
        if node.attributes.get_int(name, 0) in REDUCED:
            node.attributes[name] = ir.AttrInt64(name, int(_FLOAT))
    for name in _TENSOR_ATTRIBUTES:
        tensor = node.attributes.get_tensor(name, None)
        if tensor is not None and tensor.dtype in REDUCED:
            node.attributes[name] = ir.AttrTensor(name, _wide(tensor))
    for output in node.outputs:
        dtype = output.dtype
        if dtype not in REDUCED or not isinstance(output.type, ir.TensorType):
            continue
        output.type = ir.TensorType(_FLOAT)
        if dtype is None or node.op_type in _EXACT:
            continue
        uses, outputs = tuple(output.uses()), [i for i, value in enumerate(graph.outputs) if value is output]
        own, output.name = output.name or "", names.unique(f"{output.name}.exact")
        narrow = _cast(output, dtype, names.unique(f"{own}.{dtype.short_name()}"))
        wide = _cast(narrow.outputs[0], _FLOAT, own)
        graph.insert_after(node, [narrow, wide])
        for reader, i in uses:
            reader.replace_input_with(i, wide.outputs[0])
        for i in outputs:
            graph.outputs[i] = wide.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(dtype)})
    result = node.outputs[0]
    result.name, result.type = name, ir.TensorType(dtype)
    result.shape = None if value.shape is None else value.shape.copy()
    return node


def open_runtime(path: Path, *, threads: int | None = None) -> OrtRuntime | SimulatedRuntime:
    """Return what runs an ONNX file on this CPU faithfully: ONNX Runtime, or the simulation where types are reduced.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is no ONNX file, or its external data cannot be read.
        EnvironmentUnsuitable: ONNX Runtime is missing.
        ExportError: the file cannot be loaded.
    """
    model = load_model(path)
    dtype = reduced_type(model)
    if dtype is None:
        return OrtRuntime(path, move_qdq=not holds_fp8(model), threads=threads)
    map_external(model)
    return SimulatedRuntime(model, dtype, threads=threads)


class SimulatedRuntime(Closing):
    """Runs a typed ONNX file on a CPU with every value of a reduced type rounded; see the module's documentation.

    Args:
        model: a typed graph; it is used up.
        dtype: its reduced type.
        threads: of one operator; None leaves the choice to ONNX Runtime.

    Attributes:
        name: what runs it, for reports.
        inputs: graph inputs, with the types of the typed graph.
        outputs: graph outputs, likewise.

    Raises:
        EnvironmentUnsuitable: ONNX Runtime is missing.
        ExportError: it cannot load the graph.
    """

    def __init__(self, model: ir.Model, dtype: ir.DataType, *, threads: int | None = None) -> None:
        self.name = f"ONNX Runtime, {'FP16' if dtype == ir.DataType.FLOAT16 else 'BF16'} simulated"
        self._inputs, self._outputs = dict(_reduced(model.graph.inputs)), dict(_reduced(model.graph.outputs))
        simulate(model)
        with temporary_folder() as folder:
            path, *_ = write_model(model, folder / "simulated.onnx")
            self._runtime = OrtRuntime(path, move_qdq=not holds_fp8(model), threads=threads)
        self.inputs, self.outputs = (
            tuple(replace(info, dtype=types[info.name].name) if info.name in types else info for info in infos)
            for infos, types in ((self._runtime.inputs, self._inputs), (self._runtime.outputs, self._outputs))
        )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see `deploycli.exporters.runtime.runtimes.Runtime.run`.

        Args:
            inputs: for an input of a reduced type, any floating-point array: it is rounded to that type.

        Returns:
            Outputs of type FP16 as float16; those of type BF16, which NumPy lacks, as float32.
        """
        with np.errstate(over="ignore"):
            fed = {
                n: a.astype(self._inputs[n]).astype(np.float32) if n in self._inputs else a for n, a in inputs.items()
            }
        found = self._runtime.run(fed)
        half = {n for n, dtype in self._outputs.items() if dtype == np.float16}
        return {n: a.astype(np.float16) if n in half else a for n, a in found.items()}

    def close(self) -> None:
        """Free what is held."""
        self._runtime.close()


def _reduced(values: Iterable[ir.Value]) -> Iterator[tuple[str, np.dtype[Any]]]:
    for value in values:
        dtype = type_of(value)
        if dtype in REDUCED and dtype is not None:
            yield value.name or "", np.dtype(dtype.numpy())
