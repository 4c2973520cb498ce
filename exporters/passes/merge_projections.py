"""Projections of one value become one projection.

Before -> after, for the query, key and value of an attention::

    MatMul(x, Wq), Add(bq); MatMul(x, Wk), Add(bk); MatMul(x, Wv), Add(bv)
    -> MatMul(x, [Wq Wk Wv]), Add([bq bk bv]), Split

Each output column is the same sum of the same products; a kernel may add them in another order, so the result is equal
within rounding. A missing bias is one of zeros. Refused, for one: a weight that other operators read as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.attention import is_read_in_place
from deploycli.exporters.graph.builder import Builder, remove_dead, replace_all
from deploycli.exporters.graph.projections import bias_of
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array


@dataclass(frozen=True)
class _Projection:
    """``MatMul(x, weight) + bias``.

    Attributes:
        matmul: the product.
        add: the sum, or None where there is no bias.
        weight: [K, N].
        bias: [N], or None.
    """

    matmul: ir.Node
    add: ir.Node | None
    weight: Array
    bias: Array | None

    @property
    def result(self) -> ir.Value:
        """What the projection gives, [..., N]."""
        return (self.add or self.matmul).outputs[0]


class MergeProjections(GraphPass):
    """Let every value be projected once. Equal within rounding."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        builder = Builder(graph, analysis)
        groups: dict[ir.Value, list[_Projection]] = {}
        for node in graph:
            projection = self._read(node, analysis)
            if projection is not None and node.inputs[0] is not None:
                groups.setdefault(node.inputs[0], []).append(projection)
        merged = [group for group in groups.values() if len(group) > 1 and len({len(p.weight) for p in group}) == 1]
        for group in merged:
            _merge(group, builder)
        return bool(merged)

    def _read(self, node: ir.Node, analysis: Analysis) -> _Projection | None:
        if node.op_type != "MatMul" or node.domain != "" or node.inputs[1] is None:
            return None
        weight = analysis.constant(node.inputs[1])
        if weight is None or weight.ndim != 2 or analysis.dims(node.outputs[0]) is None:
            return None
        if is_read_in_place(node, analysis):
            return None
        if len(node.inputs[1].uses()) > 1:
            self.remarks.append(Remark(label(node), "its weight is read elsewhere too"))
            return None
        found = bias_of(node, analysis)
        if found is not None and found.numbers.ndim == 1:
            return _Projection(node, found.add, weight, found.numbers)
        return _Projection(node, None, weight, None)


def _merge(group: list[_Projection], builder: Builder) -> None:
    anchor = group[0].matmul  # stands before every reader of any result
    x = anchor.inputs[0]  # which may be a part of a merged projection by now
    sizes = [projection.weight.shape[1] for projection in group]
    weight = np.concatenate([projection.weight for projection in group], axis=1)
    value = builder.value("MatMul", [x, builder.constant(weight)], anchor)
    if any(projection.bias is not None for projection in group):
        zeros = [np.zeros(size, weight.dtype) for size in sizes]
        biases = [zero if p.bias is None else p.bias for p, zero in zip(group, zeros, strict=True)]
        value = builder.value("Add", [value, builder.constant(np.concatenate(biases))], anchor)
    operands = [value, builder.constant(np.array(sizes, np.int64))]
    split = builder.node("Split", operands, anchor, len(group), axis=-1)
    replace_all({projection.result: output for projection, output in zip(group, split.outputs, strict=True)})
    remove_dead(builder.graph, [node for p in group for node in (p.matmul, p.add) if node is not None])
