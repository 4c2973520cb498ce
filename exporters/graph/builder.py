"""Add nodes to a graph in the place and under the name of those that they replace."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.affine import BATCH
from deploycli.exporters.graph.analysis import Dims, reshape_target
from deploycli.exporters.graph.lowerings import MovementOp, as_indices, slice_bounds
from deploycli.exporters.graph.unique import Names, value_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycli.exporters.graph.analysis import Facts
    from deploycli.exporters.graph.movement_ops import Array


class Builder:
    """Inserts nodes before an anchor, keeps the facts, and shares constants of equal content."""

    def __init__(self, graph: ir.Graph, facts: Facts) -> None:
        self.graph = graph
        self.facts = facts
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
        self.facts.infer(node)
        for output in node.outputs:
            annotate(output, self.facts)
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


def annotate(value: ir.Value, facts: Facts) -> None:
    """Write what is known of a value into its type and shape."""
    fact = facts[value]
    if fact is None:
        return
    value.type = ir.TensorType(fact.dtype)
    if fact.axes is not None and (value.shape is None or fact.dims is not None):
        name = (None if facts.batch is None else facts.batch.name) or "batch"
        value.shape = ir.Shape([_dimension(d, name) for d in fact.axes])


def _dimension(dim: int | None, name: str) -> int | ir.SymbolicDim:
    if dim is None:
        return ir.SymbolicDim(None)
    if dim == 0 or dim % BATCH:
        return dim
    factor = dim // BATCH
    return ir.SymbolicDim(name if factor == 1 else f"{factor}*{name}")
