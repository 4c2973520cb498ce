"""Graphs that break rules 3, 4, 5, 7, 8 and 14."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from tests.exporters.lint.cases import Case, fails, warns
from tests.exporters.lint.texts import F16, F32, I64, Graph, weight

HALF = "(float16[batch, 8] x) => (float16[batch, 8] y)"


def half(body: str, **constants: Any) -> Graph:
    return Graph(f"{HALF} {{ {body} }}", constants)


def single(body: str, **constants: Any) -> Graph:
    return Graph(f"(float[batch, 8] x) => (float[batch, 8] y) {{ {body} }}", constants)


def image(body: str, **constants: Any) -> Graph:
    return Graph(f"(float[batch, 3, 8, 8] x) => (float[batch, 3, 8, 8] y) {{ {body} }}", constants)


QKV = "float16[batch, 3, 49, 32] q, float16[batch, 3, 49, 32] k, float16[batch, 3, 49, 32] v"
OUT = "float16[batch, 3, 49, 32] y"


def attention(body: str, more: str = "", outputs: str = OUT, **constants: Any) -> Graph:
    return Graph(f"({QKV}{more}) => ({outputs}) {{ {body} }}", constants, opset=23)


ATTENTION = attention("y = Attention (q, k, v, m)", m=weight(1, 3, 49, 49, dtype=F16))
OPSET_23 = 1  # above what most models use, of which rule 1 warns

GEMM = Graph(
    "(float16[8, 8] x) => (float16[8, 8] y) { y = Gemm (x, w, b) }",
    {"w": weight(8, 8, dtype=F16), "b": weight(8, dtype=F16)},
)
WIDE = replace(
    GEMM,
    text="(float[8, 8] x) => (float[8, 8] y) { y = Gemm (x, w, b) }",
    constants={"w": weight(8, 8), "b": weight(8)},
)


def gemm(graph: Graph, attributes: str) -> Graph:
    return replace(graph, text=graph.text.replace("Gemm", f"Gemm <{attributes}>"))


CASES: tuple[Case, ...] = (
    # --- 3: types
    warns(
        "a DOUBLE input",
        3,
        Graph("(double[batch, 8] x) => (double[batch, 8] y) { y = Relu (x) }"),
        Graph("(float[batch, 8] x) => (float[batch, 8] y) { y = Relu (x) }"),
        "x is DOUBLE",
    ),
    fails(
        "an INT16 input",
        3,
        Graph("(int16[batch, 8] x) => (float[batch, 8] y) { y = Cast <to = 1> (x) }"),
        Graph("(int32[batch, 8] x) => (float[batch, 8] y) { y = Cast <to = 1> (x) }"),
        "x is INT16",
    ),
    fails(
        "a UINT32 inside",
        3,
        single("h = Cast <to = 12> (x) y = Cast <to = 1> (h)"),
        single("h = Cast <to = 6> (x) y = Cast <to = 1> (h)"),
        "h is UINT32",
    ),
    fails(
        "UINT8 inside",
        3,
        Graph(
            "(uint8[batch, 8] x) => (float[batch, 8] y) { h = Reshape (x, r) y = Cast <to = 1> (h) }",
            {"r": np.array([-1, 8], I64)},
        ),
        Graph("(uint8[batch, 8] x) => (float[batch, 8] y) { h = Cast <to = 1> (x) y = Relu (h) }"),
        "UINT8 inside",
    ),
    fails(
        "UINT8 that is made inside",
        3,
        single("h = Cast <to = 2> (x) y = Cast <to = 1> (h)"),
        Graph("(float[batch, 8] x) => (uint8[batch, 8] y) { h = Relu (x) y = Cast <to = 2> (h) }"),
        "UINT8 inside",
    ),
    fails(
        "an INT8 table",
        3,
        Graph(
            "(int64[batch] x) => (float[batch, 8] y) { h = Gather (t, x) y = Cast <to = 1> (h) }",
            {"t": np.ones((4, 8), np.int8)},
        ),
        Graph("(int64[batch] x) => (float[batch, 8] y) { y = Gather (t, x) }", {"t": weight(4, 8)}),
        "t is stored INT8",
    ),
    fails(
        "FP8 of another kind",
        3,
        single(
            "h = DequantizeLinear (w, s, z) y = MatMul (x, h)",
            w=np.ones((8, 8), ml_dtypes.float8_e5m2),
            s=F32(1),
            z=np.zeros((), ml_dtypes.float8_e5m2),
        ),
        None,
        "FLOAT8E5M2",
        6,
        15,
    ),
    fails(
        "integers multiplied as matrices",
        3,
        Graph("(int32[batch, 8] x) => (int32[batch, 4] y) { y = MatMul (x, w) }", {"w": np.ones((8, 4), np.int32)}),
        Graph("(float[batch, 8] x) => (float[batch, 4] y) { y = MatMul (x, w) }", {"w": weight(8, 4)}),
        "MatMul has no INT32 form",
    ),
    fails(
        "integers where the table has them and the parser not",
        3,
        Graph("(int32[batch, 8] x) => (int32[batch, 8] y) { y = Relu (x) }"),
        Graph("(int8[batch, 8] x) => (int8[batch, 8] y) { y = Relu (x) }"),
        "Relu has no INT32",
    ),
    # --- 4: strong typing
    fails(
        "a sum of two types",
        4,
        half("y = Add (x, b)", b=weight(8)),
        half("y = Add (x, b)", b=weight(8, dtype=F16)),
        "x is FLOAT16, b is FLOAT",
    ),
    fails(
        "a product with an FP32 weight",
        4,
        half("y = MatMul (x, w)", w=weight(8, 8)),
        half("y = MatMul (x, w)", w=weight(8, 8, dtype=F16)),
        "operands of MatMul",
    ),
    fails(
        "a norm with FP32 parameters",
        4,
        half("y = LayerNormalization (x, w, b)", w=weight(8), b=weight(8)),
        half("y = LayerNormalization (x, w, b)", w=weight(8, dtype=F16), b=weight(8, dtype=F16)),
        "w is FLOAT, b is FLOAT",
    ),
    fails(
        "a choice of two types",
        4,
        Graph("(float16[batch, 8] x, bool[8] c) => (float16[batch, 8] y) { y = Where (c, x, b) }", {"b": weight(8)}),
        Graph(
            "(float16[batch, 8] x, bool[8] c) => (float16[batch, 8] y) { y = Where (c, x, b) }",
            {"b": weight(8, dtype=F16)},
        ),
        "operands of Where",
    ),
    warns(
        "limits of another type",
        4,
        half("y = Clip (x, a, b)", a=F32(0), b=F32(6)),
        half("y = Clip (x, a, b)", a=F16(0), b=F16(6)),
        "operands of Clip",
    ),
    fails(
        "a slope of another type",
        4,
        half("y = PRelu (x, s)", s=weight(8)),
        half("y = PRelu (x, s)", s=weight(8, dtype=F16)),
        "operands of PRelu",
    ),
    fails(
        "tokens of two types",
        4,
        Graph("(float16[batch, 8] x, float[batch, 1] c) => (float16[batch, 9] y) { y = Concat <axis = 1> (c, x) }"),
        Graph("(float16[batch, 8] x, float16[batch, 1] c) => (float16[batch, 9] y) { y = Concat <axis = 1> (c, x) }"),
        "operands of Concat",
    ),
    fails(
        "FP16 factors of a Resize",
        4,
        image("y = Resize (x, , r)", r=np.ones(4, F16)),
        image("y = Resize (x, , r)", r=np.ones(4, F32)),
        "scales is FLOAT16",
    ),
    fails(
        "a declaration that lies",
        4,
        half("h = Cast <to = 1> (x) r = Relu (h) y = Cast <to = 1> (r)"),
        half("h = Cast <to = 1> (x) r = Relu (h) y = Cast <to = 10> (r)"),
        "y is declared FLOAT16, it is FLOAT",
        17,
    ),
    # --- 5: inference
    fails(
        "the mean of a norm",
        5,
        Graph(
            "(float[batch, 8] x) => (float[batch, 8] y, float[batch, 1] m) { y, m = LayerNormalization (x, w) }",
            {"w": weight(8)},
        ),
        single("y = LayerNormalization (x, w)", w=weight(8)),
        "more than one result",
    ),
    fails(
        "a norm along no axis",
        5,
        single("y = LayerNormalization <axis = 3> (x, w)", w=weight(8)),
        single("y = LayerNormalization <axis = 1> (x, w)", w=weight(8)),
        "axis 3",
    ),
    fails(
        "a norm that trains",
        5,
        image(
            "y, m, v = BatchNormalization <training_mode = 1> (x, a, b, c, d)",
            a=weight(3),
            b=weight(3),
            c=weight(3),
            d=np.ones(3, F32),
        ),
        image("y = BatchNormalization (x, a, b, c, d)", a=weight(3), b=weight(3), c=weight(3), d=np.ones(3, F32)),
        "trains",
    ),
    fails(
        "Dropout that trains",
        5,
        single("y = Dropout (x, r, t)", r=F32(0.5), t=np.array(True)),
        single("y = Relu (x)"),
        "trains",
    ),
    warns(
        "Dropout that does not",
        5,
        single("y = Dropout (x, r)", r=F32(0.5)),
        single("y = Relu (x)"),
        "left in the graph",
    ),
    fails(
        "the indices of a pooling",
        5,
        Graph(
            """(float[batch, 3, 8, 8] x) => (float[batch, 3, 7, 7] y, int64[batch, 3, 7, 7] i)
            { y, i = MaxPool <kernel_shape = [2, 2]> (x) }"""
        ),
        Graph("(float[batch, 3, 8, 8] x) => (float[batch, 3, 7, 7] y) { y = MaxPool <kernel_shape = [2, 2]> (x) }"),
        "more than one result",
    ),
    # --- 7: Attention
    fails(
        "Attention with two results",
        7,
        attention(
            "y, pk = Attention (q, k, v, , p, p)",
            ", float16[batch, 3, 9, 32] p",
            f"{OUT}, float16[batch, 3, 58, 32] pk",
        ),
        None,
        "more than one result",
        OPSET_23,
        10,
    ),
    fails(
        "Attention that remembers",
        7,
        attention("y = Attention (q, k, v, , p, p)", ", float16[batch, 3, 9, 32] p"),
        None,
        "past_key",
        OPSET_23,
    ),
    fails("Attention with softcap", 7, attention("y = Attention <softcap = 5.0> (q, k, v)"), None, "softcap", OPSET_23),
    fails(
        "Attention of FP32 masks",
        7,
        replace(ATTENTION, constants={"m": weight(1, 3, 49, 49)}),
        None,
        "its mask is FLOAT",
        OPSET_23,
    ),
    fails(
        "Attention with a mask in 5-D",
        7,
        replace(ATTENTION, constants={"m": weight(1, 1, 3, 49, 49, dtype=F16)}),
        None,
        "5 dimensions",
        OPSET_23,
    ),
    warns(
        "Attention with the parser's attribute",
        7,
        attention("y = Attention <TRT_decomposable = 1> (q, k, v)"),
        None,
        "no attribute of ONNX",
        OPSET_23,
        12,
    ),
    fails(
        "Attention with an operand that is passed over",
        7,
        replace(attention("y = Attention (q, k, v, , , , n)", ", int64[batch] n"), opset=24),
        None,
        "passes over its operand nonpad_kv_seqlen",
        OPSET_23,
    ),
    fails(
        "Attention with a window that is passed over",
        7,
        replace(attention("y = Attention <left_window_size = 2> (q, k, v)"), opset=25),
        None,
        "passes over its attribute left_window_size",
        OPSET_23,
    ),
    # --- 8: Gemm
    warns("a Gemm that scales", 8, gemm(GEMM, "alpha = 0.5"), GEMM, "alpha is 0.5"),
    warns("a Gemm that scales its bias", 8, gemm(GEMM, "beta = 2.0"), GEMM, "beta is 2"),
    warns("an FP32 Gemm that scales", 8, gemm(WIDE, "alpha = 0.5"), gemm(WIDE, "alpha = 1.0"), "alpha is 0.5"),
    fails(
        "a Gemm of batches",
        8,
        Graph("(float[batch, 8, 8] x) => (float[batch, 8, 8] y) { y = Gemm (x, w) }", {"w": weight(8, 8)}),
        Graph("(float[batch, 8, 8] x) => (float[batch, 8, 8] y) { y = MatMul (x, w) }", {"w": weight(8, 8)}),
        "3 dimensions",
        10,
    ),
    # --- 14: numbers
    warns(
        "NaN",
        14,
        single("y = Add (x, b)", b=np.array([np.nan, *range(7)], F32)),
        single("y = Add (x, b)", b=weight(8)),
        "1 of 8 values are NaN",
    ),
    warns(
        "infinity",
        14,
        half("y = Add (x, b)", b=np.array([np.inf, *range(7)], F16)),
        half("y = Add (x, b)", b=weight(8, dtype=F16)),
        "infinite",
    ),
    warns(
        "a mask of -inf",
        14,
        single("y = Add (x, b)", b=np.array([-np.inf, *range(7)], F32)),
        single("y = Add (x, b)", b=np.array([-100, *range(7)], F32)),
        "-inf",
    ),
    warns(
        "more than FP16 holds",
        14,
        single("y = Add (x, b)", b=np.array([65520, *range(7)], F32)),
        single("y = Add (x, b)", b=np.array([65504, *range(7)], F32)),
        "above 65504",
    ),
    warns(
        "less than FP16 holds",
        14,
        single("y = Add (x, b)", b=np.full(8, 1e-8, F32)),
        single("y = Add (x, b)", b=np.full(8, 1e-4, F32)),
        "8 become 0",
    ),
    warns(
        "subnormal FP16",
        14,
        half("y = Add (x, b)", b=np.full(8, 1e-6, F16)),
        half("y = Add (x, b)", b=np.full(8, 1e-4, F16)),
        "100% of its values are subnormal",
    ),
)
