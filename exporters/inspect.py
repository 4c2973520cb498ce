"""What is in an ONNX file, without running it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from deploycli.models.spec import TensorInfo, numpy_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx_ir as ir

    from deploycli.exporters.graph.steps import GraphCost, KernelFigures


@dataclass(frozen=True)
class OnnxSummary:
    """What a person wants to know of an ONNX file.

    Attributes:
        path: the file.
        size: bytes, external data included.
        opset: version of the default operator set.
        ir_version: version of the file format.
        producer: who wrote it.
        inputs: graph inputs; sizes are texts, symbolic axes by name.
        outputs: graph outputs.
        ops: operator type -> number of nodes, most frequent first; subgraphs included.
        parameters: number of elements in all initializers.
        largest: the largest initializers, name -> bytes.
        cost: what the graph costs to run and to keep; None where the graph is broken.
        kernels: what TensorRT is predicted to make of it; None where the graph is broken.
    """

    path: str
    size: int
    opset: int
    ir_version: int
    producer: str
    inputs: tuple[TensorInfo[str], ...]
    outputs: tuple[TensorInfo[str], ...]
    ops: Mapping[str, int]
    parameters: int
    largest: Mapping[str, int]
    cost: GraphCost | None
    kernels: KernelFigures | None

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return asdict(self)


def summarize(path: Path, *, largest: int = 5) -> OnnxSummary:
    """Read an ONNX file.

    Args:
        path: the file.
        largest: how many of the largest initializers to name.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is no ONNX file, or its external data is missing.
    """
    from deploycli.exporters.graph.onnx_file import external_files, load_model

    model = load_model(path)
    tensors = {name: v.const_value for name, v in model.graph.initializers.items() if v.const_value is not None}
    size = path.stat().st_size + sum((path.parent / file).stat().st_size for file in external_files(model))
    ops = Counter(node.op_type for node in model.graph.all_nodes())
    by_size = sorted(tensors.items(), key=lambda item: -item[1].nbytes)
    summary = OnnxSummary(
        path=str(path),
        size=size,
        opset=model.opset_imports.get("", 0),
        ir_version=model.ir_version or 0,
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        inputs=tuple(_describe(value) for value in model.graph.inputs if value.name not in tensors),
        outputs=tuple(_describe(value) for value in model.graph.outputs),
        ops=dict(ops.most_common()),
        parameters=sum(tensor.size for tensor in tensors.values()),
        largest={name: tensor.nbytes for name, tensor in by_size[:largest]},
        cost=None,
        kernels=None,
    )
    cost, kernels = _costs(model)
    return replace(summary, cost=cost, kernels=kernels)


def _costs(model: ir.Model) -> tuple[GraphCost | None, KernelFigures | None]:
    """Count a model, which is used up: its functions are inlined."""
    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.cost import graph_cost
    from deploycli.exporters.graph.kernels import predict
    from deploycli.exporters.passes.pipeline import tidy

    try:
        tidy(model)
    except Exception:  # of onnx_ir's own making: a circle, a function that calls itself
        return None, None
    analysis = Analysis(model.graph)
    return graph_cost(model.graph, analysis), predict(model.graph, analysis).figures


def _describe(value: ir.Value) -> TensorInfo[str]:
    shape = () if value.shape is None else tuple(str(dim) for dim in value.shape)
    dtype = "unknown" if value.dtype is None else numpy_name(value.dtype.name)
    return TensorInfo(value.name or "", dtype, shape)
