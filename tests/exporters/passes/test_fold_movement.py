from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from deploycli.exporters.passes.fold_movement import FoldMovement
from tests.exporters.passes.graphs import END, apply, parse, slices, transform

fold = partial(transform, FoldMovement)


ROLL = "g (float[batch, 8, 8, 4] x) => (float[batch, 8, 8, 4] y) {" + slices("x", "r", 1, 2) + slices("r", "y", 2, 2)
PARTITION = """
    w6 = Reshape (r, s6)
    t = Transpose <perm: ints = [0, 1, 3, 2, 4, 5]> (w6)
    y = Reshape (t, s3)
"""
WINDOWS = {"s6": [-1, 2, 4, 2, 4, 96], "s3": [-1, 16, 96]}


def test_a_roll_on_two_axes_is_one_gather_of_tokens() -> None:
    counts, refusals, modified = fold(ROLL + "}")
    assert (counts, refusals, modified) == ({"Gather": 1, "Reshape": 1}, [], True)


def test_a_roll_on_one_axis_is_one_gather() -> None:
    text = "g (float[batch, 8, 4] x) => (float[batch, 8, 4] y) {" + slices("x", "y", 1, 3) + "}"
    assert fold(text)[0] == {"Gather": 1}


def test_halves_of_different_values_are_no_roll() -> None:
    text = """g (float[batch, 8, 4] x, float[batch, 8, 4] z) => (float[batch, 8, 4] y) {
        a = Slice (x, three, end, one)
        b = Slice (z, zero, three, one)
        y = Concat <axis: int = 1> (a, b)
    }"""
    counts, _, modified = fold(text, three=[3], end=[END], one=[1], zero=[0])
    assert (counts, modified) == ({"Slice": 2, "Concat": 1}, False)


def test_roll_and_partition_are_one_gather() -> None:
    text = (
        "g (float[batch, 64, 96] x) => (float[windows, 16, 96] y) { i = Reshape (x, s4)"
        + slices("i", "h", 1, 2) + slices("h", "r", 2, 2) + PARTITION + "}"
    )  # fmt: skip
    counts, _, _ = fold(text, s4=[-1, 8, 8, 96], **WINDOWS)
    assert counts == {"Gather": 1, "Reshape": 1}


def test_reverse_and_unshift_are_one_gather() -> None:
    text = (
        """g (float[windows, 16, 96] x) => (float[batch, 64, 96] y) {
            w6 = Reshape (x, s6)
            t = Transpose <perm: ints = [0, 1, 3, 2, 4, 5]> (w6)
            i = Reshape (t, s4)"""
        + slices("i", "h", 1, 6) + slices("h", "r", 2, 6) + "y = Reshape (r, s3) }"
    )  # fmt: skip
    text = text.replace("float[windows, 16, 96] x", "float[batch, 4, 16, 96] x")
    counts, _, _ = fold(text, s6=[-1, 2, 2, 4, 4, 96], s4=[-1, 8, 8, 96], s3=[-1, 64, 96])
    assert counts == {"Gather": 1, "Reshape": 1}


def test_a_partition_alone_is_a_strided_view() -> None:
    text = "g (float[batch, 8, 8, 96] r) => (float[windows, 16, 96] y) {" + PARTITION + "}"
    counts, _, modified = fold(text, **WINDOWS)
    assert (counts, modified) == ({"Reshape": 2, "Transpose": 1}, False)


def test_a_partition_that_is_spelled_with_more_operators_is_the_same_view() -> None:
    text = (
        "g (float[batch, 64, 96] x) => (float[windows, 16, 96] y) { i = Reshape (x, s4) r = Identity (i)"
        + PARTITION + "}"
    )  # fmt: skip
    counts, _, modified = fold(text, s4=[0, 8, 8, 96], **WINDOWS)
    assert (counts, modified) == ({"Reshape": 2, "Transpose": 1}, True)


MERGING = """g (float[batch, 8, 8, 96] x) => (float[batch, 4, 4, 384] y) {
    a = Slice (x, c00, end, axes, two)
    b = Slice (x, c10, end, axes, two)
    c = Slice (x, c01, end, axes, two)
    d = Slice (x, c11, end, axes, two)
    y = Concat <axis: int = 3> (a, b, c, d)
}"""
CORNERS: dict[str, Any] = {"c00": [0, 0], "c10": [1, 0], "c01": [0, 1], "c11": [1, 1], "axes": [1, 2], "two": [2, 2]}


def test_patch_merging_is_a_strided_view() -> None:
    counts, _, _ = fold(MERGING, end=[END, END], **CORNERS)
    assert counts == {"Reshape": 2, "Transpose": 1}


def test_patch_merging_in_another_order_of_corners_is_no_strided_view() -> None:
    text = MERGING.replace("(a, b, c, d)", "(a, d, c, b)")
    counts, _, _ = fold(text, end=[END, END], **CORNERS)
    assert counts == {"Gather": 1, "Reshape": 2}


PACKED = """g (float[batch, 784, 288] x) => (float[batch, 3, 784, 32] q, float[batch, 3, 32, 784] k) {
    five = Reshape (x, s5)
    t = Transpose <perm: ints = [2, 0, 3, 1, 4]> (five)
    q0 = Gather <axis: int = 0> (t, i0)
    k0 = Gather <axis: int = 0> (t, i1)
    v0 = Gather <axis: int = 0> (t, i2)
    kt = Transpose <perm: ints = [0, 1, 3, 2]> (k0)
    sum = Add (q0, v0)
    q = Neg (sum) k = Neg (kt)
}"""


def test_a_packed_projection_is_split_and_transposed() -> None:
    counts, _, _ = fold(PACKED, s5=[-1, 784, 3, 3, 32], i0=0, i1=1, i2=2)
    assert counts == {"Add": 1, "Neg": 2, "Reshape": 1, "Split": 1, "Transpose": 3}


def test_a_projection_of_which_one_part_is_read_is_not_split() -> None:
    text = PACKED.replace("sum = Add (q0, v0)", "sum = Identity (q0)").replace(
        "k = Neg (kt)", "k = Transpose <perm: ints = [0, 1, 3, 2]> (q)"
    )
    counts, _, _ = fold(text, s5=[-1, 784, 3, 3, 32], i0=0, i1=1, i2=2)
    assert "Split" not in counts


@pytest.mark.parametrize(
    "text",
    [
        "Pad (x, none)",
        "Slice (x, zero, end, one)",
        "Reshape (x, same)",
        "Reshape (x, copy)",
        "Expand (x, ones)",
        "Tile (x, ones)",
        "Transpose <perm: ints = [0, 1, 2]> (x)",
        "Squeeze (u, zero) u = Unsqueeze (x, zero)",
        "Transpose <perm: ints = [2, 0, 1]> (u) u = Transpose <perm: ints = [1, 2, 0]> (x)",
        "Concat <axis: int = 1> (u, v) u, v = Split <axis: int = 1> (x, halves)",
        "DepthToSpace <blocksize: int = 1> (u) u = Unsqueeze (x, zero)",
    ],
)
def test_movement_that_moves_nothing_vanishes(text: str) -> None:
    last, *first = text.split(") ", 1)
    last += ")" if first else ""
    unsqueezed = "Squeeze (y0, zero)" if "Depth" in text else "Identity (y0)"
    body = f"n = Neg (x0) x = Identity (n) {' '.join(first)} y0 = {last} y1 = {unsqueezed} y = Neg (y1)"
    counts, _, modified = fold(
        f"g (float[batch, 6, 4] x0) => (float[batch, 6, 4] y) {{ {body} }}",
        none=[0] * 6, zero=[0], end=[END], one=[1], same=[-1, 6, 4], copy=[0, 0, 0], ones=[1, 1, 1], halves=[4, 2],
    )  # fmt: skip
    assert (counts, modified) == ({"Neg": 2}, True)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("Pad (x, some)", "batch, 7, 4"),
        ("Slice (x, one, end, one)", "batch, 5, 4"),
        ("Transpose <perm: ints = [0, 2, 1]> (x)", "batch, 4, 6"),
        ("Expand (x, twice)", "2, batch, 6, 4"),
    ],
)
def test_movement_that_moves_something_stays(text: str, shape: str) -> None:
    counts, _, modified = fold(
        f"g (float[batch, 6, 4] x) => (float[{shape}] y) {{ y = {text} }}",
        some=[0, 1, 0, 0, 0, 0], one=[1], end=[END], twice=[2, 1, 1, 1],
    )  # fmt: skip
    assert (sum(counts.values()), modified) == (1, False)


def test_a_padded_partition_appends_one_zero_row() -> None:
    text = "g (float[batch, 6, 7, 96] x) => (float[windows, 16, 96] y) { r = Pad (x, pads)" + PARTITION + "}"
    text = text.replace("y = Reshape (t, s3)", "z = Reshape (t, s3)" + slices("z", "y", 1, 3))
    counts, _, _ = fold(text, pads=[0, 0, 0, 0, 0, 2, 1, 0], **WINDOWS)
    assert counts == {"Gather": 1, "Pad": 1, "Reshape": 2}


def test_padding_with_another_number_is_a_boundary_and_both_sides_fold() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 8, 4] y) {
        a = Transpose <perm: ints = [0, 2, 1]> (x)
        b = Transpose <perm: ints = [0, 2, 1]> (a)
        p = Pad (b, pads, fill)
        c = Transpose <perm: ints = [0, 2, 1]> (p)
        y = Transpose <perm: ints = [0, 2, 1]> (c)
    }"""
    counts, _, _ = fold(text, pads=[0, 1, 0, 0, 1, 0], fill=np.float32(-100))
    assert counts == {"Pad": 1}
    counts, _, _ = fold(text, pads=[0, 1, 0, 0, 1, 0], fill=np.float32(-0.0))
    assert counts == {"Pad": 1}


def test_padding_by_a_number_that_the_graph_computes_is_a_boundary() -> None:
    text = """g (float[batch, 6, 4] x, float fill) => (float[batch, 8, 4] y) { y = Pad (x, pads, fill) }"""
    assert fold(text, pads=[0, 1, 0, 0, 1, 0])[0] == {"Pad": 1}


CONCAT_ZEROS = """g (TYPE[2, 6, 4] x) => (TYPE[2, 4, 8] y) {
    c = Concat <axis: int = 1> (x, zeros)
    t = Transpose <perm: ints = [0, 2, 1]> (c)
    u = Transpose <perm: ints = [0, 2, 1]> (t)
    y = Transpose <perm: ints = [0, 2, 1]> (u)
}"""


@pytest.mark.parametrize(("name", "dtype"), [("float", "float32"), ("int64", "int64"), ("float16", "float16")])
def test_a_concat_with_zeros_pads(name: str, dtype: str) -> None:
    counts, _, modified = fold(CONCAT_ZEROS.replace("TYPE", name), zeros=np.zeros((2, 2, 4), dtype))
    assert modified
    assert counts == {"Pad": 1, "Gather": 1, "Transpose": 1} or sum(counts.values()) < 4


def test_a_concat_with_ones_does_not() -> None:
    counts, _, _ = fold(CONCAT_ZEROS.replace("TYPE", "float"), zeros=np.ones((2, 2, 4), np.float32))
    assert counts == {"Concat": 1, "Transpose": 1}


def test_a_graph_input_that_is_moved_to_a_graph_output_keeps_both_names() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 6, 4] y) {
        a = Transpose <perm: ints = [0, 2, 1]> (x)
        y = Transpose <perm: ints = [0, 2, 1]> (a)
    }"""
    assert fold(text)[0] == {"Identity": 1}


def test_two_outputs_that_are_the_same_value_keep_both_names() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 4, 6] y, float[batch, 4, 6] z) {
        n = Neg (x)
        a = Identity (n)
        y = Transpose <perm: ints = [0, 2, 1]> (a)
        b = Unsqueeze (n, one)
        c = Transpose <perm: ints = [0, 1, 3, 2]> (b)
        z = Squeeze (c, one)
    }"""
    assert fold(text, one=[1])[0] == {"Neg": 1, "Transpose": 1, "Identity": 1}


def test_a_declared_shape_of_an_output_is_kept() -> None:
    text = """g (float[batch, 6, 4] x) => (float[rows, 4] y) {
        n = Neg (x) a = Reshape (n, s) b = Identity (a) y = Reshape (b, r)
    }"""
    plain = parse(text, s=[-1, 4, 1], r=[-1, 4])
    rewritten, _, modified = apply(FoldMovement, plain)
    assert modified
    assert rewritten.graph.output[0] == plain.graph.output[0]


def test_a_value_that_is_used_twice_is_moved_once() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 6, 4] y) {
        u = Unsqueeze (x, one)
        a = Transpose <perm: ints = [0, 1, 3, 2]> (u)
        b = Squeeze (a, one)
        c = Squeeze (a, one)
        s = Mul (b, c)
        y = Transpose <perm: ints = [0, 2, 1]> (s)
    }"""
    assert fold(text, one=[1])[0] == {"Transpose": 2, "Mul": 1}


def test_a_result_that_the_region_reads_itself_is_handed_on() -> None:
    text = """g (float[batch, 64, 768] x) => (float[batch, 64, 768] y, float[batch, 768, 64] z) {
    """ + slices("x", "r", 1, 3) + "y = Neg (r) t = Transpose <perm: ints = [0, 2, 1]> (r) z = Neg (t) }"  # fmt: skip
    assert fold(text)[0] == {"Gather": 1, "Neg": 2, "Transpose": 1}


def test_the_sides_of_a_concat_of_two_values_fold_by_themselves() -> None:
    text = """g (float[batch, 6, 4] x, float[batch, 2, 4] z) => (float[batch, 4, 8] y) {
        a = Transpose <perm: ints = [0, 2, 1]> (x)
        b = Transpose <perm: ints = [0, 2, 1]> (a)
        c = Concat <axis: int = 1> (b, z)
        d = Unsqueeze (c, one)
        e = Transpose <perm: ints = [0, 1, 3, 2]> (d)
        y = Squeeze (e, one)
    }"""
    assert fold(text, one=[1])[0] == {"Concat": 1, "Transpose": 1}


def test_a_reversed_channel_axis_has_no_form() -> None:
    text = "g (float[batch, 300, 300] x) => (float[batch, 300, 300] y) { f = Slice (x, m, far, axes, m) y = Neg (f) }"
    counts, _, modified = fold(text, m=[-1, -1], far=[-END, -END], axes=[1, 2])
    assert (counts, modified) == ({"Slice": 1, "Neg": 1}, False)


def test_axes_of_size_one_are_moved_without_an_operator_that_copies() -> None:
    text = """g (float[batch, 1, 6, 1, 4] x) => (float[1, batch, 6, 1, 4] y) {
        n = Neg (x) y = Transpose <perm: ints = [1, 0, 2, 3, 4]> (n)
    }"""
    assert fold(text)[0] == {"Neg": 1, "Reshape": 1}


def test_allowzero_is_read() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 24] y) {
        a = Reshape <allowzero: int = 1> (x, s) n = Unsqueeze (a, one) y = Squeeze (n, one)
    }"""
    assert fold(text, s=[-1, 24], one=[1])[0] == {"Reshape": 1}


def test_the_cost_of_a_gather_with_many_indices_is_counted_once() -> None:
    """Indices of two axes in a Gather that is already the cheapest form."""
    text = "g (float[batch, 49, 4] x) => (float[batch, 3, 2, 4] y) { n = Neg (x) y = Gather <axis: int = 1> (n, i) }"
    counts, _, modified = fold(text, i=[[1, 5], [-1, 9], [0, 0]])
    assert (counts, modified) == ({"Gather": 1, "Neg": 1}, False)


@pytest.mark.parametrize("dtype", ["float16", "int64", "bool", "uint8", "double"])
def test_any_type_moves(dtype: str) -> None:
    text = f"g ({dtype}[batch, 8, 4] x) => ({dtype}[batch, 8, 4] y) {{" + slices("x", "y", 1, 3) + "}"
    assert fold(text)[0] == {"Gather": 1}


def test_a_value_that_an_inner_graph_reads_is_read() -> None:
    text = """g (float[batch, 6, 4] x, bool flag) => (float[batch, 4, 6] y) {
        a = Transpose <perm: ints = [0, 2, 1]> (x)
        b = Transpose <perm: ints = [0, 2, 1]> (a)
        c = Transpose <perm: ints = [0, 2, 1]> (b)
        y = If (flag) <
            then_branch = yes () => (float[batch, 4, 6] p) { p = Neg (c) },
            else_branch = no () => (float[batch, 4, 6] q) { q = Abs (a) }
        >
    }"""
    assert fold(text)[0] == {"Transpose": 1, "If": 1}


def test_a_region_is_left_where_its_parts_are_read_everywhere() -> None:
    """Every intermediate result is read, so folding would only add operators."""
    text = """g (float[batch, 64, 96] x) => (float[batch, 96, 64] a, float[batch, 8, 8, 96] b) {
        t = Transpose <perm: ints = [0, 2, 1]> (x)
        a = Neg (t)
        r = Reshape (x, s)
        b = Neg (r)
    }"""
    counts, refusals, modified = fold(text, s=[-1, 8, 8, 96])
    assert (counts, refusals, modified) == ({"Transpose": 1, "Reshape": 1, "Neg": 2}, [], False)
