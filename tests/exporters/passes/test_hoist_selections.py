from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.cost import graph_cost
from deploycli.exporters.passes import hoist_selections
from deploycli.exporters.passes.hoist_selections import HoistSelections
from deploycli.exporters.passes.pipeline import rewrite
from tests.exporters.passes.graphs import END, apply, load, ops, parse, proto, reasons
from tests.exporters.passes.row_programs import deviation

RNG = np.random.default_rng(0)
N, C, HIDDEN, CLASSES = 7, 8, 16, 3


@pytest.fixture(autouse=True)
def _products_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it pays to save every one of these small graphs."""
    monkeypatch.setattr(hoist_selections, "PRODUCTS_PER_BYTE", 1e-9)


def real(*shape: int) -> Any:
    return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


WEIGHTS: dict[str, Any] = {
    "g1": real(C), "b1": real(C), "wqkv": real(C, 3 * C), "bqkv": real(3 * C), "wp": real(C, C), "bp": real(C),
    "g2": real(C), "b2": real(C), "w1": real(C, HIDDEN), "c1": real(HIDDEN), "w2": real(HIDDEN, C), "c2": real(C),
    "g3": real(C), "b3": real(C), "wh": real(CLASSES, C), "bh": real(CLASSES), "wd": real(CLASSES, C),
    "bd": real(CLASSES),
    "five": [-1, N, 3, 2, C // 2], "tokens": [-1, N, C], "i0": 0, "i1": 1, "i2": 2, "i4": 4, "one": [1],
    "mask": real(1, N, N),
    "from": [2], "end": [END], "wq": real(C, C), "wk": real(C, C), "wv": real(C, C), "heads": [-1, N, 2, C // 2],
    "flat": [-1, C], "turned": [N, -1, C],
}  # fmt: skip

NORM = "n = LayerNormalization (x, g1, b1)"
MERGED = """
    qkv = MatMul (n, wqkv) qkvb = Add (qkv, bqkv) r = Reshape (qkvb, five) t = Transpose <perm = [2, 0, 3, 1, 4]> (r)
    q = Gather <axis: int = 0> (t, i0) k = Gather <axis: int = 0> (t, i1) v = Gather <axis: int = 0> (t, i2)
"""
APART = "".join(
    f"{p}m = MatMul (n, w{p}) {p}r = Reshape ({p}m, heads) {p} = Transpose <perm = [0, 2, 1, 3]> ({p}r)\n"
    for p in "qkv"
)
SCORES = "kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, kt)"
MASKED = SCORES.replace("s =", "u =") + " s = Add (u, mask)"
MIXED = """
    p = Softmax <axis: int = -1> (s) o = MatMul (p, v) ot = Transpose <perm = [0, 2, 1, 3]> (o) a = Reshape (ot, tokens)
"""
PROJECTED = "pm = MatMul (a, wp) pb = Add (pm, bp) y = Add (x, pb)"
MLP = """
    m = LayerNormalization (y, g2, b2) h = MatMul (m, w1) hb = Add (h, c1) ge = Gelu (hb) f = MatMul (ge, w2)
    fb = Add (f, c2) z = Add (y, fb) e = LayerNormalization (z, g3, b3)
"""
CLASS = "c = Gather <axis: int = 1> (e, i0) logits = Gemm <transB: int = 1> (c, wh, bh)"
MEAN = "c = ReduceMean <keepdims: int = 0> (e, one) logits = Gemm <transB: int = 1> (c, wh, bh)"

ATTENTION = 2 * N * C  # of one query with all keys, and of its probabilities with all values
ROW = C * C + ATTENTION + C * C + 2 * C * HIDDEN  # query, attention, projection and MLP of one token
BLOCK = N * (2 * C * C + ROW)


def block(*parts: str, results: str = f"float[batch, {CLASSES}] logits", x: str = f"float[batch, {N}, {C}] x") -> Any:
    body = "".join(parts)
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return parse(f"g ({x}) => ({results}) {{ {body} }}", **{k: v for k, v in WEIGHTS.items() if k in words})


def multiply_adds(model: onnx.ModelProto) -> int | None:
    graph = load(model).graph
    return graph_cost(graph, Analysis(graph)).multiply_adds


def hoist(plain: onnx.ModelProto) -> tuple[onnx.ModelProto, Any]:
    """Run the pass; the results stay, and a second run changes nothing."""
    rewritten, graph_pass, modified = apply(HoistSelections, plain)
    assert deviation(plain, rewritten, (1, 3, 5)) < 1e-5
    assert modified == (proto(load(plain)).graph.node != rewritten.graph.node)
    again, _, changed = apply(HoistSelections, rewritten)
    assert not changed
    assert again == rewritten
    return rewritten, graph_pass


def untouched(plain: onnx.ModelProto) -> Any:
    rewritten, graph_pass = hoist(plain)
    assert rewritten.graph.node == proto(load(plain)).graph.node
    return reasons(graph_pass)


def selections(model: onnx.ModelProto) -> int:
    return sum(ops(model).get(op, 0) for op in ("Gather", "Slice"))


def test_a_class_token_needs_no_other_rows_of_the_last_block() -> None:
    plain = block(NORM, MERGED, SCORES, MIXED, PROJECTED, MLP, CLASS)
    assert multiply_adds(plain) == BLOCK + C * CLASSES
    rewritten, _ = hoist(plain)
    assert multiply_adds(rewritten) == N * 2 * C * C + ROW + C * CLASSES
    # q apart from k and v: their bias, product and view twice; the token of x, of n, of e, and k and v of both.
    grown = {op: n - ops(plain).get(op, 0) for op, n in ops(rewritten).items()}
    assert {op: n for op, n in grown.items() if n} == {"MatMul": 1, "Add": 1, "Reshape": 1, "Transpose": 1, "Slice": 2}


def test_two_tokens_are_kept_and_found_again() -> None:
    """The distillation token is the last but one here: its index must be that in what is left."""
    heads = "d = Gather <axis: int = 1> (e, i4) logits2 = Gemm <transB: int = 1> (d, wd, bd)"
    two = f"float[batch, {CLASSES}] logits, float[batch, {CLASSES}] logits2"
    rewritten, _ = hoist(block(NORM, MERGED, SCORES, MIXED, PROJECTED, MLP, CLASS, heads, results=two))
    assert multiply_adds(rewritten) == N * 2 * C * C + 2 * ROW + 2 * C * CLASSES


def test_the_mean_over_tokens_reads_them_all() -> None:
    assert untouched(block(NORM, MERGED, SCORES, MIXED, PROJECTED, MLP, MEAN)) == []


def test_tokens_that_are_an_output_too_are_all_computed() -> None:
    both = f"float[batch, {N}, {C}] e, float[batch, {CLASSES}] logits"
    assert untouched(block(NORM, MERGED, SCORES, MIXED, PROJECTED, MLP, CLASS, results=both)) == []


def test_a_mask_is_cut_as_a_constant() -> None:
    bare, _ = hoist(block(NORM, MERGED, SCORES, MIXED, PROJECTED, MLP, CLASS))
    rewritten, _ = hoist(block(NORM, MERGED, MASKED, MIXED, PROJECTED, MLP, CLASS))
    assert ops(rewritten) == {**ops(bare), "Add": ops(bare)["Add"] + 1}
    assert [1, 1, N] in [list(tensor.dims) for tensor in rewritten.graph.initializer]


def test_queries_that_are_projected_apart_need_no_splitting() -> None:
    plain = block(NORM, APART, SCORES, MIXED, PROJECTED, MLP, CLASS)
    rewritten, _ = hoist(plain)
    assert multiply_adds(rewritten) == N * 2 * C * C + ROW + C * CLASSES
    assert {**ops(rewritten), "Slice": 0, "Gather": 1} == {**ops(plain), "Slice": 0}
    assert selections(rewritten) == 3  # of x, of n, and the one that was there


def test_the_pipeline_merges_what_is_left_of_the_projections() -> None:
    plain = block(NORM, APART, SCORES, MIXED, PROJECTED, MLP, CLASS)
    model = load(plain)
    rewrite(model)
    rewritten = proto(model)
    assert deviation(plain, rewritten, (1, 3, 5)) < 1e-5
    # q, k and v, two in attention, projection, two of the MLP: of one block no kernel is saved by reading them in place
    assert ops(rewritten)["MatMul"] == 7
    assert multiply_adds(rewritten) == N * 2 * C * C + ROW + C * CLASSES


@pytest.mark.parametrize("turn", [True, False])
def test_tokens_and_images_on_one_axis_are_told_apart(turn: bool) -> None:
    """[N*B, C], as torch.nn.MultiheadAttention has it, or [B*N, C]."""
    around = "at = Transpose <perm = [1, 0, 2]> (a)", "pt = Reshape (pg, turned) pb = Transpose <perm = [1, 0, 2]> (pt)"
    before, after = around if turn else ("at = Identity (a)", "pb = Reshape (pg, tokens)")
    projected = f"{before} af = Reshape (at, flat) pg = Gemm (af, wp, bp) {after} y = Add (x, pb)"
    rewritten, _ = hoist(block(NORM, MERGED, SCORES, MIXED, projected, MLP, CLASS))
    assert multiply_adds(rewritten) == N * 2 * C * C + ROW + C * CLASSES


def test_a_static_batch_is_no_obstacle() -> None:
    sizes = {"x": f"float[2, {N}, {C}] x", "results": f"float[2, {CLASSES}] logits"}
    plain = block(NORM, MERGED, SCORES, MIXED, PROJECTED, MLP, CLASS, **sizes)
    rewritten, _ = hoist(plain)
    assert multiply_adds(rewritten) == 2 * (N * 2 * C * C + ROW + C * CLASSES)


def test_one_sample_of_a_batch_is_left_alone() -> None:
    text = "f = MatMul (x, wp) y = Gather <axis: int = 0> (f, i0)"
    assert untouched(block(text, results=f"float[{N}, {C}] y")) == []


def test_a_selection_does_not_pass_what_mixes_its_rows() -> None:
    """A softmax over tokens needs them all; its twin over channels does not."""
    text = "f = MatMul (x, wp) s = Softmax <axis: int = {}> (f) y = Gather <axis: int = 1> (s, i0)"
    one = f"float[batch, {C}] y"
    assert untouched(block(text.replace("{}", "1"), results=one)) == []
    rewritten, _ = hoist(block(text.replace("{}", "2"), results=one))
    assert multiply_adds(rewritten) == C * C


def test_a_selection_without_a_product_above_stays() -> None:
    text = f"{NORM} s = Softmax (n) y = Gather <axis: int = 1> (s, i0)"
    assert untouched(block(text, results=f"float[batch, {C}] y")) == []


def test_an_operator_that_nobody_knows_is_named() -> None:
    text = "f = MatMul (x, wp) s = CumSum (f, i1) y = Gather <axis: int = 1> (s, i0)"
    assert untouched(block(text, results=f"float[batch, {C}] y")) == [
        "CumSum is not known to keep rows apart, and few of them are read"
    ]


def test_what_costs_more_than_it_saves_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # at their real price, so few products are not worth another operator
    plain = block(NORM, MERGED, SCORES, MIXED, PROJECTED, MLP, CLASS)
    saved = (N - 1) * ROW
    assert untouched(plain) == [f"saves {saved} multiply-adds, less than its operators and copies cost"]


def test_channels_that_nobody_reads_are_not_computed() -> None:
    """A selection of columns cuts the weight and the bias; those of both halves are all that there are."""
    half = "f = MatMul (x, wp) fb = Add (f, bp) y = Slice (fb, from, end, from)"
    plain = block(half, results=f"float[batch, {N}, {C - 2}] y")
    rewritten, _ = hoist(plain)
    assert (ops(rewritten), multiply_adds(rewritten)) == ({"MatMul": 1, "Add": 1}, N * C * (C - 2))
    parts = "f = MatMul (x, wp) y, z = Split <axis: int = -1, num_outputs: int = 2> (f)"
    assert untouched(block(parts, results=f"float[batch, {N}, {C // 2}] y, float[batch, {N}, {C // 2}] z")) == []


def test_a_class_token_by_itself_needs_no_patches() -> None:
    """What a Concat would put behind the rows that are read is not computed."""
    text = "f = MatMul (x, wp) j = Concat <axis: int = 1> (t, f) k = MatMul (j, wq) y = Gather <axis: int = 1> (k, i0)"
    tokens = f"float[batch, {N}, {C}] x, float[batch, 1, {C}] t"
    rewritten, _ = hoist(block(text, x=tokens, results=f"float[batch, {C}] y"))
    assert (ops(rewritten), multiply_adds(rewritten)) == ({"MatMul": 1, "Gather": 1}, C * C)


def test_what_an_inner_graph_reads_is_computed_whole() -> None:
    text = """
        g (float[batch, 7, 8] x, bool c) => (float[batch, 8] y, float[batch, 7, 8] z) {
            f = MatMul (x, wp) y = Gather <axis: int = 1> (f, i0)
            z = If (c) <then_branch = a () => (float[batch, 7, 8] u) { u = Neg (f) },
                        else_branch = b () => (float[batch, 7, 8] w) { w = Neg (x) }>
        }"""
    plain = parse(text, wp=WEIGHTS["wp"], i0=0)
    rewritten, _, modified = apply(HoistSelections, plain)
    assert not modified
    assert rewritten.graph.node == proto(load(plain)).graph.node


def test_order_of_results_and_names_stay() -> None:
    """Both results are one value; each keeps its name."""
    text = "f = MatMul (x, wp) y = Gather <axis: int = 1> (f, r0) z = Gather <axis: int = 1> (f, r0)"
    plain = parse(
        f"g (float[batch, {N}, {C}] x) => (float[batch, 1, {C}] y, float[batch, 1, {C}] z) {{ {text} }}",
        wp=WEIGHTS["wp"], r0=[3],
    )  # fmt: skip
    rewritten, _ = hoist(plain)
    assert multiply_adds(rewritten) == C * C
    assert [output.name for output in rewritten.graph.output] == ["y", "z"]


def attention(mask: str = "", **attributes: int) -> onnx.ModelProto:
    said = ", ".join(f"{name}: int = {value}" for name, value in attributes.items())
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[batch, 2, {N}, 4] q, float[batch, 2, {N}, 4] k, float[batch, 2, {N}, 4] v) => (float[batch, 2, 4] y) {{
            a = Attention <{said}> (q, k, v{mask}) y = Gather <axis: int = 2> (a, i4)
        }}"""
    plain = onnx.parser.parse_model(text)
    for name in ("mask", "i4"):
        plain.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(WEIGHTS[name]), name))
    return plain


@pytest.mark.parametrize("mask", ["", ", mask"])
def test_the_attention_operator_is_row_wise_in_its_queries(mask: str) -> None:
    """Except where the place of a query decides which keys it sees."""
    rewritten, _ = hoist(attention(mask, is_causal=0))
    assert multiply_adds(rewritten) == 2 * 4 * 2 * N
    assert untouched(attention(mask, is_causal=1)) == [
        "Attention is not known to keep rows apart, and few of them are read"
    ]
