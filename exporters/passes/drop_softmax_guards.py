"""A Softmax whose scores are finite needs no guard.

Before -> after, as PyTorch decomposes scaled_dot_product_attention::

    Softmax(s) -> p; Where(IsNaN(p), 0, p) -> p

The guard is for a query that sees no key at all: a row of minus infinities. Scores are bounded through all that is
added to them and multiplied into them, in the type that they have there: two finite masks may overflow together, and so
may a scale of the queries and one of the keys. Where each row keeps a finite score, and none is plus infinity, there is
no NaN. Bit-equal for all products far from overflow. Refused, for one: a constant mask that hides every key from some
query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from deploycli.exporters.graph.builder import replace
from deploycli.exporters.graph.movement_ops import MOVEMENT
from deploycli.exporters.graph.operators import ARITHMETIC
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.common.fusion import maker
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array


class DropSoftmaxGuards(GraphPass):
    """Let products read probabilities as they are."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        modified = False
        for node in list(graph):
            probabilities = _guarded(node, analysis)
            if probabilities is None:
                continue
            softmax = probabilities.producer()
            if softmax is not None and _is_safe(softmax, analysis):
                replace(node.outputs[0], probabilities)
                modified = True
            else:
                self.remarks.append(Remark(label(node), "its mask may hide all keys from a query"))
        return modified


def _guarded(node: ir.Node, analysis: Analysis) -> ir.Value | None:
    """Read a node as ``where(isnan(p), 0, p)`` of the probabilities p; return them."""
    if node.op_type != "Where" or node.domain != "" or node.outputs[0].is_graph_output():
        return None
    condition, zero, value = node.inputs
    test, softmax, zeros = maker(condition, "IsNaN"), maker(value, "Softmax"), analysis.constant(zero)
    if test is None or test.inputs[0] is not value or softmax is None or zeros is None or zeros.any():
        return None
    return value if analysis.dims(node.outputs[0]) == analysis.dims(value) else None


@dataclass(frozen=True)
class _Bounds:
    """Between which numbers each score lies; shapes broadcast to the scores'."""

    lower: Array
    upper: Array


def _is_safe(softmax: ir.Node, analysis: Analysis) -> bool:
    """Say whether no row of scores is hidden as a whole, and none overflows: its Softmax has no NaN then."""
    scores = softmax.inputs[0]
    bounds, axes = None if scores is None else _bounds(scores, analysis), analysis.axes(scores)
    if bounds is None or axes is None:
        return False
    axis = softmax.attributes.get_int("axis", -1)
    behind = -axis if axis < 0 else len(axes) - axis  # counted from the end, as broadcasting does
    lower = bounds.lower if behind > bounds.lower.ndim else bounds.lower.max(-behind)
    return bool(np.isfinite(lower).all() and (bounds.upper < np.inf).all())  # a NaN is neither


def _bounds(scores: ir.Value, analysis: Analysis) -> _Bounds | None:
    """Bound scores that are a product, with what is added to it and multiplied into it; None where they are not."""
    path: list[ir.Node] = []
    while (node := scores.producer()) is not None and (node.domain, node.op_type) != ("", "MatMul"):
        moving = _varying(node, analysis)
        if moving is None:
            return None
        path.insert(0, node)
        scores = moving
    fact = analysis[scores]
    if node is None or fact is None or not fact.dtype.is_floating_point():
        return None
    usual = far_from_overflow(fact.dtype.numpy())
    with np.errstate(all="ignore"):  # what overflows is the answer
        times = math.prod(_times_usual(value, math.sqrt(usual), analysis) for value in node.inputs)
        most = np.array(usual * max(times, 1)).astype(fact.dtype.numpy()).astype(np.float64)
        bounds = _Bounds(-most, most)
        for node in path:
            bounds = _after(node, bounds, analysis)
    return bounds


def far_from_overflow(dtype: np.dtype[Any]) -> float:
    """Return a number that a product of queries and keys is taken to stay below, and a mask that hides is beyond."""
    largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]  # it ships no types
    return largest / 2 if largest < 1e6 else largest * 2.0**-28


_MOST_LOOKED_AT = 128
"""So many operators above a product are looked at; with more, no bound is known."""

_USUAL_WEIGHT = 2.0**10
"""A projection by no larger numbers than this leaves numbers of the usual size."""


def _times_usual(operand: ir.Value | None, usual: float, analysis: Analysis) -> float:
    """Return how many times larger than usual an operand of a product may be, for the constants that it is made with.

    Queries and keys are taken to be of the usual size where no constant says otherwise: a finite scale, or a mask that
    is added before the product, may let the product overflow.
    """
    found: dict[ir.Value | None, float] = {}

    def of(value: ir.Value | None) -> float:
        if value not in found:
            found[value] = math.inf
            if len(found) <= _MOST_LOOKED_AT:
                constant = analysis.constant(value)
                node = None if value is None else value.producer()
                if constant is not None:
                    found[value] = _largest(constant) / usual
                elif node is None or node.domain != "":
                    found[value] = 1
                else:
                    found[value] = made_by(node)
        return found[value]

    def factor(value: ir.Value | None) -> float:
        constant = analysis.constant(value)
        return of(value) if constant is None else _largest(constant)

    def made_by(node: ir.Node) -> float:
        first = node.inputs[0] if node.inputs else None
        constants = [constant for constant in map(analysis.constant, node.inputs[1:]) if constant is not None]
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            weights = max([1, *(_largest(x) / _USUAL_WEIGHT for x in constants)])
            return weights * of(first) if constants else max(map(of, node.inputs))
        if node.op_type in ("BatchNormalization", "LayerNormalization"):
            return max([1, *(_largest(x) / _USUAL_WEIGHT for x in constants)])
        if node.op_type == "Mul":
            return math.prod(map(factor, node.inputs))
        if node.op_type == "Div":
            divisor = analysis.constant(node.inputs[1])
            return of(first) if divisor is None else of(first) / float(np.abs(divisor).min(initial=math.inf))
        if node.op_type in _KEEPS_SIZE or node.op_type in MOVEMENT:
            numbers = [value for value in node.inputs if _is_number(value, analysis)]
            return max(map(of, numbers), default=1)
        return 1

    return of(operand)


_KEEPS_SIZE = frozenset({"Abs", "Add", "Cast", "Identity", "Max", "Min", "Neg", "Relu", "Sub", "Sum", "Where"})
"""Operators whose results are of their operands' size."""


def _is_number(value: ir.Value | None, analysis: Analysis) -> bool:
    fact = None if value is None else analysis[value]
    return fact is None or fact.dtype.is_floating_point()


def _largest(constant: Array) -> float:
    """Return the largest magnitude of a constant; where one is no number, infinity."""
    largest = float(np.abs(constant.astype(np.float64)).max(initial=0))
    return math.inf if math.isnan(largest) else largest


def _varying(node: ir.Node, analysis: Analysis) -> ir.Value | None:
    """Return the operand of a node that is bounded by its own bounds, where all others are constant."""
    if node.domain != "" or len(node.outputs) != 1:
        return None
    if node.op_type == "Cast" or (node.op_type != "Concat" and analysis.only_moves(node)):
        return node.inputs[0]
    varying = [value for value in node.inputs if analysis.constant(value) is None]
    if node.op_type not in ARITHMETIC or len(varying) != 1 or (node.op_type == "Div" and varying[0] is node.inputs[1]):
        return None
    return varying[0]


def _after(node: ir.Node, bounds: _Bounds, analysis: Analysis) -> _Bounds:
    """Return the bounds of what a node makes."""
    if node.op_type in ARITHMETIC:
        operands = [analysis.constant(value) for value in node.inputs]
        ends = [
            ARITHMETIC[node.op_type](*(end if x is None else x.astype(np.float64) for x in operands))
            for end in (bounds.lower, bounds.upper)
        ]
        bounds = _Bounds(np.minimum(*ends), np.maximum(*ends))  # either is NaN where one is
    elif node.op_type != "Cast":  # where the numbers go is not followed
        bounds = _Bounds(np.asarray(bounds.lower.min()), np.asarray(bounds.upper.max()))
    fact = analysis[node.outputs[0]]
    if fact is None or not fact.dtype.is_floating_point():
        return _Bounds(np.array(np.nan), np.array(np.nan))
    # As it is rounded there.
    lower, upper = (end.astype(fact.dtype.numpy()).astype(np.float64) for end in (bounds.lower, bounds.upper))
    return _Bounds(lower, upper)
