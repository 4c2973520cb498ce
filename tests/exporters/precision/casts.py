"""Small FP32 graphs as ONNX text, cast, and what must hold of every typed graph."""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

from deploycli.exporters.graph.movement_ops import MOVEMENT
from deploycli.exporters.lint import lint
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.exporters.precision.simulate import SimulatedRuntime, reduced_type
from tests.exporters.passes.graphs import session

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import numpy.typing as npt

Array = Any  # arrays of any type, in tests

F16, F32, BF16 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16
TYPING = frozenset({3, 4, 6, 8})
"""Rules of the lint that a cast may break: element types, scales, Gemm."""


QUANTIZED = """g (float[2, 4, 8] x) => (float[2, 4, 8] y) {
    a = Mul (x, two)
    q = QuantizeLinear (a, s, z)
    d = DequantizeLinear (q, s, z)
    v = DequantizeLinear <axis = 1> (i, t, o)
    b = MatMul (d, v)
    y = Relu (b)
}"""
INT8 = {
    "two": np.float32(2),
    "s": np.float32(2**-5),
    "z": np.int8(0),
    "i": np.arange(-32, 32, dtype=np.int8).reshape(8, 8),
    "o": np.zeros(8, np.int8),
}
"""Constants of it, the scales t of the weight aside."""


def source(
    text: str, opset: int = 20, *, is_named: bool = True, **constants: npt.ArrayLike | Double
) -> onnx.ModelProto:
    """Parse a graph given as text without its header; Python floats are FP32."""
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "other" : 1, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(f"{head}\n{text}")
    model.graph.initializer.extend(_tensor(name, value) for name, value in constants.items())
    if is_named:
        for i, node in enumerate(model.graph.node):
            node.name = node.name or f"block.{i}/{node.op_type}"
    return model


def _tensor(name: str, value: npt.ArrayLike | Double) -> onnx.TensorProto:
    if isinstance(value, Double):
        return numpy_helper.from_array(np.array(value.value), name)
    array = np.asarray(value)
    return numpy_helper.from_array(array.astype(np.float32) if array.dtype == np.float64 else array, name)


@dataclass(frozen=True)
class Double:
    """A constant that is DOUBLE on purpose."""

    value: float


@dataclass(frozen=True)
class Typed:
    """A graph before and after, and what was said of it."""

    source: onnx.ModelProto
    proto: onnx.ModelProto
    notes: Mapping[str, str]

    @property
    def ops(self) -> Counter[str]:
        return Counter(node.op_type for node in self.proto.graph.node)

    @property
    def types(self) -> dict[str, int]:
        """Element types of all values of the main graph, by ONNX's own inference."""
        return types_of(self.proto)

    def node(self, op_type: str) -> onnx.NodeProto:
        (found,) = (node for node in self.proto.graph.node if node.op_type == op_type)
        return found

    def result(self, op_type: str) -> int:
        """The element type of the first result of the only node of this kind."""
        return self.types[self.node(op_type).output[0]]

    def constant(self, name: str) -> Array:
        return numpy_helper.to_array(next(t for t in self.proto.graph.initializer if t.name == name))

    def run(self, **inputs: Array) -> dict[str, Array]:
        return simulated(self.proto, **inputs)

    def run_source(self, **inputs: Array) -> dict[str, Array]:
        return plain(self.source, **inputs)


def typed(
    model: onnx.ModelProto, precision: str = "fp16", *, io: bool = False, keep: tuple[str, ...] = (), **policy: Any
) -> Typed:
    """Cast a graph, and check all that must hold whatever the graph is."""
    onnx.checker.check_model(model, full_check=True)
    made = [_cast(model, precision, io=io, keep=keep, **policy) for _ in range(2)]
    (proto, notes), (again, _) = made
    assert proto.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)
    check(proto)
    check_ends(model, proto, precision if io else "fp32")
    check_casts(proto, {node.name for node in model.graph.node})
    return Typed(model, proto, notes)


def _cast(
    model: onnx.ModelProto, precision: str, *, io: bool, keep: tuple[str, ...], **policy: Any
) -> tuple[onnx.ModelProto, dict[str, str]]:
    graph = ir.from_proto(copy.deepcopy(model))  # its tensors would be renamed in place
    rules = Policy(REDUCED_TYPES[precision], keep=tuple(re.compile(text) for text in keep), **policy)
    notes = cast(graph, rules, reduce_io=io)
    proto = ir.to_proto(graph)
    assert isinstance(proto, onnx.ModelProto)
    assert len({(note.node, note.reason) for note in notes}) == len(notes)
    return proto, {note.node: note.reason for note in notes}


def types_of(proto: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    types = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    return types | {value.name: value.type.tensor_type.elem_type for value in values}


def check(proto: onnx.ModelProto) -> None:
    """A strongly typed graph: the checker, strict inference and the rules of the parser have nothing against it."""
    onnx.checker.check_model(proto, full_check=True)
    types_of(proto)
    report = lint(ir.from_proto(proto), rules=TYPING, plugins=["Half", "twice"])
    assert report.errors == ()
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    assert all(names)


def check_ends(before: onnx.ModelProto, after: onnx.ModelProto, precision: str) -> None:
    """Names and shapes stay; FP32 may become the type of the ends."""
    for old, new in ((before.graph.input, after.graph.input), (before.graph.output, after.graph.output)):
        assert [value.name for value in old] == [value.name for value in new]
        for x, y in zip(old, new, strict=True):
            a, b = x.type.tensor_type, y.type.tensor_type
            assert a.shape == b.shape
            wanted = int(REDUCED_TYPES[precision]) if precision != "fp32" else F32
            assert b.elem_type == (wanted if a.elem_type == F32 else a.elem_type)


def check_casts(proto: onnx.ModelProto, old: Collection[str]) -> None:
    """No Cast is there for nothing: to the same type, twice, of a constant, or back after data was moved only.

    What the graph had already, under ``old`` names, may be unread or there twice.
    """
    types, outputs = types_of(proto), {value.name for value in proto.graph.output}
    constants = {t.name for t in proto.graph.initializer} - {value.name for value in proto.graph.input}
    producers = {name: node for node in proto.graph.node for name in node.output}
    read = {name for node in _all_nodes(proto.graph) for name in node.input} | outputs
    seen = set()
    for node in proto.graph.node:
        if node.op_type != "Cast":
            continue
        given, made = types.get(node.input[0], 0), types[node.output[0]]
        assert given != made
        if node.name not in old:
            assert (node.input[0], made) not in seen
            assert node.input[0] not in constants
            assert node.output[0] in read
        seen.add((node.input[0], made))
        if (given, made) in ((F16, F32), (BF16, F32)):
            assert not _moved_from_cast(node.input[0], producers, types), f"{node.name} undoes a Cast"
    unread = {name for name in constants - read if not any(name in t.name for t in proto.graph.output)}
    assert unread <= {name for name in constants if name.startswith("unread")}


def _moved_from_cast(name: str, producers: Mapping[str, onnx.NodeProto], types: Mapping[str, int]) -> bool:
    node = producers.get(name)
    if node is None:
        return False
    if node.op_type == "Cast":
        return types.get(node.input[0]) == F32
    return node.op_type in MOVEMENT and any(_moved_from_cast(x, producers, types) for x in node.input if x)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_nodes(inner)


def weights(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def feeds(proto: onnx.ModelProto, seed: int = 0) -> dict[str, Array]:
    """Numbers for every input: normal ones, which FP16 has too, or small integers."""
    rng, made = np.random.default_rng(seed), {}
    constants = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        if value.type.tensor_type.elem_type == TensorProto.INT64:
            made[value.name] = rng.integers(0, 5, shape)
        elif value.type.tensor_type.elem_type == TensorProto.BOOL:
            made[value.name] = rng.integers(0, 2, shape).astype(bool)
        elif value.name not in constants:
            made[value.name] = rng.standard_normal(shape).astype(np.float16).astype(np.float32)
    return made


def assert_close(graph: Typed, rtol: float = 4e-3, **inputs: Array) -> None:
    """The simulation of the typed graph gives what the FP32 graph gives, up to rounding."""
    inputs = inputs or feeds(graph.source)
    expected, found = graph.run_source(**inputs), graph.run(**inputs)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        if array.dtype.kind != "f":
            np.testing.assert_array_equal(found[name], array)
            continue
        assert np.isfinite(found[name]).all()
        assert np.abs(found[name] - array).max() <= rtol * np.abs(array).max()


def simulated(proto: onnx.ModelProto, **inputs: Array) -> dict[str, Array]:
    model = ir.from_proto(proto)
    dtype = reduced_type(model)
    assert dtype is not None
    with SimulatedRuntime(model, dtype, threads=1) as runtime:
        return runtime.run(inputs)


def plain(proto: onnx.ModelProto, **inputs: Array) -> dict[str, Array]:
    """Run node by node in ONNX Runtime, as written."""
    runtime = session(proto)
    names = [value.name for value in proto.graph.output]
    return dict(zip(names, runtime.run(names, inputs), strict=True))
