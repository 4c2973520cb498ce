"""Element types of a graph: those that a file does not say, whether an operator's definition allows another, what
rounding to FP16 or BF16 does to constants, and which values are attention masks, whose infinities may be rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from deploycli.exporters.graph.builder import inner_graphs
from deploycli.exporters.graph.movement_ops import MOVEMENT
from deploycli.exporters.graph.operators import is_onnx, opset
from deploycli.exporters.lint.element_types import allowed_types, derive, formal

if TYPE_CHECKING:
    Array = npt.NDArray[Any]


REDUCED = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def fill_types(model: ir.Model) -> None:
    """Write down the element types that follow from the operators, in inner graphs too; shapes play no part."""
    _fill(model.graph, opset(model.opset_imports))


def _fill(graph: ir.Graph, version: int) -> None:
    for node in graph:
        for body in inner_graphs(node):
            _fill(body, version)
        for output, dtype in zip(node.outputs, derive(node, type_of, version), strict=True):
            if output.type is None and dtype is not None:
                output.type = ir.TensorType(dtype)


def type_of(value: ir.Value | None) -> ir.DataType | None:
    """Return the element type of a value, or None where it has none or is absent."""
    if value is None:
        return None
    return value.const_value.dtype if value.type is None and value.const_value is not None else value.dtype


def drop_idle_casts(graph: ir.Graph) -> None:
    """Take out what casts a value to the type that it has; what makes an output of the graph becomes an Identity."""
    for node in list(graph):
        if not is_onnx(node, "Cast") or node.inputs[0] is None or node.inputs[0].dtype != node.outputs[0].dtype:
            continue
        if node.outputs[0].is_graph_output():
            node.op_type = "Identity"
            node.attributes.clear()
        else:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            graph.remove(node, safe=True)


def opset_of(node: ir.Node) -> int:
    """Return the version of the ONNX operator set that a node of a main graph is defined by."""
    graph = node.graph
    assert isinstance(graph, ir.Graph), "nodes of functions are not asked for"
    return opset(graph.opset_imports)


def takes(node: ir.Node, position: int, dtype: ir.DataType) -> bool:
    """Whether the definition of an operator allows an element type for the operand at this position."""
    return is_onnx(node) and _allows(node.op_type, opset_of(node), "inputs", position, dtype)


def makes(node: ir.Node, position: int, dtype: ir.DataType) -> bool:
    """Whether the definition of an operator allows an element type for the result at this position."""
    return is_onnx(node) and _allows(node.op_type, opset_of(node), "outputs", position, dtype)


@cache
def _allows(op_type: str, opset: int, side: str, position: int, dtype: ir.DataType) -> bool:
    schema = onnx.defs.get_schema(op_type, opset, "")
    parameter = formal(getattr(schema, side), position)
    return parameter is not None and dtype in allowed_types(schema, parameter.type_str)


MASKING = frozenset({"Add", "Cast", "Max", "Min", "Sub", "Sum", "Trilu", "Where", *MOVEMENT})
"""Operators through which a mask stays one: they add it, choose it or move it."""

NEAR_OVERFLOW = 0.5
"""A value beyond this share of the largest finite one is too near: a score is added to it, or an input not seen yet
reaches further."""

_ATTENTION_MASK = 3  # operand of ONNX's Attention


@dataclass(frozen=True)
class Rounding:
    """What becomes of a constant.

    Attributes:
        size: number of values.
        overflowed: finite or infinite values beyond the largest finite one of the reduced type.
        near: values beyond `NEAR_OVERFLOW` of it, those that overflow too.
        subnormal: values that are not zero and below the smallest normal number of the reduced type.
        flushed: values that are not zero and would be.
        kept: values that are still not zero.
        largest: largest magnitude; NaN where there is one.
    """

    size: int
    overflowed: int
    near: int
    subnormal: int
    flushed: int
    kept: int
    largest: float

    @property
    def vanishes(self) -> bool:
        """Whether nothing would be left, as of an epsilon that protects a division."""
        return self.flushed > 0 and self.kept == 0


def examine(array: Array, target: ir.DataType) -> Rounding:
    """Count what overflows and what is flushed to zero when FP32 values are rounded to a reduced type."""
    rounded, magnitude = reduced(array, target), np.abs(array)
    return Rounding(
        size=array.size,
        overflowed=int(array.size - np.isfinite(rounded).sum()),
        near=int((magnitude > NEAR_OVERFLOW * float(target.max)).sum()),
        subnormal=int(((magnitude > 0) & (magnitude < float(target.tiny))).sum()),
        flushed=int(((rounded == 0) & (array != 0)).sum()),
        kept=int((rounded != 0).sum()),
        largest=float(magnitude.max(initial=0.0)),
    )


def reduced(array: Array, target: ir.DataType, *, limit: float | None = None) -> Array:
    """Round FP32 values to a reduced type.

    Args:
        array: FP32 values.
        target: FP16 or BF16.
        limit: largest magnitude to write: a mask stays finite.
    """
    with np.errstate(over="ignore", under="ignore"):
        result: Array = (array if limit is None else array.clip(-limit, limit)).astype(target.numpy())
    return result


def feeds_softmax(value: ir.Value) -> bool:
    """Whether a value is only ever added to, or chosen for, what a Softmax reads: an attention mask or bias."""
    uses = value.uses()
    if not uses or value.is_graph_output():
        return False
    return all(
        use.node.op_type == "Softmax"
        or (use.node.op_type == "Attention" and use.idx == _ATTENTION_MASK)
        or (use.node.op_type in MASKING and all(feeds_softmax(output) for output in use.node.outputs))
        for use in uses
    )
