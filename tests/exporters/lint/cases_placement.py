"""Graphs that break rule 15, and legal ones that look like them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.exporters.lint.cases import Case, warns
from tests.exporters.lint.cases_quantization import STORED, four_bits, graph, stored
from tests.exporters.lint.texts import F32, I8, I64, Graph, attention, pair, scales, weight

SHORT = pair("x", "d")
BIASED = graph(
    f"{SHORT} w = DequantizeLinear <axis = 1> (q, t, u) m = MatMul (d, w) y = Add (m, b)",
    **STORED.constants,
    b=weight(8),
)
ACTIVE = graph(
    f"{SHORT} w = DequantizeLinear <axis = 1> (q, t, u) m = MatMul (d, w) a = Add (m, b) y = Gelu (a)",
    **STORED.constants,
    b=weight(8),
)
NORM = graph("y = LayerNormalization (x, g)", g=weight(8))
PATCHES = "(float[batch, 3, 8, 8] x) => (float[batch, 4, 16] y)"


def patches(quantize: bool) -> Graph:
    """A patch embedding: a Conv, its tokens, their norm."""
    body = f"""{pair("x", "e")} w = DequantizeLinear <axis = 0> (q, v, u) c = Conv <strides = [4, 4]> (e, w)
        t = Reshape (c, k) p = Transpose <perm = [0, 2, 1]> (t)
        {pair("p", "d", scale="r") if quantize else "d = Identity (p)"} y = LayerNormalization (d, g)"""
    constants = scales(
        q=weight(16, 3, 4, 4, dtype=I8),
        v=np.full(16, 0.1, F32),
        u=np.zeros(16, I8),
        k=np.array([-1, 16, 4], I64),
        g=weight(16),
    )
    return Graph(f"{PATCHES} {{ {body} }}", {**constants, **({"r": F32(0.2)} if quantize else {})})


CASES: tuple[Case, ...] = (
    warns(
        "the input of a norm",
        15,
        graph(f"{SHORT} y = LayerNormalization (d, g)", **scales(g=weight(8))),
        NORM,
        "input of LayerNormalization",
    ),
    warns(
        "the input of Softmax",
        15,
        graph(f"{SHORT} y = Softmax (d)", **scales()),
        graph(f"h = Softmax (x) {pair('h', 'y')}", **scales()),
        "input of Softmax",
    ),
    warns(
        "a quantized bias",
        15,
        replace(
            BIASED,
            text=BIASED.text.replace("y = Add (m, b)", "v = DequantizeLinear (e, s, z) y = Add (m, v)"),
            constants={**STORED.constants, "e": weight(8, dtype=I8)},
        ),
        BIASED,
        "its bias is quantized",
    ),
    warns(
        "a quantized bias of a Gemm",
        15,
        graph(
            f"{SHORT} w = DequantizeLinear <axis = 1> (q, t, u) v = DequantizeLinear (e, s, z) y = Gemm (d, w, v)",
            "(float[8, 8] x) => (float[8, 8] y)",
            **STORED.constants,
            e=weight(8, dtype=I8),
        ),
        graph(
            f"{SHORT} w = DequantizeLinear <axis = 1> (q, t, u) y = Gemm (d, w, b)",
            "(float[8, 8] x) => (float[8, 8] y)",
            **STORED.constants,
            b=weight(8),
        ),
        "its bias is quantized",
    ),
    warns(
        "a pair before the bias",
        15,
        replace(BIASED, text=BIASED.text.replace("y = Add (m, b)", f"{pair('m', 'n')} y = Add (n, b)")),
        BIASED,
        "between a GEMM and its bias",
    ),
    warns(
        "a pair before GELU",
        15,
        replace(ACTIVE, text=ACTIVE.text.replace("y = Gelu (a)", f"{pair('a', 'n')} y = Gelu (n)")),
        ACTIVE,
        "between a GEMM and its activation",
    ),
    warns(
        "a pair before a GELU that is spelled out",
        15,
        replace(
            ACTIVE,
            text=ACTIVE.text.replace("y = Gelu (a)", f"{pair('a', 'n')} h = Div (n, r) e = Erf (h) y = Mul (n, e)"),
            constants={**ACTIVE.constants, "r": F32(1.414)},
        ),
        replace(
            ACTIVE,
            text=ACTIVE.text.replace("y = Gelu (a)", "h = Div (a, r) e = Erf (h) y = Mul (a, e)"),
            constants={**ACTIVE.constants, "r": F32(1.414)},
        ),
        "between a GEMM and its activation",
    ),
    warns(
        "an activation in floating point",
        15,
        graph(
            "w = DequantizeLinear <axis = 1> (q, t, u) y = MatMul (x, w)",
            q=weight(8, 8, dtype=I8),
            t=np.full(8, 0.1, F32),
            u=np.zeros(8, I8),
        ),
        STORED,
        "operand 0 of MatMul is not quantized",
    ),
    warns(
        "a weight in floating point",
        15,
        graph(f"{SHORT} y = MatMul (d, w)", **scales(w=weight(8, 8))),
        STORED,
        "operand 1 of MatMul is not quantized",
    ),
    warns(
        "one scale for a whole weight",
        15,
        stored("w = DequantizeLinear (q, s, z)", t=F32(1), u=I8(0)),
        STORED,
        "one scale for all channels",
        18,
    ),
    warns(
        "scales along the sum", 15, stored("w = DequantizeLinear <axis = 0> (q, t, u)"), STORED, "scales along axis 0"
    ),
    warns(
        "scales along the sum of a transposed weight",
        15,
        stored("r = DequantizeLinear <axis = 1> (q, t, u) w = Transpose <perm = [1, 0]> (r)"),
        stored("r = DequantizeLinear <axis = 0> (q, t, u) w = Transpose <perm = [1, 0]> (r)"),
        "scales along axis 1",
    ),
    warns(
        "one value quantized twice",
        15,
        graph(f"{pair('x', 'd')} {pair('x', 'e', scale='r')} y = Add (d, e)", **scales(r=F32(0.1))),
        graph(f"{pair('x', 'd')} y = Add (d, d)", **scales()),
        "x is quantized 2 times",
    ),
    warns(
        "the first product alone", 15, attention(quantize="qk"), attention(quantize="qkpvo"), "the first product", 16
    ),
    warns(
        "the second product alone", 15, attention(quantize="pv"), attention(quantize="qkpvo"), "the second product", 16
    ),
    warns(
        "INT8 heads that are too wide",
        15,
        attention(quantize="qkpvo", dim=128),
        attention(quantize="qkpvo", dim=64),
        "128 channels",
        16,
    ),
    warns(
        "INT8 with too many tokens",
        15,
        attention(quantize="qkpvo", tokens=513),
        attention(quantize="qkpvo", tokens=512),
        "513 tokens",
        16,
    ),
)

CLEAN: dict[str, Graph] = {
    "the norm of a patch embedding": patches(True),
    "a weight in FP32 with a pair": graph(
        f"{SHORT} {pair('w', 'v', scale='t', zero='u', attributes='axis = 1')} y = MatMul (d, v)",
        **scales(w=weight(8, 8), t=np.full(8, 0.1, F32), u=np.zeros(8, I8)),
    ),
    "4-bit weights alone": four_bits(4),
    "a pair before a residual sum": graph(f"{SHORT} y = Add (d, x)", **scales()),
}
