"""Graphs that break rules 6 and 15."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.exporters.lint.cases import Case, fails, warns
from tests.exporters.lint.texts import F16, F32, I8, I64, Graph, pair, scales, weight

VECTOR = "(float[batch, 8] x) => (float[batch, 8] y)"


def graph(body: str, head: str = VECTOR, **constants: Any) -> Graph:
    return Graph(f"{head} {{ {body} }}", constants)


PAIR = graph(pair("x", "y"), **scales())


def with_scale(scale: Any, zero: Any = None) -> Graph:
    return replace(PAIR, constants={"s": scale, "z": I8(0) if zero is None else zero})


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
    f"""{VECTOR} {{ {pair("x", "d", scale="t", zero="u")}
        w = DequantizeLinear <axis = 0, block_size = 4> (q, s, z) y = MatMul (d, w) }}""",
    {"q": weight(8, 8, dtype=I8), "s": np.full((2, 8), 0.1, F32), "z": np.zeros((2, 8), I8), "t": F32(0.1), "u": I8(0)},
    opset=21,
)

PAIRED = """
    q = QuantizeLinear (x, s, z)
    y = DequantizeLinear (q, t, u)
"""

CASES: tuple[Case, ...] = (
    warns(
        "a scale that is an input",
        6,
        graph(pair("x", "y"), "(float[batch, 8] x, float s) => (float[batch, 8] y)", z=I8(0)),
        PAIR,
        "s is computed",
    ),
    fails("a scale of 0", 6, with_scale(F32(0)), PAIR, "its scale is 0"),
    fails("a negative scale", 6, with_scale(F32(-0.1)), PAIR, "its scale is -0.1"),
    warns("a scale without an end", 6, with_scale(F32(np.inf)), PAIR, "not finite"),
    fails("a scale that is no number", 6, with_scale(F32(np.nan)), PAIR, "is no number"),
    warns("a subnormal FP16 scale", 6, half_pair(F16(2.0**-15)), half_pair(F16(2.0**-14)), "subnormal in FLOAT16"),
    warns("a subnormal FP32 scale", 6, with_scale(F32(1e-39)), PAIR, "subnormal in FLOAT"),
    fails("an FP16 scale that underflowed", 6, half_pair(F16(1e-9)), half_pair(F16(0.1)), "its scale is 0"),
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
        "a scale [1, 8] for data",
    ),
    fails(
        "blocks that do not divide the axis",
        6,
        replace(BLOCKS, constants={**BLOCKS.constants, "s": np.full((3, 8), 0.1, F32), "z": np.zeros((3, 8), I8)}),
        BLOCKS,
        "3 blocks on axis 0",
    ),
    fails(
        "blocks on two axes",
        6,
        replace(BLOCKS, constants={**BLOCKS.constants, "s": np.full((2, 2), 0.1, F32), "z": np.zeros((2, 2), I8)}),
        BLOCKS,
        "a scale [2, 2] for data [8, 8]",
    ),
    fails("an odd number of 4-bit values", 6, four_bits(3), four_bits(4), "even number"),
    warns(
        "an FP32 scale of FP16 data",
        6,
        half_pair(F32(0.1)),
        half_pair(F16(0.1)),
        "its scale is FLOAT, its data are FLOAT16",
        4,
    ),
    warns(
        "a Q of one scale, a DQ of another",
        6,
        graph(PAIRED, s=F32(0.1), t=F32(0.2), z=I8(0), u=I8(0)),
        graph(PAIRED, s=F32(0.1), t=F32(0.1), z=I8(0), u=I8(0)),
        "its scale is not that of its Q",
    ),
    warns(
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
    warns(
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
    warns(
        "a quantized output",
        6,
        graph("y = QuantizeLinear (x, s, z)", "(float[batch, 8] x) => (int8[batch, 8] y)", **scales()),
        PAIR,
        "is an output of the graph",
    ),
    warns(
        "a Q that nothing reads",
        6,
        graph("q = QuantizeLinear (x, s, z) y = Relu (x)", **scales()),
        PAIR,
        "nothing dequantizes",
    ),
    warns(
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
        "is a dequantized constant",
    ),
    fails(
        "a UINT8 weight",
        6,
        stored(q=np.ones((8, 8), np.uint8), u=np.zeros(8, np.uint8)),
        STORED,
        "it dequantizes UINT8",
    ),
    warns(
        "a weight and a zero point of two types",
        6,
        stored(u=np.zeros(8, np.uint8)),
        STORED,
        "its data are INT8, its zero point is UINT8",
    ),
)
