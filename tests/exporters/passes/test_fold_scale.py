from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from deploycli.exporters.passes import fold_scale as scale
from deploycli.exporters.passes.fold_scale import FoldScale
from tests.exporters.passes.graphs import apply, differences, ops, parse, reasons
from tests.exporters.passes.test_mutants import SEARCH

RNG = np.random.default_rng(0)


def constant(*shape: int) -> Any:
    return RNG.integers(1, 9, shape).astype(np.float32)


def fold(text: str, **constants: Any) -> tuple[dict[str, int], list[str], bool]:
    """Run the pass and prove that the graph computes what it did, within rounding."""
    plain = parse(text, **constants)
    rewritten, graph_pass, modified = apply(FoldScale, plain)
    assert differences(plain, rewritten, rtol=1e-5) == []
    return ops(rewritten), reasons(graph_pass), modified


# Two heads of three channels each; q, k and v are split from one projection.
ATTENTION = """g (float[batch, 5, 4] x) => (float[batch, 2, 5, 3] y) {
    m = MatMul (x, w)
    qkv = Add (b, m)
    heads = Reshape (qkv, s)
    moved = Transpose <perm = [2, 0, 3, 1, 4]> (heads)
    q5, k5, v5 = Split <axis = 0, num_outputs = 3> (moved)
    q = Squeeze (q5, zero)
    k = Squeeze (k5, zero)
    v = Squeeze (v5, zero)
    t = Transpose <perm = [0, 1, 3, 2]> (k)
    scores = MatMul (q, t)
    y = MatMul (scores, v)
}"""
CONSTANTS = {
    "w": constant(4, 18),
    "b": constant(18),
    "s": [-1, 5, 3, 2, 3],
    "zero": [0],
    "c": np.float32(0.3),
    "root": np.float32([0.7]),
}

fold_in_attention = partial(fold, **CONSTANTS)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scores = MatMul (q, t)", "qs = Mul (q, c) scores = MatMul (qs, t)"),
        ("scores = MatMul (q, t)", "qs = Mul (c, q) scores = MatMul (qs, t)"),
        ("scores = MatMul (q, t)", "qs = Div (q, c) scores = MatMul (qs, t)"),
        ("scores = MatMul (q, t)", "raw = MatMul (q, t) scores = Mul (raw, c)"),
        ("scores = MatMul (q, t)", "raw = MatMul (q, t) scores = Div (raw, c)"),
        ("scores = MatMul (q, t)", "qs = Mul (q, root) ts = Mul (t, root) scores = MatMul (qs, ts)"),
        ("t = Transpose <perm = [0, 1, 3, 2]> (k)", "ks = Mul (k, c) t = Transpose <perm = [0, 1, 3, 2]> (ks)"),
        ("q = Squeeze (q5, zero)", "qs = Mul (q5, root) q = Squeeze (qs, zero)"),
    ],
)
def test_a_scale_goes_into_the_projection(old: str, new: str) -> None:
    assert old in ATTENTION
    counts, refusals, modified = fold_in_attention(ATTENTION.replace(old, new))
    assert (counts, refusals, modified) == (fold_in_attention(ATTENTION)[0], [], True)


def test_without_a_bias() -> None:
    text = ATTENTION.replace("qkv = Add (b, m)", "").replace("(qkv, s)", "(m, s)")
    text = text.replace("scores = MatMul (q, t)", "qs = Mul (q, c) scores = MatMul (qs, t)")
    assert "Mul" not in fold(text, **{k: v for k, v in CONSTANTS.items() if k != "b"})[0]


@pytest.mark.parametrize(
    ("projection", "weight"),
    [
        ("p = Gemm (x, w, b)", (4, 6)),
        ("p = Gemm <transB = 1> (x, w, b)", (6, 4)),
        ("p = Gemm <alpha = 0.5> (x, w)", (4, 6)),
        ("m = MatMul (x, w) a = Add (m, b) p = Add (b1, a)", (4, 6)),
        ("m = MatMul (x, w) p = Add (m, b1)", (4, 6)),
    ],
)
def test_every_projection_by_constants_takes_a_scale(projection: str, weight: tuple[int, ...]) -> None:
    text = f"""g (float[batch, 4] x) => (float[batch, 2] y, float[batch, 4] rest) {{
        {projection}
        q, r = Split <axis = 1> (p, sizes)
        y = Mul (q, c)
        rest = Neg (r)
    }}""".replace("y = Mul (q, c)", "scaled = Mul (q, c) y = Neg (scaled)")
    constants = {"w": constant(*weight), "b": constant(6), "b1": constant(1), "sizes": [2, 4], "c": np.float32(0.3)}
    counts, refusals, modified = fold(text, **{k: v for k, v in constants.items() if f"{k}" in text})
    assert (modified, refusals, counts.get("Mul", 0)) == (True, [], 0)


@pytest.mark.parametrize(
    ("operator", "parameters"),
    [("Conv (x, w, b)", {"w": constant(6, 3, 1, 1), "b": constant(6)}), ("Conv (x, w)", {"w": constant(6, 3, 1, 1)})],
)
def test_a_convolution_is_a_projection_of_its_channels(operator: str, parameters: dict[str, Any]) -> None:
    text = f"""g (float[batch, 3, 2, 2] x) => (float[batch, 2, 2, 2] y, float[batch, 4, 2, 2] rest) {{
        p = {operator}
        q, r = Split <axis = 1> (p, sizes)
        scaled = Mul (q, c)
        y = Neg (scaled)
        rest = Neg (r)
    }}"""
    counts, refusals, modified = fold(text, sizes=[2, 4], c=np.float32(0.3), **parameters)
    assert (modified, refusals, "Mul" in counts) == (True, [], False)


def test_a_scale_behind_a_normalisation_goes_into_its_weights() -> None:
    text = """g (float[batch, 4] x) => (float[batch, 4] y) {
        n = LayerNormalization (x, gamma, beta)
        scaled = Mul (n, c)
        y = Neg (scaled)
    }"""
    counts, refusals, modified = fold(text, gamma=constant(4), beta=constant(4), c=np.float32(0.3))
    assert (counts, refusals, modified) == ({"LayerNormalization": 1, "Neg": 1}, [], True)


# --- twins that must not match ---------------------------------------------------------------------------------------


def test_columns_that_something_else_reads_are_refused() -> None:
    text = ATTENTION.replace("scores = MatMul (q, t)", "qs = Mul (q, c) n = MatMul (qs, t) o = MatMul (q, t)")
    text = text.replace("y = MatMul", "scores = Sub (n, o) y = MatMul")
    counts, refusals, modified = fold_in_attention(text)
    assert (counts["Mul"], refusals, modified) == (1, ["its columns are read elsewhere too"], False)


def test_a_scale_of_scores_goes_to_the_keys_where_the_query_is_taken() -> None:
    text = ATTENTION.replace("=> (", "=> (float[batch, 2, 5, 3] n, ")
    text = text.replace("scores = MatMul (q, t)", "n = Neg (q) raw = MatMul (q, t) scores = Mul (raw, c)")
    counts, refusals, modified = fold_in_attention(text)
    assert ("Mul" in counts, refusals, modified) == (False, [], True)


def test_scores_that_something_else_reads_are_refused() -> None:
    text = ATTENTION.replace("=> (", "=> (float[batch, 2, 5, 5] raw, ")
    text = text.replace("scores = MatMul (q, t)", "raw = MatMul (q, t) scores = Mul (raw, c)")
    counts, refusals, modified = fold_in_attention(text)
    assert (counts["Mul"], refusals, modified) == (1, ["the scores are read elsewhere too"], False)


def test_query_and_key_that_were_normalised_are_refused() -> None:
    """Swin V2: the scores are cosines."""
    text = ATTENTION.replace(
        "scores = MatMul (q, t)", "qn = Tanh (q) tn = Tanh (t) raw = MatMul (qn, tn) scores = Mul (raw, c)"
    )
    counts, refusals, modified = fold_in_attention(text)
    assert (counts["Mul"], modified) == (1, False)
    assert refusals == ["no projection by constants: it comes from Tanh"]


def test_a_scale_for_each_head_is_refused() -> None:
    text = ATTENTION.replace("scores = MatMul (q, t)", "raw = MatMul (q, t) scores = Mul (raw, each)")
    counts, refusals, modified = fold(text, each=constant(2, 1, 1), **CONSTANTS)
    assert (counts["Mul"], refusals, modified) == (1, ["its scale is not one number"], False)


def test_a_weight_that_is_read_elsewhere_is_refused() -> None:
    text = """g (float[batch, 4] x) => (float[batch, 6] y, float[4, 6] n) {
        m = MatMul (x, w)
        s = Mul (m, c)
        y = Neg (s)
        n = Neg (w)
    }"""
    counts, refusals, modified = fold(text, w=constant(4, 6), c=np.float32(0.3))
    assert (counts["Mul"], refusals, modified) == (1, ["its weight is read elsewhere too"], False)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_a_weight_that_would_vanish_or_overflow_is_refused(factor: float) -> None:
    text = "g (float[batch, 4] x) => (float[batch, 6] y) { m = MatMul (x, w) s = Mul (m, c) y = Sign (s) }"
    weight = constant(4, 6) * np.float32(factor)
    _, refusals, modified = fold(text, w=weight, c=np.float32(factor))
    assert (refusals, modified) == (["its weight would overflow or vanish"], False)


@pytest.mark.parametrize("rest", ["y = Mul (m, m)", "t = Mul (m, x2) y = Neg (t)", "t = Add (m, c) y = Neg (t)"])
def test_what_is_no_scale_is_left_alone(rest: str) -> None:
    text = f"g (float[batch, 4] x, float[batch, 6] x2) => (float[batch, 6] y) {{ m = MatMul (x, w) {rest} }}"
    constants = {"w": constant(4, 6)} | ({"c": np.float32(0.3)} if "c)" in rest else {})
    assert fold(text, **constants)[1:] == ([], False)


def test_a_scale_that_makes_its_operand_larger_is_left_alone() -> None:
    text = "g (float[batch, 4] x) => (float[batch, 6] y) { m = MatMul (x, w) s = Mul (m, c) y = Neg (s) }"
    assert fold(text, w=constant(4, 1), c=np.full(6, 0.3, np.float32))[1:] == ([], False)


def test_a_second_run_changes_nothing() -> None:
    text = ATTENTION.replace("scores = MatMul (q, t)", "qs = Mul (q, c) scores = MatMul (qs, t)")
    once, _, _ = apply(FoldScale, parse(text, **CONSTANTS))
    assert not apply(FoldScale, once)[2]


# --- properties ------------------------------------------------------------------------------------------------------


@st.composite
def attentions(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A projection into heads in any order of its axes, and parts of it, each with or without scales."""
    names = list("ghi")  # axes behind batch and tokens: which, head, channel
    sizes = {"g": draw(st.integers(2, 3)), "h": draw(st.integers(1, 3)), "i": draw(st.integers(1, 3))}
    order = draw(st.permutations(names))
    axis = 2 + order.index("g")
    lines, outputs = [], []
    for part in range(sizes["g"]):
        value = f"p{part}"
        lines.append(f"{value} = Gather <axis = {axis}> (r, i{part})")
        for k in range(draw(st.integers(0, 2))):
            operator = draw(st.sampled_from(["Mul", "Div"]))
            lines.append(f"{value}s{k} = {operator} ({value}{f's{k - 1}' if k else ''}, c{draw(st.integers(0, 1))})")
        last = lines[-1].split(" ", 1)[0]
        if draw(st.integers(0, 4)) == 0:  # somebody reads it before it is scaled
            lines.append(f"e{part} = Neg ({value})")
            outputs.append(f"e{part}")
        lines.append(f"y{part} = Abs ({last})")
        outputs.append(f"y{part}")
    rest = [sizes[n] for n in order if n != "g"]
    columns = int(np.prod(list(sizes.values())))
    declared = ", ".join(f"float[batch, 2, {rest[0]}, {rest[1]}] {name}" for name in outputs)
    text = f"""g (float[batch, 2, 4] x) => ({declared}) {{
        m = MatMul (x, w)
        b = Add (m, bias)
        r = Reshape (b, s)
        {chr(10).join(lines)}
    }}"""
    constants: dict[str, Any] = {
        "w": constant(4, columns), "bias": constant(columns), "s": [-1, 2, *(sizes[n] for n in order)],
        "c0": np.float32(0.3), "c1": np.float32([[1.7]]),
    }  # fmt: skip
    constants |= {f"i{part}": np.int64(part) for part in range(sizes["g"])}
    return text, {name: value for name, value in constants.items() if f"{name})" in text}


def check(case: tuple[str, dict[str, Any]]) -> list[str]:
    plain = parse(case[0], **case[1])
    rewritten, _, _ = apply(FoldScale, plain)
    return differences(plain, rewritten, (1, 3), rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(attentions())
def test_any_parts_of_a_projection(case: tuple[str, dict[str, Any]]) -> None:
    assert check(case) == []


@pytest.mark.parametrize("mutant", ["all columns", "others are not asked", "the bias is forgotten"])
def test_the_property_finds_a_fault(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = scale._Folder
    if mutant == "all columns":
        real = folder._columns
        monkeypatch.setattr(folder, "_columns", lambda *a: None if (found := real(*a)) is None else np.ones_like(found))
    elif mutant == "others are not asked":
        real_uses = folder._uses
        monkeypatch.setattr(folder, "_uses", lambda *a: list(real_uses(*a))[-1:])
    else:
        real_projection = folder._projection

        def without_bias(*args: Any) -> Any:
            found = real_projection(*args)
            if found is None:
                return None
            return scale._Projection(found.result, found.axis, tuple(p for p in found.parameters if p.is_weight))

        monkeypatch.setattr(folder, "_projection", without_bias)

    def is_reported(case: tuple[str, dict[str, Any]]) -> bool:
        try:
            return check(case) != []
        except Exception:  # an operator that no runtime takes is a report, too
            return True

    find(attentions(), is_reported, settings=SEARCH)  # raises where nothing is reported
