"""Names that a person can read and that do not depend on the order of passes; and an order that no file decides.

In a graph that is traced a node is called ``<PyTorch module path>/<operator>``, with a number where there are several:
the profilers of ONNX Runtime and TensorRT then speak of the user's own modules.

A graph from elsewhere has many files: its nodes may stand in any order that is sorted, its constants in any order at
all. Here it gets one of them, so that the same graph always ends as the same bytes. Names that the file gives stay.
What the passes add is called after its place: ``/layers.0/attn/Gather`` where its neighbour is
``/layers.0/attn/MatMul``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.builder import annotate, inner_graphs, remove
from deploycli.exporters.graph.unique import PARAMETER, Names, value_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import onnx_ir as ir

_CONSTANT = "const"

_SCOPE = "deploycli.scope"
"""Metadata key of the part of a node's name before its last slash, while the passes run: new nodes inherit it."""


def name_nodes(model: ir.Model, module_key: str) -> None:
    """Name nodes, their outputs and nameless constants; keep names of inputs, outputs and parameters.

    Graphs inside an If or a Loop keep their names.

    Args:
        model: the model, renamed in place; the metadata that carried the module paths is dropped.
        module_key: metadata key of the module path.
    """
    graph = model.graph
    analysis = Analysis(graph)
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
                annotate(output, analysis)
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
    order_constants(graph)


# --- graphs from elsewhere -------------------------------------------------------------------------------------------


def put_in_order(graph: ir.Graph) -> None:
    """Sort the nodes of a graph and of those inside it depth first from the outputs, and constants as they are read.

    Nodes that no output needs are removed. A graph with a cycle stays unsorted; the ONNX checker refuses it.
    """
    for node in graph:
        for inner in inner_graphs(node):
            put_in_order(inner)
    order = _depth_first(graph)
    remove(graph, [node for node in graph if node not in order])
    graph.extend(order)
    order_constants(graph)


def order_constants(graph: ir.Graph) -> None:
    """Sort the constants of a graph as its nodes read them, then those that are outputs, then those that are inputs."""
    read = (value for node in graph for value in _reads(node))
    for value in dict.fromkeys((*read, *graph.outputs, *graph.inputs)):
        if value.is_initializer() and value.graph is graph:
            del graph.initializers[value.name or ""]
            graph.register_initializer(value)


def _depth_first(graph: ir.Graph) -> dict[ir.Node, None]:
    """Return the nodes that the outputs need, each after all that it reads."""
    order: dict[ir.Node, None] = {}
    entered: set[ir.Node] = set()
    stack = [value.producer() for value in reversed(graph.outputs)]
    while stack:
        node = stack[-1]
        if node is None or node in order or node.graph is not graph:
            stack.pop()
        elif node in entered:
            stack.pop()
            order[node] = None
        else:
            entered.add(node)
            stack += reversed([value.producer() for value in _reads(node)])
    return order


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node reads, and what the graphs inside it read."""
    yield from (value for value in node.inputs if value is not None)
    for inner in inner_graphs(node):
        for reader in inner:
            yield from _reads(reader)
        yield from inner.outputs


@dataclass(frozen=True)
class KnownNames:
    """What a file calls its nodes and its values."""

    nodes: frozenset[str]
    values: frozenset[str]


def known_names(graph: ir.Graph) -> KnownNames:
    """Return the names to keep, and note in every node where it stands, which is passed on to what replaces it."""
    for node in graph:
        scope = (node.name or "").rpartition("/")[0]
        if scope:
            node.metadata_props[_SCOPE] = scope
    nodes = frozenset(node.name for node in graph.all_nodes() if node.name)
    return KnownNames(nodes, frozenset(value_names(graph)))


def name_what_is_new(graph: ir.Graph, known: KnownNames, analysis: Analysis) -> None:
    """Name the nodes and values that have no name from the file, and write down the types of all values.

    Args:
        graph: the main graph, in order.
        known: the names that stay.
        analysis: of the graph as it is.
    """
    nodes = Names(node.name for node in graph.all_nodes() if node.name in known.nodes)
    made = [value for value in _named_by_passes(graph) if value.name not in known.values]
    for i, value in enumerate(made):  # out of the way: two values may swap names
        value.name = f"\0{i}"
    values, new = Names(value_names(graph)), set(made)
    for node in graph:
        scope = node.metadata_props.pop(_SCOPE, "")
        if node.name not in known.nodes:
            node.name = nodes.unique(f"{scope}/{node.op_type}" if scope else node.op_type)
        for i, operand in enumerate(node.inputs):
            if operand is not None and operand in new and operand.is_initializer():
                new.remove(operand)  # called after the first that reads it
                operand.name = values.unique(f"{node.name}.{_CONSTANT}{i}")
        for i, value in enumerate(node.outputs):
            if value in new:
                value.name = values.unique(f"{node.name}.{i}" if len(node.outputs) > 1 else node.name)
            if value.name and not value.is_graph_output():
                annotate(value, analysis)
    for value in made:
        if value in new and value.is_initializer():  # only inner graphs read it
            value.name = values.unique(_CONSTANT)
    order_constants(graph)  # what gets another name goes to the end


def _named_by_passes(graph: ir.Graph) -> Iterable[ir.Value]:
    own = [*graph.initializers.values(), *(value for node in graph for value in node.outputs if value.name)]
    return [value for value in own if not value.is_graph_input() and not value.is_graph_output()]
