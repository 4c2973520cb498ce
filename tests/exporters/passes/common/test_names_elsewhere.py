"""One order and one set of names for a graph, however its file was written."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.passes.common.names import known_names, name_what_is_new, put_in_order
from tests.exporters.passes.graphs import differences, parse, proto

TEXT = """g (float[batch, 4] x, bool flag) => (float[batch, 4] y, float[batch, 4] z) {
    a = Neg (x)
    b = Abs (c1)
    unread = Neg (a)
    y = Add (a, b)
    z = If (flag) <
        then_branch = yes () => (float[batch, 4] p) { unread2 = Abs (a) q = Mul (a, c2) p = Add (q, c1) },
        else_branch = no () => (float[batch, 4] r) { r = Neg (y) }
    >
}"""
CONSTANTS = {"c2": np.float32([2]), "c1": np.float32([1, 2, 3, 4])}


def test_nodes_follow_the_outputs_depth_first_and_constants_their_readers() -> None:
    plain = parse(TEXT, **CONSTANTS)
    other = onnx.ModelProto()
    other.CopyFrom(plain)
    del other.graph.node[:], other.graph.initializer[:]
    other.graph.node.extend(plain.graph.node[i] for i in (1, 0, 2, 3, 4))
    other.graph.initializer.extend(reversed(plain.graph.initializer))
    texts = set()
    for message in (plain, other):
        model = ir.from_proto(message)
        put_in_order(model.graph)
        result = proto(model)
        texts.add(onnx.printer.to_text(result))
        assert [node.op_type for node in result.graph.node] == ["Neg", "Abs", "Add", "If"]
        assert [tensor.name for tensor in result.graph.initializer] == ["c1", "c2"]
        inner = result.graph.node[3].attribute[0].g
        assert [node.op_type for node in inner.node] in (["Mul", "Add"], ["Neg"])
        assert differences(plain, result) == []
    assert len(texts) == 1


def test_names_of_the_file_stay() -> None:
    plain = parse("g (float[batch, 4] x) => (float[batch, 4] y) { a = Neg (x) y = Add (a, c) }", c=np.float32([1]))
    plain.graph.node[0].name = "stem/Neg"
    model = ir.from_proto(plain)
    name_what_is_new(model.graph, known_names(model.graph), Analysis(model.graph))
    result = proto(model)
    assert [node.name for node in result.graph.node] == ["stem/Neg", "Add"]
    assert [node.output[0] for node in result.graph.node] == ["a", "y"]
    assert [tensor.name for tensor in result.graph.initializer] == ["c"]
    assert "a" in [value.name for value in result.graph.value_info]


def test_what_is_new_is_called_after_its_place_and_its_reader() -> None:
    plain = parse("g (float[batch, 4] Neg) => (float[batch, 4] y) { a = Abs (Neg) y = Abs (a) }")
    plain.graph.node[0].name = "stem/Abs"
    model = ir.from_proto(plain)
    known = known_names(model.graph)
    first = model.graph[0]
    constant = ir.Value(name="made", const_value=ir.tensor(np.float32([1]), name="made"))
    model.graph.register_initializer(constant)
    new = ir.Node("", "Mul", [first.outputs[0], constant])
    new.metadata_props.update(first.metadata_props)
    model.graph.insert_after(first, new)
    bare = ir.Node("", "Neg", [new.outputs[0]])
    model.graph.insert_after(new, bare)
    model.graph[3].replace_input_with(0, bare.outputs[0])
    name_what_is_new(model.graph, known, Analysis(model.graph))
    result = proto(model)
    assert [node.name for node in result.graph.node] == ["stem/Abs", "stem/Mul", "Neg", "Abs"]
    assert [node.output[0] for node in result.graph.node] == ["a", "stem/Mul", "Neg_1", "y"]  # an input is called Neg
    assert [tensor.name for tensor in result.graph.initializer] == ["stem/Mul.const1"]
    assert not any(node.metadata_props for node in result.graph.node)


def test_a_constant_that_only_an_inner_graph_reads_is_named_too() -> None:
    model = ir.from_proto(parse(TEXT, **CONSTANTS))
    put_in_order(model.graph)
    known = known_names(model.graph)
    model.graph.initializers["c2"].name = "made"
    name_what_is_new(model.graph, known, Analysis(model.graph))
    assert list(model.graph.initializers) == ["c1", "const"]
