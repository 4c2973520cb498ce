"""Random graphs of a few dozen kinds of nodes: a cast graph is valid, and gives what the FP32 graph gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.exporters.precision.casts import typed, weights

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, COLUMNS = 4, 8

Make = "Callable[[Graph, str, str], str]"


class Graph:
    """A graph in the making; its values are FP32 [4, 8], and of magnitude 1 or a little more."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Any] = {}

    def constant(self, value: Any) -> str:
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        for name, other in self.constants.items():
            if other.dtype == array.dtype and np.array_equal(other, array):
                return name
        name = f"c{len(self.constants)}"
        self.constants[name] = array
        return name

    def node(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        operands = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        self.nodes.append(helper.make_node(op, operands, names, name=f"n{len(self.nodes)}/{op}", **attributes))
        return names[0] if outputs == 1 else names

    def model(self, outputs: list[str], opset: int) -> onnx.ModelProto:
        ends = [self.node("Identity", name) for name in outputs]
        image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, COLUMNS])
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [ROWS, COLUMNS]) for name in ends]
        tensors = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "random", [image], results, tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def _branches(g: Graph, a: str, b: str) -> str:
    shape = [ROWS, COLUMNS]
    flag = g.node("Cast", g.node("ReduceMax", "x", np.array([0, 1]), keepdims=0), to=TensorProto.BOOL)
    name = f"inner{len(g.nodes)}"
    bodies = {
        key: helper.make_graph(
            [helper.make_node(op, [operand], [f"{name}_{key}"])],
            key,
            [],
            [helper.make_tensor_value_info(f"{name}_{key}", TensorProto.FLOAT, shape)],
        )
        for key, op, operand in (("then_branch", "Tanh", a), ("else_branch", "Neg", b))
    }
    return str(g.node("If", flag, **bodies))


def _there_and_back(g: Graph, a: str, _b: str) -> str:
    moved = g.node("Transpose", g.node("Reshape", a, np.array([ROWS, 2, COLUMNS // 2])), perm=[1, 0, 2])
    back = g.node("Transpose", moved, perm=[1, 0, 2])
    return str(g.node("Reshape", back, np.array([ROWS, COLUMNS])))


def _concatenated(g: Graph, a: str, b: str) -> str:
    both = g.node("Concat", a, b, axis=0)
    return str(g.node("Slice", both, np.array([2]), np.array([2 + ROWS]), np.array([0])))


def _swapped(g: Graph, a: str, _b: str) -> str:
    left, right = g.node("Split", a, np.array([3, 5]), outputs=2, axis=1)
    return str(g.node("Concat", g.node("Neg", right), left, axis=1))


def _normalised_in_pieces(g: Graph, a: str, _b: str) -> str:
    centred = g.node("Sub", a, g.node("ReduceMean", a, np.array([1])))
    variance = g.node("ReduceMean", g.node("Mul", centred, centred), np.array([1]))
    return str(g.node("Div", centred, g.node("Sqrt", g.node("Add", variance, np.float32(0.5)))))


def _attention(g: Graph, a: str, b: str) -> str:
    mask = np.where(np.tril(np.ones((ROWS, ROWS))), 0, -np.inf)
    scores = g.node("MatMul", a, g.node("Transpose", b, perm=[1, 0]))
    probabilities = g.node("Softmax", g.node("Add", g.node("Mul", scores, np.float32(0.25)), mask), axis=-1)
    return str(g.node("MatMul", probabilities, b))


def _quantized(g: Graph, a: str, _b: str) -> str:
    """On the input alone: after rounding, a value may fall into the next step."""
    scale, zero = np.float32(2**-4), np.int8(0)
    return str(g.node("DequantizeLinear", g.node("QuantizeLinear", "x", scale, zero), scale, zero))


def _double(g: Graph, a: str, _b: str) -> str:
    """ONNX Runtime 1.31 loses a value that is cast there and straight back, where an inner graph reads it."""
    return str(g.node("Cast", g.node("Abs", g.node("Cast", a, to=TensorProto.DOUBLE)), to=TensorProto.FLOAT))


WEIGHT = weights(COLUMNS, COLUMNS) / 4
KINDS: dict[str, Callable[[Graph, str, str], str]] = {
    **{
        op: (lambda g, a, _b, op=op: g.node(op, a))
        for op in ("Abs", "Erf", "Identity", "Neg", "Relu", "Sigmoid", "Tanh")
    },
    **{op: (lambda g, a, b, op=op: g.node(op, a, b)) for op in ("Max", "Min")},
    "Add": lambda g, a, b: g.node("Mul", g.node("Add", a, b), np.float32(0.5)),
    "Sub": lambda g, a, b: g.node("Mul", g.node("Sub", a, b), np.float32(0.5)),
    "Mul": lambda g, a, b: g.node("Clip", g.node("Mul", a, b), np.float32(-2), np.float32(2)),
    "square": lambda g, a, _b: g.node("Pow", g.node("Tanh", a), np.float32(2)),
    "MatMul": lambda g, a, _b: g.node("MatMul", a, WEIGHT),
    "Gemm": lambda g, a, b: g.node("Gemm", a, WEIGHT, np.linspace(-1, 1, COLUMNS), transB=1),
    "LayerNormalization": lambda g, a, _b: g.node("LayerNormalization", a, np.full(COLUMNS, 0.5), epsilon=0.5),
    "pieces": _normalised_in_pieces,
    "Softmax": lambda g, a, _b: g.node("Softmax", a, axis=-1),
    "attention": _attention,
    "mean": lambda g, a, b: g.node("Add", g.node("ReduceMean", a, np.array([1])), g.node("Mul", b, np.float32(0.5))),
    "moved": _there_and_back,
    "concatenated": _concatenated,
    "swapped": _swapped,
    "gathered": lambda g, a, _b: g.node("Gather", a, np.array([3, 1, 0, 2])),
    "padded": lambda g, a, _b: g.node(
        "Slice", g.node("Pad", a, np.array([1, 0, 0, 0])), *map(np.array, ([0], [ROWS], [0]))
    ),
    "expanded": lambda g, a, _b: g.node("Mul", a, g.node("Expand", np.float32([0.7]), g.node("Shape", a))),
    "filled": lambda g, a, _b: g.node("Sub", a, g.node("ConstantOfShape", g.node("Shape", a))),
    "counted": lambda g, a, _b: g.node("Div", a, g.node("Cast", g.node("Size", a), to=TensorProto.FLOAT)),
    "chosen": lambda g, a, b: g.node("Where", g.node("Greater", "x", np.float32(0.3)), a, b),
    "large": lambda g, a, _b: g.node("Mul", g.node("Mul", a, np.float32(1e6)), np.float32(1e-6)),
    "tiny": lambda g, a, _b: g.node("Add", a, np.float32(1e-12)),
    "double": _double,
    "itself": lambda g, a, _b: g.node("Cast", a, to=TensorProto.FLOAT),
    "If": _branches,
    "quantized": _quantized,
    "squeezed": lambda g, a, _b: g.node("Squeeze", g.node("Unsqueeze", a, np.array([0])), np.array([0])),
}

STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(KINDS)), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=14
)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    STEPS,
    st.sampled_from([19, 20, 22, 23]),
    st.sampled_from(["fp16", "fp16", "bf16"]),
    st.booleans(),
    st.integers(0, 9),
)
def test_random_graphs(steps: list[tuple[str, int, int]], opset: int, precision: str, io: bool, kept: int) -> None:
    graph, values = Graph(), ["x"]
    for kind, i, j in steps:
        a, b = (values[-1 - k % len(values)] for k in (i, j))
        values.append(KINDS[kind](graph, a, b))
    for _ in range(2):  # one of them is always cast
        graph.node("Tanh", "x")
    model = graph.model([values[-1], values[len(values) // 2]], opset)
    made = typed(model, precision, io=io, keep=(f"n{kept}/",) if kept < len(graph.nodes) and kept % 3 == 0 else ())
    x = np.random.default_rng(len(steps)).integers(-16, 17, (ROWS, COLUMNS)).astype(np.float32) / 16  # exact in BF16
    expected, found = made.run_source(x=x), made.run(x=x)
    for name, array in expected.items():
        tolerance = 0.02 if precision == "fp16" else 0.16
        assert np.abs(found[name].astype(np.float32) - array).max() <= tolerance * max(1, np.abs(array).max())
