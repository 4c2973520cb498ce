"""What only training needs goes.

Before -> after::

    Dropout(x, ratio, training_mode=False) -> x
    Cast(x: float32, to=float32)           -> x
    Identity(x)                            -> x

Refused, for one: a Dropout whose mask is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from exporters.rewrite.builder import replace

if TYPE_CHECKING:
    from exporters.rewrite.facts import Facts
    from exporters.steps import Refusal


class DropInferenceNoOps(ir.passes.InPlacePass):
    """Remove operators that return their first operand at inference.

    Args:
        facts: types of values that have none in the graph.
    """

    def __init__(self, facts: Facts | None = None) -> None:
        super().__init__()
        self._facts = facts
        self.refusals: list[Refusal] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass; see the module's documentation."""
        dropped = []
        for node in model.graph:
            source = node.inputs[0] if node.inputs else None
            if source is None or not self._returns_its_operand(node, source):
                continue
            if node.outputs[0].is_graph_output() and (source.producer() is None or source.is_graph_output()):
                continue
            replace(node.outputs[0], source)
            dropped.append(node)
        model.graph.remove(dropped, safe=True)
        return ir.passes.PassResult(model, bool(dropped))

    def _returns_its_operand(self, node: ir.Node, source: ir.Value) -> bool:
        if node.domain != "":
            return False
        if node.op_type == "Cast":
            return self._dtype(source) == node.attributes.get_int("to", None)
        return node.op_type == "Identity" or (node.op_type == "Dropout" and not _trains(node))

    def _dtype(self, value: ir.Value) -> ir.DataType | None:
        fact = None if self._facts is None else self._facts[value]
        return value.dtype if fact is None else fact.dtype


def _trains(node: ir.Node) -> bool:
    """Say whether a Dropout drops anything, or whether its mask is read."""
    training = node.inputs[2] if len(node.inputs) > 2 else None
    constant = None if training is None or training.is_graph_input() else training.const_value
    trains = training is not None and (constant is None or bool(constant.numpy()))
    return trains or any(mask.uses() or mask.is_graph_output() for mask in node.outputs[1:])
