"""Shapes for any batch size: arithmetic on numbers that grow with it, and the shapes of what an operator makes.

A symbolic dimension is written as a multiple of the stand-in :data:`BATCH`, and all is computed at the two batch sizes
of :data:`BATCHES`. A number that a graph computes from the batch size B is followed only while it is ``a*B + c``: such
a number is known from its values at these two. Shape arithmetic has other functions that agree with a line at the sizes
one happens to look at, ``min(B, 16)`` or ``B // 8``; so it is the operator that decides, not the numbers it gave.

What an operator makes is found by ONNX's own shape inference, asked once for all nodes that are alike. A network
repeats its blocks: of a Swin's operators few are unlike all before them. What inference may depend on is the operator,
its attributes, and its operands' types, shapes and short values; that is the key.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from deploycli.exporters.graph.movement_ops import MOVEMENT, data_operands

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploycli.exporters.graph.movement_ops import Array

BATCH = 1_000_003
"""Stand-in for the symbolic batch: a prime above every dimension of a real model."""

BATCHES = (1, BATCH)
"""The batch sizes at which shape arithmetic is done. Together they decide ``a*B + c``."""

INTEGERS = {int(ir.DataType.INT32): np.int32, int(ir.DataType.INT64): np.int64}
"""Types of shape arithmetic, by their number in ONNX."""

Dims: TypeAlias = "tuple[int, ...]"
Axes: TypeAlias = "tuple[int | None, ...]"
"""A shape as far as it is known: None for an axis that is not."""

Extremes: TypeAlias = "tuple[Array, Array]"
"""A value at the smallest and at the largest batch; one object where it is the same at both."""

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
        extremes: its value at the smallest and at the largest batch; None where it is not known.
    """

    dtype: ir.DataType
    axes: Axes
    extremes: Extremes | None


# --- arithmetic ------------------------------------------------------------------------------------------------------


def substitute(dim: int, batch: int) -> int:
    """Replace the stand-in in one dimension by a batch size."""
    return dim // BATCH * batch if dim % BATCH == 0 else dim


def elements(dims: Dims, batch: int = 1) -> int:
    """Return the number of elements of a shape at a batch size."""
    return math.prod(substitute(d, batch) for d in dims)


def item_bytes(dtype: ir.DataType) -> float:
    """Return the bytes of an element; of a string, which may be of any length, those of a pointer."""
    return _POINTER if dtype.is_string() else dtype.itemsize


_LINEAR = frozenset({"Add", "Neg", "Sub"})
_ORDERED = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min"})
_SIZED_BY_VALUE = frozenset({"Expand", "Tile"})


def grows(extremes: Extremes | None) -> bool:
    """Say whether a known value grows with the batch."""
    return extremes is not None and extremes[0] is not extremes[1]


def at(extremes: Extremes, batch: int) -> Array:
    """Return the value at a batch size."""
    low, high = extremes
    return low if low is high else low + (high - low) // (BATCHES[1] - BATCHES[0]) * (batch - BATCHES[0])


def stays_affine(node: ir.Node, operands: list[Extremes | None]) -> bool:
    """Say whether the node's results are of the form ``a*B + c`` if its operands are, None where one is absent."""
    growing = [i for i, extremes in enumerate(operands) if grows(extremes)]
    if node.op_type in MOVEMENT:
        return node.op_type not in _SIZED_BY_VALUE and set(growing) <= set(data_operands(node))
    if node.op_type in _LINEAR or node.op_type == "Mul":
        is_wide = all(
            extremes is None or extremes[0].dtype == np.int64 for extremes in operands
        )  # a narrow one might overflow
        return is_wide and (node.op_type != "Mul" or len(growing) < 2)
    if node.op_type == "Cast":
        return _keeps_integers(node, operands)
    if node.op_type == "Where":
        return 0 not in growing
    if len(operands) != 2 or operands[0] is None or operands[1] is None:
        return False
    (a, a_high), (b, b_high) = operands[0], operands[1]
    if node.op_type in _ORDERED:  # two lines that do not cross
        return np.array_equal(np.sign(a - b), np.sign(a_high - b_high))
    if node.op_type == "Div":
        exact = (a_high == a * BATCHES[1]) & (np.where(b == 0, 1, a % np.where(b == 0, 1, b)) == 0)
        return 1 not in growing and bool(b.all()) and bool(np.all((a == a_high) | exact))
    return False


def _keeps_integers(node: ir.Node, operands: list[Extremes | None]) -> bool:
    to = INTEGERS.get(node.attributes.get_int("to", 0))
    limit = 0 if to is None else np.iinfo(to).max
    return all(
        abs(int(x)) <= limit
        for extremes in operands
        if extremes is not None
        for value in extremes
        for x in value.reshape(-1)
    )


# --- what an operator makes ------------------------------------------------------------------------------------------


class NodeShapes:
    """Infers the outputs of nodes; graphs with the same opsets share what was found.

    Args:
        opset_imports: domain -> version.
    """

    def __init__(self, opset_imports: Mapping[str, int]) -> None:
        self._opset_imports = opset_imports
        self._known = _KNOWN.setdefault(tuple(sorted(opset_imports.items())), {})

    def infer(self, node: ir.Node, operands: Sequence[Operand | None]) -> _Inferred:
        """Return type and shapes at both batch sizes of every output, None where they are not known.

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
        low, high = (_infer_at(i, node, operands, version, self._opset_imports) for i in range(len(BATCHES)))
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
    if operand.extremes is None or not _is_read(operand.extremes):
        return None
    low, high = operand.extremes
    return low.tobytes() if low is high else (low.tobytes(), high.tobytes(), low.shape, high.shape)


def _is_read(extremes: Extremes) -> bool:
    limit = INTEGERS_LIMIT if extremes[0].dtype.kind in "iub" else FLOATS_LIMIT
    return all(array.size <= limit for array in extremes)


def _infer_at(
    which: int,
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
        shape = tuple(None if dim is None else substitute(dim, BATCHES[which]) for dim in operand.axes)
        types[name] = onnx.helper.make_tensor_type_proto(int(operand.dtype), shape)
        if operand.extremes is not None and _is_read(operand.extremes):
            data[name] = onnx.numpy_helper.from_array(np.asarray(operand.extremes[which], order="C"), name)
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
