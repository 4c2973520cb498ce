"""A product over an axis that is moved to the end for it, and back, multiplies from the left.

Before -> after, for attention whose heads talk to each other (CaiT), of scores [B, H, N, N]::

    Transpose [B, N, N, H], MatMul(W), Add(b), Transpose [B, H, N, N]
    -> Reshape [B, H, N*N], MatMul(W^T, .), Add(b [H, 1]), Reshape [B, H, N, N]

Nothing is moved any more. TensorRT, which writes out products of so few channels, makes one kernel of the product and
the Softmax beside it; in the other form it is up to seven, and their number depends on the batch.

Each number is the same sum of the same products: equal within rounding. Refused, for one: a product that something else
reads before its axis is moved back; and one over the tokens of an MLP-Mixer: of many channels TensorRT makes the same
kernels either way, and only a weight that stands on the right is quantized.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.analysis import dynamic_axes, reshape_target
from deploycli.exporters.graph.builder import Builder, replace
from deploycli.exporters.graph.operators import is_onnx, only_reader
from deploycli.exporters.graph.projections import Bias, bias_of
from deploycli.exporters.passes.common.tidy import sweep
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.shapes import Dims


_MOST_CHANNELS = 16
"""Products that sum over more stay as they are; models have so many heads at most."""


@dataclass(frozen=True)
class _Product:
    """A product between two Transposes.

    Attributes:
        x: what is multiplied, before anything is moved: [*outer, K, *inner].
        axis: of the K channels that are summed over.
        weight: [K, M].
        bias: what is added, or None.
        back: the Transpose behind it, whose result is [*outer, M, *inner].
    """

    x: ir.Value
    axis: int
    weight: Array
    bias: Bias | None
    back: ir.Node


class MultiplyFromLeft(GraphPass):
    """Multiply an axis where it is. Equal within rounding."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        found = [product for node in graph if (product := _read(node, analysis)) is not None]
        builder = Builder(graph, analysis)
        for product in found:
            _write(product, builder)
        if found:
            sweep(graph)
        return bool(found)


def _read(node: ir.Node, analysis: Analysis) -> _Product | None:
    turn = node.inputs[0].producer() if is_onnx(node, "MatMul") and node.inputs[0] is not None else None
    if turn is None or not is_onnx(turn, "Transpose"):
        return None
    x, weight = turn.inputs[0], analysis.constant(node.inputs[1])
    dims, perm = analysis.dims(x), turn.attributes.get_ints("perm", ())
    if x is None or dims is None or not perm or weight is None or weight.ndim != 2:
        return None
    if weight.shape[0] > _MOST_CHANNELS:
        return None
    axis = perm[-1]
    inner, merged = dims[axis + 1 :], (*dims[:axis], weight.shape[1], math.prod(dims[axis + 1 :]))
    if list(perm[:-1]) != sorted(perm[:-1]) or not inner or dynamic_axes(dims[axis:]) or reshape_target(merged) is None:
        return None
    bias = bias_of(node, analysis)
    back = only_reader((node if bias is None else bias.add).outputs[0])
    if back is None or not is_onnx(back, "Transpose"):
        return None
    if list(back.attributes.get_ints("perm", ())) != np.argsort(perm).tolist():
        return None
    return _Product(x, axis, weight, bias, back)


def _write(product: _Product, builder: Builder) -> None:
    dims = builder.analysis.known_dims(product.x)
    outer, inner, anchor = dims[: product.axis], dims[product.axis + 1 :], product.back

    def as_rows(value: ir.Value, rows: int, columns: Dims) -> ir.Value:
        return value if len(inner) == 1 else builder.reshape(value, (*outer, rows, *columns), anchor)

    summed, made = product.weight.shape
    # [*outer, K, *inner] -> [*outer, K, prod(inner)] -> [*outer, M, prod(inner)] -> [*outer, M, *inner]
    value = as_rows(product.x, summed, (math.prod(inner),))
    value = builder.value("MatMul", [builder.constant(product.weight.T, "weight"), value], anchor)
    if product.bias is not None:
        value = builder.value("Add", [value, builder.constant(product.bias.numbers.reshape(-1, 1), "bias")], anchor)
    replace(anchor.outputs[0], as_rows(value, made, inner))
