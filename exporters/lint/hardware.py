"""Rule 20: what the GPUs compute that an engine is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.lint.element_types import is_onnx
from deploycli.exporters.lint.problem import error, name_of
from deploycli.exporters.target.targets import NEEDS, dotted, lacking, named, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from deploycli.exporters.lint.problem import Problem
    from deploycli.exporters.lint.subject import Subject

_NAMES: Mapping[ir.DataType, str] = {
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT4E2M1: "fp4",
}


def hardware_features(subject: Subject) -> dict[str, str]:
    """Return what a graph has that not every GPU computes, of `NEEDS`, each with the first place that has it."""
    found: dict[str, str] = {}
    for value in subject.graph.inputs:
        _note(found, value.dtype, value.name)
    for name, tensor in subject.tensors:
        _note(found, tensor.dtype, name)
    for node in subject.nodes:
        dtype = subject.inference.dtype(node.outputs[0])
        _note(found, dtype, name_of(node))
        if is_onnx(node, "MatMul", "Gemm", "Einsum", "Attention") and dtype == ir.DataType.FLOAT:
            found.setdefault("fp32 products", name_of(node))
    return found


def hardware(subject: Subject) -> Iterator[Problem]:
    """Rule 20: the GPUs that are named (`--gpu`) compute everything in the graph.

    Source: TensorRT for RTX, which compiles no BF16 and no matrix products in FP32 below compute capability 8.0, no FP8
    below 8.9, no FP4 below 12.0.
    """
    features = hardware_features(subject)
    for feature, targets in lacking(subject.targets, features).items():
        yield error(
            features[feature],
            f"TensorRT for RTX compiles no {shown(feature)} for {named(targets)}",
            f"another precision, or GPUs from compute capability {dotted(NEEDS[feature])}",
        )


def _note(found: dict[str, str], dtype: ir.DataType | None, where: str | None) -> None:
    if dtype is not None and dtype in _NAMES:
        found.setdefault(_NAMES[dtype], where or "graph")
