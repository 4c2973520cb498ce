"""Graphs that break rules 6 and 15."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.exporters.tensorrt.cases import Case, fails, warns
from tests.exporters.tensorrt.texts import F16, F32, I8, I64, Graph, attention, pair, scales, weight

VECTOR = "(float[batch, 8] x) => (float[batch, 8] y)"


def graph(body: str, head: str = VECTOR, **constants: Any) -> Graph:
    return Graph(f"{head} {{ {body} }}", constants)


PAIR = graph(pair("x", "y"), **scales())


def with_scale(scale: Any, zero: Any = I8(0)) -> Graph:
    return replace(PAIR, constants={"s": scale, "z": zero})


def half_pair(scale: Any) -> Graph:
    return graph(pair("x", "y"), "(float16[batch, 8] x) => (float16[batch, 8] y)", s=scale, z=I8(0))


CHANNELS = graph(pair("x", "y", attributes="axis = 1"), s=np.full(8, 0.1, F32), z=np.zeros(8, I8))

STORED = graph(
    "w = DequantizeLinear <axis = 1> (q, t, u) " + pair("x", "d") + " y = MatMul (d, w)",
    **scales(),
    q=weight(8, 8, dtype=I8),
    t=np.full(8, 0.1, F32),
    u=np.zeros(8, I8),
)


def stored(body: str = "", **constants: Any) -> Graph:
    return replace(
        STORED,
        text=STORED.text.replace(
            "w = DequantizeLinear <axis = 1> (q, t, u)", body or "w = DequantizeLinear <axis = 1> (q, t, u)"
        ),
        constants={**STORED.constants, **constants},
    )


def four_bits(columns: int) -> Graph:
    tensor = helper.make_tensor("q", TensorProto.INT4, [3, columns], [1] * 3 * columns)
    zeros = helper.make_tensor("z", TensorProto.INT4, [columns], [0] * columns)
    head = f"(float[batch, 3] x) => (float[batch, {columns}] y)"
    return Graph(
        f"{head} {{ w = DequantizeLinear <axis = 1> (q, s, z) y = MatMul (x, w) }}",
        {"q": tensor, "s": np.full(columns, 0.1, F32), "z": zeros},
        opset=21,
    )


BLOCKS = Graph(
    f"{VECTOR} {{ w = DequantizeLinear <axis = 0, block_size = 4> (q, s, z) {pair('x', 'd', scale='t', zero='u')} y = MatMul (d, w) }}",
    {"q": weight(8, 8, dtype=I8), "s": np.full((2, 8), 0.1, F32), "z": np.zeros((2, 8), I8), "t": F32(0.1), "u": I8(0)},
    opset=21,
)

PAIRED = """
    q = QuantizeLinear (x, s, z)
    y = DequantizeLinear (q, t, u)
"""

RULE_6: tuple[Case, ...] = (
    fails(
        "a scale that is an input",
        6,
        graph(pair("x", "y"), "(float[batch, 8] x, float s) => (float[batch, 8] y)", z=I8(0)),
        PAIR,
        "s is computed",
    ),
    fails("a scale of 0", 6, with_scale(F32(0)), PAIR, "its scale is 0"),
    fails("a negative scale", 6, with_scale(F32(-0.1)), PAIR, "its scale is -0.1"),
    fails("a scale without an end", 6, with_scale(F32(np.inf)), PAIR, "not finite"),
    fails("a scale that is no number", 6, with_scale(F32(np.nan)), PAIR, "not finite"),
    fails("a subnormal FP16 scale", 6, half_pair(F16(2.0**-15)), half_pair(F16(2.0**-14)), "subnormal in FLOAT16"),
    fails("a subnormal FP32 scale", 6, with_scale(F32(1e-39)), PAIR, "subnormal in FLOAT"),
    fails("an FP16 scale that underflowed", 6, half_pair(F16(1e-9)), half_pair(F16(0.1)), "its scale is 0"),
    fails("a DOUBLE scale", 6, with_scale(np.float64(0.1)), PAIR, "its scale is DOUBLE", 3, 4),
    fails("no scale at all", 6, with_scale(np.zeros(0, F32)), PAIR, "no elements"),
    fails(
        "no zero point",
        6,
        graph("q = QuantizeLinear (x, s) y = DequantizeLinear (q, s)", s=F32(0.1)),
        PAIR,
        "no zero point",
    ),
    fails("a zero point that is not 0", 6, with_scale(F32(0.1), I8(3)), PAIR, "its zero point is not 0"),
    fails("UINT8", 6, with_scale(F32(0.1), np.uint8(0)), PAIR, "its zero point is UINT8"),
    fails("INT16", 6, replace(with_scale(F32(0.1), np.int16(0)), opset=21), PAIR, "its zero point is INT16", 3),
    fails(
        "a zero point that is an input",
        6,
        graph(pair("x", "y"), "(float[batch, 8] x, int8 z) => (float[batch, 8] y)", s=F32(0.1)),
        PAIR,
        "z is no constant",
    ),
    fails("more zero points than scales", 6, with_scale(F32(0.1), np.zeros(8, I8)), PAIR, "1 scales and 8 zero points"),
    fails(
        "scales for too few channels",
        6,
        replace(CHANNELS, constants={"s": np.full(4, 0.1, F32), "z": np.zeros(4, I8)}),
        CHANNELS,
        "axis 1, which has 8",
    ),
    fails(
        "an axis that is not there",
        6,
        replace(CHANNELS, text=CHANNELS.text.replace("axis = 1", "axis = 2")),
        CHANNELS,
        "axis 2 of a tensor",
    ),
    fails(
        "a matrix of scales without blocks",
        6,
        replace(CHANNELS, constants={"s": np.full((1, 8), 0.1, F32), "z": np.zeros((1, 8), I8)}),
        CHANNELS,
        "no block_size",
    ),
    fails(
        "blocks that do not divide the axis",
        6,
        replace(BLOCKS, constants={**BLOCKS.constants, "s": np.full((3, 8), 0.1, F32), "z": np.zeros((3, 8), I8)}),
        BLOCKS,
        "3 blocks of 4 on axis 0",
    ),
    fails(
        "blocks on two axes",
        6,
        replace(BLOCKS, constants={**BLOCKS.constants, "s": np.full((2, 2), 0.1, F32), "z": np.zeros((2, 2), I8)}),
        BLOCKS,
        "a scale [2, 2] for data [8, 8]",
    ),
    fails("an odd number of 4-bit values", 6, four_bits(3), four_bits(4), "even number"),
    fails(
        "an FP32 scale of FP16 data",
        6,
        half_pair(F32(0.1)),
        half_pair(F16(0.1)),
        "its scale is FLOAT, its data are FLOAT16",
        4,
    ),
    fails(
        "a Q of one scale, a DQ of another",
        6,
        graph(PAIRED, s=F32(0.1), t=F32(0.2), z=I8(0), u=I8(0)),
        graph(PAIRED, s=F32(0.1), t=F32(0.1), z=I8(0), u=I8(0)),
        "its scale is not that of its Q",
    ),
    fails(
        "a Q of one axis, a DQ of another",
        6,
        graph(
            "q = QuantizeLinear <axis = 1> (x, s, z) y = DequantizeLinear <axis = 2> (q, s, z)",
            "(float[batch, 8, 8] x) => (float[batch, 8, 8] y)",
            s=np.full(8, 0.1, F32),
            z=np.zeros(8, I8),
        ),
        graph(
            "q = QuantizeLinear <axis = -1> (x, s, z) y = DequantizeLinear <axis = 2> (q, s, z)",
            "(float[batch, 8, 8] x) => (float[batch, 8, 8] y)",
            s=np.full(8, 0.1, F32),
            z=np.zeros(8, I8),
        ),
        "its axis is 2",
    ),
    fails(
        "movement between Q and DQ",
        6,
        graph(
            "q = QuantizeLinear (x, s, z) r = Reshape (q, k) y = DequantizeLinear (r, s, z)",
            **scales(k=np.array([-1, 8], I64)),
        ),
        graph(
            "r = Reshape (x, k) q = QuantizeLinear (r, s, z) y = DequantizeLinear (q, s, z)",
            **scales(k=np.array([-1, 8], I64)),
        ),
        "read by Reshape, not by a DQ",
    ),
    fails(
        "a quantized output",
        6,
        graph("y = QuantizeLinear (x, s, z)", "(float[batch, 8] x) => (int8[batch, 8] y)", **scales()),
        PAIR,
        "is an output of the graph",
    ),
    fails(
        "a Q that nothing reads",
        6,
        graph("q = QuantizeLinear (x, s, z) y = Relu (x)", **scales()),
        PAIR,
        "nothing dequantizes",
    ),
    fails(
        "INT8 of no Q",
        6,
        graph("h = Cast <to = 3> (x) y = DequantizeLinear (h, s, z)", **scales()),
        PAIR,
        "its data come from Cast",
    ),
    fails(
        "an INT32 bias",
        6,
        graph(
            "b = DequantizeLinear (q, s, z) y = Add (x, b)", s=F32(0.1), q=np.arange(8, dtype=np.int32), z=np.int32(0)
        ),
        PAIR,
        "it dequantizes INT32",
    ),
    fails(
        "an integer that is quantized",
        6,
        graph(pair("x", "y"), "(int32[batch, 8] x) => (float[batch, 8] y)", **scales()),
        PAIR,
        "it quantizes INT32",
    ),
    fails(
        "a quantized scale",
        6,
        graph(
            "t = DequantizeLinear (e, s, z) q = QuantizeLinear (x, t, z) y = DequantizeLinear (q, t, z)",
            **scales(e=I8(2)),
        ),
        PAIR,
        "is dequantized",
    ),
    fails(
        "a UINT8 weight",
        6,
        stored(q=np.ones((8, 8), np.uint8), u=np.zeros(8, np.uint8)),
        STORED,
        "it dequantizes UINT8",
    ),
    fails(
        "a weight and a zero point of two types",
        6,
        stored(u=np.zeros(8, np.uint8)),
        STORED,
        "its data are INT8, its zero point is UINT8",
    ),
)

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
    tokens = f"t = Reshape (c, k) p = Transpose <perm = [0, 2, 1]> (t) {pair('p', 'd', scale='r') if quantize else 'd = Identity (p)'}"
    body = f"{pair('x', 'e')} w = DequantizeLinear <axis = 0> (q, v, u) c = Conv <strides = [4, 4]> (e, w) {tokens} y = LayerNormalization (d, g)"
    constants = scales(
        q=weight(16, 3, 4, 4, dtype=I8),
        v=np.full(16, 0.1, F32),
        u=np.zeros(16, I8),
        k=np.array([-1, 16, 4], I64),
        g=weight(16),
    )
    return Graph(f"{PATCHES} {{ {body} }}", {**constants, **({"r": F32(0.2)} if quantize else {})})


RULE_15: tuple[Case, ...] = (
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

CASES = (*RULE_6, *RULE_15)
