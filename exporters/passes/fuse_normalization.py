"""A layer normalisation that an exporter wrote out becomes one operator again.

Before -> after, for exports through TorchScript and for old opsets::

    ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div, Mul, Add -> LayerNormalization

It is read operator by operator. Equal within rounding.

LayerNormalization is an operator from opset 17 on: an older graph is raised if nothing in it changes its meaning
(:mod:`deploycli.exporters.passes.common.opset`). Refused, for one: a normalisation beside a GridSample of opset 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.builder import Builder, replace
from deploycli.exporters.graph.shapes import BATCH
from deploycli.exporters.passes.common.fusion import Fusion, maker, operand_of, single_number, with_number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploycli.exporters.graph.analysis import Analysis, Fact
    from deploycli.exporters.graph.movement_ops import Array


@dataclass(frozen=True)
class _Normalization:
    """``(x - mean(x)) / sqrt(variance(x) + epsilon)`` over the axes from one on."""

    x: ir.Value
    axis: int
    epsilon: float


class FuseNormalization(Fusion[_Normalization]):
    """Let a normalisation over the last axes be one operator."""

    opset = 17

    def read(self, node: ir.Node, analysis: Analysis) -> _Normalization | None:
        """Read a node as what is normalised, before its scale and shift."""
        for deviation, root in _quotients(node, analysis):
            moment, axes = operand_of(root, "Sqrt"), analysis.axes(deviation)
            if axes is None or moment is None or not _is_single(analysis[deviation]):
                continue
            for variance, epsilon in with_number(moment, "Add", analysis, len(axes)):
                mean = _mean(variance, analysis)
                if mean is None:
                    continue
                squared, axis = mean
                x = _deviation(deviation, axis, analysis)
                if x is not None and any(_deviation(d, axis, analysis) is x for d in _squares(squared, analysis)):
                    return _Normalization(x, axis, epsilon)
        return None

    def write(self, node: ir.Node, found: _Normalization, builder: Builder) -> None:
        """Write it with the scale and the shift that follow, as far as they are constants."""
        analysis, result = builder.analysis, node.outputs[0]
        dims, fact = analysis.axes(found.x), analysis[found.x]
        assert dims is not None, "its mean was read"
        assert fact is not None, "its mean was read"
        shape = tuple(dim for dim in dims[found.axis :] if dim is not None)
        scale: Array = np.ones(shape, fact.dtype.numpy())
        shift, last = None, node
        following = _only_reader(result, "Mul", shape, len(dims), analysis)
        if following is not None:
            last, scale = following
        following = _only_reader(last.outputs[0], "Add", shape, len(dims), analysis)
        if following is not None:
            last, shift = following
        operands = [found.x, builder.constant(scale), *([] if shift is None else [builder.constant(shift)])]
        axis = found.axis - len(dims)
        normed = builder.value("LayerNormalization", operands, last, axis=axis, epsilon=found.epsilon)
        replace(last.outputs[0], normed)


def _is_single(fact: Fact | None) -> bool:
    """Say whether numbers are of a type that LayerNormalization keeps: it computes in, and has its epsilon in, FP32."""
    return fact is not None and fact.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _quotients(node: ir.Node, analysis: Analysis) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield numerator and denominator of ``a / b`` and of ``a * (1 / b)``."""
    if node.domain != "" or node.op_type not in ("Div", "Mul"):
        return
    a, b = node.inputs
    assert a is not None, "an arithmetic operator has both operands"
    assert b is not None, "an arithmetic operator has both operands"
    if node.op_type == "Div":
        yield a, b
    elif node.op_type == "Mul":
        for numerator, inverse in ((a, b), (b, a)):
            root, division = operand_of(inverse, "Reciprocal"), maker(inverse, "Div")
            rank = len(analysis.axes(numerator) or ())
            if division is not None and single_number(division.inputs[0], analysis, rank) == 1:
                root = division.inputs[1]
            if root is not None:
                yield numerator, root


def _mean(value: ir.Value, analysis: Analysis) -> tuple[ir.Value, int] | None:
    """Read a value as the mean over the last axes; return what is averaged, and the first of them."""
    node = maker(value, "ReduceMean")
    if node is None or node.inputs[0] is None or not node.attributes.get_int("keepdims", 1):
        return None
    dims = analysis.axes(node.inputs[0])
    given = analysis.constant(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", None)
    if dims is None or given is None:
        return None
    axes = sorted(int(axis) % len(dims) for axis in given)
    first = len(dims) - len(axes)
    are_static = all(dim is not None and dim % BATCH for dim in dims[first:])
    return (node.inputs[0], first) if axes == list(range(first, len(dims))) and axes and are_static else None


def _deviation(value: ir.Value, axis: int, analysis: Analysis) -> ir.Value | None:
    """Read a value as ``x - mean(x)`` over the axes from one on."""
    node = maker(value, "Sub")
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return None
    return node.inputs[0] if _mean(node.inputs[1], analysis) == (node.inputs[0], axis) else None


def _squares(value: ir.Value, analysis: Analysis) -> Iterator[ir.Value]:
    node = value.producer()
    if node is None or node.domain != "" or len(node.inputs) != 2:
        return
    a, b = node.inputs
    rank = len(analysis.axes(a) or ())
    is_square = (node.op_type == "Mul" and a is b) or (node.op_type == "Pow" and single_number(b, analysis, rank) == 2)
    if a is not None and is_square:
        yield a


def _only_reader(
    value: ir.Value, op_type: str, shape: tuple[int, ...], rank: int, analysis: Analysis
) -> tuple[ir.Node, Array] | None:
    """Return the operator that alone reads a value, and its constant, if that varies over the last axes only."""
    readers = list(value.uses())
    if len(readers) != 1 or value.is_graph_output():
        return None
    node, position = readers[0]
    if node.op_type != op_type or node.domain != "":
        return None
    constant = analysis.constant(node.inputs[1 - position])
    if constant is None or constant.ndim > rank:  # it would add axes to the result
        return None
    while constant.ndim > len(shape) and constant.shape[0] == 1:
        constant = constant[0]
    try:
        return node, np.broadcast_to(constant, shape)
    except ValueError:  # it varies over other axes
        return None
