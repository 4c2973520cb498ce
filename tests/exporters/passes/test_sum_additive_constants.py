from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from deploycli.exporters.passes.sum_additive_constants import SumAdditiveConstants
from tests.exporters.passes.graphs import apply, differences, ops, parse, reasons, transform

RNG = np.random.default_rng(0)


def constant(*shape: int) -> Any:
    """Numbers whose sums with small integers are exact, so that re-association changes no bit."""
    return RNG.integers(-8, 8, shape).astype(np.float32) / 8


merge = partial(transform, SumAdditiveConstants)


SHIFTED = """g (float[batch, 4, 3, 2, 2] x) => (float[rows, 3, 2, 2] y) {
    n = Reshape (x, s4)
    biased = Add (n, bias)
    windows = Reshape (biased, s5)
    masked = Add (windows, mask)
    y = Reshape (masked, s4)
}"""
SHAPES = {"s4": [-1, 3, 2, 2], "s5": [-1, 4, 3, 2, 2]}


def test_bias_and_mask_meet_across_a_reshape() -> None:
    plain = parse(SHIFTED, bias=constant(1, 3, 2, 2), mask=constant(1, 4, 1, 2, 2), **SHAPES)
    rewritten, graph_pass, modified = apply(SumAdditiveConstants, plain)
    assert differences(plain, rewritten) == []
    assert (ops(rewritten), modified, reasons(graph_pass)) == ({"Add": 1, "Reshape": 3}, True, [])
    assert [1, 4, 3, 2, 2] in [list(tensor.dims) for tensor in rewritten.graph.initializer]


@pytest.mark.parametrize("reader", ["other = Neg (biased)", "other = Reshape (biased, s5)"])
def test_a_first_sum_that_is_read_elsewhere_is_refused(reader: str) -> None:
    text = SHIFTED.replace("=> (", "=> (float[a, b, c, d] other, ").replace("windows =", f"{reader} windows =")
    if "Reshape" in reader:
        text = text.replace("float[a, b, c, d] other", "float[a, b, c, d, e] other")
    counts, refusals, modified = merge(text, bias=constant(1, 3, 2, 2), mask=constant(1, 4, 1, 2, 2), **SHAPES)
    assert (counts["Add"], modified, refusals) == (2, False, ["the first sum is read elsewhere too"])


@pytest.mark.parametrize("output", ["biased", "windows"])
def test_a_first_sum_that_is_a_graph_output_is_refused(output: str) -> None:
    rank = "a, b, c, d" if output == "biased" else "a, b, c, d, e"
    text = SHIFTED.replace("=> (", f"=> (float[{rank}] {output}, ")
    counts, refusals, _ = merge(text, bias=constant(1, 3, 2, 2), mask=constant(1, 4, 1, 2, 2), **SHAPES)
    assert (counts["Add"], refusals) == (2, ["the first sum is read elsewhere too"])


def test_a_first_sum_that_an_inner_graph_reads_is_refused() -> None:
    text = """g (float[2] x, bool flag) => (float[2] y, float[2] z) {
        s = Add (x, c)
        y = Add (s, d)
        z = If (flag) <
            then_branch = yes () => (float[2] p) { p = Neg (s) }, else_branch = no () => (float[2] q) { q = Abs (x) }
        >
    }"""
    counts, refusals, _ = merge(text, c=constant(2), d=constant(2))
    assert (counts["Add"], refusals) == (2, ["the first sum is read elsewhere too"])


def test_a_sum_with_itself_is_refused() -> None:
    """The first sum is read twice, by one node."""
    text = "g (float[batch, 2] x) => (float[batch, 2] y) { s = Add (x, c) t = Mul (s, s) y = Add (t, d) }"
    assert merge(text, c=constant(2), d=constant(2))[2] is False


def test_a_constant_that_depends_on_the_batch_is_refused() -> None:
    """Flattened, the constant of one sample would have to be repeated for every sample."""
    text = """g (float[batch, 3] x) => (float[rows] y) {
        s = Add (x, c) f = Reshape (s, minus) y = Add (f, d)
    }"""
    counts, refusals, _ = merge(text, c=constant(3), d=constant(1), minus=[-1])
    assert (counts["Add"], refusals) == (2, ["the constant would depend on the batch size"])


def test_a_constant_that_is_the_same_everywhere_does_not() -> None:
    text = """g (float[batch, 3] x) => (float[rows] y) {
        s = Add (x, c) f = Reshape (s, minus) y = Add (f, d)
    }"""
    assert merge(text, c=np.ones(3, np.float32), d=constant(1), minus=[-1])[0] == {"Add": 1, "Reshape": 1}


def test_a_constant_larger_than_both_is_refused() -> None:
    text = """g (float[batch, 3000, 1] x) => (float[batch, 3000, 3000] y) {
        wide = Expand (x, s) a = Add (wide, c) b = Identity (a) y = Add (b, d)
    }"""
    plain = parse(text, s=[1, 1, 3000], c=constant(3000), d=constant(3000, 1))
    rewritten, graph_pass, _ = apply(SumAdditiveConstants, plain)
    assert ops(rewritten)["Add"] == 2
    assert reasons(graph_pass) == ["36000000 bytes of constants from 24000"]


@pytest.mark.parametrize(
    ("first", "second"),
    [((1,), (1,)), ((3, 4), (4,)), ((3, 1), (1, 4)), ((1, 3, 4), (3, 1)), ((), (4,)), ((1, 1, 1), (1, 3, 1))],
)
def test_constants_of_any_fitting_shapes_are_summed(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    text = "g (float[batch, 3, 4] x) => (float[batch, 3, 4] y) { s = Add (c, x) y = Add (s, d) }"
    assert merge(text, c=constant(*first), d=constant(*second))[0] == {"Add": 1}


def test_a_constant_that_widens_the_value_is_left() -> None:
    text = "g (float[batch, 1, 4] x) => (float[batch, 3, 4] y) { s = Add (x, c) y = Add (s, d) }"
    assert merge(text, c=constant(3, 1), d=constant(4))[0] == {"Add": 2}


def test_three_constants_become_one() -> None:
    text = """g (float[batch, 3, 4] x) => (float[batch, 4, 3] y) {
        s = Add (x, c) t = Transpose <perm: ints = [0, 2, 1]> (s) u = Add (t, d) y = Add (u, e)
    }"""
    assert merge(text, c=constant(3, 4), d=constant(3), e=constant(4, 1))[0] == {"Add": 1, "Transpose": 1}


def test_a_moved_constant_goes_through_slices_with_absent_operands_and_zero_padding() -> None:
    text = """g (float[batch, 4, 4] x) => (float[batch, 3, 4] y) {
        s = Add (x, c) p = Pad (s, pads) w = Slice (p, start, end, "", steps) y = Add (w, d)
    }""".replace('""', "axes")
    constants = {"start": [0, 0, 0], "end": [2**63 - 1] * 3, "steps": [1, 2, 1], "pads": [0, 1, 0, 0, 0, 0]}
    plain = parse(text, c=constant(4, 4), d=constant(3, 4), axes=[0, 1, 2], **constants)
    plain.graph.node[2].input[3] = ""
    rewritten, _, modified = apply(SumAdditiveConstants, plain)
    assert differences(plain, rewritten) == []
    assert (ops(rewritten), modified) == ({"Add": 1, "Pad": 1, "Slice": 1}, True)


def test_padding_with_another_number_is_not_crossed() -> None:
    text = "g (float[batch, 4] x) => (float[batch, 5] y) { s = Add (x, c) p = Pad (s, pads, fill) y = Add (p, d) }"
    constants = {"pads": [0, 1, 0, 0], "fill": np.float32(2)}
    assert merge(text, c=constant(4), d=constant(5), **constants)[0] == {"Add": 2, "Pad": 1}


def test_a_reshape_to_the_batch_size_is_crossed() -> None:
    text = """g (float[batch, 3, 4] x) => (float[batch, 12] y) {
        s = Add (x, c)
        size = Shape <start: int = 0, end: int = 1> (x)
        whole = Concat <axis: int = 0> (size, rest)
        r = Reshape (s, whole)
        y = Add (r, d)
    }"""
    assert merge(text, c=constant(3, 4), d=constant(12), rest=[12])[0]["Add"] == 1


def test_the_sum_of_two_inputs_is_left() -> None:
    text = "g (float[batch, 4] x, float[batch, 4] z) => (float[batch, 4] y) { s = Add (x, z) y = Add (s, d) }"
    assert merge(text, d=constant(4))[0] == {"Add": 2}


def test_a_sum_that_overflows_is_refused() -> None:
    """Added one by one, the mask and the bias leave a finite number."""
    text = "g (float16[batch, 4] x) => (float16[batch, 4] y) { s = Add (x, bias) y = Add (s, mask) }"
    bias, mask = np.full(4, -32, np.float16), np.full(4, -65504, np.float16)
    counts, refusals, _ = merge(text, bias=bias, mask=mask)
    assert (counts, refusals) == ({"Add": 2}, ["the sum of the constants overflows"])
    assert merge(text, bias=bias, mask=mask / 65504)[0] == {"Add": 1}
    assert merge(text, bias=bias, mask=np.full(4, -np.inf, np.float16))[0] == {"Add": 1}


def test_integers_are_summed_too() -> None:
    text = "g (int64[batch, 4] x) => (int64[batch, 4] y) { s = Add (x, c) y = Add (s, d) }"
    assert merge(text, c=[1, 2, 3, 4], d=[5])[0] == {"Add": 1}
