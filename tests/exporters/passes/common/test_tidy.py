from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common

from deploycli.exporters.passes.common.tidy import LiftConstants, Sort, sweep
from tests.exporters.passes.graphs import differences, load, ops, parse, proto

if TYPE_CHECKING:
    from collections.abc import Callable

CONSTANTS = [
    {"value": onnx.numpy_helper.from_array(np.arange(6, dtype=np.float16).reshape(2, 3))},
    {"value_int": 7},
    {"value_ints": [3, -1, 2**62]},
    {"value_float": 0.1},
    {"value_floats": [0.1, -2.5]},
    {"value_string": "né"},
    {"value_strings": ["a", "bcd"]},
]


def constant(attribute: dict[str, Any], name: str = "c") -> onnx.NodeProto:
    return onnx.helper.make_node("Constant", [], [name], **attribute)


def with_nodes(nodes: list[onnx.NodeProto], outputs: list[str]) -> ir.Model:
    values = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = onnx.helper.make_graph(nodes, "g", [], values)
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]))


@pytest.mark.parametrize("attribute", CONSTANTS, ids=lambda a: next(iter(a)))
def test_constants_become_the_initializers_that_onnx_ir_makes_of_them(attribute: dict[str, Any]) -> None:
    nodes = [constant(attribute), onnx.helper.make_node("Identity", ["c"], ["y"])]
    model, other = (with_nodes(nodes, ["y"]) for _ in range(2))
    assert LiftConstants()(model).modified
    assert not LiftConstants()(model).modified
    ours = model.graph.initializers["c"].const_value
    assert ours is not None
    assert [node.op_type for node in model.graph] == ["Identity"]
    assert next(iter(model.graph)).inputs[0] is model.graph.initializers["c"]
    if attribute == {"value_string": "né"}:
        assert ours.numpy().item() == "né".encode()  # onnx_ir takes ASCII only
        return
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(other)
    theirs = other.graph.initializers["c"].const_value
    assert theirs is not None
    assert (ours.name, ours.dtype, ours.shape) == (theirs.name, theirs.dtype, theirs.shape)
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert ir.to_proto(model).graph.initializer == ir.to_proto(other).graph.initializer


def test_a_constant_that_is_an_output_stays() -> None:
    model = with_nodes([constant({"value_int": 7}, "y")], ["y"])
    assert not LiftConstants()(model).modified
    assert ops(model) == {"Constant": 1}


def test_constants_in_a_branch_become_initializers_of_the_branch() -> None:
    plain = parse(
        """g (bool p, float[2] x) => (float[2] y) {
            y = If (p) <
                then_branch: graph = t () => (float[2] a) { c = Constant <value_float: float = 1.0> () a = Add (x, c) },
                else_branch: graph = e () => (float[2] b) { b = Neg (x) }
            >
        }"""
    )  # fmt: skip
    model = load(plain)
    LiftConstants()(model)
    (node,) = model.graph
    assert list(node.attributes["then_branch"].as_graph().initializers) == ["c"]
    assert not differences(plain, proto(model))


CHAIN = """g (float[batch, 4] x) => (float[batch, 4] y) {
    a = Neg (x) b = Abs (x) c = Add (a, b) d = Mul (a, c) e = Sqrt (b) f = Add (d, e) y = Neg (f)
}"""


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_nodes_are_sorted_as_onnx_ir_sorts_them(seed: int) -> None:
    plain = parse(CHAIN)
    nodes = list(plain.graph.node)
    if seed:  # else sorted already
        random.Random(seed).shuffle(nodes)
    del plain.graph.node[:]
    plain.graph.node.extend(nodes)
    model, other = load(plain), load(plain)
    modified = Sort()(model).modified
    assert modified == common.TopologicalSortPass()(other).modified
    assert [node.outputs[0].name for node in model.graph] == [node.outputs[0].name for node in other.graph]


def test_a_branch_that_reads_what_comes_later_is_sorted() -> None:
    nodes = list(
        parse(
            """g (bool p, float[2] x) => (float[2] y) {
                n = Neg (x)
                y = If (p) <
                    then_branch: graph = t () => (float[2] a) { a = Abs (n) },
                    else_branch: graph = e () => (float[2] b) { b = Neg (x) }
                >
            }"""
        ).graph.node
    )  # fmt: skip
    plain = parse("g (bool p, float[2] x) => (float[2] y) { y = Identity (x) }")
    del plain.graph.node[:]
    plain.graph.node.extend(reversed(nodes))
    model = load(plain)
    Sort()(model)
    assert [node.op_type for node in model.graph] == ["Neg", "If"]


@st.composite
def graphs(draw: st.DrawFn) -> Callable[[], ir.Model]:
    """A graph of which much is read by nothing."""
    count = draw(st.integers(1, 12))
    operands = [(draw(st.integers(-2, i - 1)), draw(st.integers(-2, i - 1))) for i in range(count)]

    def make() -> ir.Model:
        names = ["x", "w"]
        body = []
        for i, (a, b) in enumerate(operands):
            body.append(f"v{i} = Add ({names[a + 2]}, {names[b + 2]})")
            names.append(f"v{i}")
        text = f"g (float[4] x) => (float[4] y) {{ {' '.join(body)} y = Neg ({names[-1]}) }}"
        return load(parse(text, w=np.ones(4, np.float32), unread=np.ones(4, np.float32)))

    return make


@settings(max_examples=50, deadline=None)
@given(graphs())
def test_what_nothing_reads_is_swept_away_as_onnx_ir_does(make: Callable[[], ir.Model]) -> None:
    model, other = make(), make()
    assert sweep(model.graph) == common.RemoveUnusedNodesPass()(other).modified
    assert proto(model) == proto(other)
    assert not sweep(model.graph)


def test_outputs_are_kept_though_no_node_reads_them() -> None:
    plain = parse("g (float[4] x) => (float[4] y, float[4] w) { y = Neg (x) dead = Abs (y) }", w=np.ones(4, np.float32))
    model = load(plain)
    sweep(model.graph)
    assert ops(model) == {"Neg": 1}
    assert list(model.graph.initializers) == ["w"]
