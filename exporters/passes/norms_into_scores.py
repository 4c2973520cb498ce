"""The norms of queries and keys go behind their product.

Before -> after, for cosine attention (Swin V2)::

    q / |q| [.., N, d], k / |k| [.., M, d]; MatMul(q / |q|, (k / |k|)^T), Mul(scale), Softmax
    -> MatMul(q, k^T), Mul(scale * 1 / |q| [.., N, 1]), Mul(1 / |k| [.., 1, M]), Softmax

A number for each row of one factor is one for each row of the product. TensorRT's fused attention takes both as
operands, where it would write the normalised queries and keys, in kernels of their own; and the projection of queries
and keys is straight in front of the attention.

``sum_i (q_i / n) k_i == (sum_i q_i k_i) / n``: equal within rounding. Refused, for one: a divisor that is another one
for each channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycli.exporters.graph.attention import is_product_of_activations, readers
from deploycli.exporters.graph.builder import Builder, replace
from deploycli.exporters.graph.movement_ops import swaps_last_axes
from deploycli.exporters.graph.operators import ELEMENTWISE, is_onnx
from deploycli.exporters.passes.common.tidy import sweep
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis

_MOST_STEPS = 6
"""Operators between the scores and their Softmax."""


@dataclass(frozen=True)
class _Norm:
    """A factor or divisor of every row of an operand of a product.

    Attributes:
        position: which operand.
        x: the operand without it, [.., N, d], or [.., d, N] once it is turned.
        norm: the factor or divisor, [.., N, 1].
        divides: it is a divisor.
        turn: the Transpose between it and the product, or None.
    """

    position: int
    x: ir.Value
    norm: ir.Value
    divides: bool
    turn: ir.Node | None


class NormsIntoScores(GraphPass):
    """Divide scores, not queries and keys, by norms. Equal within rounding."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        builder = Builder(graph, analysis)
        modified = False
        for node in list(graph):
            if is_product_of_activations(node, analysis) and _leads_to_softmax(node, analysis):
                norms = [found for i in (0, 1) if (found := _read(node, i, analysis)) is not None]
                if norms:
                    _write(node, norms, builder)
                    modified = True
        if modified:
            sweep(graph)
        return modified


def _leads_to_softmax(scores: ir.Node, analysis: Analysis) -> bool:
    """Say whether a product is read by a Softmax alone, through what works element by element and views."""

    def leads(node: ir.Node) -> tuple[int, ...] | None:
        if not is_onnx(node, "Reshape", *ELEMENTWISE):
            return None
        varying = tuple(i for i, value in enumerate(node.inputs) if analysis.constant(value) is None)
        return varying if len(varying) == 1 else None

    ends = list(readers(scores.outputs[0], leads, _MOST_STEPS))
    return bool(ends) and all(is_onnx(end.node, "Softmax") for end in ends)


def _read(scores: ir.Node, position: int, analysis: Analysis) -> _Norm | None:
    """Read an operand of a product as rows with a factor or a divisor each."""
    value = scores.inputs[position]
    node = None if value is None else value.producer()
    turn = None
    if node is not None and is_onnx(node, "Transpose") and swaps_last_axes(node.attributes.get_ints("perm", ())):
        turn, value = node, node.inputs[0]
        node = None if value is None else value.producer()
    if node is None or value is None or not is_onnx(node, "Div", "Mul") or (position == 1) != (turn is not None):
        return None
    rows = analysis.dims(value)
    for x, norm in ((0, 1), (1, 0)) if node.op_type == "Mul" else ((0, 1),):
        operand, factor = node.inputs[x], node.inputs[norm]
        fits = rows is not None and analysis.dims(operand) == rows and analysis.dims(factor) == (*rows[:-1], 1)
        if fits and operand is not None and factor is not None and analysis.constant(factor) is None:
            return _Norm(position, operand, factor, node.op_type == "Div", turn)
    return None


def _write(scores: ir.Node, norms: list[_Norm], builder: Builder) -> None:
    operands = list(scores.inputs)
    factors = []
    for each in norms:
        x, factor = each.x, each.norm
        if each.divides:
            factor = builder.value("Reciprocal", [factor], scores)
        if each.turn is not None:
            perm = list(each.turn.attributes.get_ints("perm", ()))
            x, factor = (builder.value("Transpose", [value], scores, perm=perm) for value in (x, factor))
        operands[each.position] = x
        factors.append(factor)
    value = builder.value("MatMul", operands, scores)
    for factor in factors:
        # [.., N, M] * [.., N, 1] * [.., 1, M]
        value = builder.value("Mul", [value, factor], scores)
    replace(scores.outputs[0], value)
