"""Windows become heads where an attention mask differs from window to window.

Before -> after, for shifted-window attention with nW windows an image and N heads::

    MatMul(q [B*nW, N, S, D], k^T), Reshape [B, nW, N, S, S], Add(constant [1, nW, N, S, S]), Reshape [B*nW, N, S, S],
    Softmax, MatMul(v [B*nW, N, S, D])
    -> MatMul(q [B, nW*N, S, D], k^T), Add(constant [1, nW*N, S, S]), Softmax, MatMul(v [B, nW*N, S, D]),
    Reshape [B*nW, N, S, D]

The scores stay four-dimensional, and the constant broadcasts over the batch alone: the form that TensorRT documents for
fused attention ("Fused attention": an additive mask ``[B|1, N|1, Sq, Skv]``). Bit-equal: no number is computed anew.
Refused, for one: scores that something else reads as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.analysis import GROWTH, dynamic_axes
from deploycli.exporters.graph.attention import masked_scores
from deploycli.exporters.graph.builder import Builder, remove, replace
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.shapes import Dims

_SCORES_RANK = 5


@dataclass(frozen=True)
class _WindowedAttention:
    """The operators from the scores to the mixed values.

    Attributes:
        scores: q [B*nW, N, S, D] by k^T [B*nW, N, D, S].
        split: Reshape to [B, nW, N, S, S].
        add: the constant.
        join: Reshape back.
        softmax: over the last axis.
        mix: probabilities by v [B*nW, N, S, D].
        dims: B, nW, N, S, S.
        constant: [1, nW, N or 1, S, S], or what broadcasts to it.
    """

    scores: ir.Node
    split: ir.Node
    add: ir.Node
    join: ir.Node
    softmax: ir.Node
    mix: ir.Node
    dims: Dims
    constant: Array


class WindowsIntoHeads(GraphPass):
    """Bring windowed attention into four dimensions."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        builder = Builder(graph, analysis)
        modified = False
        for node in list(graph):
            if node.op_type == "Softmax" and node.domain == "":
                attention = self._read(node, analysis)
                if attention is not None:
                    _fold(attention, builder)
                    modified = True
        return modified

    def _read(self, softmax: ir.Node, analysis: Analysis) -> _WindowedAttention | None:
        above = masked_scores(softmax, analysis)
        between = () if above is None else tuple(step.node for step in above.steps)
        if above is None or [node.op_type for node in between] != ["Reshape", "Add", "Reshape"]:
            return None
        scores, (split, add, join) = above.node, between
        dims, folded = analysis.dims(add.outputs[0]), analysis.dims(join.outputs[0])
        if dims is None or folded is None or len(dims) != _SCORES_RANK:
            return None
        batch, windows, heads, *_ = dims
        if dynamic_axes(dims[1:]):
            return None
        if analysis.dims(scores.outputs[0]) != folded or folded != (batch * windows, *dims[2:]):
            return None
        constant = analysis.constant(add.inputs[1 - above.steps[1].position])
        if constant is None or np.broadcast_shapes(constant.shape, (1, *dims[1:])) != (1, *dims[1:]):
            return None
        if (size := math.prod(dims[1:]) * constant.itemsize) > constant.nbytes + GROWTH:
            self.remarks.append(Remark(label(softmax), f"{size} bytes of constants from {constant.nbytes}"))
            return None
        chain = (scores, split, add, join, softmax)
        if any(len(node.outputs[0].uses()) != 1 or node.outputs[0].is_graph_output() for node in chain):
            self.remarks.append(Remark(label(softmax), "its scores or probabilities are read elsewhere too"))
            return None
        mix, position = next((usage.node, usage.idx) for usage in softmax.outputs[0].uses())
        operands = (*scores.inputs, mix.inputs[1] if mix.op_type == "MatMul" else None)
        shapes = [analysis.dims(value) for value in operands]
        last = softmax.attributes.get_int("axis", -1) in (-1, len(folded) - 1)
        if position != 0 or not last or any(s is None or s[:2] != (batch * windows, heads) for s in shapes):
            self.remarks.append(Remark(label(softmax), "its windows and heads are not the outer axes of q, k and v"))
            return None
        return _WindowedAttention(scores, split, add, join, softmax, mix, dims, constant)


def _fold(attention: _WindowedAttention, builder: Builder) -> None:
    a, analysis = attention, builder.analysis
    batch, windows, heads, *rest = a.dims

    def folded(value: ir.Value | None, anchor: ir.Node) -> ir.Value:
        dims = analysis.dims(value)
        assert value is not None and dims is not None, "_read has looked at them"  # noqa: PT018 - one fact
        producer = value.producer()
        if producer is not None and producer.op_type == "Reshape" and producer.inputs[0] is not None:
            value = producer.inputs[0]  # a view of a view is a view
        # [B*nW, N, S, D] -> [B, nW*N, S, D]
        return builder.reshape(value, (batch, windows * heads, *dims[2:]), anchor)

    q, k, v = a.scores.inputs[0], a.scores.inputs[1], a.mix.inputs[1]
    scores = builder.value("MatMul", [folded(q, a.scores), folded(k, a.scores)], a.scores)
    # [1, nW, N, S, S] -> [1, nW*N, S, S]
    constant = np.broadcast_to(a.constant, (1, windows, heads, *rest)).reshape(1, windows * heads, *rest)
    shifted = builder.value("Add", [scores, builder.constant(constant)], a.add)
    probabilities = builder.value("Softmax", [shifted], a.softmax, axis=-1)
    mixed = builder.value("MatMul", [probabilities, folded(v, a.mix)], a.mix)
    dims = analysis.dims(a.mix.outputs[0])
    assert dims is not None, "it has the shape of v"
    replace(a.mix.outputs[0], builder.reshape(mixed, dims, a.mix))
    remove(builder.graph, [a.scores, a.split, a.add, a.join, a.softmax, a.mix])
