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
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.attention import readers
from deploycli.exporters.graph.builder import Builder, remove_dead, replace
from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.movement_ops import data_operands
from deploycli.exporters.graph.operators import operand
from deploycli.exporters.graph.regions import moved
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    from collections.abc import Iterable

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array

_SHIFTS = (2.0**-4, 2.0**2)
"""The least and the most that is added to a normalised vector, whose elements are about 1."""


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
        for node in list(graph):
            if node.op_type == "LayerNormalization" and node.domain == "" and node.graph is graph:
                found = self._read(node, analysis)
                if isinstance(found, str):
                    self.remarks.append(Remark(label(node), found))
                elif found:
                    _fold(node, found, builder)
                    folded = True
        return folded

    def _read(self, norm: ir.Node, analysis: Analysis) -> list[_Reader] | str:
        """Return what reads a LayerNormalization; none where nothing is to be folded, or why that cannot be done."""
        dims = analysis.dims(norm.outputs[0])
        gamma, beta = (analysis.constant(operand(norm, i)) for i in (1, 2))
        if dims is None or len(dims) < 2 or norm.attributes.get_int("axis", -1) not in (-1, len(dims) - 1):
            return []
        found, others = _find_readers(norm.outputs[0], analysis)
        if not any(reader.add is not None for reader in found):
            return []
        if others or norm.outputs[0].is_graph_output() or any(out.uses() for out in norm.outputs[1:]):
            return f"it is read by {', '.join(sorted({node.op_type for node in others})) or 'an output'} as well"
        if gamma is None or gamma.shape != dims[-1:] or gamma.dtype.kind != "f":
            return "its scale is not one number for each channel"
        if operand(norm, 2) is not None and (beta is None or beta.shape != gamma.shape):
            return "its bias is not one number for each channel"
        weights = {reader.matmul.inputs[1] for reader in found}
        if any(weight is not None and len(weight.uses()) > 1 for weight in weights):
            return "a weight is read elsewhere too"
        if not all(np.isfinite(a).all() for r in found for a in (r.weight, r.bias, gamma, beta) if a is not None):
            return "its weights are not all finite"
        return found


def _find_readers(value: ir.Value, analysis: Analysis) -> tuple[list[_Reader], list[ir.Node]]:
    """Return the products by constants that read a value or rows of it, and what else does."""

    def leads(node: ir.Node) -> tuple[int, ...] | None:
        return (0,) if _moves_rows(node, analysis) else None

    found, others = list[_Reader](), list[ir.Node]()
    for end in readers(value, leads):
        weight = analysis.constant(operand(end.node, 1)) if end.node.op_type == "MatMul" else None
        if weight is None or weight.ndim != 2 or end.position != 0 or weight.dtype.kind != "f":
            others.append(end.node)
        else:
            found.append(_with_bias(end.node, weight, analysis))
    return found, others


def _moves_rows(node: ir.Node, analysis: Analysis) -> bool:
    """Say whether a node moves rows and leaves the channels of each as they are."""
    dims, result = analysis.dims(operand(node, 0)), analysis.dims(node.outputs[0])
    if not dims or not result or dims[-1] != result[-1] or len(node.outputs) > 1 or not analysis.only_moves(node):
        return False
    if len(data_operands(node)) > 1 or node.inputs[0] is None:
        return False
    try:
        (channels,) = moved(node, {node.inputs[0]: IndexMap.coordinate(dims, len(dims) - 1)}, analysis)
    except ValueError:
        return False
    return channels.key == IndexMap.coordinate(result, len(result) - 1).key


def _with_bias(matmul: ir.Node, weight: Array, analysis: Analysis) -> _Reader:
    """Return a product with its bias where an attention reads the sum."""
    uses = list(matmul.outputs[0].uses())
    add = uses[0].node if len(uses) == 1 and not matmul.outputs[0].is_graph_output() else None
    if add is not None and add.op_type == "Add" and add.domain == "":
        bias = analysis.constant(operand(add, 1 - uses[0].idx))
        fits = bias is not None and bias.shape[-1:] == weight.shape[1:] and bias.size == weight.shape[1]
        keeps = analysis.dims(add.outputs[0]) == analysis.dims(matmul.outputs[0])
        if bias is not None and fits and keeps and _is_read_by_attention(add.outputs[0], analysis):
            return _Reader(matmul, weight, add, bias.reshape(-1))
    return _Reader(matmul, weight, None, None)


def _is_read_by_attention(value: ir.Value, analysis: Analysis) -> bool:
    """Say whether only movement stands between a value and products of two activations, which are all that read it."""

    def leads(node: ir.Node) -> tuple[int, ...] | None:
        return tuple(data_operands(node)) if analysis.only_moves(node) else None

    ends = [] if value.is_graph_output() else list(readers(value, leads))
    return bool(ends) and all(
        end.node.op_type == "MatMul"
        and end.node.domain == ""
        and all(analysis.constant(v) is None for v in end.node.inputs)
        for end in ends
    )


def _fold(norm: ir.Node, found: Iterable[_Reader], builder: Builder) -> None:
    """Give the products their new weights, and the LayerNormalization a scale of one and a bias of ``t``."""
    analysis = builder.analysis
    gamma, beta = (analysis.constant(operand(norm, i)) for i in (1, 2))
    assert gamma is not None, "_read looked at it"
    parts = [(reader, *_parts(reader, gamma, beta)) for reader in found]
    shift = best_shift([(centred, bias) for _, centred, bias in parts], len(gamma))
    for reader, centred, bias in parts:
        weight = (centred + bias / (shift * len(gamma)) if shift else centred).astype(reader.weight.dtype)
        reader.matmul.replace_input_with(1, builder.constant(weight))
        if reader.add is not None:
            replace(reader.add.outputs[0], reader.matmul.outputs[0])
            remove_dead(builder.graph, [reader.add])
    ones = builder.constant(np.ones(gamma.shape, gamma.dtype))
    shifts = [builder.constant(np.full(gamma.shape, shift, gamma.dtype))] if shift else []
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    stash = norm.attributes.get_int("stash_type", 1)
    inputs = [norm.inputs[0], ones, *shifts]
    made = builder.value("LayerNormalization", inputs, norm, axis=-1, epsilon=epsilon, stash_type=stash)
    replace(norm.outputs[0], made)
    remove_dead(builder.graph, [norm])


def _parts(reader: _Reader, gamma: Array, beta: Array | None) -> tuple[Array, Array]:
    """Return the weights that a normalised vector meets, their columns centred, [C, M], and the bias, [M], in FP64."""
    weight = reader.weight.astype(np.float64)
    bias = np.zeros(weight.shape[1]) if reader.bias is None else reader.bias.astype(np.float64)
    if beta is not None:
        bias = bias + beta.astype(np.float64) @ weight
    scaled = gamma.astype(np.float64)[:, None] * weight
    return scaled - scaled.mean(0), bias


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
