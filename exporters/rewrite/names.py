"""Names that a person can read and that do not depend on the order of passes.

A node is called ``<PyTorch module path>/<operator>``, with a number where there are several: the profilers of ONNX
Runtime and TensorRT then speak of the user's own modules.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from exporters.rewrite.builder import annotate
from exporters.rewrite.facts import Facts

if TYPE_CHECKING:
    import onnx_ir as ir

_CONSTANT = "const"


def name_nodes(model: ir.Model, module_key: str) -> None:
    """Name nodes, their outputs and nameless constants; keep names of inputs, outputs and parameters.

    Args:
        model: the model, renamed in place; the metadata that carried the module paths is dropped.
        module_key: metadata key of the module path.
    """
    graph = model.graph
    facts = Facts(graph)
    seen: Counter[str] = Counter()
    for value in graph.initializers.values():
        if value.name:
            seen[value.name] += 1
    seen.update(v.name for v in (*graph.inputs, *graph.outputs) if v.name)
    for i, node in enumerate(graph):  # out of the way: two nodes may swap names
        node.name = f"\0{i}"
        for j, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = f"\0{i}.{j}"
    for node in graph:
        path = node.metadata_props.pop(module_key, "")
        node.name = _unique("/".join(filter(None, (path, node.op_type))), seen)
        for j, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = node.name if len(node.outputs) == 1 else f"{node.name}.{j}"
            annotate(output, facts)
    _name_constants(graph, seen)


def _name_constants(graph: ir.Graph, seen: Counter[str]) -> None:
    """Call a constant that the passes made after its first reader; order them as they are read."""
    in_order: dict[ir.Value, str] = {}
    for node in graph:
        for i, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value not in in_order:
                in_order[value] = f"{node.name}.{_CONSTANT}{i}"
    for value in in_order:
        del graph.initializers[value.name or ""]
    for value, name in in_order.items():
        if not (value.name or "").count("."):  # parameters carry a module path
            value.name = _unique(name, seen)
        graph.register_initializer(value)


def _unique(name: str, seen: Counter[str]) -> str:
    seen[name] += 1
    if seen[name] == 1:
        return name
    candidate = f"{name}_{seen[name] - 1}"
    return candidate if candidate not in seen else _unique(name, seen)
