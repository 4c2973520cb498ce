"""Shapes of a node's outputs, by ONNX's own shape inference, asked once for all nodes that are alike.

A network repeats its blocks: of a Swin's operators few are unlike all before them. What inference may depend on is the
operator, its attributes, and its operands' types, shapes and short values; that is the key.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from deploycli.exporters.graph.affine import BATCH, ENDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploycli.exporters.graph.movement_ops import Array

Dims: TypeAlias = "tuple[int, ...]"
Axes: TypeAlias = "tuple[int | None, ...]"
"""A shape as far as it is known: None for an axis that is not."""

Known: TypeAlias = "tuple[ir.DataType, Axes, Axes]"
_Inferred: TypeAlias = "list[Known | None] | None"

INTEGERS_LIMIT = 4096
"""Largest integer operand that inference looks into, elements. Shapes are shorter; tensors of data are longer."""

FLOATS_LIMIT = 16
"""The same for other types: the scales of a Resize."""

_MOST = 8192
"""So many results are kept."""

_POINTER = 8

_MOST_ELEMENTS = 2**56
"""A shape of more elements than this is taken for one that overflowed."""


class Operand(NamedTuple):
    """What inference may read of an operand.

    Attributes:
        dtype: element type.
        axes: shape, with the batch written as multiples of the stand-in.
        ends: its value at each end; None where it is not known.
    """

    dtype: ir.DataType
    axes: Axes
    ends: tuple[Array, Array] | None


def substitute(dim: int, batch: int) -> int:
    """Replace the stand-in in one dimension by a batch size."""
    return dim // BATCH * batch if dim % BATCH == 0 else dim


def elements(dims: Dims, batch: int = 1) -> int:
    """Return the number of elements of a shape at a batch size."""
    return math.prod(substitute(d, batch) for d in dims)


def item_bytes(dtype: ir.DataType) -> float:
    """Return the bytes of an element; of a string, which may be of any length, those of a pointer."""
    return _POINTER if dtype.is_string() else dtype.itemsize


class NodeShapes:
    """Infers the outputs of nodes; graphs with the same opsets share what was found.

    Args:
        opset_imports: domain -> version.
    """

    def __init__(self, opset_imports: Mapping[str, int]) -> None:
        self._opset_imports = opset_imports
        self._known = _KNOWN.setdefault(tuple(sorted(opset_imports.items())), {})

    def infer(self, node: ir.Node, operands: Sequence[Operand | None]) -> _Inferred:
        """Return type and shapes at both ends of every output, None where they are not known.

        Args:
            node: the operator.
            operands: its inputs, None where an optional one is absent.
        """
        key = _key(node, operands)
        if key is None:
            return self._infer(node, operands)
        if key not in self._known:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = self._infer(node, operands)
        return self._known[key]

    def _infer(self, node: ir.Node, operands: Sequence[Operand | None]) -> _Inferred:
        version = self._opset_imports.get(node.domain)
        if version is None or not onnx.defs.has(node.op_type, node.domain):
            return None
        low, high = (_infer_at(end, node, operands, version, self._opset_imports) for end in range(len(ENDS)))
        if low is None or high is None:
            return None
        return [
            None if at_low is None or at_high is None else (*at_low, at_high[1])
            for at_low, at_high in zip(low, high, strict=True)
        ]


_KNOWN: dict[tuple[tuple[str, int], ...], dict[object, _Inferred]] = {}

_PLAIN = frozenset({ir.AttributeType.FLOAT, ir.AttributeType.INT, ir.AttributeType.STRING})
_LISTS = frozenset({ir.AttributeType.FLOATS, ir.AttributeType.INTS, ir.AttributeType.STRINGS})


def _key(node: ir.Node, operands: Sequence[Operand | None]) -> object | None:
    """Return all that inference may depend on, or None where that is too much to compare: a tensor, a subgraph."""
    attributes = []
    for name, attribute in node.attributes.items():
        if attribute.type in _PLAIN:
            attributes.append((name, attribute.type, attribute.value))
        elif attribute.type in _LISTS:
            attributes.append((name, attribute.type, tuple(attribute.value)))
        else:
            return None
    return (
        node.op_type,
        node.domain,
        frozenset(attributes),
        tuple(None if x is None else (x.dtype, x.axes, _value_key(x)) for x in operands),
        tuple(bool(output.name) for output in node.outputs),
    )


def _value_key(operand: Operand) -> object:
    if operand.ends is None or not _is_read(operand.ends):
        return None
    low, high = operand.ends
    return low.tobytes() if low is high else (low.tobytes(), high.tobytes(), low.shape, high.shape)


def _is_read(ends: tuple[Array, Array]) -> bool:
    limit = INTEGERS_LIMIT if ends[0].dtype.kind in "iub" else FLOATS_LIMIT
    return all(array.size <= limit for array in ends)


def _infer_at(
    end: int,
    node: ir.Node,
    operands: Sequence[Operand | None],
    version: int,
    opset_imports: Mapping[str, int],
) -> list[tuple[ir.DataType, Axes] | None] | None:
    """Run ONNX's own shape inference on one node at one batch size."""
    try:
        proto = ir.serde.serialize_node(node)
    except ir.serde.SerdeError:  # a part of it that no file can hold
        return None
    types, data = {}, {}
    del proto.input[:]
    for i, operand in enumerate(operands):
        proto.input.append("" if operand is None else f"x{i}")
        if operand is None:
            continue
        name = f"x{i}"
        shape = tuple(None if dim is None else substitute(dim, ENDS[end]) for dim in operand.axes)
        types[name] = onnx.helper.make_tensor_type_proto(int(operand.dtype), shape)
        if operand.ends is not None and _is_read(operand.ends):
            data[name] = onnx.numpy_helper.from_array(np.asarray(operand.ends[end], order="C"), name)
    del proto.output[:]  # absent ones at the end may have been left out
    proto.output.extend(f"y{i}" if output.name else "" for i, output in enumerate(node.outputs))
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        opsets = [onnx.helper.make_opsetid(domain, v) for domain, v in opset_imports.items()]
        inferred = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, None, opsets, 10)
    except (onnx.shape_inference.InferenceError, onnx.defs.SchemaError, onnx.checker.ValidationError):
        return None
    return [_read_type(inferred.get(f"y{i}")) for i in range(len(node.outputs))]


def _read_type(proto: onnx.TypeProto | None) -> tuple[ir.DataType, Axes] | None:
    if proto is None or not proto.HasField("tensor_type") or not proto.tensor_type.HasField("shape"):
        return None
    dims = proto.tensor_type.shape.dim
    axes = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in dims)
    if math.prod(d for d in axes if d) > _MOST_ELEMENTS:  # it was inferred in 64 bits
        return None
    return ir.DataType(proto.tensor_type.elem_type), axes
