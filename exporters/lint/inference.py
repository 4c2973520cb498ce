"""Types, shapes and small values of a graph that may be broken.

Element types follow operator by operator from :mod:`~deploycli.exporters.lint.element_types`. Shapes come from ONNX's
own strict inference, node by node, at batch 1 and at batch :data:`~deploycli.exporters.graph.shapes.BATCH`. Where ONNX
refuses a node because its operands differ in type, they are made alike and it is asked again: one wrong Cast must not
hide what comes after it. No large tensor is read.

The two batch sizes, the arithmetic with them and the evaluation of a node are those of `graph.analysis`. That is of a
graph which ONNX takes, for those who rewrite it: it reads and computes every constant, of the main graph alone, and
where ONNX refuses a node it knows nothing of what follows. Here a stranger's file is judged: types go on where no shape
is known, inner graphs and circles are walked, why a node is refused is a finding, data that are large or broken are not
read, and a shape that is no multiple of the batch is still known at both sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from deploycli.exporters.graph.analysis import GROWTH, as_extremes, fit_axis
from deploycli.exporters.graph.evaluate import can_evaluate, evaluate
from deploycli.exporters.graph.operators import QDQ, is_onnx
from deploycli.exporters.graph.shapes import BATCH, BATCHES, grows, stays_affine
from deploycli.exporters.lint.element_types import allowed_types, derive, formal, schema_of
from deploycli.exporters.target.settings import DEFAULT_BATCH
from deploycli.models.errors import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.shapes import Dims, Extremes

_VALUE_LIMIT = 4096
"""Largest value that is kept, elements: shapes, axes and scales are shorter."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one value.

    Attributes:
        dtype: element type; None where it does not follow from anything.
        rank: number of dimensions; None where it is not known.
        dims: shape, with the batch written as multiples of ``BATCH``; None where it is not of that form.
        extremes: shape at the smallest and at the largest batch, whatever its form.
        values: the value at each of them, one object if it is constant; None where it is not known, or large.
    """

    dtype: ir.DataType | None
    rank: int | None = None
    dims: Dims | None = None
    extremes: tuple[Dims, Dims] | None = None
    values: Extremes | None = None

    @property
    def constant(self) -> Array | None:
        """The value, where it is small and the same at every batch size."""
        return None if self.values is None or grows(self.values) else self.values[0]


UNKNOWN = Known(None)


class Inference:
    """What is known of a graph.

    Args:
        graph: the graph.
        opset: version of the ONNX operator set.
        read: returns the data of a tensor, or None where they cannot be read.

    Attributes:
        batch_name: symbol of the batch axis, or None where the batch is fixed.
        refusals: node -> why ONNX's strict inference refuses it even with operands of one type.
        fitting: those of them that it takes at the batch size that engines are tuned for by default.
    """

    def __init__(self, graph: ir.Graph, opset: int, read: Callable[[ir.TensorProtocol], Array | None]) -> None:
        self._opset = opset
        self._read = read
        self._known: dict[ir.Value, Known] = {}
        self.batch_name = _batch_symbol(graph)
        self.refusals: dict[ir.Node, str] = {}
        self.fitting: set[ir.Node] = set()
        for value in graph.inputs:
            self._add_input(value)
        for node in in_order(graph):
            self._infer(node)

    def __getitem__(self, value: ir.Value | None) -> Known:
        if value is None:
            return UNKNOWN
        if value not in self._known:
            self._known[value] = self._stored(value)
        return self._known[value]

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Return the element type of a value."""
        return self[value].dtype

    def dims(self, value: ir.Value | None) -> Dims | None:
        """Return the shape of a value, with the batch written as multiples of ``BATCH``."""
        return self[value].dims

    def _add_input(self, value: ir.Value) -> None:
        tensor = value.const_value
        if tensor is not None:  # the parser takes the default value for a constant
            self._known[value] = self._stored(value)
            return
        dtype = declared_type(value)
        if value.shape is None:
            self._known[value] = Known(dtype)
            return
        dims: list[tuple[int, int] | None] = []
        for dim in value.shape:
            if isinstance(dim, int):
                dims.append((dim, dim) if dim >= 0 else None)
            else:
                dims.append(BATCHES if dim.value is not None and dim.value == self.batch_name else None)
        shapes = None
        if all(dim is not None for dim in dims):
            low, high = (tuple(dim[which] for dim in dims if dim is not None) for which in (0, 1))
            shapes = (low, high)
        self._known[value] = _known(dtype, shapes, rank=len(dims))

    def _stored(self, value: ir.Value) -> Known:
        """Read what an initializer says of itself, and its data only where they are few."""
        tensor = value.const_value
        if tensor is None:
            return Known(declared_type(value))
        dims = tuple(int(d) for d in tensor.shape.numpy())
        array = self._read(tensor) if 0 <= math.prod(dims) <= _VALUE_LIMIT and not tensor.dtype.is_string() else None
        values = None if array is None or array.shape != dims else (array, array)
        return _known(tensor.dtype, (dims, dims) if min(dims, default=0) >= 0 else None, values)

    def _infer(self, node: ir.Node) -> None:
        bodies = [a.value for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH and not a.is_ref()]
        for body in bodies:
            for inner in in_order(body):
                self._infer(inner)
        types = derive(node, self.dtype, self._opset)
        shapes = self._shapes_of_branches(node, bodies) if bodies else self._shapes(node)
        values = self._values(node, shapes)
        for i, output in enumerate(node.outputs):
            dtype, shape, extremes = types[i], None, None
            if dtype is None and schema_of(node, self._opset) is None:
                dtype = declared_type(output)  # an operator that ONNX does not know
            if shapes is not None and shapes[i] is not None:
                shape = shapes[i]
            if values is not None:
                extremes = values[i]
                shape = (extremes[0].shape, extremes[1].shape)
            self._known[output] = _known(dtype, shape, extremes)

    def _shapes(self, node: ir.Node) -> list[tuple[Dims, Dims] | None] | None:
        """Return the shapes at both batch sizes, or None where they do not follow."""
        schema = schema_of(node, self._opset)
        operands = [None if value is None else self[value] for value in node.inputs]
        if is_onnx(node, "Constant"):
            return _shape_of_constant(node)
        if schema is None or any(x is not None and (x.extremes is None or x.dtype is None) for x in operands):
            return None
        types = [None if x is None else x.dtype for x in operands]
        reason = ""
        for attempt in (types, _made_alike(schema, types)):
            found = [_infer_outputs(schema, node, operands, attempt, which, self._opset) for which in (0, 1)]
            low, high = found
            if isinstance(low, list) and isinstance(high, list):
                if is_onnx(node, *_SHAPED_AS_FIRST) and operands and operands[0] is not None:
                    return [operands[0].extremes]
                return [None if a is None or b is None else (a, b) for a, b in zip(low, high, strict=True)]
            reason = next(x for x in found if isinstance(x, str))
        self.refusals[node] = reason
        usual = [None if x is None else _at(x, DEFAULT_BATCH[1]) for x in operands]
        if isinstance(_infer_outputs(schema, node, usual, _made_alike(schema, types), 0, self._opset), list):
            self.fitting.add(node)
        if is_onnx(node, *QDQ) and operands and operands[0] is not None:
            return [operands[0].extremes] * len(node.outputs)  # in an opset that lacks the type
        return None

    def _shapes_of_branches(self, node: ir.Node, bodies: Sequence[ir.Graph]) -> list[tuple[Dims, Dims] | None] | None:
        """An If has the shapes that its branches agree on; what a loop gives is not followed."""
        if not is_onnx(node, "If") or any(len(body.outputs) != len(node.outputs) for body in bodies):
            return None
        extremes = [[self[value].extremes for value in body.outputs] for body in bodies]
        return [found[0] if len(set(found)) == 1 else None for found in zip(*extremes, strict=True)]

    def _values(self, node: ir.Node, shapes: list[tuple[Dims, Dims] | None] | None) -> list[Extremes] | None:
        """Do shape arithmetic: return the outputs at both batch sizes, where they follow and are small."""
        if shapes is None or any(s is None or max(map(math.prod, s)) > _VALUE_LIMIT for s in shapes) or not shapes:
            return None
        if is_onnx(node, "Constant"):
            tensor = constant_tensor(node)
            array = None if tensor is None else self._read(tensor)
            return None if array is None else [(array, array)]
        if not can_evaluate(node) or not node.inputs:
            return None
        operands = [None if value is None else self[value] for value in node.inputs]
        if node.op_type in ("Shape", "Size"):
            measured = _measure(node, operands[0])
            return None if measured is None else [measured]
        values = [None if x is None else x.values for x in operands]
        if any(x is not None and x.values is None for x in operands):
            return None
        is_constant = not any(map(grows, values))
        if any(not _is_integer(v) for v in values) and not (is_constant and is_onnx(node, "Cast")):
            return None
        try:
            if not is_constant and not stays_affine(node, values):
                return None
            low, high = (
                evaluate(node, [None if v is None else v[which] for v in values], {"": self._opset}, GROWTH)
                for which in (0, 0 if is_constant else 1)
            )
        except Exception:  # a file may give an operator any operands and attributes; then its value is not known
            return None
        pairs = [None if a is None or b is None else as_extremes(a, b) for a, b in zip(low, high, strict=True)]
        return None if None in pairs else [p for p in pairs if p is not None]


def in_order(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """Yield the nodes of one graph, each after those that it reads from; a cycle in the order of the file."""
    seen = set[ir.Node]()
    for root in graph:
        stack = [(root, False)]
        while stack:
            node, is_ready = stack.pop()
            if is_ready:
                yield node
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                producers = [value.producer() for value in node.inputs if value is not None]
                stack += [(p, False) for p in reversed(producers) if p is not None and p.graph is node.graph]


def declared_type(value: ir.Value) -> ir.DataType | None:
    """Return the element type that the file declares; None for what is no tensor."""
    if not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.UNDEFINED:
        return None
    return value.dtype


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the tensor that a Constant node holds; None where it holds none."""
    for name, found in node.attributes.items():
        if found.is_ref() or found.value is None:
            continue
        if name == "value" and found.type == ir.AttributeType.TENSOR:
            tensor: ir.TensorProtocol = found.value
            return tensor
        if name in ("value_int", "value_ints") and found.type in (ir.AttributeType.INT, ir.AttributeType.INTS):
            return ir.Tensor(np.array(found.value, np.int64))
        if name in ("value_float", "value_floats") and found.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
            return ir.Tensor(np.array(found.value, np.float32))
    return None


def _shape_of_constant(node: ir.Node) -> list[tuple[Dims, Dims] | None] | None:
    tensor = constant_tensor(node)
    if tensor is None or len(node.outputs) != 1:
        return None
    dims = tuple(int(d) for d in tensor.shape.numpy())
    return [(dims, dims)] if min(dims, default=0) >= 0 else None


def _batch_symbol(graph: ir.Graph) -> str | None:
    """Return the symbol that stands on axis 0 of the first input that has one there."""
    for value in graph.inputs:
        if value.shape is not None and len(value.shape):
            first = value.shape[0]
            if not isinstance(first, int) and first.value:
                return first.value
    return None


def _known(
    dtype: ir.DataType | None,
    extremes: tuple[Dims, Dims] | None,
    values: Extremes | None = None,
    *,
    rank: int | None = None,
) -> Known:
    if extremes is None:
        return Known(dtype, rank)
    return Known(
        dtype, len(extremes[0]) if len(extremes[0]) == len(extremes[1]) else None, _fit(*extremes), extremes, values
    )


def _at(known: Known, batch: int) -> Known:
    """Return what is known of a value at one batch size: shapes and values grow by the same step with each."""
    if known.extremes is None:
        return known

    def between(low: int, high: int) -> int:
        return low + (high - low) * (batch - 1) // (BATCH - 1)

    extremes, values = known.extremes, known.values
    shape = tuple(map(between, *extremes)) if len(extremes[0]) == len(extremes[1]) else extremes[1]
    if values is not None and values[0] is not values[1] and values[0].shape == values[1].shape:
        numbers = [between(int(low), int(high)) for low, high in zip(values[0].flat, values[1].flat, strict=True)]
        array = np.array(numbers, values[0].dtype).reshape(values[0].shape)
        values = (array, array)
    return replace(known, extremes=(shape, shape), values=values)


def _fit(low: Dims, high: Dims) -> Dims | None:
    """Return the dims that give these shapes at both batch sizes, or None where they are not multiples of the batch."""
    if len(low) != len(high):
        return None
    dims = [fit_axis(a, b) for a, b in zip(low, high, strict=True)]
    return None if None in dims else high


def _is_integer(extremes: Extremes | None) -> bool:
    """Only integers are shapes; arithmetic on them is exact and needs no runtime."""
    return extremes is None or extremes[0].dtype.kind in "ib"


def _measure(node: ir.Node, operand: Known | None) -> Extremes | None:
    if operand is None or operand.extremes is None:
        return None
    start, end = node.attributes.get("start"), node.attributes.get("end")
    window = slice(*(a.value if a is not None and isinstance(a.value, int) else None for a in (start, end)))
    low, high = operand.extremes
    if node.op_type == "Shape":
        return as_extremes(np.array(low[window], np.int64), np.array(high[window], np.int64))
    sizes = [math.prod(low), math.prod(high)]
    return as_extremes(*(np.array(s, np.int64) for s in sizes)) if max(sizes) < 2**63 else None


def _made_alike(schema: onnx.defs.OpSchema, types: Sequence[ir.DataType | None]) -> list[ir.DataType | None]:
    """Give all operands of one type parameter the type of the first, or the only type that it may have."""
    first: dict[str, ir.DataType] = {}
    alike: list[ir.DataType | None] = []
    for i, dtype in enumerate(types):
        parameter = formal(schema.inputs, i)
        if dtype is not None and parameter is not None and parameter.is_homogeneous:
            allowed = allowed_types(schema, parameter.type_str)
            dtype = next(iter(allowed)) if len(allowed) == 1 else first.setdefault(parameter.type_str, dtype)
        alike.append(dtype)
    return alike


_SHAPED_AS_FIRST = ("GroupNormalization", "MeanVarianceNormalization")
"""Functions of ONNX's, of whose results it infers no shapes."""

_RESIZE_OPTIONS = 13
"""Before this opset a Resize had operands that had to be there and were not read; files leave them out, and TensorRT
takes these."""


def _infer_outputs(
    schema: onnx.defs.OpSchema,
    node: ir.Node,
    operands: Sequence[Known | None],
    types: Sequence[ir.DataType | None],
    which: int,
    opset: int,
) -> list[Dims | None] | str:
    """Run ONNX's own inference on one node at one batch size; return the shapes, or why it refuses."""
    try:
        proto = ir.serde.serialize_node(node)
        described, data = {}, {}
        for i, (operand, dtype) in enumerate(zip(operands, types, strict=True)):
            if operand is None or operand.extremes is None or dtype is None:
                continue
            proto.input[i] = name = f"x{i}"
            described[name] = onnx.helper.make_tensor_type_proto(int(dtype), operand.extremes[which])
            if operand.values is not None and operand.values[which].dtype.kind in "ibf":
                array = np.asarray(operand.values[which], dtype.numpy(), order="C")
                data[name] = onnx.numpy_helper.from_array(array, name)
        names = [f"y{i}" if output.name else "" for i, output in enumerate(node.outputs)]
        while len(names) > 1 and not names[-1]:  # absent, however it is written
            names.pop()
        proto.output[:] = names
        if node.op_type == "Resize" and opset < _RESIZE_OPTIONS:
            nothing = np.zeros(0, np.float32)
            proto.input[:] = [name or "absent" for name in proto.input]
            described["absent"] = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, nothing.shape)
            data["absent"] = onnx.numpy_helper.from_array(nothing, "absent")
        opsets = [onnx.helper.make_opsetid("", opset)]
        inferred = onnx.shape_inference.infer_node_outputs(schema, proto, described, data, None, opsets, 10)
    except Exception as error:  # a file may hold anything, and each part of ONNX has exceptions of its own
        return first_line(error)
    return [_shape(inferred.get(f"y{i}")) for i in range(len(node.outputs))]


def _shape(proto: onnx.TypeProto | None) -> Dims | None:
    if proto is None or not proto.HasField("tensor_type") or not proto.tensor_type.HasField("shape"):
        return None
    dims = proto.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None
