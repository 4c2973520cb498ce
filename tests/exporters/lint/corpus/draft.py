"""A graph in the making, and the dice that decide what becomes of it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

T = TypeVar("T")
Dim = int | str

F32, F16, BF16, F64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE
I8, I16, I32, I64 = TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64
U8, U16, U32, U64 = TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64
BOOL, FP8, INT4, FP4 = TensorProto.BOOL, TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1
FP8_E5M2, UINT4, COMPLEX = TensorProto.FLOAT8E5M2, TensorProto.UINT4, TensorProto.COMPLEX64

FLOATS: Mapping[int, float] = {F32: 4, F16: 5, BF16: 1.2}
NUMBERS: Mapping[int, float] = {**FLOATS, I32: 1.5, I64: 1.5}
ANY: Mapping[int, float] = {**NUMBERS, BOOL: 1, F64: 0.5}
ODD: Mapping[int, float] = {F64: 2, I8: 1, U8: 1, I16: 0.7, U32: 0.5, I32: 2, I64: 2, BOOL: 1.5, FP8: 0.4, U64: 0.3}

OPSETS: Mapping[int, float] = {
    **{7: 0.5, 8: 0.5, 9: 0.7, 10: 0.7, 11: 1, 12: 0.7, 13: 2, 14: 1, 15: 1, 16: 1, 17: 3, 18: 2, 19: 2, 20: 4},
    **{21: 3, 22: 2, 23: 2, 24: 1.5, 25: 1, 26: 0.7},
}

BATCH = "batch"


class Draft:
    """A graph in the making.

    Args:
        seed: of the dice.

    Attributes:
        opset: of the graph; a recipe may raise it.
        tags: words for the graph's name.
    """

    def __init__(self, seed: str) -> None:
        self.dice = random.Random(seed)
        self.opset = self.pick(OPSETS)
        self.ir_version = 10
        self.tags: list[str] = []
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.domains: set[str] = set()
        self._names = 0

    # the dice

    def chance(self, probability: float) -> bool:
        return self.dice.random() < probability

    def pick(self, choices: Mapping[T, float] | Sequence[T]) -> T:
        """Return one of the choices, by weight where they have any."""
        if isinstance(choices, dict):
            return self.dice.choices(list(choices), list(choices.values()))[0]
        return self.dice.choice(list(choices))

    def since(self, opset: int, often: float = 0.9) -> None:
        """Mostly use an opset from this one on."""
        if self.opset < opset and self.chance(often):
            self.opset = self.pick({number: weight for number, weight in OPSETS.items() if number >= opset})

    def dtype(self, usual: Mapping[int, float] = FLOATS, odd: float = 0.15) -> int:
        """Return an element type that an operator has, or now and then another."""
        return self.pick(ODD if self.chance(odd) else usual)

    def shape(
        self, rank: int | None = None, *, batch: float = 0.4, sizes: Sequence[int] = (1, 2, 3, 4, 8)
    ) -> list[Dim]:
        """Return dimensions; the first may be the batch, another one may be dynamic, too."""
        rank = self.pick({0: 0.3, 1: 1, 2: 3, 3: 4, 4: 4, 5: 1, 6: 0.3, 8: 0.1, 9: 0.1}) if rank is None else rank
        dims: list[Dim] = [self.pick(sizes) for _ in range(rank)]
        if rank and self.chance(batch):
            dims[0] = BATCH
            if rank > 1 and self.chance(0.08):
                dims[self.dice.randrange(1, rank)] = "n"
        elif rank and self.chance(0.015):
            dims[-1] = 0
        return dims

    def axis(self, rank: int) -> int:
        """Return an axis, counted from either side, and now and then one too far."""
        if not rank or self.chance(0.03):
            return rank
        return self.dice.randrange(-rank, rank)

    def array(self, dims: Sequence[int], dtype: int = F32, low: float = -1, high: float = 1) -> npt.NDArray[Any]:
        """Return numbers that an element type can hold."""
        values = np.random.default_rng(self.dice.randrange(2**32)).uniform(low, high, tuple(dims))
        numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
        if dtype == BOOL:
            return np.asarray(values > 0)
        if dtype in (I8, I16, I32, I64, INT4):
            return np.asarray(np.rint(values * 4)).astype(numpy_type)
        if dtype in (U8, U16, U32, U64, UINT4):
            return np.asarray(np.abs(np.rint(values * 4))).astype(numpy_type)
        return np.asarray(values).astype(numpy_type)

    # values

    def name(self, stem: str) -> str:
        self._names += 1
        return f"{stem}{self._names}"

    def input(self, dtype: int, dims: Sequence[Dim]) -> str:
        name = self.name("x")
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(dims)))
        return name

    def constant(self, array: npt.ArrayLike, dtype: int | None = None, *, node: float = 0.2) -> str:
        """Return a stored value: an initializer, or now and then a Constant node."""
        found = np.asarray(array)
        if dtype is not None:
            found = found.astype(helper.tensor_dtype_to_np_dtype(dtype))
        name = self.name("c")
        tensor = numpy_helper.from_array(found, name)
        if self.chance(node):
            self.nodes.append(helper.make_node("Constant", [], [name], name=f"n.{name}", value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def integers(self, values: Sequence[int] | int, dtype: int = I64, *, computed: float = 0.1) -> str:
        """Return an operand such as axes, pads or a shape: mostly stored, else computed or an input of the graph."""
        array = np.asarray(values, helper.tensor_dtype_to_np_dtype(dtype))
        if not self.chance(computed):
            return self.constant(array)
        kind = self.pick({"input": 2, "identity": 1, "arithmetic": 1.5, "data": 1.5, "cast": 1})
        self.tags.append(kind)
        if kind == "input":
            return self.input(dtype, array.shape)
        if kind == "data":
            numbers = self.input(F32, array.shape)
            return self.node("Cast", [numbers], to=dtype)
        if kind == "identity":
            return self.node("Identity", [self.constant(array)])
        if kind == "cast":
            other = I32 if dtype == I64 else I64
            return self.node("Cast", [self.constant(array, other)], to=dtype)
        return self.node("Add", [self.constant(array - 1), self.constant(np.ones_like(array))])

    def data(self, dtype: int, dims: Sequence[Dim], *, stored: float = 0.04) -> str:
        """Return what an operator works on: mostly an input of the graph, else stored or computed."""
        if self.chance(stored) and all(isinstance(dim, int) for dim in dims):
            return self.constant(self.array([int(dim) for dim in dims], dtype))
        x = self.input(dtype, dims)
        if self.chance(0.15):
            return self.node("Identity", [x])
        return x

    def weight(self, dims: Sequence[int], dtype: int, *, computed: float = 0.08, **limits: float) -> str:
        """Return a parameter: mostly stored."""
        if self.chance(computed):
            self.tags.append("computed")
            return self.input(dtype, dims)
        return self.constant(self.array(dims, dtype, **limits), dtype)

    def node(self, op_type: str, operands: Sequence[str], *, domain: str = "", **attributes: Any) -> str:
        return self.nodes_of(op_type, operands, 1, domain=domain, **attributes)[0]

    def nodes_of(
        self, op_type: str, operands: Sequence[str], results: int, *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several results."""
        names = [self.name("y") for _ in range(results)]
        self.add(op_type, operands, names, domain=domain, **attributes)
        return names

    def add(
        self, op_type: str, operands: Sequence[str], results: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> None:
        given = {key: value for key, value in attributes.items() if value is not None and value != []}
        node = helper.make_node(
            op_type, operands, results, name=f"n{len(self.nodes)}.{op_type}", domain=domain, **given
        )
        self.nodes.append(node)
        if domain:
            self.domains.add(domain)

    def output(self, *names: str, dtype: int | None = None) -> None:
        """Let values be results of the graph; their types are inferred unless given."""
        for name in names:
            info = onnx.ValueInfoProto(name=name)
            if dtype is not None:
                info = helper.make_tensor_value_info(name, dtype, None)
            self.outputs.append(info)

    def model(self) -> onnx.ModelProto:
        """Return the model; results are declared as ONNX infers them, or else to have the type of the first input."""
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in sorted(self.domains))]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version)
        try:
            inferred = {v.name: v.type for v in onnx.shape_inference.infer_shapes(model).graph.output}
        except Exception:  # the graph may be odd
            inferred = {}
        inferred |= {v.name: v.type for v in self.inputs}
        first = self.inputs[0].type.tensor_type.elem_type if self.inputs else F32
        for value in model.graph.output:
            found, given = inferred.get(value.name), value.type.tensor_type.elem_type
            if found is not None and found.WhichOneof("value"):
                value.type.CopyFrom(found)
            if given or not value.type.WhichOneof("value"):
                value.type.tensor_type.elem_type = given or first
        return model
