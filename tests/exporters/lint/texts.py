"""Small graphs as ONNX text, most of them broken in one known way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from deploycli.exporters.lint import lint

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from deploycli.exporters.lint import LintReport

F16, F32, I8, I64 = np.float16, np.float32, np.int8, np.int64


@dataclass(frozen=True)
class Graph:
    """A graph as text, without header and node names, and its constants."""

    text: str
    constants: Mapping[str, npt.ArrayLike] = field(default_factory=dict)
    opset: int = 20
    ir_version: int = 10
    version: str = "11.4"
    is_named: bool = True

    def proto(self) -> onnx.ModelProto:
        head = f'<ir_version: {self.ir_version}, opset_import: ["" : {self.opset}, "com.microsoft" : 1]>'
        model = onnx.parser.parse_model(f"{head}\ng {self.text}")
        for name, value in self.constants.items():
            tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value), name)
            tensor.name = name
            model.graph.initializer.append(tensor)
        if self.is_named:
            for i, node in enumerate(model.graph.node):
                node.name = node.name or f"{node.op_type}.{i}"
        return model

    def model(self) -> ir.Model:
        return ir.from_proto(self.proto())

    def lint(self, **options: Any) -> LintReport:
        return lint(self.model(), **{"version": self.version, **options})


def weight(*shape: int, dtype: Any = F32, seed: int = 0) -> npt.NDArray[Any]:
    """Numbers that no rule has anything against."""
    return (np.random.default_rng(seed).uniform(0.1, 1, shape) * np.where(np.arange(shape[-1]) % 2, 1, -1)).astype(
        dtype
    )


def pair(x: str, out: str, *, scale: str = "s", zero: str = "z", attributes: str = "") -> str:
    """Q and DQ of one value."""
    mark = f"<{attributes}>" if attributes else ""
    return f"""
        {out}_q = QuantizeLinear{mark} ({x}, {scale}, {zero})
        {out} = DequantizeLinear{mark} ({out}_q, {scale}, {zero})
    """


def scales(dtype: Any = F32, **others: npt.ArrayLike) -> dict[str, npt.ArrayLike]:
    return {"s": dtype(0.05), "z": I8(0), **others}


DTYPES = {"float": F32, "float16": F16}


def attention(
    *,
    dtype: str = "float16",
    heads: int = 3,
    tokens: int = 49,
    dim: int = 32,
    scale: str = "before",
    mask: tuple[int, ...] | None = None,
    five: bool = False,
    cast: bool = False,
    quantize: str = "",
    between: str = "",
    axis: int = -1,
    **options: Any,
) -> Graph:
    """An attention [batch, N, S, D] in the documented form, or off it in the ways that are asked for.

    Args:
        scale: ``before`` the first product, ``after`` it, or ``div``.
        mask: shape of the additive constant.
        five: add the mask in 5-D, as for the shifted windows of one image.
        cast: run Softmax in FP32.
        quantize: any of ``q k p v o``: which values have a Q/DQ pair.
        between: one more operator before the Softmax.
    """
    n = DTYPES[dtype]
    shape = f"batch, {heads}, {tokens}, {dim}"
    constants: dict[str, Any] = {"scale": n(0.25)}
    lines = [f"qs = {'Mul (q, scale)' if scale == 'before' else 'Identity (q)'}"]
    if scale != "before":
        lines = []
    first = "qs" if scale == "before" else "q"
    keys = "k"
    if five:  # windows are apart in the inputs
        shape = f"batch, {mask[1]}, {heads}, {tokens}, {dim}" if mask else shape
        constants["split"] = np.array([-1, heads, tokens, dim], I64)
        lines = ["q4 = Reshape (q, split) k4 = Reshape (k, split) v4 = Reshape (v, split) qs = Mul (q4, scale)"]
        keys = "k4"
    lines.append(f"kt = Transpose <perm = [0, 1, 3, 2]> ({keys})")
    names = {"q": first, "k": "kt", "v": "v4" if five else "v"}
    for letter in ("q", "k", "v"):
        if letter in quantize:
            lines.append(pair(names[letter], f"{letter}_d", scale=f"s_{letter}"))
            names[letter] = f"{letter}_d"
    lines.append(f"a = MatMul ({names['q']}, {names['k']})")
    x = "a"
    if scale == "after":
        lines.append("a_s = Mul (a, scale)")
        x = "a_s"
    if scale == "div":
        lines.append("a_s = Div (a, scale)")
        x = "a_s"
    if mask is not None:
        constants["mask"] = weight(*mask, dtype=n)
        if five:
            windows = mask[1]
            constants["to5"] = np.array([-1, windows, heads, tokens, tokens], I64)
            constants["to4"] = np.array([-1, heads, tokens, tokens], I64)
            lines.append(f"a5 = Reshape ({x}, to5) m5 = Add (a5, mask) m = Reshape (m5, to4)")
        else:
            lines.append(f"m = Add ({x}, mask)")
        x = "m"
    if between:
        lines.append(f"b = {between} ({x})")
        x = "b"
    if cast:
        lines.append(f"c = Cast <to = 1> ({x})")
        x = "c"
    lines.append(f"p = Softmax <axis = {axis}> ({x})")
    x = "p"
    if cast:
        lines.append(f"pc = Cast <to = {10 if dtype == 'float16' else 1}> (p)")
        x = "pc"
    if "p" in quantize:
        lines.append(pair(x, "p_d", scale="s_p"))
        x = "p_d"
    out = "y" if "o" not in quantize else "o"
    lines.append(f"{out} = MatMul ({x}, {names['v']})")
    if "o" in quantize:
        lines.append(pair("o", "y", scale="s_o"))
    for i, letter in enumerate(quantize):
        constants[f"s_{letter}"] = n(0.01 * (i + 1))
    if quantize:
        constants["z"] = I8(0)
    if scale == "none":
        del constants["scale"]
    made = "windows, " + ", ".join(shape.split(", ")[2:]) if five else shape
    head = f"({dtype}[{shape}] q, {dtype}[{shape}] k, {dtype}[{shape}] v) => ({dtype}[{made}] y)"
    return Graph(head + " {\n" + "\n".join(lines) + "\n}", constants, **options)
