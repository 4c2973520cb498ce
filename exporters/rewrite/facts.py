"""What is known of every value: its type, its shape for any batch size, and its value where that is constant.

The graph is interpreted at two batch sizes. A dimension that doubles with the batch is a multiple of it; a value that
is the same at both is constant, however it was computed from shapes. A symbolic dimension is written as a multiple of
the stand-in :data:`BATCH`, so that ``[64*B, 49, 96]`` is a tuple of plain integers on which all arithmetic works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from exporters.rewrite.evaluate import can_evaluate, evaluate
from exporters.rewrite.movement_ops import Array

if TYPE_CHECKING:
    from collections.abc import Mapping

Dims: TypeAlias = tuple[int, ...]

BATCH = 1_000_003
"""Stand-in for the symbolic batch: a prime above every dimension of a real model."""

PROBES = (2, 3)
"""Batch sizes of the interpretation. Not 1, which broadcasts."""

_SHAPE_ARITHMETIC_LIMIT = 4096
"""Largest batch-dependent value that is followed, elements. Shapes are shorter; tensors of data are longer."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one value.

    Attributes:
        dtype: element type.
        dims: shape, with the batch written as multiples of :data:`BATCH`; None where it is not of that form.
        probes: the value at each batch size of :data:`PROBES`, or None where it depends on data.
    """

    dtype: ir.DataType
    dims: Dims | None
    probes: tuple[Array, ...] | None = None

    @property
    def constant(self) -> Array | None:
        """The value, where it is the same at every batch size."""
        if self.probes is None:
            return None
        first, *rest = self.probes
        return first if all(x is first or _same(x, first) for x in rest) else None

    def at(self, batch: int) -> Dims | None:
        """The shape for a batch size."""
        return None if self.dims is None else tuple(substitute(d, batch) for d in self.dims)


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def substitute(dim: int, batch: int) -> int:
    """Replace the stand-in in one dimension by a batch size."""
    return dim // BATCH * batch if dim % BATCH == 0 else dim


def dynamic_axes(dims: Dims) -> list[int]:
    """Return the axes that grow with the batch."""
    return [i for i, dim in enumerate(dims) if dim and dim % BATCH == 0]


def reshape_target(dims: Dims) -> list[int] | None:
    """Return dims as a Reshape operand, -1 for the batch; None where two axes grow with it."""
    axes = dynamic_axes(dims)
    return None if len(axes) > 1 else [-1 if i in axes else dim for i, dim in enumerate(dims)]


class Facts:
    """Facts about a graph, kept up to date by the passes as they add nodes."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._facts: dict[ir.Value, Fact] = {}
        self.batch_name = _batch_symbol(graph)
        for value in graph.inputs:
            self._add_input(value)
        for value in graph.initializers.values():
            self._fact_of_initializer(value)
        for node in graph:
            self.infer(node)

    def __getitem__(self, value: ir.Value) -> Fact | None:
        return self._facts.get(value) or self._fact_of_initializer(value)

    def dims(self, value: ir.Value | None) -> Dims | None:
        """Return the shape of a value, or None where it is not known."""
        fact = None if value is None else self[value]
        return None if fact is None else fact.dims

    def constant(self, value: ir.Value | None) -> Array | None:
        """Return the value of a constant, or None."""
        fact = None if value is None else self[value]
        return None if fact is None else fact.constant

    def infer(self, node: ir.Node) -> None:
        """Record what follows for the outputs of a node whose inputs are known."""
        facts = [None if value is None else self[value] for value in node.inputs]
        if any(fact is None and value is not None for fact, value in zip(facts, node.inputs, strict=True)):
            return
        values = self._evaluate(node, facts)
        if values is not None:
            for i, output in enumerate(node.outputs):
                probes = tuple(v[i] for v in values)
                shapes = [p.shape for p in probes]
                self._facts[output] = Fact(_dtype(probes[0]), _fit(shapes), probes)
            return
        shapes_at = [_infer_outputs(node, facts, i, self._graph.opset_imports) for i in range(len(PROBES))]
        if any(s is None for s in shapes_at):
            return
        for i, output in enumerate(node.outputs):
            inferred = [s[i] for s in shapes_at if s is not None]
            if all(t is not None for t in inferred):
                types = [t for t in inferred if t is not None]
                self._facts[output] = Fact(types[0][0], _fit([t[1] for t in types]))

    def _add_input(self, value: ir.Value) -> None:
        if value.shape is None or value.dtype is None:
            return
        dims = tuple(dim if isinstance(dim, int) else BATCH for dim in value.shape)
        symbols = {dim.value for dim in value.shape if isinstance(dim, ir.SymbolicDim)}
        known = symbols <= {self.batch_name} and None not in symbols
        if known:
            self._facts[value] = Fact(value.dtype, dims)

    def _fact_of_initializer(self, value: ir.Value) -> Fact | None:
        tensor = value.const_value
        if tensor is None or not value.is_initializer() or value.is_graph_input():
            return None
        array = tensor.numpy()
        fact = self._facts[value] = Fact(tensor.dtype, array.shape, (array,) * len(PROBES))
        return fact

    def _evaluate(self, node: ir.Node, facts: list[Fact | None]) -> list[list[Array]] | None:
        """Return the outputs at each probe, where they follow from constants and shapes alone."""
        if not can_evaluate(node):
            return None
        if node.op_type in ("Shape", "Size") and facts[0] is not None and facts[0].dims is not None:
            shapes = [np.array(facts[0].at(b), np.int64) for b in PROBES]
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
            return [[s[start:end] if node.op_type == "Shape" else np.array(s.prod(), np.int64)] for s in shapes]
        if any(fact is not None and fact.probes is None for fact in facts) or not facts:
            return None
        constant = all(fact is None or fact.constant is not None for fact in facts)
        if not constant and sum(fact.probes[0].size for fact in facts if fact and fact.probes) > _SHAPE_ARITHMETIC_LIMIT:
            return None
        results: list[list[Array]] = []
        try:
            for i in range(1 if constant else len(PROBES)):
                operands = [None if fact is None or fact.probes is None else fact.probes[i] for fact in facts]
                results.append(evaluate(node, operands, self._graph.opset_imports))
        except ValueError:
            return None
        return results * len(PROBES) if constant else results


def _batch_symbol(graph: ir.Graph) -> str | None:
    """Return the name of the batch axis: the one symbol that stands on axis 0 of the inputs."""
    for value in graph.inputs:
        if value.shape is not None and len(value.shape) and isinstance(value.shape[0], ir.SymbolicDim):
            return value.shape[0].value
    return None


def _fit(shapes: list[Dims]) -> Dims | None:
    """Return the dims that give these shapes at the probes, or None where they are not multiples of the batch."""
    first, *rest = shapes
    if any(len(s) != len(first) for s in rest):
        return None
    dims = []
    for axis in zip(*shapes, strict=True):
        if len(set(axis)) == 1:
            dims.append(axis[0])
        elif all(size * PROBES[0] == axis[0] * b for size, b in zip(axis, PROBES, strict=True)) and not axis[0] % PROBES[0]:
            dims.append(axis[0] // PROBES[0] * BATCH)
        else:
            return None
    return tuple(dims)


def _dtype(array: Array) -> ir.DataType:
    return ir.DataType.from_numpy(array.dtype)


def _infer_outputs(
    node: ir.Node, facts: list[Fact | None], probe: int, opset_imports: Mapping[str, int]
) -> list[tuple[ir.DataType, Dims] | None] | None:
    """Run ONNX's own shape inference on one node at one batch size."""
    version = opset_imports.get(node.domain)
    if version is None or not onnx.defs.has(node.op_type, node.domain):
        return None
    proto = ir.to_proto(node)
    assert isinstance(proto, onnx.NodeProto)
    types, data = {}, {}
    for i, fact in enumerate(facts):
        if fact is None:
            continue
        shape = fact.at(PROBES[probe])
        if shape is None:
            return None
        proto.input[i] = name = f"x{i}"
        types[name] = onnx.helper.make_tensor_type_proto(int(fact.dtype), shape)
        if fact.probes is not None and fact.probes[probe].size <= _SHAPE_ARITHMETIC_LIMIT:
            data[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(fact.probes[probe]), name)
    for i, output in enumerate(node.outputs):
        proto.output[i] = f"y{i}" if output.name else ""
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        opsets = [onnx.helper.make_opsetid(domain, v) for domain, v in opset_imports.items()]
        inferred = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, None, opsets, 10)
    except (onnx.shape_inference.InferenceError, onnx.defs.SchemaError):
        return None
    return [_read_type(inferred.get(f"y{i}")) for i in range(len(node.outputs))]


def _read_type(proto: onnx.TypeProto | None) -> tuple[ir.DataType, Dims] | None:
    if proto is None or not proto.HasField("tensor_type") or not proto.tensor_type.HasField("shape"):
        return None
    dims = proto.tensor_type.shape.dim
    if not all(d.HasField("dim_value") for d in dims):
        return None
    return ir.DataType(proto.tensor_type.elem_type), tuple(d.dim_value for d in dims)


