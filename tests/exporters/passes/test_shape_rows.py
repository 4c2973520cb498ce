from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common

from deploycli.exporters.passes import shape_rows as row_shapes
from deploycli.exporters.passes.shape_rows import ShapeRows
from tests.exporters.passes.graphs import apply, differences, load, ops, parse, proto, transform
from tests.exporters.passes.test_mutants import SEARCH

RNG = np.random.default_rng(0)
shape = partial(transform, ShapeRows)


def constant(*dims: int) -> Any:
    return RNG.integers(-4, 5, dims).astype(np.float32)


# Normalised as an image, worked on as tokens, added as an image.
MLP = """g (float[batch, 2, 3, 4] x) => (float[batch, 2, 3, 4] y) {
    start = Transpose <perm = [0, 2, 1, 3]> (x)
    swapped = Reshape (start, image)
    a = Relu (swapped)
    tokens = Reshape (a, flat)
    m = MatMul (tokens, w)
    b = Add (bias, m)
    back = Reshape (b, image)
    s = Add (a, back)
    again = Reshape (s, flat)
    r = Relu (again)
    image_again = Reshape (r, image)
    y = Neg (image_again)
}"""
CONSTANTS = {"image": [-1, 2, 3, 4], "flat": [-1, 6, 4], "w": constant(4, 4), "bias": constant(4)}


def test_rows_keep_one_shape() -> None:
    counts, _, modified = shape(MLP, **CONSTANTS)
    assert (counts, modified) == ({"Transpose": 1, "Reshape": 2, "Relu": 2, "MatMul": 1, "Add": 2, "Neg": 1}, True)


def test_a_product_has_three_axes_at_most() -> None:
    """The image is its shape from one end to the other, and no Reshape would be needed: but for the product."""
    text = """g (float[batch, 2, 3, 4] x) => (float[batch, 2, 3, 4] y) {
        m = MatMul (x, w)
        b = Add (m, bias)
        y = Neg (b)
    }"""
    rewritten, _, modified = apply(ShapeRows, plain := parse(text, w=CONSTANTS["w"], bias=CONSTANTS["bias"]))
    assert differences(plain, rewritten) == []
    assert (ops(rewritten), modified) == ({"Reshape": 2, "MatMul": 1, "Add": 1, "Neg": 1}, True)
    inferred = onnx.shape_inference.infer_shapes(rewritten)
    (product,) = (node.output[0] for node in rewritten.graph.node if node.op_type == "MatMul")
    assert [len(v.type.tensor_type.shape.dim) for v in inferred.graph.value_info if v.name == product] == [3]


def test_a_second_run_changes_nothing() -> None:
    once, _, _ = apply(ShapeRows, parse(MLP, **CONSTANTS))
    assert not apply(ShapeRows, once)[2]


def test_a_reshape_to_something_else_reads_any_shape() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 2, 3, 2, 2] y) {
        windows = Reshape (x, w3)
        m = MatMul (windows, w)
        heads = Reshape (m, s)
        y = Neg (heads)
    }"""
    counts, _, modified = shape(text, w3=[-1, 3, 4], s=[-1, 2, 3, 2, 2], w=constant(4, 4))
    assert (counts, modified) == ({"MatMul": 1, "Reshape": 1, "Neg": 1}, True)


def test_a_target_that_copies_dimensions_is_written_out() -> None:
    """Its zeros would stand for other dimensions."""
    text = """g (float[batch, 6, 4] x) => (float[rows, 3, 2, 2] y) {
        windows = Reshape (x, w3)
        m = MatMul (windows, w)
        heads = Reshape (m, s)
        y = Neg (heads)
    }"""
    counts, _, modified = shape(text, w3=[-1, 3, 4], s=[0, 0, 2, 2], w=constant(4, 4))
    assert (counts, modified) == ({"MatMul": 1, "Reshape": 1, "Neg": 1}, True)


def test_a_normalisation_counts_its_axis_from_the_end() -> None:
    text = MLP.replace("b = Add (bias, m)", "n = LayerNormalization <axis = 2> (m, gamma) b = Add (n, bias)")
    plain = parse(text, gamma=constant(4), **CONSTANTS)
    rewritten, _, modified = apply(ShapeRows, plain)
    assert differences(plain, rewritten, rtol=1e-5) == []
    assert (modified, ops(rewritten)["Reshape"]) == (True, 2)


# --- twins that must not match ---------------------------------------------------------------------------------------


def test_a_value_that_the_graph_returns_keeps_its_shape() -> None:
    text = """g (float[batch, 2, 3, 4] x) => (float[batch, 6, 4] y) {
        t = Reshape (x, flat)
        m = MatMul (t, w)
        y = Add (m, bias)
    }"""
    counts, _, modified = shape(text, **{name: CONSTANTS[name] for name in ("flat", "w", "bias")})
    assert (counts["Reshape"], modified) == (1, False)


@pytest.mark.parametrize("dims", [(6, 4), (1, 6, 4), (1, 6, 1)])
def test_a_constant_that_differs_from_row_to_row_holds_the_shape(dims: tuple[int, ...]) -> None:
    text = """g (float[batch, 2, 3, 4] x) => (float[batch, 2, 3, 4] y) {
        t = Reshape (x, flat)
        s = Add (t, c)
        y = Reshape (s, image)
    }"""
    counts, _, modified = shape(text, c=constant(*dims), **{k: CONSTANTS[k] for k in ("flat", "image")})
    assert (counts["Reshape"], modified) == (2, False)


def test_products_of_two_activations_hold_the_shape() -> None:
    text = """g (float[batch, 2, 3, 4] x) => (float[batch, 2, 3, 3] y) {
        a = Relu (x)
        t = Transpose <perm = [0, 1, 3, 2]> (a)
        y = MatMul (a, t)
    }"""
    assert shape(text) == ({"Relu": 1, "Transpose": 1, "MatMul": 1}, [], False)


def test_a_reshape_of_the_channels_is_no_view_of_rows() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 12, 2] y) {
        a = Relu (x)
        r = Reshape (a, s)
        b = Relu (r)
        y = Neg (b)
    }"""
    counts, _, modified = shape(text, s=[-1, 12, 2])
    assert (counts["Reshape"], modified) == (1, False)


def test_what_a_branch_reads_keeps_its_shape() -> None:
    text = """g (float[batch, 2, 3, 4] x, bool c) => (float[a, b, d] y) {
        r = Relu (x)
        t = Reshape (r, flat)
        m = MatMul (t, w)
        y = If (c) <
            then_branch = one () => (float[a, b, d] p) { p = Neg (m) },
            else_branch = two () => (float[a, b, d] q) { q = Abs (t) }
        >
    }"""
    plain = parse(text, w=CONSTANTS["w"], flat=CONSTANTS["flat"])
    rewritten, _, _ = apply(ShapeRows, plain)
    assert differences(plain, rewritten, (1, 3)) == []


# --- properties ------------------------------------------------------------------------------------------------------

LEADS = [[-1, 12], [-1, 2, 6], [-1, 3, 2, 2], [-1, 4], [-1]]


@st.composite
def networks(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Row-wise networks with a Reshape wherever one likes; numbers are small integers, so that sums are exact."""
    values = [("x", 0)]  # name, number of its shape
    lines = []
    for i in range(draw(st.integers(2, 9))):
        name, lead = draw(st.sampled_from(values[-4:]))
        kind = draw(st.sampled_from(["view", "view", "unary", "bias", "weight", "sum", "fixed"]))
        if kind == "view":
            lead = draw(st.integers(0, len(LEADS) - 1))
            lines.append(f"v{i} = Reshape ({name}, s{lead})")
        elif kind == "unary":
            lines.append(f"v{i} = Relu ({name})")
        elif kind == "bias":
            lines.append(f"v{i} = {draw(st.sampled_from(['Add', 'Sub']))} ({name}, bias)")
        elif kind == "weight":
            lines.append(f"v{i} = MatMul ({name}, w)")
        elif kind == "sum":
            other, _ = draw(st.sampled_from([(n, k) for n, k in values if k == lead]))
            lines.append(f"v{i} = Add ({name}, {other})")
        else:  # something that needs the very shape
            lines.append(f"v{i} = Mul ({name}, c{lead})")
        values.append((f"v{i}", lead))
    last, lead = values[-1]
    rank = len(LEADS[lead]) + 1
    axes = ", ".join("abcdef"[:rank])
    text = f"g (float[batch, 12, 4] x) => (float[{axes}] y) {{ {chr(10).join(lines)}\ny = Neg ({last}) }}"
    constants: dict[str, Any] = {"bias": constant(4), "w": RNG.integers(-1, 2, (4, 4)).astype(np.float32)}
    constants |= {f"s{k}": [*dims, 4] for k, dims in enumerate(LEADS)}
    constants |= {f"c{k}": RNG.integers(-1, 2, (1, *dims[1:], 4)).astype(np.float32) for k, dims in enumerate(LEADS)}
    return text, {name: value for name, value in constants.items() if f" {name})" in text}


def reshapes_of(model: onnx.ModelProto) -> int:
    return ops(model).get("Reshape", 0)


def deep_products(model: onnx.ModelProto) -> int:
    """How many products have more than three axes."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.value_info, *graph.output)}
    return sum(node.op_type == "MatMul" and ranks[node.output[0]] > 3 for node in graph.node)


def check(case: tuple[str, dict[str, Any]]) -> list[str]:
    model = load(parse(case[0], **case[1]))
    common.RemoveUnusedNodesPass()(model)  # as before every pass
    plain = proto(model)
    rewritten, _, _ = apply(ShapeRows, plain)
    found = differences(plain, rewritten, (1, 3))
    reshapes, deep = (tuple(count(graph) for graph in (plain, rewritten)) for count in (reshapes_of, deep_products))
    if reshapes[1] - reshapes[0] > row_shapes._DEEP * (deep[0] - deep[1]):
        found.append("more Reshapes than before, and than products of fewer axes are worth")
    return found + (["a second run changes something"] if apply(ShapeRows, rewritten)[2] else [])


@settings(max_examples=100, deadline=None)
@given(networks())
def test_any_network_on_rows(case: tuple[str, dict[str, Any]]) -> None:
    assert check(case) == []


@pytest.mark.parametrize("mutant", ["a constant of rows is shared", "channels are rows", "a reader is forgotten"])
def test_the_property_finds_a_fault(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant == "a constant of rows is shared":
        real = row_shapes._row_operands
        monkeypatch.setattr(
            row_shapes, "_row_operands", lambda node, facts: (0,) if node.op_type == "Mul" else real(node, facts)
        )
    elif mutant == "channels are rows":
        monkeypatch.setattr(row_shapes, "reshape_target", lambda dims: [-1, *dims[1:-1][::-1], dims[-1]])
        monkeypatch.setattr(
            row_shapes.Builder, "reshape",
            lambda self, x, dims, anchor: self.value(
                "Reshape", [x, self.constant(np.array([-1, *dims[1:-1][::-1], dims[-1]], np.int64))], anchor
            ),
        )  # fmt: skip
    else:
        real_source = row_shapes._Shaper._source

        def forgetful(self: Any, value: Any) -> Any:
            source = real_source(self, value)
            source.workers = source.workers[:1]
            return source

        monkeypatch.setattr(row_shapes._Shaper, "_source", forgetful)

    def is_reported(case: tuple[str, dict[str, Any]]) -> bool:
        try:
            return check(case) != []
        except Exception:  # an operator that no runtime takes is a report, too
            return True

    find(networks(), is_reported, settings=settings(SEARCH, max_examples=600))  # raises where nothing is reported
