"""Names that a person can read and that do not depend on the order of passes.

A node is called ``<PyTorch module path>/<operator>``, with a number where there are several: the profilers of ONNX
Runtime and TensorRT then speak of the user's own modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycli.exporters.graph.analysis import Facts
from deploycli.exporters.graph.builder import annotate
from deploycli.exporters.graph.unique import PARAMETER, Names, value_names

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    nameless = [value for value in graph.initializers.values() if not _has_a_name(value)]
    for i, value in enumerate(nameless):  # out of the way: two values may swap names
        value.name = f"\0{i}"
    for node in graph:
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
    _name_constants(graph, nameless, names)


def _has_a_name(value: ir.Value) -> bool:
    return value.is_graph_input() or value.is_graph_output() or PARAMETER in value.meta


def _name_constants(graph: ir.Graph, nameless: Sequence[ir.Value], names: Names) -> None:
    """Call a constant that the passes made after its first reader; order all initializers as they are read."""
    wishes: dict[ir.Value, str] = {}
    for node in graph:
        for i, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value.graph is graph:
                wishes.setdefault(value, f"{node.name}.{_CONSTANT}{i}")
    for value in nameless:
        value.name = names.unique(wishes.get(value, _CONSTANT))
    for value in wishes:
        del graph.initializers[value.name or ""]
        graph.register_initializer(value)
