"""Random networks over tokens: products, normalisations, attention and movement, and selections of their tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_ir.passes import common

from tests.exporters.passes.graphs import Array, session
from tests.exporters.passes.programs import B, Dims, Program, declared

WIDTH = 4
"""Channels of every value that is tokens: two heads of two."""


class Network(Program):
    """A program of real numbers. Tokens are [B, N, WIDTH]; every N has its own values to add up."""

    def real(self, *shape: int) -> str:
        """Weights that are nowhere zero and differ everywhere."""
        rng = np.random.default_rng(len(self.constants) + 1)
        return self.constant(rng.standard_normal(shape) / math.sqrt(shape[0]), self.dtype)

    @property
    def dtype(self) -> Any:
        return helper.tensor_dtype_to_np_dtype(self.elem_type)

    def keep(self, value: str, hidden: dict[str, Dims]) -> None:
        """Let only the last of the values that were made be read."""
        dims = self.pool[value]
        self.pool = hidden
        self.pool[value] = dims


def linear(p: Network, x: str) -> None:
    dims, hidden = p.pool[x], dict(p.pool)
    product = p.op("MatMul", [x, p.real(WIDTH, WIDTH)], dims)
    p.keep(p.op("Add", [product, p.real(WIDTH)] if p.draw(st.booleans()) else [p.real(WIDTH), product], dims), hidden)


def flat_linear(p: Network, x: str) -> None:
    """A Gemm over tokens and images on one axis, in either order."""
    (_, n, c), hidden = p.pool[x], dict(p.pool)
    turned = p.draw(st.booleans())
    if turned:
        x = p.op("Transpose", [x], (n, B, c), perm=[1, 0, 2])
    flat = p.op("Reshape", [x, p.constant([-1, c])], (n * B, c))
    product = p.op("Gemm", [flat, p.real(c, c), p.real(c)], (n * B, c), transB=p.integer(0, 1))
    y = p.op("Reshape", [product, p.constant([n, -1, c] if turned else [-1, n, c])], (n, B, c) if turned else (B, n, c))
    p.keep(p.op("Transpose", [y], (B, n, c), perm=[1, 0, 2]) if turned else y, hidden)


def heads(p: Network, x: str, rows: int) -> str:
    """[B, N, 4] -> [B, 2, N, 2]."""
    split = p.op("Reshape", [x, p.constant([-1, rows, 2, WIDTH // 2])], (B, rows, 2, WIDTH // 2))
    return p.op("Transpose", [split], (B, 2, rows, WIDTH // 2), perm=[0, 2, 1, 3])


def attention(p: Network, x: str) -> None:
    """One product for queries, keys and values, split in one of three ways; a constant for each pair of tokens."""
    (_, n, c), hidden = p.pool[x], dict(p.pool)
    half = c // 2
    qkv = p.op("MatMul", [x, p.real(c, 3 * c)], (B, n, 3 * c))
    qkv = p.op("Add", [qkv, p.real(3 * c)], (B, n, 3 * c))
    way = p.pick(["split", "gather", "unbind"])
    if way == "split":
        parts = p.split_op("Split", [qkv, p.constant([c, c, c])], [(B, n, c)] * 3, axis=-1)
        q, k, v = (heads(p, part, n) for part in parts)
    else:
        five = p.op("Reshape", [qkv, p.constant([-1, n, 3, 2, half])], (B, n, 3, 2, half))
        five = p.op("Transpose", [five], (3, B, 2, n, half), perm=[2, 0, 3, 1, 4])
        if way == "gather":
            q, k, v = (p.op("Gather", [five, p.constant(i)], (B, 2, n, half), axis=0) for i in range(3))
        else:
            parts = p.split_op("Split", [five], [(1, B, 2, n, half)] * 3, axis=0, num_outputs=3)
            q, k, v = (p.op("Squeeze", [part, p.constant([0])], (B, 2, n, half)) for part in parts)
    k = p.op("Transpose", [k], (B, 2, half, n), perm=[0, 1, 3, 2])
    scores = p.op("MatMul", [q, k], (B, 2, n, n))
    scores = p.op("Add", [scores, p.real(*p.pick([(2, n, n), (n, n), (n, 1), (1, n)]))], (B, 2, n, n))
    mixed = p.op("MatMul", [p.op("Softmax", [scores], (B, 2, n, n), axis=-1), v], (B, 2, n, half))
    joined = p.op("Transpose", [mixed], (B, n, 2, half), perm=[0, 2, 1, 3])
    p.keep(p.op("Reshape", [joined, p.constant([-1, n, c])], (B, n, c)), hidden)


def norm(p: Network, x: str) -> None:
    p.op("LayerNormalization", [x, p.real(WIDTH), p.real(WIDTH)], p.pool[x], axis=-1)


def elementwise(p: Network, x: str) -> None:
    p.op(p.pick(["Tanh", "Neg", "Sigmoid"]), [x], p.pool[x])


def by_token(p: Network, x: str) -> None:
    """A table with a row for every token, such as positions."""
    dims = p.pool[x]
    p.op(p.pick(["Add", "Mul"]), [x, p.real(*p.pick([dims[1:], (1, *dims[1:]), (dims[1], 1)]))], dims)


def residual(p: Network, x: str) -> None:
    y = p.pick([y for y, dims in p.pool.items() if dims == p.pool[x]])
    p.op("Add", [x, y], p.pool[x])


def mixing(p: Network, x: str) -> None:
    """Tokens that depend on each other."""
    dims, hidden = p.pool[x], dict(p.pool)
    if p.draw(st.booleans()):
        p.op("Softmax", [x], dims, axis=1)
        return
    mean = p.op("ReduceMean", [x, p.constant([1])], (B, 1, WIDTH), keepdims=1)
    p.keep(p.op("Sub", [x, mean], dims), hidden)


def some_tokens(p: Network, x: str) -> None:
    _, n, c = p.pool[x]
    if p.draw(st.booleans()):
        rows = p.draw(st.lists(st.integers(-n, n - 1), min_size=1, max_size=4))
        p.op("Gather", [x, p.constant(rows)], (B, len(rows), c), axis=1)
        return
    start, step = p.integer(0, n - 1), p.pick([1, 1, 2, -1])
    kept = len(range(n)[start::step])
    end = -(2**63) if step < 0 else 2**63 - 1
    p.op("Slice", [x, *(p.constant([i]) for i in (start, end, 1, step))], (B, kept, c))


def joined(p: Network, x: str) -> None:
    y = p.pick(list(p.pool))
    n, m = p.pool[x][1], p.pool[y][1]
    if n + m <= 9:
        p.op("Concat", [x, y], (B, n + m, WIDTH), axis=1)


LAYERS = [
    linear, linear, flat_linear, attention, attention, norm, elementwise, by_token, residual, residual, mixing,
    some_tokens, joined,
]  # fmt: skip


@st.composite
def networks(draw: Any) -> onnx.ModelProto:
    """Draw a network whose results are tokens of its last values."""
    p = Network(draw, draw(st.sampled_from([TensorProto.FLOAT, TensorProto.DOUBLE])))
    dims = (B, draw(st.integers(2, 6)), WIDTH)
    p.pool["x"] = dims
    for _ in range(draw(st.integers(2, 9))):
        x = list(p.pool)[-1] if draw(st.integers(0, 3)) else draw(st.sampled_from(list(p.pool)))
        draw(st.sampled_from(LAYERS))(p, x)
    results: dict[str, Dims] = {}
    for value in [list(p.pool)[-1], *draw(st.lists(st.sampled_from(list(p.pool)), max_size=2))]:
        _, n, c = p.pool[value]
        if draw(st.integers(0, 4)) == 0 and value != "x":
            results[value] = p.pool[value]
            continue
        row = p.op("Gather", [value, p.constant(p.integer(-n, n - 1))], (B, c), axis=1)
        results[row] = p.pool.pop(row)
    inputs = [helper.make_tensor_value_info("x", p.elem_type, declared(dims))]
    outputs = [helper.make_tensor_value_info(name, p.elem_type, declared(d)) for name, d in results.items()]
    graph = helper.make_graph(p.nodes, "network", inputs, outputs, p.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    needed = ir.from_proto(model)
    common.RemoveUnusedNodesPass()(needed)
    return ir.to_proto(needed)


def deviation(plain: onnx.ModelProto, rewritten: onnx.ModelProto, batches: tuple[int, ...] = (1, 5)) -> float:
    """Return the largest difference of any output, by its largest magnitude; infinity where a type or shape differs."""
    if list(plain.graph.output) != list(rewritten.graph.output) or list(plain.graph.input) != list(
        rewritten.graph.input
    ):
        return math.inf
    one, other = session(plain), session(rewritten)
    worst = 0.0
    for batch in batches:
        feed = {}
        for value in plain.graph.input:
            shape = [d.dim_value or batch for d in value.type.tensor_type.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feed[value.name] = np.random.default_rng(batch).standard_normal(shape).astype(dtype)
        for x, y in zip(one.run(None, feed), other.run(None, feed), strict=True):
            worst = max(worst, _difference(x, y))
    return worst


def _difference(x: Array, y: Array) -> float:
    if x.shape != y.shape or x.dtype != y.dtype or not np.isfinite(y).all():
        return math.inf
    return float(np.abs(x - y).max(initial=0) / max(np.abs(x).max(initial=0), 1e-3))


def rounding(model: onnx.ModelProto) -> float:
    """What re-ordered sums may differ by in the precision of a model."""
    return 1e-9 if model.graph.input[0].type.tensor_type.elem_type == TensorProto.DOUBLE else 1e-4
