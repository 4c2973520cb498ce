"""What only training needs goes.

Before -> after::

    Dropout(x, ratio, training_mode=False) -> x
    Cast(x: float32, to=float32)           -> x

Refused, for one: a Dropout whose mask is read.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.rewrite.builder import replace


class DropInferenceNoOps(ir.passes.InPlacePass):
    """Remove operators that return their first operand at inference."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass; see the module's documentation."""
        modified = False
        for node in list(model.graph):
            source = node.inputs[0] if node.inputs else None
            if source is None or not _returns_its_operand(node, source):
                continue
            if node.outputs[0].is_graph_output() and (source.producer() is None or source.is_graph_output()):
                continue
            replace(node.outputs[0], source)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _returns_its_operand(node: ir.Node, source: ir.Value) -> bool:
    if node.domain != "":
        return False
    if node.op_type == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 else None
        constant = None if training is None else training.const_value
        trains = training is not None and (constant is None or bool(constant.numpy()))
        return not trains and not any(mask.uses() or mask.is_graph_output() for mask in node.outputs[1:])
    if node.op_type == "Cast":
        return source.dtype is not None and source.dtype == node.attributes.get_int("to", None)
    return False
