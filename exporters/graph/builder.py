"""Change a graph: add nodes in the place and under the name of those that they replace, rewire readers, remove nodes.

Rewiring takes time that grows with what is rewired. onnx_ir copies all operands of a node to exchange one of them. That
is nothing for an Add, and minutes for a Concat of some ten thousand parts; the operands of such a node are exchanged
together.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.analysis import reshape_target
from deploycli.exporters.graph.lowerings import MovementOp, as_indices, slice_bounds
from deploycli.exporters.graph.shapes import BATCH, Dims
from deploycli.exporters.graph.unique import Names, value_names

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array

_WIDE = 64
"""A node of more operands than this gets all its new ones together."""


class Builder:
    """Inserts nodes before an anchor, keeps the analysis up to date, and shares constants of equal content."""

    def __init__(self, graph: ir.Graph, analysis: Analysis) -> None:
        self.graph = graph
        self.analysis = analysis
        self._names = Names(value_names(graph))
        self._constants: dict[tuple[str, Dims, bytes], ir.Value] = {}

    def constant(self, array: Array, name: str = "constant") -> ir.Value:
        """Return an initializer that holds the array; the name is a wish."""
        array = np.asarray(array, order="C")
        # The bytes of a weight are not to be held on to, nor to be copied.
        digest = hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()
        key = (array.dtype.name, array.shape, digest)
        value = self._constants.get(key)
        if value is None:
            name = self._names.unique(name)
            tensor = ir.tensor(array, name=name)
            value = self._constants[key] = initializer(name, tensor)
            self.graph.register_initializer(value)
        return value

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | None], anchor: ir.Node, outputs: int = 1, **attributes: Any
    ) -> ir.Node:
        """Insert a node before the anchor; it inherits the anchor's PyTorch module path."""
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        node = ir.Node("", op_type, inputs, attrs, num_outputs=outputs)
        node.metadata_props.update(anchor.metadata_props)
        for output in node.outputs:
            output.name = self._names.unique(op_type)
        self.graph.insert_before(anchor, node)
        self.analysis.infer(node)
        for output in node.outputs:
            annotate(output, self.analysis)
        return node

    def value(self, op_type: str, inputs: Sequence[ir.Value | None], anchor: ir.Node, **attributes: Any) -> ir.Value:
        """Insert a node with one output and return the output."""
        return self.node(op_type, inputs, anchor, **attributes).outputs[0]

    def reshape(self, source: ir.Value, dims: Dims, anchor: ir.Node) -> ir.Value:
        """Insert a Reshape to dims that grow with the batch on one axis at most."""
        target = reshape_target(dims)
        assert target is not None, "callers check that the shape can be written"
        return self.value("Reshape", [source, self.constant(np.array(target, np.int64))], anchor)

    def move(self, op: MovementOp, source: ir.Value, anchor: ir.Node) -> ir.Value:
        """Insert one operator of a lowering."""
        if op.op_type == "Reshape":
            return self.reshape(source, op.dims, anchor)
        if op.op_type == "Transpose":
            return self.value("Transpose", [source], anchor, perm=list(op.values))
        if op.op_type == "Gather":
            return self.value("Gather", [source, self.constant(as_indices(op))], anchor, axis=op.axis)
        if op.op_type == "Slice":
            start, end = slice_bounds(op)
            operands = [self.constant(np.array([x], np.int64)) for x in (start, end, op.axis)]
            return self.value("Slice", [source, *operands], anchor)
        pads = np.zeros(2 * len(op.dims), np.int64)
        pads[len(op.dims) + op.axis] = 1
        return self.value("Pad", [source, self.constant(pads)], anchor)


def initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Return a value that holds a tensor; the graph must still register it."""
    shape, tensor_type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
    return ir.Value(name=name, shape=shape, type=tensor_type, const_value=tensor)


def annotate(value: ir.Value, analysis: Analysis) -> None:
    """Write what is known of a value into its type and shape."""
    fact = analysis[value]
    if fact is None:
        return
    value.type = ir.TensorType(fact.dtype)
    if fact.axes is not None and (value.shape is None or fact.dims is not None):
        name = (None if analysis.batch is None else analysis.batch.name) or "batch"
        value.shape = ir.Shape([_dimension(d, name) for d in fact.axes])


def _dimension(dim: int | None, name: str) -> int | ir.SymbolicDim:
    if dim is None:
        return ir.SymbolicDim(None)
    if dim == 0 or dim % BATCH:
        return dim
    factor = dim // BATCH
    return ir.SymbolicDim(name if factor == 1 else f"{factor}*{name}")


# --- rewiring --------------------------------------------------------------------------------------------------------


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


def let_read(node: ir.Node, position: int, value: ir.Value) -> None:
    """Let a node read another value at a position; nothing is rewired where it reads it already."""
    if node.inputs[position] is not value:
        node.replace_input_with(position, value)


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
