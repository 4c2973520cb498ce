"""Powers of two are exact: random graphs with random exponents compute the same bits, in float64; mutants do not."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from deploycli.exporters.precision import rescale as rescaling
from deploycli.exporters.precision import scales as scaling
from deploycli.exporters.precision.dtypes import fill_types
from deploycli.exporters.precision.rescale import Writer, apply_exponents
from deploycli.exporters.precision.scales import Scales, epsilon_of
from tests.exporters.precision.casts import source, weights
from tests.exporters.precision.networks import normal, proto_of
from tests.exporters.precision.outliers import double
from tests.exporters.precision.test_insert_casts_properties import COLUMNS, ROWS, Graph

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[[Graph, str, str], str]

SIZE = [ROWS, COLUMNS]
IMAGE = [1, COLUMNS, 2, 2]


def matrix(seed: int) -> Any:
    return weights(COLUMNS, COLUMNS, seed=seed)


def _normalized(g: Graph, a: str, _b: str) -> str:
    gain, bias = weights(COLUMNS, seed=1), weights(COLUMNS, seed=2)
    return str(g.node("LayerNormalization", a, gain, bias, epsilon=0.25))


def _per_channel(g: Graph, a: str, _b: str) -> str:
    image = g.node("Reshape", a, np.array(IMAGE))
    made = g.node("InstanceNormalization", image, weights(COLUMNS, seed=3), weights(COLUMNS, seed=4), epsilon=0.25)
    return str(g.node("Reshape", made, np.array(SIZE)))


def _batch(g: Graph, a: str, _b: str) -> str:
    image = g.node("Reshape", a, np.array(IMAGE))
    parts = [weights(COLUMNS, seed=i) for i in (5, 6, 7)]
    made = g.node("BatchNormalization", image, *parts, np.abs(weights(COLUMNS, seed=8)), epsilon=0.25)
    return str(g.node("Reshape", made, np.array(SIZE)))


def _root_mean_square(g: Graph, a: str, _b: str) -> str:
    mean = g.node("ReduceMean", g.node("Mul", a, a), np.array([1]))
    root = g.node("Sqrt", g.node("Add", mean, np.float32(0.25)))
    return str(g.node("Mul", g.node("Div", a, root), weights(COLUMNS, seed=9)))


def _unit(g: Graph, a: str, _b: str) -> str:
    norm = g.node("Max", g.node("ReduceL2", a, np.array([1])), np.float32(0.25))
    return str(g.node("Mul", a, g.node("Reciprocal", norm)))


def _convolved(g: Graph, a: str, _b: str) -> str:
    image = g.node("Reshape", a, np.array(IMAGE))
    kernel = weights(COLUMNS, COLUMNS, 1, 1, seed=10)
    made = g.node("Relu", g.node("Conv", image, kernel, weights(COLUMNS, seed=11)))
    return str(g.node("Reshape", g.node("MaxPool", made, kernel_shape=[1, 1]), np.array(SIZE)))


def _attended(g: Graph, a: str, b: str) -> str:
    scores = g.node("Mul", g.node("MatMul", a, g.node("Transpose", b, perm=[1, 0])), np.float32(0.25))
    return str(g.node("MatMul", g.node("Softmax", scores, axis=-1), b))


def _halves(g: Graph, a: str, b: str) -> str:
    both = g.node("Concat", a, b, axis=0)
    return str(g.node("Slice", both, np.array([2]), np.array([2 + ROWS]), np.array([0])))


KINDS: dict[str, Make] = {
    "Abs": lambda g, a, _b: g.node("Abs", a),
    "Add": lambda g, a, b: g.node("Add", a, b),
    "Add constant": lambda g, a, _b: g.node("Add", weights(COLUMNS, seed=12), a),
    "BatchNormalization": _batch,
    "Clip": lambda g, a, _b: g.node("Clip", a, np.float32(-0.5), np.float32(1)),
    "Concat": _halves,
    "Conv": _convolved,
    "Div": lambda g, a, b: g.node("Div", a, g.node("Add", g.node("Abs", b), np.float32(1))),
    "Div constant": lambda g, a, _b: g.node("Div", a, 1 + np.abs(weights(COLUMNS, seed=13))),
    "Gelu": lambda g, a, _b: g.node("Gelu", a),
    "Gemm": lambda g, a, _b: g.node("Gemm", a, matrix(14), weights(COLUMNS, seed=15), transB=1, alpha=0.5),
    "InstanceNormalization": _per_channel,
    "LayerNormalization": _normalized,
    "LeakyRelu": lambda g, a, _b: g.node("LeakyRelu", a, alpha=0.1),
    "MatMul": lambda g, a, _b: g.node("MatMul", a, matrix(16)),
    "Max": lambda g, a, b: g.node("Max", a, b),
    "Mul": lambda g, a, b: g.node("Mul", a, b),
    "Mul constant": lambda g, a, _b: g.node("Mul", a, weights(COLUMNS, seed=17)),
    "Neg": lambda g, a, _b: g.node("Neg", a),
    "PRelu": lambda g, a, _b: g.node("PRelu", a, weights(COLUMNS, seed=18)),
    "ReduceL2": _unit,
    "Softmax": _attended,
    "Sqrt": lambda g, a, _b: g.node("Sqrt", g.node("Abs", a)),
    "Sub": lambda g, a, b: g.node("Sub", a, b),
    "Tanh": lambda g, a, _b: g.node("Tanh", a),
    "Where": lambda g, a, b: g.node("Where", np.arange(COLUMNS) > 3, a, b),
    "root mean square": _root_mean_square,
    "rotated": lambda g, a, _b: g.node("Pad", g.node("Slice", a, np.array([1]), np.array([8]), np.array([1])),
                                       np.array([0, 1, 0, 0]), np.float32(0.5)),
}  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[onnx.ModelProto, list[tuple[int, int]]]:
    """A graph, and exponents that are wished for: which of its groups, and how much."""
    g = Graph()
    values = ["x", g.node("MatMul", "x", matrix(0))]
    for _ in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(sorted(KINDS)))
        values.append(KINDS[kind](g, *(draw(st.sampled_from(values[-4:])) for _ in range(2))))
    wishes = draw(st.lists(st.tuples(st.integers(0, 99), st.integers(-9, 9)), min_size=1, max_size=4))
    return g.model([g.node("Tanh", values[-1])], 20), wishes


def scaled(proto: onnx.ModelProto, wishes: list[tuple[int, int]]) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Scale what may be scaled of what is wished for; return the graph, and the exponent of each value."""
    model = ir.from_proto(copy.deepcopy(proto))
    fill_types(model)
    scales = Scales(model.graph)
    free = [i for i, group in enumerate(scales.groups) if not group.pinned]
    wanted: dict[int, int] = {}
    found: dict[int, int] = {}
    for choice, exponent in wishes:
        if free:
            tried = {**wanted, free[choice % len(free)]: exponent}
            solved = scales.solve(tried, lambda group, k: scales.groups[group].pinned if k else "")
            if not isinstance(solved, str):
                wanted, found = tried, solved
    exponents = {
        value.name or "": found.get(group, 0) for value in values_of(model) if (group := scales.of(value)) is not None
    }
    writer = Writer(model.graph)
    apply_exponents(scales, found, writer)
    writer.finish()
    return proto_of(model), exponents


def values_of(model: ir.Model) -> list[ir.Value]:
    return [output for node in model.graph for output in node.outputs]


def differing(case: tuple[onnx.ModelProto, list[tuple[int, int]]]) -> list[str]:
    """Return the values that are not bit by bit what they were, times their power of two."""
    proto, wishes = case
    made, exponents = scaled(proto, wishes)
    known = {value.name for value in proto.graph.output}
    for graph in (proto.graph, made.graph):
        graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in exponents if name not in known
        )
    inputs = {"x": normal(ROWS, COLUMNS)}
    before, after = double(proto, inputs), double(made, inputs)
    return [
        name
        for name, array in before.items()
        if not np.array_equal(np.ldexp(array, -exponents.get(name, 0)), after[name], equal_nan=True)
    ]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_no_bit_is_another(case: tuple[onnx.ModelProto, list[tuple[int, int]]]) -> None:
    assert differing(case) == []


def test_most_of_what_is_wished_for_is_done() -> None:
    """The property says something: exponents are found, of many kinds of operators."""
    seen: set[str] = set()

    def notes(case: tuple[onnx.ModelProto, list[tuple[int, int]]]) -> bool:
        made, exponents = scaled(*case)
        seen.update(n.op_type for n in made.graph.node if any(exponents.get(name) for name in (*n.input, *n.output)))
        return {"Gemm", "Conv", "LayerNormalization", "Add", "Div", "Sqrt", "Where", "InstanceNormalization"} <= seen

    find(cases(), notes, settings=SEARCH)


# --- the judge -------------------------------------------------------------------------------------------------------

SEARCH = settings(
    max_examples=600,
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def is_reported(case: tuple[onnx.ModelProto, list[tuple[int, int]]]) -> bool:
    return differing(case) != []


def only(position: int, op_type: str) -> Callable[[Any], Any]:
    """One operand of an operator is left as it was."""

    def change(real: Any) -> Any:
        def scale(self: Any, use: Any, *rest: Any) -> None:
            if (use.position, use.node.op_type) != (position, op_type):
                real(self, use, *rest)

        return scale

    return change


def apart(real: Any) -> Any:
    """The operands of a sum need not be scaled alike."""
    return {**real, "Add": lambda node, relations: bool(relations.keys(node))}


MUTANTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "epsilon as it was": (rescaling, "scaled_epsilon", lambda _real: lambda node, _exponent: epsilon_of(node)),
    "epsilon half as much": (
        rescaling, "scaled_epsilon", lambda _real: lambda node, exponent: epsilon_of(node) * 2.0**-exponent
    ),
    "bias of a normalisation as it was": (Writer, "scale", only(2, "LayerNormalization")),
    "bias of a convolution as it was": (Writer, "scale", only(2, "Conv")),
    "bias of a product as it was": (Writer, "scale", only(2, "Gemm")),
    "weight as it was": (Writer, "scale", only(1, "MatMul")),
    "sums of different scales": (scaling, "_RULES", apart),
    "a quotient as a product": (scaling, "_RULES", lambda real: {**real, "Div": real["Mul"]}),
    "a root as it was": (scaling, "_RULES", lambda real: {**real, "Sqrt": real["Abs"]}),
    "Tanh is linear": (scaling, "_RULES", lambda real: {**real, "Tanh": real["Abs"]}),
    "Softmax is linear": (scaling, "_RULES", lambda real: {**real, "Softmax": real["Abs"]}),
    "slopes are scaled": (scaling, "_RULES", lambda real: {**real, "PRelu": real["Add"]}),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_random_graphs_find_the_fault(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, name, make = MUTANTS[mutant]
    monkeypatch.setattr(target, name, make(getattr(target, name)))
    find(cases(), is_reported, settings=SEARCH)  # raises where nothing is reported


# --- single operators ------------------------------------------------------------------------------------------------


def groups(text: str, opset: int = 20, **constants: Any) -> dict[str, int]:
    """Return the exponents of all values where ``a`` is to have 2."""
    model = ir.from_proto(source(f"g (float[4,8] x) => (float[4,8] y) {{ a = Mul (x, c) {text} }}", opset, **constants))
    fill_types(model)
    scales = Scales(model.graph)
    a = next(value for value in values_of(model) if value.name == "a")
    wanted = scales.of(a)
    assert wanted is not None
    found = scales.solve({wanted: 2}, lambda group, k: scales.groups[group].pinned if k else "")
    if isinstance(found, str):
        return {}
    return {value.name or "": found.get(scales.of(value) or 0, 0) for value in values_of(model)}


@pytest.mark.parametrize(
    ("text", "exponents"),
    [
        ("b = Pow (a, two) y = Mul (b, c)", {"a": 2, "b": 4, "y": 0}),
        ("b = Pow (a, c) y = Mul (b, c)", {}),
        ("b = ReduceSumSquare <keepdims = 1> (a) y = Mul (b, c)", {"a": 2, "b": 4, "y": 0}),
        ("b = Reciprocal (a) y = Mul (b, c)", {"a": 2, "b": -2, "y": 0}),
        ("b = Sqrt (a) y = Mul (b, c)", {"a": 2, "b": 1, "y": 0}),
        ("b = LpNormalization (a) y = Neg (b)", {"a": 2, "b": 0, "y": 0}),
        ("b = Einsum <equation = \"ij,kj->ik\"> (a, a) y = MatMul (b, c)", {"a": 2, "b": 4, "y": 0}),
        ("b, m = Dropout (a) y = Mul (b, c)", {}),
        ("b = Dropout (a) y = Mul (b, c)", {"a": 2, "b": 2, "y": 0}),
        ("b, m, s = LayerNormalization (a, c) d = Mul (m, c) y = Add (b, d)", {}),
        ("b = ArgMax <axis = 1> (a) d = Cast <to = 1> (b) y = Mul (d, c)", {"a": 2, "b": 0, "d": 0, "y": 0}),
        ("b = Cast <to = 10> (a) y = Cast <to = 1> (b)", {}),
    ],
)  # fmt: skip
def test_an_operator(text: str, exponents: dict[str, int]) -> None:
    c = np.float32(3) if "MatMul" not in text else weights(4, 8)
    assert groups(text, c=c, two=np.float32(2)) == exponents


@pytest.mark.parametrize(("role", "exponents"), [("v", {"a": 2, "v": 2, "b": 2, "y": 0}), ("q", {}), ("k", {})])
def test_the_values_of_an_attention_may_be_scaled_and_the_scores_may_not(role: str, exponents: dict[str, int]) -> None:
    operands = ", ".join(role if name == role else "o" for name in "qkv")
    text = f"""{role} = Reshape (a, heads) o = Reshape (x, heads)
        b = Attention <q_num_heads = 2, kv_num_heads = 2> ({operands}) d = Reshape (b, rows) y = Mul (d, c)"""
    constants = {"heads": np.array([1, 4, 8], np.int64), "rows": np.array([4, 8], np.int64)}
    found = groups(text, 23, c=np.float32(3), **constants)
    assert {name: found[name] for name in exponents} == exponents
    assert bool(found) is bool(exponents)
