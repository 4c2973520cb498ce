from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from deploycli.exporters.graph.unique import PARAMETER
from deploycli.exporters.passes.common.names import name_nodes
from deploycli.exporters.passes.pipeline import rewrite
from tests.exporters.passes.graphs import differences, load, parse, proto

KEY = "module"


def named(text: str, paths: tuple[str, ...] = (), **constants: Any) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    plain = parse(text, **constants)
    model = load(plain)
    for node, path in zip(model.graph, paths, strict=False):
        node.metadata_props[KEY] = path
    name_nodes(model, KEY)
    result = proto(model)
    assert differences(plain, result) == []
    return plain, result


def test_nodes_carry_their_module_and_a_number_where_there_are_several() -> None:
    text = "g (float[batch] x) => (float[batch] y) { a = Neg (x) b = Neg (a) c = Abs (b) y = Abs (c) }"
    _, result = named(text, ("layers.0", "layers.0", "layers.1", ""))
    assert [node.name for node in result.graph.node] == ["layers.0/Neg", "layers.0/Neg_1", "layers.1/Abs", "Abs"]
    assert [node.output[0] for node in result.graph.node] == ["layers.0/Neg", "layers.0/Neg_1", "layers.1/Abs", "y"]
    assert not any(node.metadata_props for node in result.graph.node)


def test_several_outputs_are_numbered() -> None:
    text = """g (float[batch, 4] x) => (float[batch, 2] y) {
        a, b = Split <axis: int = 1, num_outputs: int = 2> (x) y = Add (a, b)
    }"""
    _, result = named(text)
    assert list(result.graph.node[0].output) == ["Split.0", "Split.1"]


def test_parameters_keep_their_names_and_constants_take_their_readers() -> None:
    text = "g (float[batch, 2] x) => (float[batch, 2] y) { a = Add (x, c17) b = Mul (bias, a) y = Add (b, c17) }"
    plain = parse(text, c17=np.ones(2, np.float32), bias=np.ones(2, np.float32))
    model = load(plain)
    model.graph.initializers["bias"].meta[PARAMETER] = True
    name_nodes(model, KEY)
    result = proto(model)
    assert [tensor.name for tensor in result.graph.initializer] == ["Add.const1", "bias"]
    assert differences(plain, result) == []


def test_a_name_that_is_taken_gets_a_number() -> None:
    """An input is called as a node would be."""
    text = """g (float[batch] Neg, float[batch] Neg_1) => (float[batch] Abs) {
        a = Neg (Neg) b = Add (a, Neg_1) Abs = Abs (b)
    }"""
    _, result = named(text)
    assert [node.name for node in result.graph.node] == ["Neg_2", "Add", "Abs_1"]


def test_an_initializer_that_is_a_graph_input_or_output_keeps_its_name() -> None:
    text = """g (float[2] x, float[2] c) => (float[2] y, float[2] d) { a = Add (x, c) y = Mul (a, d) }"""
    plain = parse(text.replace(", float[2] d)", ")"), c=np.ones(2, np.float32), d=np.ones(2, np.float32))
    plain.graph.output.append(onnx.helper.make_tensor_value_info("d", 1, [2]))
    model = load(plain)
    name_nodes(model, KEY)
    result = proto(model)
    assert [tensor.name for tensor in result.graph.initializer] == ["c", "d"]
    assert differences(plain, result) == []


IF = """g (float[2] x, bool flag) => (float[2] y) {
    a = Neg (x)
    t = Add (a, c)
    y = If (flag) <
        then_branch = yes () => (float[2] p) { "Neg" = Abs (t) p = Add ("Neg", a) },
        else_branch = no () => (float[2] q) { q = Sub (t, c) }
    >
}"""


def test_inner_graphs_read_the_renamed_values_and_keep_their_own_names() -> None:
    """An inner value is called as an outer one would be: it would hide it."""
    _, result = named(IF, c=np.ones(2, np.float32))
    branch = next(a.g for a in result.graph.node[2].attribute if a.name == "then_branch")
    assert [node.output[0] for node in branch.node] == ["Neg", "p"]
    assert result.graph.node[0].output[0] == "Neg_1"


def test_a_constant_that_only_an_inner_graph_reads_gets_a_name() -> None:
    text = IF.replace("t = Add (a, c)", "t = Abs (a)")
    _, result = named(text, c=np.ones(2, np.float32))
    assert [tensor.name for tensor in result.graph.initializer] == ["const"]


def test_nodes_without_names_and_constants_of_equal_content_are_fine() -> None:
    text = "g (float[batch, 2] x) => (float[batch, 2] y) { a = Add (x, c) b = Add (a, d) n = Neg (b) y = Add (n, c) }"
    plain = parse(text, c=np.ones(2, np.float32), d=np.ones(2, np.float32))
    model = load(plain)
    rewrite(model)
    name_nodes(model, KEY)
    result = proto(model)
    assert differences(plain, result) == []
    names = [tensor.name for tensor in result.graph.initializer]
    assert len(set(names)) == len(names) == 2


def test_naming_twice_changes_nothing() -> None:
    model = load(parse(IF, c=np.ones(2, np.float32)))
    name_nodes(model, KEY)
    once = ir.to_proto(model).SerializeToString(deterministic=True)
    name_nodes(model, KEY)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == once


def test_absent_outputs_stay_absent() -> None:
    text = """g (float[3] x) => (float[3] y) {
        values, first, inverse = Unique <axis: int = 0> (x) y = Cast <to: int = 1> (inverse)
    }"""
    plain = parse(text)
    plain.graph.node[0].output[1] = ""
    model = load(plain)
    name_nodes(model, KEY)
    result = proto(model)
    assert list(result.graph.node[0].output) == ["Unique.0", "", "Unique.2"]
    assert differences(plain, result) == []
