"""A Softmax whose scores are finite needs no guard.

Before -> after, as PyTorch decomposes scaled_dot_product_attention::

    Softmax(s) -> p; Where(IsNaN(p), 0, p) -> p

The guard is for a query that sees no key at all: a row of minus infinities. Where no mask, or a finite one, is added to
the scores, there is no such row. Bit-equal for all scores that are numbers. Refused, for one: a mask of infinities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exporters.rewrite.builder import replace
from exporters.rewrite.graph_pass import GraphPass
from exporters.rewrite.unique import label
from exporters.steps import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporters.rewrite.facts import Facts

_ARITHMETIC = frozenset({"Add", "Div", "Mul", "Sub"})


class DropSoftmaxGuard(GraphPass):
    """Let products read probabilities as they are."""

    def transform(self, graph: ir.Graph, facts: Facts) -> bool:
        """Run the pass; see the module's documentation."""
        modified = False
        for node in list(graph):
            probabilities = _guarded(node, facts)
            if probabilities is None:
                continue
            softmax = probabilities.producer()
            if softmax is not None and softmax.inputs[0] is not None and _is_finite(softmax.inputs[0], facts):
                replace(node.outputs[0], probabilities)
                modified = True
            else:
                self.refusals.append(Refusal(label(node), "its mask may hide all keys from a query"))
        return modified


def _guarded(node: ir.Node, facts: Facts) -> ir.Value | None:
    """Read a node as ``where(isnan(p), 0, p)`` of the probabilities p; return them."""
    if node.op_type != "Where" or node.domain != "" or node.outputs[0].is_graph_output():
        return None
    condition, zero, value = node.inputs
    test = None if condition is None else condition.producer()
    softmax = None if value is None else value.producer()
    zeros = facts.constant(zero)
    if test is None or test.op_type != "IsNaN" or test.domain != "" or test.inputs[0] is not value:
        return None
    if softmax is None or softmax.op_type != "Softmax" or softmax.domain != "" or zeros is None or zeros.any():
        return None
    return value if facts.dims(node.outputs[0]) == facts.dims(value) else None


def _is_finite(scores: ir.Value, facts: Facts) -> bool:
    """Say whether scores are a product, perhaps scaled, with finite constants added."""
    while (node := scores.producer()) is not None and node.domain == "" and node.op_type != "MatMul":
        if facts.only_moves(node) and node.inputs[0] is not None and node.op_type == "Reshape":
            scores = node.inputs[0]
            continue
        constants = [facts.constant(value) for value in node.inputs]
        known = [i for i, constant in enumerate(constants) if constant is not None and np.isfinite(constant).all()]
        if node.op_type not in _ARITHMETIC or len(known) != 1:
            return False
        operand = node.inputs[1 - known[0]]
        if operand is None:
            return False
        scores = operand
    return node is not None and node.domain == ""
