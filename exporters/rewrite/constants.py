"""Constants fold completely.

Before -> after::

    table, index -> Reshape, Gather, Reshape, Transpose, Unsqueeze -> bias     becomes one initializer
    Shape(x)[1]                                                                becomes 3136

A value is constant if it follows from initializers and from shapes that do not depend on the batch, whatever computes
it. Refused, for one: a result much larger than what it is made of, such as an Expand to a whole feature map.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.rewrite.builder import annotate
from exporters.rewrite.facts import Facts
from exporters.steps import Refusal

_GROWTH = 16 * 2**20
"""A constant may be this much larger than its operands, bytes."""


class FoldConstants(ir.passes.InPlacePass):
    """Replace every value that is known by an initializer. Bit-equal to ONNX Runtime's own evaluation."""

    def __init__(self, facts: Facts | None = None) -> None:
        super().__init__()
        self._facts = facts
        self.refusals: list[Refusal] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass; see the module's documentation."""
        graph = model.graph
        facts = self._facts or Facts(graph)
        self.refusals = []
        folded = [node for node in graph if self._folds(node, facts)]
        for node in reversed(folded):  # readers first, so that what only they read is not stored
            for i, output in enumerate(list(node.outputs)):
                if output.uses():
                    _store(node, i, facts)
            graph.remove(node, safe=True)
        return ir.passes.PassResult(model, bool(folded))

    def _folds(self, node: ir.Node, facts: Facts) -> bool:
        values = [facts.constant(output) for output in node.outputs]
        if any(v is None for v in values) or any(output.is_graph_output() for output in node.outputs):
            return False
        made = sum(v.nbytes for v in values if v is not None)
        given = sum(v.nbytes for v in map(facts.constant, node.inputs) if v is not None)
        if made > given + _GROWTH:
            self.refusals.append(Refusal(node.name or "", f"{made} bytes of constants from {given}"))
            return False
        return True


def _store(node: ir.Node, index: int, facts: Facts) -> None:
    output = node.outputs[index]
    array = facts.constant(output)
    assert array is not None
    assert node.graph is not None
    # A transposed weight stays a view of the original: it is copied when it is written, one tensor at a time.
    tensor = ir.Tensor(np.asarray(array), name=output.name)
    value = ir.Value(name=output.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    output.name = f"{output.name}_folded"
    node.graph.register_initializer(value)
    output.replace_all_uses_with(value)
    annotate(value, facts)
