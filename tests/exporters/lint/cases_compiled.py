"""Graphs of which the compiler makes more kernels, more bytes or none at all, and twins that compute the same or nearly
so: rules 6, 15, 16 and 19. What it makes of each is in `test_compiled.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.exporters.lint.cases import Case, fails, warns
from tests.exporters.lint.texts import DTYPES, F16, I8, I64, Graph, weight


def small(*shape: int, seed: int = 0, dtype: Any = F16) -> Any:
    return (weight(*shape, seed=seed) * 0.05).astype(dtype)


def perceptrons(rows: str, *, dtype: str = "float16", activation: str = "Gelu", depth: int = 2) -> Graph:
    """LayerNorm, product, bias, GELU, product, bias and residual on ``[rows, 96]``."""
    number = DTYPES[dtype]
    constants: dict[str, Any] = {"g": np.ones(96, number), "t": np.zeros(96, number)}
    lines = ["x0 = Relu (x)"]
    for i in range(depth):
        constants |= {f"v{i}": small(96, 384, seed=i, dtype=number), f"a{i}": small(384, seed=i, dtype=number)}
        constants |= {f"w{i}": small(384, 96, seed=9 + i, dtype=number), f"b{i}": small(96, seed=i, dtype=number)}
        lines.append(f"""n{i} = LayerNormalization (x{i}, g, t) h{i} = MatMul (n{i}, v{i}) i{i} = Add (h{i}, a{i})
            j{i} = {activation} (i{i}) k{i} = MatMul (j{i}, w{i}) l{i} = Add (k{i}, b{i})
            x{i + 1} = Add (x{i}, l{i})""")
    shape = f"{dtype}[{rows}, 96]"
    return Graph(f"({shape} x) => ({shape} y) {{ {' '.join(lines)} y = Neg (x{depth}) }}", constants)


def projected(form: str, batch: str = "batch", *, bias: bool = False, mask: bool = False) -> Graph:
    """An attention of [batch, 197, 6 * 32] behind three products and before one: ``operator`` or ``products``."""
    constants: dict[str, Any] = {
        "split": np.array([-1, 197, 6, 32], I64),
        "flat": np.array([-1, 197, 192], I64),
        "p": small(192, 192, seed=9),
        **({"m": weight(1, 6, 197, 197, dtype=F16)} if mask else {}),
    }
    lines = ["u = Relu (x)"]
    for i, name in enumerate("qkv"):
        constants[f"w{name}"] = small(192, 192, seed=i)
        lines.append(f"{name}p = MatMul (u, w{name})")
        if bias:
            constants[f"b{name}"] = small(192, seed=i)
            lines.append(f"{name}b = Add ({name}p, b{name})")
        perm = "[0, 2, 3, 1]" if name == "k" and form == "products" else "[0, 2, 1, 3]"
        lines.append(f"{name}r = Reshape ({name}{'b' if bias else 'p'}, split)")
        lines.append(f"{name} = Transpose <perm = {perm}> ({name}r)")
    if form == "operator":
        lines.append(f"o = Attention <scale = 1.0> (q, k, v{', m' if mask else ''})")
    else:
        lines.append(f"s = MatMul (q, k) {'a = Add (s, m)' if mask else 'a = Mul (s, one)'}")
        lines.append("e = Softmax (a) o = MatMul (e, v)")
        constants |= {} if mask else {"one": F16(0.5)}
    lines.append("t = Transpose <perm = [0, 2, 1, 3]> (o) f = Reshape (t, flat) y = MatMul (f, p)")
    shape = f"float16[{batch}, 197, 192]"
    text = f"({shape} x) => ({shape} y) {{ {' '.join(lines)} }}"
    return Graph(text, constants, opset=23 if form == "operator" else 22)


def windowed(scores: str, *, heads: int = 1, bias: bool = False, batch: str = "batch") -> Graph:
    """An attention of rows [B, N, W, C], four windows of 16 tokens, whose scores have axes ``B``, ``W`` and ``h``."""
    width = 32 * heads
    rows = ["B", "N", "W", "h", "d"]
    perm = [rows.index(axis) for axis in (*scores, "N", "d")]
    keys = [*perm[:3], perm[4], perm[3]]
    constants: dict[str, Any] = {
        "split": np.array([-1, 16, 4, heads, 32], I64),
        "flat": np.array([-1, 16, 4, width], I64),
        "m": weight(16, 16, dtype=F16),
    }
    lines = []
    for i, name in enumerate("qkv"):
        constants[f"w{name}"] = small(width, width, seed=i)
        lines.append(f"{name}p = MatMul (x, w{name})")
        if bias:
            constants[f"b{name}"] = small(width, seed=i)
            lines.append(f"{name}b = Add ({name}p, b{name})")
        lines.append(f"{name}r = Reshape ({name}{'b' if bias else 'p'}, split)")
        lines.append(f"{name} = Transpose <perm = {keys if name == 'k' else perm}> ({name}r)")
    back = [perm.index(axis) for axis in range(5)]
    lines.append(f"""s = MatMul (q, k) a = Add (s, m) p = Softmax (a) o = MatMul (p, v)
        t = Transpose <perm = {back}> (o) y = Reshape (t, flat)""")
    shape = f"float16[{batch}, 16, 4, {width}]"
    return Graph(f"({shape} x) => ({shape} y) {{ {' '.join(lines)} }}", constants)


def quantized(data: str, weights: str, *, operator: str = "MatMul", channels: bool = True) -> Graph:
    """An INT8 product of FP16 values, whose scales are ``float16``, or ``float`` between Casts."""
    shape = {"MatMul": "8, 16, 96", "Gemm": "8, 96", "Conv": "8, 96, 4, 4"}[operator]
    kernel = (96, 96, 1, 1) if operator == "Conv" else (96, 96)
    count, axis = 96 if channels else 1, 0 if operator == "Conv" else 1
    constants: dict[str, Any] = {
        "s": DTYPES[data](0.05),
        "z": I8(0),
        "q": np.random.default_rng(0).integers(-127, 128, kernel).astype(I8),
        "t": np.linspace(0.04, 0.05, count).astype(DTYPES[weights]) if channels else DTYPES[weights](0.05),
        "u": np.zeros(96, I8) if channels else I8(0),
        "b": weight(1, 96, 1, 1, dtype=F16) if operator == "Conv" else weight(96, dtype=F16),
    }
    mark = f"<axis = {axis}>" if channels else ""
    if data == "float":
        lines = [
            "c = Cast <to = 1> (x) xq = QuantizeLinear (c, s, z) e = DequantizeLinear (xq, s, z) d = Cast <to = 10> (e)"
        ]
    else:
        lines = ["xq = QuantizeLinear (x, s, z) d = DequantizeLinear (xq, s, z)"]
    name = "f" if weights == "float" else "w"
    lines.append(f"{name} = DequantizeLinear {mark} (q, t, u)")
    if weights == "float":
        lines.append("w = Cast <to = 10> (f)")
    lines.append(f"m = {operator} (d, w) n = Add (m, b) y = Relu (n)")
    return Graph(f"(float16[{shape}] x) => (float16[{shape}] y) {{ {' '.join(lines)} }}", constants)


NARROW, WIDE, MIXED = quantized("float16", "float16"), quantized("float", "float"), quantized("float16", "float")

CASES: tuple[Case, ...] = (
    fails("scales of two types", 6, MIXED, NARROW, "the scales of its operands are FLOAT16 and FLOAT"),
    fails("scales of two types, turned", 6, quantized("float", "float16"), NARROW, "are FLOAT and FLOAT16"),
    warns("FP32 scales around FP16", 15, WIDE, NARROW, "the scales of its operands are FP32"),
    fails("one head whose tokens lie between", 16, windowed("BWh"), windowed("BhW"), "the builder fails"),
    fails("the same, windows first", 16, windowed("WBh"), windowed("WBh", heads=2), "the builder fails"),
    fails("the same, its head first", 16, windowed("hBW"), windowed("WhB"), "the builder fails"),
    warns(
        "the operator Attention with a dynamic batch",
        16,
        projected("operator"),
        projected("products"),
        "copies the operands and the result of the operator Attention, as its batch is dynamic",
        1,
    ),
    warns(
        "the operator Attention with a mask",
        16,
        projected("operator", "8", mask=True),
        projected("products", "8", mask=True),
        "as it has a mask",
        1,
    ),
    warns(
        "products on four axes",
        19,
        perceptrons("8, 14, 14"),
        perceptrons("8, 196"),
        "a product on 4 axes: its bias, and what follows it, becomes a kernel of its own",
    ),
    warns(
        "products on five axes of a dynamic batch",
        19,
        perceptrons("batch, 2, 7, 14", dtype="float"),
        perceptrons("batch, 196", dtype="float"),
        "a product on 5 axes",
    ),
)
