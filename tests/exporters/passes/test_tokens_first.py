from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import find, given, settings

from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.attention import find_attention, is_product_of_activations, is_read_in_place
from deploycli.exporters.graph.cost import graph_cost
from deploycli.exporters.graph.operators import ELEMENTWISE
from deploycli.exporters.passes import tokens_first
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.passes.tokens_first import TokensFirst
from tests.exporters.passes.attention_networks import attention_networks, deviation
from tests.exporters.passes.graphs import apply, load, ops, parse, proto, reasons
from tests.exporters.passes.test_mutants import SEARCH

B, N, C, H = "batch", 6, 8, 2
D = C // H

CONSTANTS: dict[str, Any] = {
    **{name: np.random.default_rng(i).normal(0, 0.5, (C, C)) for i, name in enumerate(("wq", "wk", "wv", "wp", "w1"))},
    **{name: np.random.default_rng(i).normal(0, 0.5, C) for i, name in enumerate(("gamma", "beta", "b"))},
    **{"w": np.random.default_rng(9).normal(0, 0.5, (C, 3 * C)), "w2": np.random.default_rng(8).normal(0, 1, (C, 4))},
    **{"four": [-1, N, H, D], "five": [-1, N, 3, H, D], "three": [-1, N, C], "zero": [0], "one": [1], "end": [9]},
}
QUERY = "mq = MatMul (n, wq) rq = Reshape (mq, four) q = Transpose <perm = [0, 2, 1, 3]> (rq)"
KEY = "mk = MatMul (n, wk) rk = Reshape (mk, four) k = Transpose <perm = [0, 2, 3, 1]> (rk)"
VALUE = "mv = MatMul (n, wv) rv = Reshape (mv, four) v = Transpose <perm = [0, 2, 1, 3]> (rv)"
MERGED = """
    m = MatMul (n, w)
    r = Reshape (m, five)
    t = Transpose <perm = [2, 0, 3, 1, 4]> (r)
    q5, k5, v5 = Split <axis = 0, num_outputs = 3> (t)
    q = Squeeze (q5, zero)
    kk = Squeeze (k5, zero)
    v = Squeeze (v5, zero)
    k = Transpose <perm = [0, 1, 3, 2]> (kk)"""
NORM = "n = LayerNormalization (x, gamma, beta)"
ATTENTION = "s = MatMul (q, k) p = Softmax <axis = -1> (s) o = MatMul (p, v)"
RESULT = "ot = Transpose <perm = [0, 2, 1, 3]> (o) a = Reshape (ot, three)"
END = "y = MatMul (a, wp)"


def graph(*parts: str, more: str = "", dtype: str = "double", **changed: Any) -> onnx.ModelProto:
    """A network of the parts; constants that they do not read are left out."""
    results = ", ".join([f"{dtype}[{B}, {N}, {C}] y", *([more] if more else [])])
    text = f"g ({dtype}[{B}, {N}, {C}] x) => ({results}) {{ {' '.join(parts)} }}"
    words = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    kind = {"double": np.float64, "float16": np.float16}[dtype]
    made = {k: v.astype(kind) if isinstance(v, np.ndarray) and v.dtype == np.float64 else v for k, v in
            {**CONSTANTS, **changed}.items() if k in words}  # fmt: skip
    return parse(text, **made)


PLAIN = (NORM, QUERY, KEY, VALUE, ATTENTION, RESULT, END)


def in_place(model: onnx.ModelProto) -> list[int]:
    """For every attention how many of its three operands are read in place."""
    loaded = load(model)
    analysis = Analysis(loaded.graph)

    def leads(node: Any) -> Any:
        through = node.op_type == "Reshape" or node.op_type in ELEMENTWISE
        return [i for i, v in enumerate(node.inputs) if analysis.constant(v) is None] if through else None

    found = []
    for node in loaded.graph:
        attention = find_attention(node, leads, lambda n: is_product_of_activations(n, analysis), 99)
        if node.op_type == "Softmax" and attention is not None:
            read = (*attention.scores.inputs, attention.mix.inputs[1])
            found.append(sum(is_read_in_place(_product(v), analysis) for v in read))
    return found


def _product(value: Any) -> Any:
    node = value.producer()
    while node.op_type in ("Reshape", "Transpose"):
        node = node.inputs[0].producer()
    return node


def multiply_adds(model: onnx.ModelProto) -> int:
    loaded = load(model)
    count = graph_cost(loaded.graph, Analysis(loaded.graph)).multiply_adds
    assert count is not None
    return count


# --- properties ------------------------------------------------------------------------------------------------------


def faults(case: tuple[onnx.ModelProto, int]) -> list[str]:
    """Run the pass alone on a network, and say what is wrong."""
    plain, attentions = case
    rewritten, done, modified = apply(TokensFirst, plain)
    found = reasons(done)
    if not modified or in_place(rewritten) != [3] * attentions:
        found.append(f"not all in place: {in_place(rewritten)}")
    if deviation(plain, rewritten) > 1e-9:
        found.append("it computes something else")
    if multiply_adds(rewritten) > multiply_adds(plain):
        found.append("it multiplies more")
    return found + (["a second run changes something"] if apply(TokensFirst, rewritten)[2] else [])


@settings(max_examples=80, deadline=None)
@given(attention_networks())
def test_any_network_of_attentions(case: tuple[onnx.ModelProto, int]) -> None:
    assert faults(case) == []


@settings(max_examples=40, deadline=None)
@given(attention_networks())
def test_any_network_through_all_passes(case: tuple[onnx.ModelProto, int]) -> None:
    plain, _ = case
    once = through_all(plain)
    again = through_all(onnx.ModelProto.FromString(once.SerializeToString()))
    assert deviation(plain, once) < 1e-8
    assert deviation(plain, again) < 1e-8
    assert multiply_adds(once) <= multiply_adds(plain)
    # A selection of tokens may find its way through one more block; nothing else is left to do.
    assert ops(again) == ops(once) or multiply_adds(again) < multiply_adds(once)


def through_all(plain: onnx.ModelProto) -> onnx.ModelProto:
    model = load(plain)
    rewrite(model)
    return proto(model)


def rolled_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tokens_first._read_heads

    def read(value: Any, analysis: Any, *, turned: bool = False) -> Any:
        found = real(value, analysis, turned=turned)
        return found if isinstance(found, str) or turned else tokens_first.Heads(
            found.product, np.roll(found.columns, 1, 0), found.windows, found.tokens
        )  # fmt: skip

    monkeypatch.setattr(tokens_first, "_read_heads", read)


def wrong_perm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels are taken for tokens, and told to be the shape that they are not."""
    monkeypatch.setattr(tokens_first, "IN_PLACE", (2, 1, 0, 3))


def exchanged_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch stands in front of the windows of a sample in one direction only."""
    real = tokens_first.Builder.reshape

    def reshape(self: Any, source: Any, dims: Any, anchor: Any) -> Any:
        now = self.analysis.dims(source)
        if len(now) == len(dims) == 3 and now[1] != dims[1]:
            other = real(self, source, (dims[1], dims[0], dims[2]), anchor)
            return self.value("Transpose", [other], anchor, perm=[1, 0, 2])
        return real(self, source, dims, anchor)

    monkeypatch.setattr(tokens_first.Builder, "reshape", reshape)


def forgotten_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that is not row by row reads what it finds."""
    real = tokens_first._Writer._get

    def get(self: Any, value: Any, layout: int, anchor: Any) -> Any:
        have = self._at_hand.get(value, {})
        return next(iter(have.values())) if layout == tokens_first.BATCH_FIRST and have else real(
            self, value, layout, anchor
        )  # fmt: skip

    monkeypatch.setattr(tokens_first._Writer, "_get", get)


def shared_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_first._Writer, "_is_free", lambda *_: True)


def forgotten_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the values: probabilities add up to one."""
    monkeypatch.setattr(tokens_first._Writer, "_add_to_bias", lambda *_: None)


def any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_first._Writer, "_takes_any_rank", lambda *_: True)


@pytest.mark.parametrize(
    "mutant",
    [rolled_heads, wrong_perm, exchanged_windows, forgotten_exit, shared_output, forgotten_bias, any_rank],
    ids=lambda m: m.__name__,
)
def test_the_property_finds_a_fault(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)

    def is_reported(case: tuple[onnx.ModelProto, int]) -> bool:
        try:
            return faults(case) != []
        except Exception:  # a graph that no runtime takes is a report, too
            return True

    find(attention_networks(), is_reported, settings=SEARCH)


# --- what is read in place -------------------------------------------------------------------------------------------


def test_an_attention_in_its_best_form() -> None:
    rewritten, done, _ = apply(TokensFirst, graph(NORM, MERGED, ATTENTION, RESULT, END))
    assert (reasons(done), in_place(rewritten)) == ([], [3])
    # Into the layout, three operands, the result, out of the layout.
    assert ops(rewritten) == {
        "Transpose": 6, "LayerNormalization": 1, "MatMul": 6, "Reshape": 4, "Softmax": 1
    }  # fmt: skip


def test_types_stay() -> None:
    plain = graph(NORM, MERGED, ATTENTION, RESULT, END, dtype="float16")
    rewritten, _, _ = apply(TokensFirst, plain)
    assert {t.data_type for t in rewritten.graph.initializer} == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    assert (in_place(rewritten), deviation(plain, rewritten) < 5e-3) == ([3], True)


def test_a_weight_that_two_attentions_share_is_stored_once() -> None:
    second = " ".join((QUERY, KEY, VALUE, ATTENTION, RESULT))
    for word in ("mq", "rq", "q", "mk", "rk", "k", "mv", "rv", "v", "s", "p", "o", "ot", "a"):
        second = second.replace(f" {word} ", f" {word}_2 ").replace(f"({word},", f"({word}_2,")
        second = second.replace(f"({word})", f"({word}_2)").replace(f", {word})", f", {word}_2)")
    second = second.replace("mq =", "mq_2 =").replace("n,", "a,")
    plain = graph(NORM, QUERY, KEY, VALUE, ATTENTION, RESULT, second, "y = MatMul (a_2, wp)")
    rewritten, done, _ = apply(TokensFirst, plain)
    assert (reasons(done), in_place(rewritten)) == ([], [3, 3])
    assert deviation(plain, rewritten) < 1e-12
    weights = [tuple(tensor.dims) for tensor in rewritten.graph.initializer if len(tensor.dims) == 2]
    assert weights == [(C, C)] * 4  # of query, key and value, and one behind


@pytest.mark.parametrize("value", ["n", "a", "ot", "s", "p"])
def test_a_value_in_the_middle_may_be_an_output(value: str) -> None:
    dims = {"n": f"{N}, {C}", "a": f"{N}, {C}", "ot": f"{N}, {H}, {D}", "s": f"{H}, {N}, {N}", "p": f"{H}, {N}, {N}"}
    plain = graph(*PLAIN, more=f"double[{B}, {dims[value]}] {value}")
    rewritten, done, _ = apply(TokensFirst, plain)
    assert deviation(plain, rewritten) < 1e-12
    assert multiply_adds(rewritten) == multiply_adds(plain)
    assert (reasons(done), in_place(rewritten)) == (
        (["its heads are not put side by side"], [0]) if value == "ot" else ([], [3])
    )


@pytest.mark.parametrize("value", ["n", "a", "f"])
def test_a_branch_reads_what_it_did(value: str) -> None:
    branch = f"""z = If (flag) <
        then_branch = one () => (double[a, b, c] u) {{ u = Neg ({value}) }},
        else_branch = two () => (double[a, b, c] t) {{ t = Abs (x) }}
    >"""
    plain = graph(*PLAIN[:-1], "f = MatMul (a, wp) y = Relu (f)", branch, more="double[a, b, c] z", flag=True)
    rewritten, done, _ = apply(TokensFirst, plain)
    assert (reasons(done), in_place(rewritten)) == ([], [3])
    assert deviation(plain, rewritten) < 1e-12
    assert multiply_adds(rewritten) == multiply_adds(plain)


def test_what_is_brought_into_the_layout_stands_in_front_of_its_first_reader() -> None:
    """The key is projected before another value is asked for in the same layout."""
    plain = graph(
        "mk = MatMul (x, wk) rk = Reshape (mk, four) k = Transpose <perm = [0, 2, 3, 1]> (rk) n = Relu (x)",
        QUERY, VALUE, ATTENTION, RESULT, END,
    )  # fmt: skip
    rewritten, done, _ = apply(TokensFirst, plain)
    assert (reasons(done), in_place(rewritten), deviation(plain, rewritten) < 1e-12) == ([], [3], True)


def test_an_image_is_normalised_on_its_last_axis() -> None:
    image = "i = Reshape (x, square) g = LayerNormalization <axis = 3> (i, gamma, beta) n = Reshape (g, three)"
    plain = graph(image, *PLAIN[1:], square=[-1, 2, 3, C])
    rewritten, _, _ = apply(TokensFirst, plain)
    assert (in_place(rewritten), deviation(plain, rewritten) < 1e-12) == ([3], True)


# --- what is not -----------------------------------------------------------------------------------------------------

HALVES = " lo, hi = Split <axis = 3, num_outputs = 2> (qr) nh = Neg (hi) q = Concat <axis = 3> (nh, lo)"
FEW_KEYS = KEY.replace("four", "few").replace(" k =", " k1 =") + " k = Tile (k1, all)"
FEW_VALUES = VALUE.replace("four", "few").replace(" v =", " v1 =") + " v = Tile (v1, all)"
FEWER = {"wk": CONSTANTS["wk"][:, :D], "wv": CONSTANTS["wv"][:, :D], "few": [-1, N, 1, D], "all": [1, H, 1, 1]}
HEADS_FIRST = {"four": [-1, H, N, D]}


@pytest.mark.parametrize(
    ("query", "key", "value", "changed", "reason"),
    [
        (QUERY.replace(" q =", " qr =") + HALVES, KEY, VALUE, {},
         "its query comes from Concat, not straight from a product"),
        (QUERY.replace("[0, 2, 1, 3]", "[0, 1, 2, 3]"), KEY.replace("[0, 2, 3, 1]", "[0, 1, 3, 2]"),
         VALUE.replace("[0, 2, 1, 3]", "[0, 1, 2, 3]"), HEADS_FIRST,
         "its query does not have the tokens of a window one after the other"),
        (QUERY, KEY, VALUE.replace(" v =", " vt =") + " v = Gather <axis = 2> (vt, order)",
         {"order": [1, 0, 2, 3, 4, 5]}, "its value does not have the tokens of a window one after the other"),
        (QUERY, FEW_KEYS, FEW_VALUES, FEWER, "heads share the columns of a projection"),
    ],
    ids=["rotary", "other axes", "order", "few heads"],
)  # fmt: skip
def test_a_refusal_says_why(query: str, key: str, value: str, changed: dict[str, Any], reason: str) -> None:
    plain = graph(NORM, query, key, value, ATTENTION, RESULT, END, **changed)
    rewritten, done, modified = apply(TokensFirst, plain)
    assert (reasons(done), modified, ops(rewritten)) == ([reason], False, ops(plain))


@pytest.mark.parametrize(("reader", "more"), [("z = Relu (mv)", f"{N}, {C}] z"), ("", f"{N}, {C}] mv")])
def test_a_projection_that_something_else_reads_is_refused(reader: str, more: str) -> None:
    plain = graph(*PLAIN, reader, more=f"double[{B}, {more}")
    rewritten, done, modified = apply(TokensFirst, plain)
    assert (reasons(done), modified) == (["its projection is read elsewhere too"], False)
    assert ops(rewritten) == ops(plain)


def test_samples_of_a_batch_that_attend_to_one_another() -> None:
    text = f"""g (double[4, {N}, {C}] x) => (double[4, {N}, {C}] y) {{ {" ".join(PLAIN)} }}"""
    text = text.replace("[0, 2, 1, 3]", "[1, 2, 0, 3]").replace("[0, 2, 3, 1]", "[1, 2, 3, 0]")
    text = text.replace("ot = Transpose <perm = [1, 2, 0, 3]>", "ot = Transpose <perm = [2, 0, 1, 3]>")
    names = ("wq", "wk", "wv", "wp", "gamma", "beta", "four", "three")
    plain = parse(text, **{name: CONSTANTS[name] for name in names})
    rewritten, done, modified = apply(TokensFirst, plain)
    assert (modified, ops(rewritten)) == (False, ops(plain))  # samples stand first, and are what attends
    assert reasons(done) == []


def test_a_softmax_that_is_no_attention_is_left_without_a_word() -> None:
    rewritten, done, modified = apply(TokensFirst, graph(NORM, "y = Softmax <axis = -1> (n)"))
    assert (reasons(done), modified, ops(rewritten)) == ([], False, {"LayerNormalization": 1, "Softmax": 1})


@pytest.mark.parametrize("pairs", ["scores", "mix"])
def test_heads_that_meet_in_other_pairs_are_refused(pairs: str) -> None:
    """Every head meets every other, by broadcasting."""
    text = f"""g (double[1, {N}, {C}] x) => (double[{H}, {H}, {N}, {D}] y) {{
        {NORM} {QUERY} {KEY} {VALUE}
        q2 = Reshape (q, outer) k2 = Reshape (k, {"inner" if pairs == "scores" else "same"})
        v2 = Reshape (v, {"inner_v" if pairs == "mix" else "outer"})
        s = MatMul (q2, k2) p = Softmax <axis = -1> (s) y = MatMul (p, v2)
    }}"""
    shapes = {"outer": [H, 1, N, D], "inner": [1, H, D, N], "same": [H, 1, D, N], "inner_v": [1, H, N, D]}
    constants = {**CONSTANTS, **shapes}
    words = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    plain = parse(text, **{name: value for name, value in constants.items() if name in words})
    rewritten, done, modified = apply(TokensFirst, plain)
    assert (len(reasons(done)), modified, ops(rewritten)) == (1, False, ops(plain))
