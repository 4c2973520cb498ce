"""Recipes of Q/DQ pairs: types, granularity, zero points, scales, neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.exporters.lint.corpus.draft import (
    BATCH,
    BF16,
    F16,
    F32,
    FLOATS,
    FP4,
    FP8,
    FP8_E5M2,
    I8,
    I16,
    I32,
    INT4,
    U8,
    UINT4,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.exporters.lint.corpus.draft import Dim, Draft

TYPES = {I8: 6, FP8: 2.5, INT4: 1.5, U8: 0.8, FP4: 0.4, I16: 0.2, FP8_E5M2: 0.2, UINT4: 0.2, I32: 0.3}
_OPSET = {I8: 10, U8: 10, FP8: 19, INT4: 21, FP4: 23, I16: 21, FP8_E5M2: 19, UINT4: 21, I32: 10}

Q, DQ = "QuantizeLinear", "DequantizeLinear"


class Pair:
    """What Q and DQ of one value share: drawn once, but for a slip now and then."""

    def __init__(self, d: Draft, dtype: int, dims: Sequence[Dim], *, stored: bool = False) -> None:
        self.d = d
        self.quantized = d.pick(TYPES)
        d.since(max(_OPSET[self.quantized], 10), 0.95)
        if dtype in (F16, BF16):
            d.since(19, 0.9)
        self.dims = dims
        self.dtype = dtype if d.chance(0.93) else d.pick(FLOATS)
        kinds = {"tensor": 6, "vector": 0.4, "axis": 4 if stored else 0.8, "block": 2.5 if stored else 0.4}
        self.kind = d.pick(kinds)
        self.axis = d.pick((0, 0, len(dims) - 1, -1, 1)) if self.kind == "axis" else len(dims) - 2
        self.block = d.pick((2, 4, 16)) if self.kind == "block" else None
        if self.block:
            d.since(21, 0.95)
        self.scales = self._shape()
        if d.chance(0.025):
            self.scales = [*self.scales, 1] if d.chance(0.5) else [3]
        self.zero = d.pick({"zero": 6, "none": 3, "other": 0.35, "type": 0.25})
        self._shared: list[str] = []
        if self.quantized != I8 or self.kind != "tensor":
            d.tags.append(f"{self.quantized}-{self.kind}")

    def _shape(self) -> list[int]:
        sizes = [dim if isinstance(dim, int) else 2 for dim in self.dims]
        if self.kind == "tensor":
            return []
        if self.kind == "vector" or not sizes:
            return [1]
        if self.kind == "axis":
            return [sizes[self.axis] if -len(sizes) <= self.axis < len(sizes) else 2]
        sizes[self.axis] = -(-sizes[self.axis] // (self.block or 1))
        return sizes

    def operands(self) -> list[str]:
        """Return scale and zero point: mostly one for both operators."""
        d = self.d
        if self._shared and d.chance(0.9):
            return self._shared
        low = d.pick({0.05: 20, 0.0: 0.2, -0.1: 0.2, 1e-41: 0.2})
        values = np.full(self.scales, low) + np.arange(int(np.prod(self.scales, dtype=int))).reshape(self.scales) / 100
        if d.chance(0.06):
            d.tags.append("scale")
            scale = d.pick((
                lambda: d.input(self.dtype, self.scales),
                lambda: d.node("Mul", [d.constant(values, self.dtype), d.constant(np.asarray(2.0), self.dtype)]),
                lambda: d.node("Cast", [d.constant(values, F16 if self.dtype == F32 else F32)], to=self.dtype),
                lambda: d.node("Identity", [d.constant(values, self.dtype)]),
            ))()  # fmt: skip
        else:
            scale = d.constant(values, self.dtype)
        operands = [scale]
        if self.zero != "none":
            kind = self.quantized if self.zero != "type" else d.pick((U8, I8, I32))
            zeros = np.zeros(self.scales if d.chance(0.97) else [2])
            operands.append(d.constant(zeros + (self.zero == "other"), kind))
        self._shared = operands
        return operands

    def _attributes(self) -> dict[str, object]:
        d = self.d
        given: dict[str, object] = {}
        if self.kind in ("axis", "block") or d.chance(0.1):
            given["axis"] = self.axis if d.chance(0.97) else 0
        if self.block:
            given["block_size"] = self.block
        return given

    def quantize(self, value: str) -> str:
        given = self._attributes()
        if self.d.opset >= 21 and (self.zero == "none" and self.d.chance(0.75)):
            given["output_dtype"] = self.quantized
        return self.d.node(Q, [value, *self.operands()], **given)

    def dequantize(self, value: str) -> str:
        return self.d.node(DQ, [value, *self.operands()], **self._attributes())


def _dims(d: Draft, *tail: int) -> list[Dim]:
    return [BATCH if d.chance(0.4) else 2, *tail]


def pair(d: Draft) -> None:
    """A pair on activations, and something before, between or behind."""
    dtype, dims = d.dtype(FLOATS, 0.05), _dims(d, *d.pick(((8,), (4, 8), (4, 6, 6), (3, 5))))
    both = Pair(d, dtype, dims)
    x = d.data(dtype, dims, stored=0)
    if d.chance(0.2):
        x = d.node(d.pick(("Relu", "Sigmoid", "Softmax")), [x])
    q = both.quantize(x)
    kind = d.pick({"pair": 8, "q": 0.7, "move": 1.5, "two": 1, "lone": 0.4, "chain": 0.6, "also": 0.5, "cast": 0.3})
    d.tags.append(kind)
    if kind == "q":
        d.output(q, dtype=both.quantized)
        return
    if kind == "lone":
        d.output(d.node("Relu", [x]))
        return
    if kind == "move":
        move = d.pick(("Transpose", "Reshape", "Identity", "Slice", "MaxPool", "Relu", "Concat"))
        d.tags.append(move)
        if move == "Reshape":
            q = d.node(move, [q, d.constant(np.array([0, -1]))])
        elif move == "Slice" and d.opset >= 10:
            q = d.node(move, [q, *(d.constant(np.array([v])) for v in (0, 1, 1))])
        elif move == "Concat":
            q = d.node(move, [q, q], axis=-1)
        elif move == "MaxPool":
            q = d.node(move, [q], kernel_shape=[1] * max(len(dims) - 2, 1))
        else:
            q = d.node(move, [q])
    if kind == "cast":
        q = d.node("Cast", [q], to=d.pick((I8, F32, both.quantized)))
    y = both.dequantize(q)
    if kind == "two":
        d.output(both.dequantize(q))
    if kind == "chain":
        y = both.dequantize(both.quantize(y)) if d.chance(0.6) else both.dequantize(y)
    if kind == "also":
        d.output(d.node("Identity", [q]), dtype=both.quantized)
    d.output(d.node("Relu", [y]) if d.chance(0.4) else y, dtype=None if d.chance(0.5) else both.dtype)


def weight(d: Draft) -> None:
    """A stored weight, dequantized or a pair, before a product."""
    op = d.pick({"MatMul": 5, "Gemm": 2.5, "Conv": 3, "ConvTranspose": 1, "Gather": 0.7, "Add": 0.7})
    d.tags.append(op)
    dtype = d.dtype(FLOATS, 0.03)
    sizes = {"Conv": [8, 4, 3, 3], "ConvTranspose": [4, 8, 3, 3], "Gather": [16, 8], "Add": [8]}.get(op, [16, 8])
    both = Pair(d, dtype, sizes, stored=True)
    if both.kind == "axis" and d.chance(0.6):
        both.axis = {"Conv": 0, "ConvTranspose": 1}.get(op, len(sizes) - 1)
        both.scales = both._shape()
    if d.chance(0.75):
        w = both.dequantize(d.constant(d.array(sizes, both.quantized)))
    else:
        w = both.dequantize(both.quantize(d.constant(d.array(sizes, dtype))))
    if d.chance(0.15) and len(sizes) == 2:
        w = d.node("Transpose", [w], perm=[0, 1])
    dims = {"Conv": _dims(d, 4, 6, 6), "ConvTranspose": _dims(d, 4, 6, 6), "Add": _dims(d, 8)}.get(op, _dims(d, 16))
    if op == "Gather":
        d.output(d.node(op, [w, d.constant(np.array([0, 3]))], axis=0))
        return
    x = d.input(dtype, dims)
    if d.chance(0.6):
        own = Pair(d, dtype, dims)
        if d.chance(0.8):
            own.quantized, own.kind, own.block, own.scales = (
                both.quantized if both.quantized != INT4 else I8,
                "tensor",
                None,
                [],
            )
        x = own.dequantize(own.quantize(x))
    operands = [x, w]
    if op in ("Gemm", "Conv") and d.chance(0.5):
        operands.append(d.weight([8], dtype))
        if d.chance(0.1):
            bias = d.constant(np.ones(8), I32)
            operands[-1] = d.node(DQ, [bias, d.constant(np.full(8, 0.1), dtype)], axis=0)
    y = d.node(op, operands)
    if d.chance(0.3):
        after = Pair(d, dtype, dims)
        y = after.dequantize(after.quantize(y))
    d.output(y)


def block_of_layers(d: Draft) -> None:
    """Two products with pairs at places that are usual, or are not."""
    dtype = d.pick(FLOATS)
    x = d.input(dtype, _dims(d, 5, 16))
    places = {name: d.chance(0.6) for name in ("first", "bias", "activation", "second", "residual")}

    def quantized(value: str, here: str) -> str:
        if not places[here]:
            return value
        own = Pair(d, dtype, [1, 5, 16])
        if d.chance(0.85):
            own.quantized, own.kind, own.block, own.scales, own.zero = I8, "tensor", None, [], "zero"
        return own.dequantize(own.quantize(value))

    h = d.node("MatMul", [quantized(x, "first"), d.weight([16, 16], dtype)])
    h = d.node("Add", [quantized(h, "bias"), d.weight([16], dtype)])
    h = d.node(d.pick(("Relu", "Sigmoid", "Tanh", "Erf")), [quantized(h, "activation")])
    h = d.node("MatMul", [quantized(h, "second"), d.weight([16, 16], dtype)])
    d.output(d.node("Add", [quantized(h, "residual"), x]))


def plugin_operators(d: Draft) -> None:
    """TensorRT's own operators, and other quantizers that it does not know."""
    op = d.pick(
        (
            "TRT_INT4DequantizeLinear",
            "TRT_FP8QuantizeLinear",
            "QLinearMatMul",
            "DynamicQuantizeLinear",
            "QuantizeLinear",
        )
    )
    d.tags.append(op)
    x = d.input(F32 if op != "QuantizeLinear" else F16, [2, 8])
    if op == "QuantizeLinear":
        scale = d.constant(np.asarray(0.1), F16)
        q = d.node(op, [x, scale, d.constant(np.asarray(0), I8)], domain="com.microsoft")
        d.output(
            d.node("DequantizeLinear", [q, scale, d.constant(np.asarray(0), I8)], domain="com.microsoft"), dtype=F16
        )
    elif op.startswith("TRT_INT4"):
        w = d.constant(d.array([8, 4], INT4))
        d.since(21, 1)
        d.output(
            d.node("MatMul", [x, d.node(op, [w, d.constant(np.full(4, 0.1), F32)], domain="trt", axis=1)]), dtype=F32
        )
    elif op.startswith("TRT_FP8"):
        d.since(19, 1)
        s = d.constant(np.asarray(0.5), F32)
        d.output(d.node("TRT_FP8DequantizeLinear", [d.node(op, [x, s], domain="trt"), s], domain="trt"), dtype=F32)
    elif op == "QLinearMatMul":
        d.since(10, 1)
        s, z = d.constant(np.float32(0.1)), d.constant(np.int8(0))
        q = d.node(Q, [x, s, z])
        d.output(d.node(DQ, [d.node(op, [q, s, z, d.constant(np.ones((8, 4)), I8), s, z, s, z]), s, z]))
    else:
        d.since(11, 1)
        d.output(d.node("Cast", [d.nodes_of(op, [x], 3)[0]], to=F32))


QUANTIZED: dict[Callable[[Draft], None], float] = {pair: 13, weight: 14, block_of_layers: 4, plugin_operators: 1.5}
