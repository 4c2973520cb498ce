"""Random networks of attentions, for properties: projections, windows, masks, layouts and what stands around them.

Numbers are doubles, so that two graphs that compute the same agree within very little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st
from onnx import checker, helper, numpy_helper

from tests.exporters.passes.graphs import session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx

CHANNELS = 8
MOST = 2**63 - 1


class AttentionNetwork:
    """A graph under construction: a stream ``[batch, L, C]``.

    Attributes:
        attentions: how many attentions it has.
    """

    def __init__(self, draw: Callable[[Any], Any], dtype: type = np.float64) -> None:
        self._draw = draw
        self._dtype = dtype
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._outputs: dict[str, Sequence[int | str]] = {}
        self._seed = 0
        self.attentions = 0
        self.tokens = self.pick(4, 8)
        self.batch: int | str = self.pick("batch", "batch", 1, 2)

    # --- writing ---

    def pick(self, *options: Any) -> Any:
        return self._draw(st.sampled_from(options))

    def constant(self, array: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def numbers(self, *shape: int, scale: float = 1.0) -> str:
        self._seed += 1
        return self.constant(np.random.default_rng(self._seed).normal(0, scale, shape).astype(self._dtype))

    def op(self, op_type: str, *inputs: str, outputs: int = 0, **attributes: Any) -> Any:
        made = [f"v{len(self._nodes)}_{i}" for i in range(outputs or 1)]
        self._nodes.append(helper.make_node(op_type, list(inputs), made, **attributes))
        return made if outputs else made[0]

    def shape(self, x: str, *dims: int) -> str:
        return self.op("Reshape", x, self.constant(np.array(dims)))

    def turn(self, x: str, *perm: int) -> str:
        return self.op("Transpose", x, perm=list(perm))

    def add(self, *operands: str) -> str:
        return self.op("Add", *self._draw(st.permutations(operands)))

    def output(self, x: str, *dims: int | str) -> None:
        self._outputs.setdefault(x, dims)

    def model(self) -> onnx.ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self._dtype))
        made = [helper.make_tensor_value_info(name, kind, shape) for name, shape in self._outputs.items()]
        source = helper.make_tensor_value_info("x", kind, [self.batch, self.tokens, CHANNELS])
        graph = helper.make_graph(self._nodes, "attentions", [source], made, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        checker.check_model(model, full_check=True)
        return model

    # --- what stands around attentions ---

    def norm(self, x: str, axis: int = -1) -> str:
        return self.op("LayerNormalization", x, self.numbers(CHANNELS), self.numbers(CHANNELS), axis=axis)

    def mlp(self, x: str, rank: int = 3) -> str:
        """LayerNormalization, two products, a residual; layer scale in one of several shapes."""
        hidden = self.op("MatMul", self.norm(x, self.pick(-1, rank - 1)), self.numbers(CHANNELS, 12))
        hidden = self.op("Relu", self.add(hidden, self.numbers(12)))
        y = self.add(self.op("MatMul", hidden, self.numbers(12, CHANNELS, scale=0.3)), self.numbers(CHANNELS))
        scale = self.numbers(*self.pick((CHANNELS,), (1,) * (rank - 1) + (CHANNELS,), (1,)))
        return self.add(x, self.op("Mul", y, scale))

    def image_mlp(self, x: str) -> str:
        """The same on an image [batch, H, W, C]."""
        image = self.shape(x, -1, 2, self.tokens // 2, CHANNELS)
        return self.shape(self.mlp(image, 4), -1, self.tokens, CHANNELS)

    def position(self, x: str) -> str:
        return self.add(x, self.numbers(*self.pick((1, self.tokens, CHANNELS), (self.tokens, CHANNELS))))

    def permute(self, x: str) -> str:
        order = np.array(self._draw(st.permutations(range(self.tokens))))
        return self.op("Gather", x, self.constant(order), axis=1)

    def look(self, x: str) -> str:
        """The stream is an output here as well."""
        self.output(x, self.batch, self.tokens, CHANNELS)
        return x

    def maximum(self, x: str) -> str:
        """A reduction of channels: rows of one number."""
        return self.op("Sub", x, self.op("ReduceMax", x, self.constant(np.array([2]))))

    # --- attention ---

    def block(self, x: str) -> str:
        """An attention within windows of some tokens, its projection, and a residual."""
        window, heads = self.pick(*(n for n in (1, 2, 4, 8) if n <= self.tokens), self.tokens), self.pick(1, 2, 4)
        y = self.norm(x) if self.pick(True, False) else x
        windows_first = self.pick(True, False)
        if windows_first:  # [B, L, C] -> [B*nW, N, C]
            y = self.shape(y, -1, window, CHANNELS)
        q, k, v = self._operands(y, window, heads)
        a = self._attend(q, k, v, window, window, heads)
        if windows_first and self.pick(True, False):
            a = self._project(self.shape(a, -1, window, CHANNELS))
            return self.add(x, self.shape(a, -1, self.tokens, CHANNELS))
        return self.add(x, self._project(self.shape(a, -1, self.tokens, CHANNELS)))

    def image_block(self, x: str) -> str:
        """The same on an image [batch, H, W, C], with layer scale."""
        window, heads = self.pick(2, self.tokens), self.pick(1, 2, 4)
        dims, ones = (-1, 2, self.tokens // 2, CHANNELS), (1, 1, 1)
        image = self.shape(x, *dims)
        y = self.op("Mul", self.norm(image, 3), self.numbers(*self.pick((), ones), CHANNELS))
        a = self.shape(self._attend(*self._operands(y, window, heads), window, window, heads), *dims)
        a = self.op("Mul", self._project(a), self.numbers(*self.pick((), ones), CHANNELS))
        return self.shape(self.add(image, a), -1, self.tokens, CHANNELS)

    def pool(self, x: str) -> str:
        """One query attends to all tokens; its result is added to every token."""
        heads = self.pick(1, 2)
        y = self.norm(x)
        ends = (self.constant(np.array([i])) for i in (0, 1, 1))
        q = self._apart(self.op("Slice", y, *ends), 1, heads, key=False)
        k, v = (self._apart(y, self.tokens, heads, key=key) for key in (True, False))
        a = self._attend(q, k, v, 1, self.tokens, heads)
        return self.op("Add", x, self._project(self.shape(a, -1, 1, CHANNELS)))

    def _project(self, a: str) -> str:
        return self.add(self.op("MatMul", a, self.numbers(CHANNELS, CHANNELS, scale=0.4)), self.numbers(CHANNELS))

    def _operands(self, y: str, window: int, heads: int) -> tuple[str, str, str]:
        """Queries and values [.., h, N, d], keys [.., h, d, N], of one projection or three."""
        size = CHANNELS // heads
        kind = self.pick("merged", "interleaved", "apart", "key and value")
        if kind == "apart":
            q, k, v = (self._apart(y, window, heads, key=i == 1) for i in range(3))
            return q, k, v
        count = 2 if kind == "key and value" else 3
        m = self._with_bias(self.op("MatMul", y, self.numbers(CHANNELS, count * CHANNELS, scale=0.4)), count)
        if kind == "interleaved":  # [.., N, h, 3, d]
            moved = self.turn(self.shape(m, -1, window, heads, 3, size), 3, 0, 2, 1, 4)
        else:  # [.., N, 3, h, d]
            moved = self.turn(self.shape(m, -1, window, count, heads, size), 2, 0, 3, 1, 4)
        parts = self.op("Split", moved, outputs=count, axis=0, num_outputs=count)
        *q1, k, v = (self.op("Squeeze", part, self.constant(np.array([0]))) for part in parts)
        q = q1[0] if q1 else self._apart(y, window, heads, key=False)
        return q, self.turn(k, 0, 1, 3, 2), v

    def _with_bias(self, m: str, count: int = 1) -> str:
        return self.add(m, self.numbers(count * CHANNELS)) if self.pick(True, False) else m

    def _apart(self, y: str, window: int, heads: int, *, key: bool) -> str:
        m = self._with_bias(self.op("MatMul", y, self.numbers(CHANNELS, CHANNELS, scale=0.4)))
        shaped = self.shape(m, -1, window, heads, CHANNELS // heads)
        if key and self.pick(True, False):
            return self.turn(shaped, 0, 2, 3, 1)
        return self.turn(self.turn(shaped, 0, 2, 1, 3), 0, 1, 3, 2) if key else self.turn(shaped, 0, 2, 1, 3)

    def _attend(self, q: str, k: str, v: str, queries: int, keys: int, heads: int) -> str:
        """Return what attention gives, tokens in front of heads: [.., Nq, h, d]."""
        self.attentions += 1
        windows, square = self.tokens // keys, (queries, keys)
        # Leading axes of the scores, of the mask, and of the operands.
        case = self.pick("none", "of heads", "of windows and heads", "5-D scores", "5-D")
        if case == "5-D":
            q, k, v = (
                self.shape(a, -1, windows, heads, *self._last(i, square, heads)) for i, a in enumerate((q, k, v))
            )
        scores = self.op("MatMul", q, k)
        if case == "of heads":
            scores = self.add(scores, self.numbers(*self.pick((heads, *square), (1, heads, *square))))
        elif case == "of windows and heads":
            scores = self.shape(scores, -1, windows * heads, *square)
            scores = self.add(scores, self.numbers(1, windows * heads, *square))
        elif case != "none":
            if case == "5-D scores":
                scores = self.shape(scores, -1, windows, heads, *square)
            scores = self.add(scores, self.numbers(windows, self.pick(1, heads), *square))
        rank = 5 if case.startswith("5-D") else 4
        p = self.op("Softmax", scores, axis=self.pick(-1, rank - 1))
        if case in ("of windows and heads", "5-D scores"):
            p = self.shape(p, -1, heads, *square)
        o = self.op("MatMul", p, v)
        return self.turn(o, 0, 1, 3, 2, 4) if case == "5-D" else self.turn(o, 0, 2, 1, 3)

    @staticmethod
    def _last(operand: int, square: tuple[int, int], heads: int) -> tuple[int, int]:
        size = CHANNELS // heads
        return ((square[0], size), (size, square[1]), (square[1], size))[operand]

    # --- how it ends ---

    def end(self, x: str) -> None:
        """All tokens, some, one, or their mean."""
        y = self.pick(self.norm, self.look)(x)
        kind = self.pick("all", "some", "slice", "first", "mean", "mean kept")
        axis = self.constant(np.array([self.pick(1, -2)]))
        if kind == "some":
            y = self.op("Gather", y, self.constant(np.array([2, 0])), axis=self.pick(1, -2))
        elif kind == "slice":
            y = self.op("Slice", y, *(self.constant(np.array([i])) for i in (0, 1)), axis)
        elif kind == "first":
            y = self.op("Gather", y, self.constant(np.array(self.pick(0, -1))), axis=1)
        elif kind.startswith("mean"):
            y = self.op("ReduceMean", y, axis, keepdims=int(kind != "mean"))
        y = self.op("MatMul", y, self.numbers(CHANNELS, 3))
        rows = {"all": [self.tokens], "some": [2], "slice": [1], "mean kept": [1]}.get(kind, [])
        self.output(y, self.batch, *rows, 3)


BLOCKS = ("block", "block", "image_block", "pool")
AROUND = ("mlp", "image_mlp", "position", "permute", "look", "maximum")


@st.composite
def attention_networks(
    draw: Callable[[Any], Any], blocks: tuple[str, ...] = BLOCKS, around: tuple[str, ...] = AROUND
) -> tuple[onnx.ModelProto, int]:
    """Draw a network of one to three attentions, and say how many it has."""
    net, x = AttentionNetwork(draw), "x"
    for _ in range(draw(st.integers(0, 1))):
        x = getattr(net, net.pick(*around))(x)
    for _ in range(draw(st.integers(1, 3))):
        x = getattr(net, net.pick(*blocks))(x)
        for _ in range(draw(st.integers(0, 2))):
            x = getattr(net, net.pick(*around))(x)
    net.end(x)
    return net.model(), net.attentions


def deviation(plain: onnx.ModelProto, rewritten: onnx.ModelProto, batches: Sequence[int] = (1, 2, 3)) -> float:
    """The largest difference of any output, as a part of the largest number in it."""
    one, other = session(plain), session(rewritten)
    (source,) = plain.graph.input
    kind = helper.tensor_dtype_to_np_dtype(source.type.tensor_type.elem_type)
    first, *rest = source.type.tensor_type.shape.dim
    names, worst = [value.name for value in plain.graph.output], 0.0
    for batch in [first.dim_value] if first.HasField("dim_value") else batches:
        x = np.random.default_rng(batch).normal(0, 1, (batch, *(d.dim_value for d in rest))).astype(kind)
        for a, b in zip(one.run(names, {"x": x}), other.run(names, {"x": x}), strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            worst = max(worst, float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-6)))
    return worst
