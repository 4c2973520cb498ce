from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from deploycli.exporters.passes import pipeline
from deploycli.exporters.passes.pipeline import OLDEST_OPSET, PASSES, rewrite, tidy
from tests.exporters.passes.graphs import differences, load, ops, parse, proto, slices

if TYPE_CHECKING:
    import pytest

ROLL = """g (float[batch, 8, 4] x) => (float[batch, 8, 4] y) {
    tail = Slice (x, three, end, one) head = Slice (x, zero, three, one) y = Concat <axis: int = 1> (tail, head)
}"""
CONSTANTS = {"zero": [0], "one": [1], "three": [3], "end": [2**63 - 1]}


def test_every_pass_leaves_a_step_with_its_node_count_and_refusals() -> None:
    flip = "f = Slice (x, minus, far, zero, minus) tail = Slice (f"
    model = load(parse(ROLL.replace("tail = Slice (x", flip), **CONSTANTS, minus=[-1], far=[-(2**63)]))
    steps = rewrite(model)
    names = [step.name for step in steps]
    assert names[:3] == ["tidy", "infer", "drop-no-ops"]
    assert names[-1] == "clean"
    again = "fold-movement-again"  # behind the layouts of rows, and behind that of attentions
    assert [name for name in names if names.count(name) > 1] == [again, again]
    assert {step.nodes for step in steps} == {4}
    assert {r.reason for step in steps for r in step.refusals} == {"mixes the samples of a batch"}


NO_PASSES = {"__init__", "any_model", "graph_pass", "pipeline"}


def test_a_pass_its_file_and_its_class_share_one_name() -> None:
    names = {*PASSES, *(name for name, _ in pipeline._ON_REQUEST)}
    files = {path.stem for path in Path(pipeline.__file__).parent.glob("*.py")} - NO_PASSES
    assert {file.replace("_", "-") for file in files} == names
    for name, make in (*pipeline._REWRITE, *pipeline._IN_PLACE, *pipeline._ON_REQUEST):
        name = name.removesuffix("-again")
        assert make.__module__.rpartition(".")[2] == name.replace("-", "_")
        assert make.__name__ == "".join(map(str.capitalize, name.split("-")))


def test_an_old_graph_passes_through_and_says_why() -> None:
    plain = parse(ROLL, **CONSTANTS)
    plain.opset_import[0].version = OLDEST_OPSET - 1
    model = load(plain)
    steps = rewrite(model)
    assert ops(model) == {"Slice": 2, "Concat": 1}
    assert [step.remark for step in steps if step.remark] == [
        "the graph is of opset 12, the passes write 13 and above: it is only tidied"
    ]
    plain.opset_import[0].version = OLDEST_OPSET
    model = load(plain)
    rewrite(model)
    assert ops(model) == {"Gather": 1}


def test_functions_are_inlined() -> None:
    plain = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        g (float[batch, 6, 4] x) => (float[batch, 6, 4] y) { a = local.turn (x) n = Neg (a) y = local.turn (n) }
        <domain: "local", opset_import: ["" : 20]>
        turn (u) => (v) { v = Transpose <perm = [0, 2, 1]> (u) }
    """)
    model = load(plain)
    rewrite(model)
    assert ops(model) == {"Transpose": 2, "Neg": 1}
    assert differences(plain, proto(model)) == []


def test_a_graph_that_is_not_sorted_is_rewritten_all_the_same() -> None:
    plain = parse(ROLL, **CONSTANTS)
    nodes = list(plain.graph.node)[::-1]
    del plain.graph.node[:]
    plain.graph.node.extend(nodes)
    model = load(plain)
    rewrite(model)
    assert ops(model) == {"Gather": 1}


def test_what_nothing_reads_does_not_hold_up_folding() -> None:
    text = ROLL.replace("y = Concat", "unread = Neg (tail) shape = Shape (head) n = Add (shape, one) y = Concat")
    model = load(parse(text, **CONSTANTS))
    rewrite(model)
    assert ops(model) == {"Gather": 1}


LOOP = """g (float[batch, 6, 4] x, int64 trips) => (float[batch, 6, 4] y) {
    a = Transpose <perm: ints = [0, 2, 1]> (x)
    b = Transpose <perm: ints = [0, 2, 1]> (a)
    k = Add (one, one)
    y = Loop (trips, , b) <body = body (int64 i, bool go, float[batch, 6, 4] s) => (bool more, float[batch, 6, 4] t) {
        more = Identity (go)
        u = Transpose <perm: ints = [0, 2, 1]> (s)
        w = Transpose <perm: ints = [0, 2, 1]> (u)
        m = Mul (w, k)
        t = Add (m, b)
    }>
}"""


def test_a_loop_passes_through_and_what_is_around_it_is_improved() -> None:
    plain = parse(LOOP, one=np.float32([1]))
    model = load(plain)
    rewrite(model)
    assert ops(model) == {"Loop": 1}
    body = next(iter(model.graph)).attributes["body"].as_graph()
    assert [node.op_type for node in body] == ["Identity", "Transpose", "Transpose", "Mul", "Add"]
    assert differences(plain, proto(model)) == []


def test_new_values_do_not_take_the_name_of_an_inner_one() -> None:
    """The pass adds a Gather; an inner graph has values called as the new ones would be."""
    text = (
        ROLL.replace("(float[batch, 8, 4] y) {", "(float[batch, 8, 4] z) {")
        .replace("(x, three", "(x, three")
        .rstrip("}")
        + """
        z = If (flag) <
            then_branch = yes () => (float[batch, 8, 4] p) { Gather = Abs (y) val_0 = Neg (x) p = Add (Gather, val_0) },
            else_branch = no () => (float[batch, 8, 4] q) { constant = Neg (y) q = Abs (constant) }
        >
    }"""
    )
    text = text.replace("(float[batch, 8, 4] x)", "(float[batch, 8, 4] x, bool flag)")
    plain = parse(text, **CONSTANTS)
    model = load(plain)
    rewrite(model)
    assert ops(model) == {"Gather": 1, "If": 1}
    assert differences(plain, proto(model)) == []


def test_a_chain_of_thousands_of_nodes_is_one_region() -> None:
    """No pass calls itself once a node."""
    names = [f"v{i}" for i in range(1000)]
    nodes = "".join(slices(x, y, 1, 3) for x, y in zip(["x", *names], [*names, "y"], strict=True))
    plain = parse("g (float[batch, 8, 4] x) => (float[batch, 8, 4] y) {" + nodes + "}")
    model = load(plain)
    rewrite(model)
    assert ops(model) == {"Gather": 1}  # 3003 steps of a ring of 8 are 3
    assert differences(plain, proto(model)) == []


def test_tidy_only_tidies() -> None:
    model = load(parse(ROLL.replace("y = Concat", "unread = Neg (tail) y = Concat"), **CONSTANTS))
    tidy(model)
    assert ops(model) == {"Slice": 2, "Concat": 1}


def test_initializers_that_are_graph_outputs_are_kept_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    plain = parse("g (float[batch, 2] x) => (float[batch, 2] y) { y = Add (x, c) }", c=np.ones(2, np.float32))
    plain.graph.output.append(onnx.helper.make_tensor_value_info("c", 1, [2]))
    model = load(plain)
    with caplog.at_level(logging.WARNING):
        rewrite(model)
    assert caplog.messages == []
    assert differences(plain, ir.to_proto(model)) == []
