"""Constants fold completely.

Before -> after::

    table, index -> Reshape, Gather, Reshape, Transpose, Unsqueeze -> bias     becomes one initializer
    Shape(x)[1]                                                                becomes 3136
    Reshape(x, Concat(Shape(x)[0], 3136, 96))                                  becomes Reshape(x, [-1, 3136, 96])

A value is constant if it follows from initializers and from shapes that do not depend on the batch, whatever computes
it. Refused, for one: a result much larger than what it is made of, such as an Expand to a whole feature map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.analysis import Analysis, reshape_target
from deploycli.exporters.graph.builder import Builder, initializer, remove
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    from deploycli.exporters.graph.movement_ops import Array


class FoldConstants(GraphPass):
    """Replace every value that is known by an initializer. Bit-equal to ONNX Runtime's own evaluation."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        folded = dict.fromkeys(node for node in graph if _folds(node, analysis))
        for node in folded:
            for output in node.outputs:
                if any(reader not in folded for reader in output.consumers()):
                    _store(output, graph, analysis)
        remove(graph, folded)
        builder = Builder(graph, analysis)
        targets = [node for node in graph if _takes_constant_target(node, builder)]
        self.remarks = [Remark(label(node), why) for node, why in analysis.weighed.items() if node.graph is graph]
        return bool(folded or targets)


def _folds(node: ir.Node, analysis: Analysis) -> bool:
    read = [output for output in node.outputs if output.uses()]
    known = all(analysis.constant(output) is not None for output in read)
    return bool(read) and known and not any(output.is_graph_output() for output in node.outputs)


def _takes_constant_target(node: ir.Node, builder: Builder) -> bool:
    """Let a Reshape whose target is computed from the batch size infer that size by itself."""
    analysis = builder.analysis
    if node.op_type != "Reshape" or node.domain != "" or analysis.constant(node.inputs[1]) is not None:
        return False
    dims = analysis.dims(node.outputs[0])
    target = None if dims is None else reshape_target(dims)
    if target is None or 0 in target:
        return False
    node.replace_input_with(1, builder.constant(np.array(target, np.int64)))
    return True


def narrowed(array: Array) -> Array:
    """Return an array as small as broadcasting allows: axes along which nothing changes are 1 long."""
    for axis in range(array.ndim):
        first = array[tuple(slice(0, 1) if i == axis else slice(None) for i in range(array.ndim))]
        if np.array_equal(array, np.broadcast_to(first, array.shape)):
            array = first
    return array


def _store(output: ir.Value, graph: ir.Graph, analysis: Analysis) -> None:
    array = analysis.constant(output)
    assert array is not None
    name, output.name = output.name or "", None
    # A transposed weight stays a view of the original: it is copied when it is written, one tensor at a time.
    value = initializer(name, ir.Tensor(array, name=name))
    graph.register_initializer(value)
    output.replace_all_uses_with(value)
