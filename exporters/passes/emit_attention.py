"""Attention becomes one operator, for those who want it.

Before -> after::

    Transpose(k [B, N, S, D]), MatMul(q, k^T), Add(mask [1, N, S, S]), Softmax, MatMul(v) -> Attention(q, k, v, mask)

The operator is of opset 23, and in its four-dimensional form here: heads on the second axis, a float mask that is
added, and a scale of 1, as the scale lies in the query's weights by then. Off by default: older runtimes lack the
operator. Kernels add in their own order, so the result is equal within rounding. Refused, for one: scores of five
dimensions, and a product with something between scores and Softmax.

Source: https://onnx.ai/onnx/operators/onnx__Attention.html
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.analysis import GROWTH, dynamic_axes
from deploycli.exporters.graph.attention import masked_scores
from deploycli.exporters.graph.builder import Builder, replace
from deploycli.exporters.graph.movement_ops import swaps_last_axes
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.common.fusion import Fusion, maker
from deploycli.exporters.passes.drop_softmax_guards import far_from_overflow

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array

_RANK = 4


@dataclass(frozen=True)
class _Attention:
    """The operands of an attention.

    Attributes:
        query: [B, N, Sq, D].
        keys: [B, N, D, Skv], as the product reads them.
        values: [B, N, Skv, Dv].
        mask: a constant that broadcasts to [B, N, Sq, Skv], or None.
        scores: the product of query and keys.
        mix: the product of probabilities and values.
    """

    query: ir.Value
    keys: ir.Value
    values: ir.Value
    mask: Array | None
    scores: ir.Node
    mix: ir.Node


class EmitAttention(Fusion[_Attention]):
    """Write every attention as one operator. Equal within rounding."""

    opset = 23

    def read(self, node: ir.Node, analysis: Analysis) -> _Attention | None:
        """Read the operators around a Softmax."""
        read = _read(node, analysis) if node.op_type == "Softmax" and node.domain == "" else None
        if isinstance(read, str):
            self.remarks.append(Remark(label(node), read))
            return None
        return read

    def write(self, node: ir.Node, found: _Attention, builder: Builder) -> None:
        """Write the operator in the place of the last product."""
        a, analysis = found, builder.analysis
        transpose = maker(a.keys, "Transpose")
        keys: ir.Value | None = None
        if transpose is not None and swaps_last_axes(transpose.attributes.get_ints("perm", ())):
            keys = transpose.inputs[0]
        if keys is None:
            keys = builder.value("Transpose", [a.keys], a.mix, perm=[0, 1, 3, 2])
        operands = [a.query, keys, a.values]
        if a.mask is not None:
            dims = analysis.dims(a.scores.outputs[0])
            assert dims is not None, "it was looked at"
            mask = a.mask.reshape((1,) * (_RANK - a.mask.ndim) + a.mask.shape)
            # ONNX Runtime broadcasts a mask over samples and heads, not over queries and keys.
            operands.append(builder.constant(np.broadcast_to(mask, (*mask.shape[:2], *dims[2:]))))
        replace(a.mix.outputs[0], builder.value("Attention", operands, a.mix, scale=1.0))


def _read(softmax: ir.Node, analysis: Analysis) -> _Attention | str | None:
    """Read the operators around a Softmax; the reason where they are no attention, None where none is near."""
    scores_value, result = softmax.inputs[0], softmax.outputs[0]
    mixes = [usage for usage in result.uses() if usage.node.op_type == "MatMul" and usage.idx == 0]
    if scores_value is None or not mixes:
        return None
    dims = analysis.dims(scores_value)
    if dims is None or len(dims) != _RANK:
        return f"its scores have {'an unknown number of' if dims is None else len(dims)} dimensions, not 4"
    if softmax.attributes.get_int("axis", -1) not in (-1, _RANK - 1):
        return "its axis is not that of the keys"
    if len(mixes) != len(list(result.uses())) or len(mixes) > 1 or result.is_graph_output():
        return "its probabilities are read elsewhere too"
    mask = None
    if (add := maker(scores_value, "Add")) is not None:
        constants = [analysis.constant(value) for value in add.inputs]
        if (constants[0] is None) == (constants[1] is None):
            return "its mask is no constant"
        mask = constants[0] if constants[1] is None else constants[1]
        assert mask is not None, "one of them is a constant"
        if mask.size and mask.max(-1, initial=-np.inf).min() < -far_from_overflow(mask.dtype):
            return "its mask hides all keys from a query: a kernel may answer 0 there"
        if dynamic_axes(dims[2:]):
            return "its mask would have to be spelled out for every batch size"
        if (size := math.prod((*mask.shape[:-2], *dims[2:])) * mask.itemsize) > mask.nbytes + GROWTH:
            return f"{size} bytes of constants from {mask.nbytes}"
    above = masked_scores(softmax, analysis)
    if above is None or [step.node for step in above.steps] != ([] if add is None else [add]):
        return "its scores are no product, or something stands between"
    scores, mix = above.node, mixes[0].node
    query, keys, values = scores.inputs[0], scores.inputs[1], mix.inputs[1]
    if query is None or keys is None or values is None:
        return None
    heads = [(d[:2], len(d)) for value in (query, keys, values) if (d := analysis.dims(value)) is not None]
    if heads != [(dims[:2], _RANK)] * 3:
        return "query, key and value differ in their heads"
    return _Attention(query, keys, values, mask, scores, mix)
