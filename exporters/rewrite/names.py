"""Names that a person can read and that do not depend on the order of passes.

A node is called ``<PyTorch module path>/<operator>``, with a number where there are several: the profilers of ONNX
Runtime and TensorRT then speak of the user's own modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporters.rewrite.builder import annotate
from exporters.rewrite.facts import Facts
from exporters.rewrite.unique import Names, value_names

if TYPE_CHECKING:
    import onnx_ir as ir

_CONSTANT = "const"


def name_nodes(model: ir.Model, module_key: str) -> None:
    """Name nodes, their outputs and nameless constants; keep names of inputs, outputs and parameters.

    Graphs inside an If or a Loop keep their names.

    Args:
        model: the model, renamed in place; the metadata that carried the module paths is dropped.
        module_key: metadata key of the module path.
    """
    graph = model.graph
    facts = Facts(graph)
    for node in graph:  # out of the way: two nodes may swap names
        for output in node.outputs:
            if output.name and not output.is_graph_output():
                output.name = "\0"
    names = Names(value_names(graph))
    for node in graph.all_nodes():
        path = node.metadata_props.pop(module_key, "")
        if node.graph is not graph:
            continue
        node.name = names.unique("/".join(filter(None, (path, node.op_type))))
        for i, output in enumerate(node.outputs):
            if output.name and not output.is_graph_output():
                output.name = names.unique(f"{node.name}.{i}") if len(node.outputs) > 1 else node.name
                annotate(output, facts)
    _name_constants(graph, names)


def _name_constants(graph: ir.Graph, names: Names) -> None:
    """Call a constant that the passes made after its first reader; order them as they are read."""
    in_order: dict[ir.Value, str] = {}
    for node in graph:
        for i, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value.graph is graph:
                in_order.setdefault(value, f"{node.name}.{_CONSTANT}{i}")
    for value in in_order:
        del graph.initializers[value.name or ""]
    for value, name in in_order.items():
        is_public = value.is_graph_input() or value.is_graph_output() or "." in (value.name or "")
        if not is_public:  # parameters carry a module path
            value.name = names.unique(name)
        graph.register_initializer(value)
