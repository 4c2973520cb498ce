"""What is done to every graph, and between passes, at the price of one look at each node.

They do what the passes of onnx_ir of the same purpose do. Those ask more of every node: whether it has optional
outputs, by its schema; whether an integer is a tensor, by the list of methods that a tensor has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploycli.exporters.graph.builder import inner_graphs, remove

if TYPE_CHECKING:
    from collections.abc import Callable

_TENSORS: dict[str, Callable[[ir.Attr, str | None], ir.TensorProtocol]] = {
    "value": lambda attribute, _name: attribute.as_tensor(),
    "value_float": lambda attribute, name: ir.Tensor(np.array(attribute.as_float(), np.float32), name=name),
    "value_floats": lambda attribute, name: ir.Tensor(np.array(attribute.as_floats(), np.float32), name=name),
    "value_int": lambda attribute, name: ir.Tensor(np.array(attribute.as_int(), np.int64), name=name),
    "value_ints": lambda attribute, name: ir.Tensor(np.array(attribute.as_ints(), np.int64), name=name),
    "value_string": lambda attribute, name: ir.StringTensor(np.array(attribute.as_string().encode()), name=name),
    "value_strings": lambda attribute, name: ir.StringTensor(
        np.array([text.encode() for text in attribute.as_strings()], np.bytes_), name=name
    ),
}


class LiftConstants(ir.passes.InPlacePass):
    """Turn Constant nodes into initializers, in subgraphs too.

    Those that are graph outputs stay nodes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        modified = False
        for node in model.graph.all_nodes():
            if node.op_type == "Constant" and node.domain == "" and not node.outputs[0].is_graph_output():
                modified |= _lift(node)
        return ir.passes.PassResult(model, modified)


def _lift(node: ir.Node) -> bool:
    attributes, output, graph = list(node.attributes.values()), node.outputs[0], node.graph
    if len(attributes) != 1 or attributes[0].name not in _TENSORS or graph is None:
        return False
    (attribute,) = attributes
    tensor = _TENSORS[attribute.name](attribute, output.name)
    value = ir.Value(
        name=output.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
        metadata_props=output.metadata_props.copy(),
    )
    value.meta.update(output.meta)
    graph.register_initializer(value)
    output.replace_all_uses_with(value)
    remove(graph, [node])
    return True


class Sort(common.TopologicalSortPass):
    """Sort the nodes; those of a graph that is sorted are left alone, as a stable sort leaves them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        if not model.functions and _is_sorted(model.graph):
            return ir.passes.PassResult(model, modified=False)
        return super().call(model)


def _is_sorted(graph: ir.Graph) -> bool:
    """Say whether every node stands after those that it reads; of a graph with graphs inside it, not known."""
    seen = set[ir.Node]()
    for node in graph:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            return False
        producers = (None if value is None else value.producer() for value in node.inputs)
        if any(producer is not None and producer not in seen for producer in producers):
            return False
        seen.add(node)
    return True


class Sweep(ir.passes.InPlacePass):
    """Remove what nothing reads, in subgraphs too."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        return ir.passes.PassResult(model, sweep(model.graph, inside=True))


def sweep(graph: ir.Graph, *, inside: bool = False) -> bool:
    """Remove the nodes and initializers of a graph that nothing reads.

    Args:
        graph: the graph.
        inside: sweep the graphs inside its nodes, too.

    Returns:
        Whether there were any.
    """
    dead = False
    for node in reversed(graph):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            remove(graph, [node])
            dead = True
        elif inside:
            for inner in inner_graphs(node):
                dead |= sweep(inner, inside=True)
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]
            dead = True
    return dead
