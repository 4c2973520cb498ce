"""The bias of a projection behind a LayerNormalization goes into the weights.

Before -> after, for the query, key and value of an attention::

    LayerNormalization(x, gamma, beta), MatMul(W [C, M]), Add(b [M])
    -> LayerNormalization(x, 1, t), MatMul(W')
       W' = diag(gamma) W - colmean(diag(gamma) W) + (beta W + b) / (t C)

A normalised vector n sums to zero, whatever its epsilon. So a number that is added to all of a column of the weights
adds nothing to ``n W'``, and ``t`` times that to ``(n + t) W'``: exactly what a bias is. Of what is left, ``-colmean``
keeps ``t`` from adding anything else. TensorRT multiplies three projections without a bias by one kernel, whose result
the attention reads in place; with a bias it is copied (:mod:`~deploycli.exporters.passes.tokens_first`).

Every reader of the LayerNormalization has to be a product by constants, and takes its part of ``beta``; where one is
the projection of an attention, all are folded. ``t`` is a power of two near the one at which rounding ``n + t`` and
``W'`` to a shorter type adds least to the result, which is known in closed form (:func:`best_shift`).

Algebra in float64, rounded once: equal within rounding. Refused, for one: a LayerNormalization that is read by a
residual connection as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycli.exporters.graph.attention import is_product_of_activations, readers
from deploycli.exporters.graph.builder import Builder, remove_dead, replace
from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.movement_ops import data_operands
from deploycli.exporters.graph.operators import is_onnx, operand
from deploycli.exporters.graph.projections import bias_of
from deploycli.exporters.graph.regions import moved, moves_one
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array

_SHIFTS = (2.0**-4, 2.0**2)
"""The least and the most that is added to a normalised vector, whose elements are about 1."""

_AN_OUTPUT = "an output"


@dataclass(frozen=True)
class _Reader:
    """A product that reads a LayerNormalization.

    Attributes:
        matmul: ``MatMul(y, W)``.
        weight: W, [C, M].
        add: the sum with a bias that goes into the weights; None where none does.
        bias: [M], or None.
    """

    matmul: ir.Node
    weight: Array
    add: ir.Node | None
    bias: Array | None


class FoldBias(GraphPass):
    """Fold biases behind a LayerNormalization into the weights. Equal within rounding."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        builder = Builder(graph, analysis)
        folded = False
        for norm in [node for node in graph if is_onnx(node, "LayerNormalization")]:
            plan = _plan(norm, analysis)
            if isinstance(plan, str):
                self.remarks.append(Remark(label(norm), plan))
            elif plan is not None:
                _fold(norm, plan, builder)
                folded = True
        return folded


@dataclass(frozen=True)
class _Plan:
    """What becomes of a LayerNormalization.

    Attributes:
        shift: its new bias, in all channels; 0 for none.
        weights: its readers with their new weights.
    """

    shift: float
    weights: tuple[tuple[_Reader, Array], ...]


def _plan(norm: ir.Node, analysis: Analysis) -> _Plan | str | None:
    """Return what a LayerNormalization becomes; None where nothing is to be folded, or why that cannot be done."""
    dims = analysis.dims(norm.outputs[0])
    if dims is None or len(dims) < 2 or norm.attributes.get_int("axis", -1) not in (-1, len(dims) - 1):
        return None
    found, others = _find_readers(norm, analysis)
    if all(reader.add is None for reader in found):
        return None
    if others:
        return f"it is read by {', '.join(sorted(others))} as well"
    if any(w is not None and len(w.uses()) > 1 for w in (reader.matmul.inputs[1] for reader in found)):
        return "a weight is read elsewhere too"
    gamma, beta = (analysis.constant(operand(norm, i)) for i in (1, 2))
    if gamma is None or gamma.shape != dims[-1:] or gamma.dtype.kind != "f":
        return "its scale is not one number for each channel"
    if operand(norm, 2) is not None and (beta is None or beta.shape != gamma.shape):
        return "its bias is not one number for each channel"
    parts = [_parts(reader, gamma, beta) for reader in found]
    if not all(np.isfinite(array).all() for part in parts for array in part):
        return "its weights are not all finite"
    shift = best_shift(parts, len(gamma))
    weights = [_shifted(*part, shift, reader.weight.dtype) for reader, part in zip(found, parts, strict=True)]
    if not all(np.isfinite(weight).all() for weight in weights):
        return "its weights would be too large for their type"
    return _Plan(shift, tuple(zip(found, weights, strict=True)))


def _find_readers(norm: ir.Node, analysis: Analysis) -> tuple[list[_Reader], set[str]]:
    """Return the products by constants that read rows of what a node makes, and what else does."""
    others = set[str]()

    def leads(node: ir.Node) -> tuple[int, ...] | None:
        if not _moves_rows(node, analysis):
            return None
        if node.outputs[0].is_graph_output():
            others.add(_AN_OUTPUT)
        return (0,)

    found = list[_Reader]()
    for end in readers(norm.outputs[0], leads):
        # What is in an inner graph cannot be told apart from what is not known.
        is_product = is_onnx(end.node, "MatMul") and end.position == 0 and end.node.graph is norm.graph
        weight = analysis.constant(end.node.inputs[1]) if is_product else None
        if weight is None or weight.ndim != 2 or weight.dtype.kind != "f":
            others.add(end.node.op_type)
        else:
            found.append(_with_bias(end.node, weight, analysis))
    if norm.outputs[0].is_graph_output() or any(out.uses() or out.is_graph_output() for out in norm.outputs[1:]):
        others.add(_AN_OUTPUT)
    return found, others


def _moves_rows(node: ir.Node, analysis: Analysis) -> bool:
    """Say whether a node moves rows and leaves the channels of each as they are."""
    dims, result = analysis.dims(operand(node, 0)), analysis.dims(node.outputs[0])
    if not dims or not result or dims[-1] != result[-1] or len(node.outputs) > 1 or not moves_one(node, analysis):
        return False
    assert node.inputs[0] is not None, "movement has an operand"
    try:
        (channels,) = moved(node, {node.inputs[0]: IndexMap.coordinate(dims, len(dims) - 1)}, analysis)
    except ValueError:
        return False
    return channels.key == IndexMap.coordinate(result, len(result) - 1).key


def _with_bias(matmul: ir.Node, weight: Array, analysis: Analysis) -> _Reader:
    """Return a product with its bias where an attention reads the sum."""
    found = bias_of(matmul, analysis)
    if found is not None and _is_read_by_attention(found.add.outputs[0], analysis):
        return _Reader(matmul, weight, found.add, found.numbers.reshape(-1))
    return _Reader(matmul, weight, None, None)


def _is_read_by_attention(value: ir.Value, analysis: Analysis) -> bool:
    """Say whether only movement stands between a value and products of two activations, which are all that read it."""

    def leads(node: ir.Node) -> tuple[int, ...] | None:
        return tuple(data_operands(node)) if analysis.only_moves(node) else None

    ends = [] if value.is_graph_output() else list(readers(value, leads))
    return bool(ends) and all(is_product_of_activations(end.node, analysis) for end in ends)


def _parts(reader: _Reader, gamma: Array, beta: Array | None) -> tuple[Array, Array]:
    """Return the weights that a normalised vector meets, their columns centred, [C, M], and the bias, [M], in FP64."""
    weight = reader.weight.astype(np.float64)
    bias = np.zeros(weight.shape[1]) if reader.bias is None else reader.bias.astype(np.float64)
    with np.errstate(invalid="ignore"):  # what is not finite is refused
        if beta is not None:
            bias = bias + beta.astype(np.float64) @ weight
        scaled = gamma.astype(np.float64)[:, None] * weight
        return scaled - scaled.mean(0), bias


def _shifted(centred: Array, bias: Array, shift: float, dtype: np.dtype[Any]) -> Array:
    """Return the weights by which ``shift`` in every channel is multiplied to the bias, [C, M]."""
    with np.errstate(over="ignore"):  # what is too large for a short type is infinite, and refused
        return (centred + bias / (shift * len(centred)) if shift else centred).astype(dtype)


def _fold(norm: ir.Node, plan: _Plan, builder: Builder) -> None:
    """Give the products their new weights, and the LayerNormalization a scale of one and a bias of ``t``."""
    for reader, weight in plan.weights:
        reader.matmul.replace_input_with(1, builder.constant(weight))
        if reader.add is not None:
            replace(reader.add.outputs[0], reader.matmul.outputs[0])
            remove_dead(builder.graph, [reader.add])
    gamma = builder.analysis.constant(operand(norm, 1))
    assert gamma is not None, "_plan looked at it"
    ones = builder.constant(np.ones(gamma.shape, gamma.dtype))
    shifts = [builder.constant(np.full(gamma.shape, plan.shift, gamma.dtype))] if plan.shift else []
    attributes = {
        "axis": -1,
        "epsilon": norm.attributes.get_float("epsilon", 1e-5),
        "stash_type": norm.attributes.get_int("stash_type", 1),
    }
    made = builder.value("LayerNormalization", [norm.inputs[0], ones, *shifts], norm, **attributes)
    replace(norm.outputs[0], made)
    remove_dead(builder.graph, [norm])


def best_shift(parts: Iterable[tuple[Array, Array]], channels: int) -> float:
    """Return the power of two ``t`` at which rounding adds least, 0 where there is no bias.

    Rounding errors of ``y = n + t`` and of ``W' = G + B / (t C)`` grow with their squares, whose sums over a column are
    ``C (1 + t^2)`` and, as the columns of G are centred, ``sum(G^2) + B^2 / (t^2 C)``. Their product is least at
    ``t^4 = sum(B^2) / (C sum(G^2))``, summed over all columns.

    Args:
        parts: for every product the centred weights G, [C, M], and the bias B, [M].
        channels: C.
    """
    centred = bias = 0.0
    for weights, biases in parts:
        centred += float(np.square(weights).sum())
        bias += float(np.square(biases).sum())
    if bias == 0:
        return 0.0
    best = _SHIFTS[1] if centred == 0 else (bias / (channels * centred)) ** 0.25
    low, high = _SHIFTS
    return 2.0 ** round(math.log2(min(max(best, low), high)))
