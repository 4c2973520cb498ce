"""Let readers read other values, and remove nodes: in time that grows with what is rewired.

onnx_ir copies all operands of a node to exchange one of them. That is nothing for an Add, and minutes for a Concat of
some ten thousand parts; the operands of such a node are exchanged together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

_WIDE = 64
"""A node of more operands than this gets all its new ones together."""


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads ``old`` read ``new``; a graph output keeps its name."""
    replace_all({old: new})


def replace_all(values: Mapping[ir.Value, ir.Value]) -> None:
    """Let everything that reads a key read its value; graph outputs keep their names."""
    wide = dict.fromkeys(u.node for old in values for u in old.uses() if len(u.node.inputs) > _WIDE)
    for reader in wide:
        _rewire(reader, [None if value is None else values.get(value, value) for value in reader.inputs])
    for old, new in values.items():
        if old.is_graph_output():
            name, old.name = old.name, f"{old.name}_replaced"
            new.name = name
            new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)


def remove(graph: ir.Graph, nodes: Collection[ir.Node]) -> None:
    """Remove nodes that nothing else reads; what the graphs inside them read is no longer read by them."""
    for node in nodes:
        for inner in inner_graphs(node):
            for reader in inner.all_nodes():
                _rewire(reader, [])
        if len(node.inputs) > _WIDE:
            _rewire(node, [])
    graph.remove(nodes, safe=True)


def remove_dead(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Remove those of the nodes that nothing reads any more, last first."""
    for node in reversed(nodes):
        if node.graph is graph and not any(o.uses() or o.is_graph_output() for o in node.outputs):
            remove(graph, [node])


def inner_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs of an If, a Loop or a Scan."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _rewire(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
    """Give a node all its operands at once, which the public interface has no way to do."""
    for position, value in enumerate(node.inputs):
        if value is not None:
            value._remove_usage(node, position)
    node._inputs = tuple(inputs)
    for position, value in enumerate(inputs):
        if value is not None:
            value._add_usage(node, position)
