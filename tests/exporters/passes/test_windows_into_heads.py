from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest

from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.passes.windows_into_heads import WindowsIntoHeads
from tests.exporters.passes.graphs import apply, differences, load, ops, parse, proto, reasons, transform

RNG = np.random.default_rng(0)

# Two heads, four windows of three tokens, five channels a head.
SHIFTED = """g (float[batch, 4, 2, 3, 5] images) => (float[rows, 2, 3, 5] y) {
    x = Reshape (images, s4)
    q = Mul (x, small)
    t = Transpose <perm = [0, 1, 3, 2]> (x)
    scores = MatMul (q, t)
    split = Reshape (scores, s5)
    shifted = Add (split, mask)
    joined = Reshape (shifted, s_scores)
    p = Softmax <axis = -1> (joined)
    y = MatMul (p, x)
}"""
SHAPES = {"s4": [-1, 2, 3, 5], "s5": [-1, 4, 2, 3, 3], "s_scores": [-1, 2, 3, 3], "small": np.float32(0.01)}


def mask(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


fold = partial(transform, WindowsIntoHeads)


@pytest.mark.parametrize("shape", [(1, 4, 2, 3, 3), (1, 4, 1, 3, 3), (4, 1, 3, 3), (3, 3), (1, 1, 1, 1, 1)])
def test_windows_fold_into_heads(shape: tuple[int, ...]) -> None:
    plain = parse(SHIFTED, mask=mask(*shape), **SHAPES)
    rewritten, graph_pass, modified = apply(WindowsIntoHeads, plain)
    assert differences(plain, rewritten) == []
    assert (modified, reasons(graph_pass)) == (True, [])
    assert ops(rewritten) == {"Reshape": 5, "Mul": 1, "Transpose": 1, "MatMul": 2, "Add": 1, "Softmax": 1}
    assert [1, 8, 3, 3] in [list(tensor.dims) for tensor in rewritten.graph.initializer]
    inferred = onnx.shape_inference.infer_shapes(rewritten, strict_mode=True, data_prop=True).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in inferred.value_info}
    assert all(ranks[node.output[0]] == 4 for node in rewritten.graph.node if node.op_type in ("Add", "Softmax"))


def test_a_second_run_changes_nothing() -> None:
    once, _, _ = apply(WindowsIntoHeads, parse(SHIFTED, mask=mask(1, 4, 2, 3, 3), **SHAPES))
    _, _, modified = apply(WindowsIntoHeads, once)
    assert not modified


def test_a_fixed_batch_folds_too() -> None:
    text = SHIFTED.replace("float[batch,", "float[2,").replace("float[rows,", "float[8,")
    counts, refusals, modified = fold(text, batches=(2,), mask=mask(1, 4, 2, 3, 3), **SHAPES)
    assert (counts["Reshape"], refusals, modified) == (5, [], True)


def test_the_constant_may_stand_on_the_left() -> None:
    text = SHIFTED.replace("Add (split, mask)", "Add (mask, split)")
    assert fold(text, mask=mask(1, 4, 2, 3, 3), **SHAPES)[2]


@pytest.mark.parametrize(("name", "rank"), [("scores", 4), ("split", 5), ("shifted", 5), ("joined", 4), ("p", 4)])
def test_what_is_read_elsewhere_is_refused(name: str, rank: int) -> None:
    axes = ", ".join("abcde"[:rank])
    text = SHIFTED.replace("=> (", f"=> (float[{axes}] {name}, ")
    _, refusals, modified = fold(text, mask=mask(1, 4, 2, 3, 3), **SHAPES)
    assert (refusals, modified) == (["its scores or probabilities are read elsewhere too"], False)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Softmax <axis = -1>", "Softmax <axis = 2>"),  # over the queries
        ("MatMul (p, x)", "Add (p, p)"),  # no values
        ("MatMul (p, x)", "MatMul (t2, p)"),  # the probabilities stand on the right
    ],
)
def test_another_form_is_left_alone(old: str, new: str) -> None:
    text = SHIFTED.replace(old, new).replace("p = Softmax", "t2 = Transpose <perm = [0, 1, 3, 2]> (x)\n    p = Softmax")
    if "Add" in new:
        text = text.replace("float[rows, 2, 3, 5] y", "float[rows, 2, 3, 3] y")
    if "t2, p" in new:
        text = text.replace("float[rows, 2, 3, 5] y", "float[rows, 2, 5, 3] y")
    _, _, modified = fold(text, mask=mask(1, 4, 2, 3, 3), **SHAPES)
    assert not modified


def test_another_reshape_is_left_alone() -> None:
    """The windows are the inner part of the axis: other scores would meet other masks."""
    text = SHIFTED.replace("split = Reshape (scores, s5)", "u = Reshape (scores, s_swapped) split = Reshape (u, s5)")
    swapped = {**SHAPES, "s_swapped": [-1, 3, 2, 3]}
    _, _, modified = fold(text, mask=mask(1, 4, 2, 3, 3), **swapped)
    assert not modified


def test_a_mask_that_is_computed_is_left_alone() -> None:
    text = SHIFTED.replace("shifted = Add (split, mask)", "m = Neg (split) shifted = Add (split, m)")
    _, _, modified = fold(text, mask=mask(1), **SHAPES)
    assert not modified


def test_the_pipeline_brings_bias_and_mask_into_four_dimensions() -> None:
    text = SHIFTED.replace("split = Reshape (scores, s5)", "biased = Add (scores, bias) split = Reshape (biased, s5)")
    plain = parse(text, mask=mask(1, 4, 1, 3, 3), bias=mask(1, 2, 3, 3), **SHAPES)
    model = load(plain)
    rewrite(model)
    rewritten = proto(model)
    assert differences(plain, rewritten, rtol=1e-5) == []
    assert ops(rewritten)["Add"] == 1
    assert [1, 8, 3, 3] in [list(tensor.dims) for tensor in rewritten.graph.initializer]


def test_the_pass_can_be_left_out() -> None:
    model = load(parse(SHIFTED, mask=mask(1, 4, 2, 3, 3), **SHAPES))
    steps = rewrite(model, without=frozenset({"windows-into-heads"}))
    assert "windows-into-heads" not in [step.name for step in steps]
    assert [1, 4, 2, 3, 3] in [list(tensor.dims) for tensor in proto(model).graph.initializer]


def test_no_view_of_a_view_is_left() -> None:
    """With one head, exporters reshape right before the products."""
    plain = parse(SHIFTED, mask=mask(1, 4, 2, 3, 3), **SHAPES)
    rewritten, _, _ = apply(WindowsIntoHeads, plain)
    reshapes = {node.output[0]: node for node in rewritten.graph.node if node.op_type == "Reshape"}
    readers = [node for node in rewritten.graph.node if node.op_type == "Reshape" and node.input[0] in reshapes]
    assert readers == []
