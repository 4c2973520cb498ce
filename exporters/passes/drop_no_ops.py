"""What only training needs goes.

Before -> after::

    Dropout(x, ratio, training_mode=False) -> x
    Cast(x: float32, to=float32)           -> x
    Identity(x)                            -> x
    Squeeze(x, axes=[])                    -> Squeeze(x)

The last is how ONNX Runtime reads an empty list; other readers take it for no axis at all.
Refused, for one: a Dropout whose mask is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycli.exporters.graph.analysis import squeezes_all
from deploycli.exporters.graph.builder import remove, replace
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis


class DropNoOps(GraphPass):
    """Remove operators that return their first operand at inference."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        dropped, modified = [], False
        for node in graph:
            if node.op_type == "Squeeze" and len(node.inputs) > 1 and squeezes_all(analysis.constant(node.inputs[1])):
                node.resize_inputs(1)
                modified = True
            source = node.inputs[0] if node.inputs else None
            if source is None or not _returns_its_operand(node, source, analysis):
                continue
            if node.outputs[0].is_graph_output() and (source.producer() is None or source.is_graph_output()):
                continue
            replace(node.outputs[0], source)
            dropped.append(node)
        remove(graph, dropped)
        return modified or bool(dropped)


def _returns_its_operand(node: ir.Node, source: ir.Value, analysis: Analysis) -> bool:
    if node.domain != "":
        return False
    if node.op_type == "Cast":
        fact = analysis[source]
        dtype = source.dtype if fact is None else fact.dtype
        return dtype is not None and dtype == node.attributes.get_int("to", None)
    return node.op_type == "Identity" or (node.op_type == "Dropout" and not _trains(node))


def _trains(node: ir.Node) -> bool:
    """Say whether a Dropout drops anything, or whether its mask is read."""
    training = node.inputs[2] if len(node.inputs) > 2 else None
    constant = None if training is None or training.is_graph_input() else training.const_value
    trains = training is not None and (constant is None or bool(constant.numpy()))
    return trains or any(mask.uses() or mask.is_graph_output() for mask in node.outputs[1:])
