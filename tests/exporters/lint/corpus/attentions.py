"""Attentions in many forms, by number: does the compiler make one kernel of each?

A form deviates from the plain one, softmax(q k^T * scale) v in FP16 with heads of 32 channels, in no, one or several
ways: sizes, masks, where the scale stands, the type of the softmax, what else stands between the products, layouts,
quantization. The seen half, of even numbers, may be looked at while rule 16 is mended. The unseen half is only counted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from deploycli.exporters.tensorrt.compilers.rtx import as_inspector_json
from deploycli.exporters.tensorrt.inspector import parse_layers
from tests.exporters.lint.corpus import Sample, records
from tests.exporters.lint.corpus.records import Record, digest_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import onnx

    from deploycli.exporters.target.targets import Capability
    from tests.exporters.lint.judge import Verdict

FILE = records.FILE.with_name("attentions.txt")

SIZE = 400

Layout = Literal["heads", "projected", "packed", "rows", "windows", "flat"]
Mask = Literal["none", "bias", "square", "keys", "input", "padding", "windows", "two", "where"]
Scale = Literal["none", "queries", "both", "product", "division", "learned"]
Between = Literal["", "Tanh", "Clip", "Relu", "Sub", "Mul", "Identity"]

_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Form:
    """One attention.

    Attributes:
        dtype: of all that is not quantized.
        layout: of queries, keys and values: ``heads`` [B, N, S, D]; ``projected``, three products of [B, S, C], or
            ``packed``, one; ``rows`` [S, B, C]; ``windows`` [B, nW, N, S, D]; ``flat`` [B, S, D], one head.
        batch: size, or None for a symbolic one.
        heads: of the queries.
        shared: queries' heads that read the same keys and values.
        queries: tokens.
        keys: tokens.
        dim: channels of a head.
        values: channels of a head of the values.
        is_turned: keys come as [.., D, S].
        scale: what stands where.
        mask: what is added to the scores: a constant, of several shapes, or an input, or two; or chosen.
        softmax: its type: that of the products, or FP32 between casts.
        axis: of the softmax.
        between: one more operator between the mask and the softmax.
        after: an operator between the softmax and the second product.
        einsum: the products are Einsum.
        operator: all of it is one operator Attention, opset 23.
        quantized: what is between Q and DQ: letters of q, k, p, v, o.
        quantized_type: in which.
        is_read: the probabilities are an output, too.
    """

    dtype: str = "fp16"
    layout: Layout = "heads"
    batch: int | None = None
    heads: int = 4
    shared: int = 1
    queries: int = 49
    keys: int = 49
    dim: int = 32
    values: int = 32
    is_turned: bool = False
    scale: Scale = "queries"
    mask: Mask = "none"
    softmax: str = "same"
    axis: int = -1
    between: Between = ""
    after: str = ""
    einsum: bool = False
    operator: bool = False
    quantized: str = ""
    quantized_type: str = "INT8"
    is_read: bool = False

    def __str__(self) -> str:
        plain = Form()
        words = {k: v for k, v in vars(self).items() if v != getattr(plain, k)}
        return ", ".join(f"{k} {v}" for k, v in words.items()) or "plain"


FUSED, APART = "fused", "apart"


def samples(numbers: Iterable[int] = range(SIZE)) -> Iterator[Sample]:
    """Make graphs."""
    for number in numbers:
        yield Sample(number, f"{number:03} {form(number)}", graph(form(number)))


def half(*, seen: bool) -> range:
    """Return the numbers of the graphs in a half."""
    return range(0 if seen else 1, SIZE, 2)


def targets_of(made: Sample) -> tuple[Capability, ...]:
    """Return what a graph is compiled for: a GPU that has FP8 where it has FP8."""
    return ((8, 9),) if "FP8" in made.name else ((8, 6),)


def record_of(made: Sample, verdict: Verdict) -> Record:
    """Note whether there is a kernel of fused attention, or else why there is no engine."""
    if verdict.refused:
        return Record.of(made, verdict)
    layers = parse_layers(as_inspector_json(verdict.layers))
    return Record(FUSED if layers.fused_attention else APART, digest_of(made.model))


def form(number: int) -> Form:
    """Return the form of a number."""
    rng = random.Random(number)

    def draw(plain: Any, others: Sequence[Any], share: float) -> Any:
        return rng.choice(others) if rng.random() < share else plain

    dim = draw(32, (8, 12, 16, 20, 24, 40, 48, 64, 64, 72, 80, 96, 128, 136, 160, 192, 256, 260, 264, 320, 512), 0.45)
    tokens = draw(49, (1, 7, 16, 17, 64, 144, 196, 197, 197, 256, 257, 400, 512, 513, 577, 784, 1024), 0.5)
    queries = draw(tokens, (1, 7, 49, 100), 0.15)
    heads = draw(4, (1, 2, 3, 5, 6, 12, 16), 0.5)
    dtype = draw("fp16", ("fp32", "bf16", "bf16"), 0.15)
    layout = draw("heads", ("projected", "projected", "packed", "packed", "rows", "windows", "flat"), 0.5)
    operator = rng.random() < 0.08
    found = Form(
        dtype=dtype,
        layout=layout,
        batch=draw(None, (1, 8), 0.3),
        heads=1 if layout == "flat" else heads,
        shared=draw(1, (heads, 2), 0.1) if heads % 2 == 0 and layout == "heads" else 1,
        queries=tokens if layout == "packed" else queries,
        keys=tokens,
        dim=dim,
        values=dim if layout not in ("heads", "projected") else draw(dim, (16, 32, 64, 96), 0.08),
        is_turned=layout == "heads" and rng.random() < 0.15,
        scale=draw("queries", ("none", "both", "product", "product", "division", "learned"), 0.5),
        mask=draw("none", ("bias", "bias", "square", "keys", "input", "padding", "windows", "two", "where"), 0.5),
        softmax=draw("same", ("fp32",), 0.2),
        axis=draw(-1, (3, -2), 0.1),
        between=draw("", ("Tanh", "Clip", "Relu", "Sub", "Mul", "Identity"), 0.12),
        after=draw("", ("Mul", "Identity", "Clip"), 0.06),
        einsum=rng.random() < 0.08,
        is_read=rng.random() < 0.05,
        quantized=draw("", ("qkpvo", "qkpvo", "qkpvo", "qkpv", "qk", "pv", "qkpo", "o"), 0.25),
    )
    if found.quantized and dtype != "bf16" and rng.random() < 0.2:
        found = replace(found, quantized_type="FP8")
    if layout == "flat" and found.axis == 3:
        found = replace(found, axis=2)
    if layout == "windows":
        found = replace(found, axis=-1, queries=tokens, batch=None)
    if found.mask == "windows":
        is_possible = layout in ("heads", "projected", "packed")
        found = replace(found, batch=8) if is_possible else replace(found, mask="bias")
    if operator:
        kept = {name: getattr(found, name) for name in ("dtype", "batch", "heads", "shared", "queries", "keys", "dim")}
        mask = found.mask if found.mask in ("bias", "square") else "none"
        found = Form(**kept, values=found.dim, mask=mask, scale="none", operator=True)
    return found


class _Builder:
    """A graph in the making."""

    def __init__(self, dtype: int) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def op(self, op_type: str, *operands: str, **attributes: Any) -> str:
        return self.ops(op_type, 1, *operands, **attributes)[0]

    def ops(self, op_type: str, results: int, *operands: str, **attributes: Any) -> list[str]:
        names = [f"t{len(self.nodes)}_{i}" for i in range(results)]
        self.nodes.append(helper.make_node(op_type, operands, names, name=f"{op_type}.{len(self.nodes)}", **attributes))
        return names

    def take(self, name: str, shape: Sequence[int | str], dtype: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype or self.dtype, shape))
        return name

    def const(self, value: Any, dtype: int | None = None) -> str:
        name = f"c{len(self.constants)}"
        array = np.asarray(value)
        kind = dtype or (TensorProto.INT64 if array.dtype == np.int64 else self.dtype)
        self.constants.append(helper.make_tensor(name, kind, array.shape, array.flatten().tolist()))
        return name

    def noise(self, *shape: int) -> str:
        array = self.rng.uniform(-1, 1, shape).astype(np.float32)
        if self.dtype == TensorProto.BFLOAT16:
            bits = (array.view(np.uint32) >> 16).astype(np.uint16)
            name = f"c{len(self.constants)}"
            self.constants.append(helper.make_tensor(name, self.dtype, shape, bits.tobytes(), raw=True))
            return name
        return self.array(array.astype(np.float16 if self.dtype == TensorProto.FLOAT16 else np.float32))

    def array(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name


def graph(form: Form) -> onnx.ModelProto:
    """Return the attention as a graph that ends with a product, as in a transformer's block."""
    b = _Builder(_TYPES[form.dtype])
    q, k, v = _tokens(b, form)
    result = _operator(b, form, q, k, v) if form.operator else _attention(b, form, q, k, v)
    y = _merged(b, form, result[0])
    outputs = [y, *result[1:]]
    return helper.make_model(
        helper.make_graph(
            b.nodes,
            "g",
            b.inputs,
            [helper.make_tensor_value_info(name, b.dtype, None) for name in outputs],
            b.constants,
        ),
        opset_imports=[helper.make_opsetid("", 23 if form.operator else 20)],
        ir_version=10,
    )


def _tokens(b: _Builder, form: Form) -> tuple[str, str, str]:
    """Return queries [.., N, Sq, D], keys [.., M, S, D] (or turned) and values [.., M, S, D]."""
    batch: int | str = "batch" if form.batch is None else form.batch
    n, m, d = form.heads, form.heads // form.shared, form.dim
    if form.layout == "flat":
        shapes = ((batch, form.queries, d), (batch, form.keys, d), (batch, form.keys, form.values))
        q, k, v = (b.take(name, shape) for name, shape in zip("qkv", shapes, strict=True))
        return q, k, v
    if form.layout == "windows":
        shape = (batch, 4, n, form.keys, d)
        q, k, v = (b.take(name, shape) for name in "qkv")
        return q, k, v
    if form.layout == "heads":
        turned = (batch, m, d, form.keys) if form.is_turned else (batch, m, form.keys, d)
        q, k = b.take("q", (batch, n, form.queries, d)), b.take("k", turned)
        v = b.take("v", (batch, m, form.keys, form.values))
        if m != n:
            k, v = (_repeated(b, form, value) for value in (k, v))
        return q, k, v
    width = n * d
    if form.layout == "packed":
        x = b.take("x", (batch, form.keys, width))
        qkv = b.op("Add", b.op("MatMul", x, b.noise(width, 3 * width)), b.noise(3 * width))
        split = b.op("Reshape", qkv, b.const(np.array([0, form.keys, 3, n, d])))
        parts = b.ops("Split", 3, b.op("Transpose", split, perm=[2, 0, 3, 1, 4]), axis=0, num_outputs=3)
        q, k, v = (b.op("Squeeze", part, b.const(np.array([0]))) for part in parts)
        return q, k, v
    is_rows = form.layout == "rows"
    made = []
    for name, tokens, size in (("x", form.queries, d), ("c", form.keys, d), ("c", form.keys, form.values)):
        given = {value.name for value in b.inputs}
        shape = (tokens, batch, width) if is_rows else (batch, tokens, width)
        x = name if name in given else b.take(name, shape)
        y = b.op("Add", b.op("MatMul", x, b.noise(width, n * size)), b.noise(n * size))
        y = b.op("Reshape", y, b.const(np.array([tokens, -1, n, size] if is_rows else [0, tokens, n, size])))
        made.append(b.op("Transpose", y, perm=[1, 2, 0, 3] if is_rows else [0, 2, 1, 3]))
    return made[0], made[1], made[2]


def _repeated(b: _Builder, form: Form, value: str) -> str:
    """Keys or values of few heads for all: [B, M, ..] -> [B, N, ..]."""
    m = form.heads // form.shared
    is_keys_turned = form.is_turned and value == "k"
    tail = [form.dim, form.keys] if is_keys_turned else [form.keys, form.dim if value == "k" else form.values]
    wide = b.op("Unsqueeze", value, b.const(np.array([2])))
    wide = b.op("Expand", wide, b.const(np.array([1, m, form.shared, *tail])))
    return b.op("Reshape", wide, b.const(np.array([0, form.heads, *tail])))


def _operator(b: _Builder, form: Form, q: str, k: str, v: str) -> list[str]:
    mask = [] if form.mask == "none" else [_mask(b, form)]
    return [b.op("Attention", q, k, v, *mask)]


def _mask(b: _Builder, form: Form) -> str:
    sizes = {"bias": (1, form.heads), "square": (), "keys": (1, 1)}[form.mask]
    return b.noise(*sizes, 1 if form.mask == "keys" else form.queries, form.keys)


def _attention(b: _Builder, form: Form, q: str, k: str, v: str) -> list[str]:
    rank = {"flat": 3, "windows": 5}.get(form.layout, 4)
    factor = form.dim**-0.5
    if form.scale in ("queries", "both"):
        q = b.op("Mul", q, b.const(factor if form.scale == "queries" else factor**0.5))
    kt = k if form.is_turned else b.op("Transpose", k, perm=[*range(rank - 2), rank - 1, rank - 2])
    if form.scale == "both":
        kt = b.op("Mul", kt, b.const(factor**0.5))
    q, kt = (_quantized(b, form, letter, value) for letter, value in (("q", q), ("k", kt)))
    s = _product(b, form, q, kt, rank)
    if form.scale == "product":
        s = b.op("Mul", s, b.const(factor))
    elif form.scale == "division":
        s = b.op("Div", s, b.const(form.dim**0.5))
    elif form.scale == "learned" and rank == 4:
        s = b.op("Mul", s, b.noise(form.heads, 1, 1))
    is_fp32 = form.softmax == "fp32" and form.dtype != "fp32"
    s = _masked(b, form, s)
    s = _between(b, form, s)
    if is_fp32:
        s = b.op("Cast", s, to=TensorProto.FLOAT)
    p = b.op("Softmax", s, axis=form.axis)
    if is_fp32:
        p = b.op("Cast", p, to=b.dtype)
    shown = [p] if form.is_read else []
    if form.after == "Mul":
        p = b.op("Mul", p, b.const(0.5))
    elif form.after:
        p = b.op(form.after, p, *([b.const(0.0), b.const(0.5)] if form.after == "Clip" else []))
    p, v = (_quantized(b, form, letter, value) for letter, value in (("p", p), ("v", v)))
    return [_quantized(b, form, "o", _product(b, form, p, v, rank)), *shown]


def _product(b: _Builder, form: Form, left: str, right: str, rank: int) -> str:
    if not form.einsum:
        return b.op("MatMul", left, right)
    free = "abc"[: rank - 2]
    return b.op("Einsum", left, right, equation=f"{free}ij,{free}jk->{free}ik")


def _masked(b: _Builder, form: Form, s: str) -> str:
    batch: int | str = "batch" if form.batch is None else form.batch
    sizes = (form.queries, form.keys)
    extra = {"flat": (1,), "windows": (1, 1, form.heads)}.get(form.layout, (1, form.heads))
    if form.mask == "bias":
        return b.op("Add", s, b.noise(*extra, *sizes))
    if form.mask == "square":
        return b.op("Add", s, b.noise(*sizes))
    if form.mask == "keys":
        return b.op("Add", s, b.noise(*[1] * (len(extra) + 1), form.keys))
    if form.mask == "two":
        return b.op("Add", b.op("Add", s, b.noise(*extra, *sizes)), b.noise(*sizes))
    ones = [1] * (len(extra) - 1)
    if form.mask == "input":
        return b.op("Add", s, b.take("mask", (batch, *ones, *sizes)))
    if form.mask == "padding":
        return b.op("Add", s, b.take("mask", (batch, *ones, 1, form.keys)))
    if form.mask == "where":
        return b.op("Where", b.array(np.tri(*sizes, dtype=bool)), s, b.const(-100.0))
    if form.mask == "windows":  # of one image: [B, nW, N, S, S] between Reshapes
        s = b.op("Reshape", s, b.const(np.array([-1, 4, form.heads, *sizes])))
        s = b.op("Add", s, b.noise(1, 4, 1, *sizes))
        return b.op("Reshape", s, b.const(np.array([-1, form.heads, *sizes])))
    return s


def _between(b: _Builder, form: Form, s: str) -> str:
    if form.between == "Clip":
        return b.op("Clip", s, b.const(-50.0), b.const(50.0))
    if form.between in ("Sub", "Mul"):
        return b.op(form.between, s, b.const(2.0))
    return b.op(form.between, s) if form.between else s


def _quantized(b: _Builder, form: Form, letter: str, value: str) -> str:
    if letter not in form.quantized or form.dtype == "bf16":
        return value
    scale = b.const(1 / 127 if letter == "p" else 0.05)
    kind = TensorProto.INT8 if form.quantized_type == "INT8" else TensorProto.FLOAT8E4M3FN
    zero = b.const(0, kind) if kind == TensorProto.INT8 else b.const(0.0, kind)
    return b.op("DequantizeLinear", b.op("QuantizeLinear", value, scale, zero), scale, zero)


def _merged(b: _Builder, form: Form, o: str) -> str:
    """Put the heads side by side, and multiply."""
    width = form.heads * form.values
    if form.layout == "flat":
        return b.op("MatMul", o, b.noise(width, 32))
    axes = {"windows": [0, 1, 3, 2, 4], "rows": [2, 0, 1, 3]}.get(form.layout, [0, 2, 1, 3])
    shape = {"windows": [0, 4, form.queries, width], "rows": [form.queries, -1, width]}.get(
        form.layout, [0, form.queries, width]
    )
    o = b.op("Reshape", b.op("Transpose", o, perm=axes), b.const(np.array(shape)))
    return b.op("MatMul", o, b.noise(width, 32))
