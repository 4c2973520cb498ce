"""One FP32 graph in which every quantised group has a switch: what INT8 costs, group by group, in one session.

Before -> after::

    MatMul(x, W)  ->  MatMul(Where(gate, DQ(Q(x)), x), Where(gate, DQ(W: int8), W))      gate: bool, a graph input

With all switches off the graph computes what it computed; with all of them on, what the INT8 graph with FP32 around it
computes: bit for bit where ONNX Runtime optimises neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploycli.exporters.bundle.files import temporary_folder
from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.graph.unique import Names, value_names
from deploycli.exporters.precision.insert_qdq import Inserter
from deploycli.exporters.runtime.runtimes import Closing, OrtRuntime

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import numpy.typing as npt

    from deploycli.exporters.precision.placement import Placement

    Array = npt.NDArray[Any]


class GatedRuntime(Closing):
    """Runs a model with any of its groups in INT8.

    Args:
        model: the FP32 graph in which the placement was found; it is used up.
        placement: the groups.
        ranges: value name -> largest magnitude.
        scale_type: scales are numbers of this type.
        output: name of the logits.
        optimize: let ONNX Runtime rewrite the graph.
    """

    def __init__(
        self,
        model: ir.Model,
        placement: Placement,
        ranges: Mapping[str, float],
        *,
        scale_type: ir.DataType,
        output: str,
        optimize: bool = True,
    ) -> None:
        graph = model.graph
        names = Names(value_names(graph))
        self._gates = {group: _gate(graph, names.unique(f"gate_{i}")) for i, group in enumerate(placement.groups)}
        self._output = output
        inserter = Inserter(graph, scale_type)
        for site in placement.sites:
            gate = self._gates[site.group]
            for position, value, quantized in inserter.operands(site, ranges):
                where = ir.node("Where", [gate, quantized, value])
                result = where.outputs[0]
                result.name, result.dtype, result.shape = names.unique("gated"), ir.DataType.FLOAT, value.shape
                graph.insert_before(site.node, where)
                site.node.replace_input_with(position, result)
        with temporary_folder() as folder:
            self._runtime = OrtRuntime(write_model(model, folder / "gated.onnx")[0], optimize=optimize)

    def logits(self, inputs: Mapping[str, Array], groups: Collection[str]) -> Array:
        """Run one batch with these groups in INT8; return [B, classes]."""
        gates = {str(gate.name): np.array(group in groups) for group, gate in self._gates.items()}
        return self._runtime.run({**inputs, **gates})[self._output]

    def close(self) -> None:
        """Free what is held."""
        self._runtime.close()


def _gate(graph: ir.Graph, name: str) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    graph.inputs.append(value)
    return value
