"""Broadcasting is implicit.

Before -> after, for a mask that was spelled out for every image of a batch::

    Add(scores [B, nW, N, S, S], Expand(mask [1, nW, 1, S, S], [B, nW, 1, S, S])) -> Add(scores, mask)

Elementwise operators repeat their operands by themselves. Bit-equal: no number is computed. Refused, for one: an
Expand that a Concat reads, such as the class token's, or one that alone makes the result as large as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.operators import BROADCASTING
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis


class DropExpand(GraphPass):
    """Let elementwise operators read what an Expand reads."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        modified = False
        for node in list(graph):
            source = node.inputs[0] if node.op_type == "Expand" and node.domain == "" else None
            if source is None:
                continue
            for usage in list(node.outputs[0].uses()):
                if _is_implicit(usage.node, usage.idx, source, analysis):
                    usage.node.replace_input_with(usage.idx, source)
                    modified = True
            if node.outputs[0].uses():
                self.remarks.append(Remark(label(node), "its result is read as it is"))
        return modified


def _is_implicit(reader: ir.Node, position: int, source: ir.Value, analysis: Analysis) -> bool:
    """Say whether a reader gives the same result where it reads the source itself."""
    if reader.op_type not in BROADCASTING or reader.domain != "":
        return False
    result = analysis.dims(reader.outputs[0])
    operands = [analysis.dims(source if i == position else value) for i, value in enumerate(reader.inputs)]
    if result is None or any(dims is None for dims in operands):
        return False
    try:
        return np.broadcast_shapes(*(dims for dims in operands if dims is not None)) == result
    except ValueError:
        return False
