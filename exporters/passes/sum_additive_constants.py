"""Additive constants meet across data movement and become one.

Before -> after, for shifted-window attention::

    Add(scores, bias [1, N, S, S]), Reshape [B, nW, N, S, S], Add(mask [1, nW, 1, S, S])
    -> Reshape, Add(constant [1, nW, N, S, S])

``move(x + a) + b == move(x) + (move(a) + b)``: an addition is re-associated, so the result is equal within rounding,
not bit for bit. Refused, for one: a first sum that something else reads as well.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.analysis import GROWTH, dynamic_axes
from deploycli.exporters.graph.builder import Builder, remove, replace
from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.movement_ops import NOWHERE
from deploycli.exporters.graph.regions import moved
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.fold_constants import narrowed
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array


class SumAdditiveConstants(GraphPass):
    """Let each value receive one additive constant instead of several."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        builder = Builder(graph, analysis)
        modified = False
        for node in list(graph):
            if node.graph is graph and self._merge(node, builder):
                modified = True
        return modified

    def _merge(self, second: ir.Node, builder: Builder) -> bool:
        """Merge the constant of the Add that the second Add's operand comes from."""
        analysis = builder.analysis
        operands = _sum_with_constant(second, analysis)
        if operands is None:
            return False
        summand, b = operands
        path: list[ir.Node] = []
        first = summand.producer()
        while first is not None and (inner := _sum_with_constant(first, analysis)) is None:
            source = first.inputs[0] if first.inputs else None
            if source is None or not analysis.only_moves(first) or len(first.outputs) != 1 or first.op_type == "Concat":
                return False
            path.insert(0, first)
            first = source.producer()
        if first is None or inner is None:
            return False
        if any(len(n.outputs[0].uses()) != 1 or n.outputs[0].is_graph_output() for n in (first, *path)):
            self.remarks.append(Remark(label(second), "the first sum is read elsewhere too"))
            return False
        x, a = inner
        total = _moved_sum(first.outputs[0], a, path, b, analysis)
        if isinstance(total, str):
            self.remarks.append(Remark(label(second), total))
            return False
        for node in path:
            x = builder.value(node.op_type, [x, *node.inputs[1:]], second, **node.attributes)
        constant = builder.constant(total, name=f"{second.outputs[0].name}_constant")
        replace(second.outputs[0], builder.value("Add", [x, constant], second))
        remove(builder.graph, [first, *path, second])
        return True


def _sum_with_constant(node: ir.Node, analysis: Analysis) -> tuple[ir.Value, Array] | None:
    """Read a node as ``x + constant``."""
    if node.op_type != "Add" or node.domain != "":
        return None
    x, y = node.inputs
    if x is None or y is None or analysis.dims(node.outputs[0]) is None:
        return None
    for value, constant in ((x, analysis.constant(y)), (y, analysis.constant(x))):
        if constant is not None and analysis.dims(value) == analysis.dims(node.outputs[0]):
            return value, constant
    return None


def _moved_sum(source: ir.Value, a: Array, path: list[ir.Node], b: Array, analysis: Analysis) -> Array | str:
    """Return ``move(a) + b``, as small as broadcasting allows, or the reason why there is no such constant."""
    dims, most = analysis.dims(source), a.nbytes + b.nbytes + GROWTH
    assert dims is not None, "both sums have a known shape"
    small = narrowed(a)
    try:
        index_map = IndexMap.identity(small.shape).broadcast_to(dims)
        for node in path:
            assert node.inputs[0] is not None, "movement has an operand"
            (index_map,) = moved(node, {node.inputs[0]: index_map}, analysis)
        block = index_map.block()
    except ValueError as error:
        return str(error)
    if dynamic_axes(block.shape):
        return "the constant would depend on the batch size"
    size = math.prod(np.broadcast_shapes(block.shape, b.shape)) * a.itemsize
    if size > most:
        return f"{size} bytes of constants from {a.nbytes + b.nbytes}"
    index = block.dense()
    with np.errstate(over="ignore"):
        total = narrowed(np.where(index == NOWHERE, a.dtype.type(0), small.reshape(-1)[index]) + b)
    if np.isfinite(a).all() and np.isfinite(b).all() and not np.isfinite(total).all():
        return "the sum of the constants overflows"  # a row that is masked twice would become NaN
    return total
