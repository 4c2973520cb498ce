"""Which operators are chosen for INT8, and what is said of the others."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from deploycli.exporters.precision.insert_qdq import insert
from deploycli.exporters.precision.number_format import FP8, INT8, NumberFormat
from deploycli.exporters.precision.placement import AUTO, SCHEMES, Placement, place
from deploycli.exporters.precision.roles import Stage
from deploycli.models.errors import UsageError
from tests.exporters.precision.networks import HALF, assert_valid, block, graph, in_place, node, normal

NOTHING: frozenset[Stage] = frozenset()


def chosen(placement: Placement) -> list[tuple[str, tuple[int, ...], int | None]]:
    return [(site.node.name or "", site.activations, site.axis) for site in placement.sites]


def refused(placement: Placement) -> dict[str, str]:
    return {remark.node: remark.reason for remark in placement.remarks}


GEMMS = [(f"MatMul{suffix}", (0,), 1) for suffix in ("", "_1", "_2", "_5", "_6", "_7")]
PRODUCTS = [("MatMul_3", (0, 1), None), ("MatMul_4", (0, 1), None)]
RESIDUALS = [("Add_3", (1,), None), ("Add_6", (1,), None)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme: str) -> None:
    placement = place(block().graph, scheme=scheme, high_precision=NOTHING)
    alone = scheme in ("auto", "gemm")  # nothing is read in place here
    assert placement.scheme == ("gemm" if alone else scheme)
    expected = [*GEMMS]
    if not alone:
        expected[3:3] = PRODUCTS
    if scheme == "full":
        expected.insert(6, RESIDUALS[0])
        expected.append(RESIDUALS[1])
    assert chosen(placement) == expected
    names = {"MatMul_3", "MatMul_4"} if alone else set()
    assert refused(placement) == dict.fromkeys(names, "scheme: gemm leaves products of two activations alone")
    for site in placement.sites:
        group = "Softmax" if (site.node.name, site.activations, None) in PRODUCTS else site.node.name
        assert site.group == group
        assert site.known == ({0: 1.0} if site.node.name == "MatMul_4" else {})


PROJECTIONS, AFTER, FC2 = ("MatMul", "MatMul_1", "MatMul_2"), ("MatMul_5",), ("MatMul_7",)


@pytest.mark.parametrize(
    ("number_format", "targets", "expected"),
    [
        (INT8, (), PROJECTIONS),
        (INT8, ((7, 5), (12, 1)), PROJECTIONS),
        (FP8, (), AFTER + FC2),
        (FP8, ((8, 9),), PROJECTIONS + AFTER + FC2),
        (FP8, ((12, 0),), AFTER + FC2),
        (FP8, ((8, 9), (12, 1)), AFTER + FC2),
    ],
)
def test_auto_is_for_the_target(
    number_format: NumberFormat, targets: tuple[tuple[int, int], ...], expected: tuple[str, ...]
) -> None:
    model = in_place()
    placement = place(model.graph, scheme=AUTO, number_format=number_format, targets=targets, high_precision=NOTHING)
    assert placement.scheme == AUTO
    assert tuple(site.node.name for site in placement.sites) == expected
    is_together = PROJECTIONS[0] in expected
    assert placement.groups == (PROJECTIONS[:1] if is_together else ()) + expected[3 * is_together :]
    assert refused(placement).keys() == {f"MatMul{s}" for s in ("", *map("_{}".format, range(1, 8)))} - {*expected}
    insert(
        model, placement.sites, dict.fromkeys(placement.calibrated, 3.0), scale_type=HALF, number_format=number_format
    )
    assert_valid(model)
    scales = {node(model, name).inputs[1].producer().inputs[1] for name in PROJECTIONS if name in expected}  # type: ignore[union-attr]
    assert len(scales) == is_together
    assert all(scale is not None and scale.const_value is not None and scale.const_value.size == 1 for scale in scales)


def test_query_key_and_value_go_together_or_not_at_all() -> None:
    placement = place(
        in_place().graph,
        scheme=AUTO,
        number_format=FP8,
        targets=((8, 9),),
        exclude=(re.compile("^MatMul_1$"),),
        high_precision=NOTHING,
    )
    assert tuple(site.node.name for site in placement.sites) == AFTER + FC2
    assert refused(placement)["MatMul_1"] == "user: matches '^MatMul_1$'"


def test_a_target_without_fp8() -> None:
    with pytest.raises(UsageError, match=r"compute capability 8\.6 does not compute"):
        place(in_place().graph, scheme=AUTO, number_format=FP8, targets=((8, 6), (8, 9)))


def test_what_needs_data_and_what_not() -> None:
    placement = place(block().graph, scheme="full", high_precision=NOTHING)
    # One value for three products; no bias, no input of a normalisation, no score, no probability.
    assert placement.calibrated == ("n1", "q", "kt", "v", "o2", "o4", "n2", "h2", "h4")
    assert placement.groups == (
        *("MatMul", "MatMul_1", "MatMul_2", "Softmax", "MatMul_5", "Add_3", "MatMul_6", "MatMul_7", "Add_6"),
    )


MODEL = """(float[b,3,8,8] x) => (float[b,20] y) {
    c = Conv<strides=[2,2]>(x, wc) t = Reshape(c, tokens) u = Transpose<perm=[0,2,1]>(t)
    n = LayerNormalization(u, g) h = MatMul(n, w1) a = Gelu(h) k = MatMul(a, w2) r = Add(u, k)
    m = Reshape(r, four) o = LayerNormalization(m, g4) z = MatMul(o, w3)
    p = ReduceMean<keepdims=0>(z, one) y = Gemm<transB=1>(p, wh, bh)
}"""


def staged(**weights: Any) -> Any:
    constants = {
        "wc": normal(32, 3, 2, 2), "w1": normal(32, 64), "w2": normal(64, 32), "w3": normal(128, 64),
        "wh": normal(20, 64), "bh": normal(20), "g": normal(32), "g4": normal(128),
        "tokens": np.array([0, 32, 16], np.int64), "four": np.array([0, 4, 128], np.int64),
        "one": np.array([1], np.int64),
    }  # fmt: skip
    return graph(MODEL, **{**constants, **weights}).graph


def test_patch_embedding_and_head_stay_in_high_precision_unless_asked_for() -> None:
    placement = place(staged(), scheme="full")
    assert placement.groups == ("MatMul", "MatMul_1", "Add", "MatMul_2")
    assert refused(placement) == {
        "Conv": "patch-embed: stays in high precision",
        "Gemm": "head: stays in high precision",
    }
    wide = place(staged(), scheme="gemm", high_precision=NOTHING)
    assert wide.groups == ("MatMul", "MatMul_1", "MatMul_2", "Gemm")
    assert refused(wide) == {"Conv": "size: 3 x 32 channels, below 16"}


@pytest.mark.parametrize(
    ("stage", "left"), [(Stage.MLP_FC2, "MatMul_1"), (Stage.PATCH_MERGING, "MatMul_2"), (Stage.HEAD, "Gemm")]
)
def test_a_stage_in_high_precision(stage: Stage, left: str) -> None:
    everything = place(staged(), scheme="gemm", high_precision=NOTHING).groups
    placement = place(staged(), scheme="gemm", high_precision=frozenset({stage}))
    assert placement.groups == tuple(group for group in everything if group != left)
    assert refused(placement)[left] == f"{stage}: stays in high precision"


@pytest.mark.parametrize(("rows", "columns"), [(15, 16), (16, 15), (1, 16), (16, 1)])
def test_what_is_too_small(rows: int, columns: int) -> None:
    model = graph("(float[b,n] x) => (float[] y) { y = MatMul(x, w) }", w=normal(rows, columns))
    placement = place(model.graph, scheme="gemm", high_precision=NOTHING)
    assert placement.sites == ()
    assert refused(placement) == {"MatMul": f"size: {rows} x {columns} channels, below 16"}
    model = graph("(float[b,n] x) => (float[] y) { y = MatMul(x, w) }", w=normal(16, 16))
    assert place(model.graph, scheme="gemm", high_precision=NOTHING).groups == ("MatMul",)


def attention(queries: int, keys: int, size: int) -> Placement:
    model = graph(
        f"""(float[b,2,{queries},{size}] q, float[b,2,{size},{keys}] k, float[b,2,{keys},{size}] v) => (float[] y) {{
            s = MatMul(q, k) p = Softmax<axis=-1>(s) y = MatMul(p, v)
        }}"""
    )
    return place(model.graph, scheme="attention")


@pytest.mark.parametrize("shape", [(8, 8, 16), (512, 512, 32), (1, 512, 64)])
def test_attentions_that_fuse(shape: tuple[int, int, int]) -> None:
    assert attention(*shape).groups == ("Softmax",)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((513, 8, 16), "513 x 8 tokens, head size 16; fused INT8 attention ends at 512 tokens"),
        ((8, 577, 16), "8 x 577 tokens, head size 16; fused INT8 attention ends at 512 tokens"),
        ((8, 8, 24), "8 x 8 tokens, head size 24; fused INT8 attention takes head sizes (16, 32, 64)"),
        ((8, 8, 128), "8 x 8 tokens, head size 128; fused INT8 attention takes head sizes (16, 32, 64)"),
    ],
)
def test_attentions_that_do_not_fuse(shape: tuple[int, int, int], reason: str) -> None:
    placement = attention(*shape)
    assert placement.sites == ()
    assert refused(placement) == {"Softmax": f"attention: {reason}"}


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("MatMul$", {"MatMul"}),
        ("MatMul_[67]", {"MatMul_6", "MatMul_7"}),
        ("Softmax", {"Softmax"}),
        ("MatMul_3", {"Softmax"}),  # half an attention is none
        ("MatMul_4", {"Softmax"}),
        ("Add_6", {"Add_6"}),
        ("Gelu", set()),
    ],
)
def test_an_expression_excludes(pattern: str, left: set[str]) -> None:
    everything = place(block().graph, scheme="full", high_precision=NOTHING).groups
    placement = place(block().graph, scheme="full", exclude=(re.compile(pattern),), high_precision=NOTHING)
    assert set(everything) - set(placement.groups) == left
    assert refused(placement) == dict.fromkeys(left, f"user: matches {pattern!r}")


TRAPS = {
    "weight on the left": (
        "(float[b,16,8] x) => (float[] y) { y = MatMul(w, x) }",
        {"w": normal(24, 16)},
        {"MatMul": "form: its weight stands on the left"},
    ),
    "batched weight": (
        "(float[b,16,16] x) => (float[] y) { y = MatMul(x, w) }",
        {"w": normal(1, 16, 16)},
        {"MatMul": "form: its weight has 3 dimensions"},
    ),
    "attention with constant values": (
        "(float[b,8,16] q, float[b,16,8] k) => (float[] y) "
        "{ s = MatMul(q, k) p = Softmax<axis=-1>(s) y = MatMul(p, w) }",
        {"w": normal(1, 8, 16)},
        {
            "Softmax": "form: no attention: its result is not read by one product of two activations alone",
            "MatMul_1": "form: its weight has 3 dimensions",
        },
    ),
    "depthwise convolution": (
        "(float[b,32,8,8] x) => (float[] y) { n = Relu(x) y = Conv<group=32>(n, w) }",
        {"w": normal(32, 1, 3, 3)},
        {"Conv": "size: 1 x 1 channels, below 16"},
    ),
    "in a branch": (
        """(float[b,16] x, bool c) => (float[] y) {
            y = If(c)<then_branch = t () => (float[] y1) { y1 = MatMul(x, w) },
                      else_branch = e () => (float[] y2) { y2 = Identity(x) }>
        }""",
        {"w": normal(16, 16)},
        {"y1": "form: it stands in a branch or a loop"},
    ),
    "Einsum": (
        '(float[b,16] x) => (float[] y) { y = Einsum<equation="bi,ij->bj">(x, w) }',
        {"w": normal(16, 16)},
        {"Einsum": "form: Einsum has no 8-bit form here"},
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_what_has_no_form_says_so(name: str) -> None:
    text, constants, expected = TRAPS[name]
    placement = place(graph(text, **constants).graph, scheme="attention", high_precision=NOTHING)
    assert placement.sites == ()
    assert refused(placement) == expected


def test_two_attentions_of_the_same_scores() -> None:
    model = graph(
        """(float[b,8,16] q, float[b,16,8] k, float[b,8,16] v) => (float[] y, float[] z) {
            s = MatMul(q, k) p = Softmax<axis=-1>(s) y = MatMul(p, v)
            t = Mul(s, half) r = Softmax<axis=-1>(t) z = MatMul(r, v)
        }""",
        half=np.float32(0.5),
    )
    placement = place(model.graph, scheme="attention")
    assert placement.groups == ("Softmax",)
    assert refused(placement) == {"Softmax_1": "form: it shares a product with another attention"}


def test_nameless_operators_are_called_after_their_results() -> None:
    model = block()
    for found in model.graph:
        found.name = None
    placement = place(model.graph, scheme="full", high_precision=NOTHING)
    assert placement.groups == ("q0", "k0", "v0", "p", "o3", "r", "h0", "h3", "y")


def test_operators_of_one_name_are_groups_of_their_own() -> None:
    model = block()
    for found in model.graph:
        found.name = "the same"
    placement = place(model.graph, scheme="full", high_precision=NOTHING)
    assert len(placement.groups) == 9
    assert len({site.group for site in placement.sites if site.node.op_type == "MatMul"}) == 7
