"""Movement and the batch axis: a map is that of one sample, whatever the batch size."""

from __future__ import annotations

from functools import partial

import pytest

from deploycli.exporters.passes.fold_movement import FoldMovement
from tests.exporters.passes.graphs import END, apply, differences, ops, parse, slices, transform

fold = partial(transform, FoldMovement)


def test_a_concat_with_zeros_for_every_sample_pads() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 8, 4] y) {
        shape = Shape <start: int = 0, end: int = 1> (x)
        whole = Concat <axis: int = 0> (shape, rest)
        zeros = ConstantOfShape (whole)
        c = Concat <axis: int = 1> (x, zeros)
    """ + slices("c", "d", 1, 3) + slices("d", "y", 1, 5) + "}"  # fmt: skip
    counts, _, _ = fold(text, rest=[2, 4])
    assert counts == {"Pad": 1, "Gather": 1}


def test_a_concat_with_the_batch_size_does_not() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 8, 4] y) {
        shape = Shape <start: int = 0, end: int = 1> (x)
        less = Sub (shape, one)
        number = Cast <to: int = 1> (less)
        whole = Concat <axis: int = 0> (shape, rest)
        fill = Expand (number, whole)
        c = Concat <axis: int = 1> (x, fill)
    """ + slices("c", "d", 1, 3) + slices("d", "y", 1, 5) + "}"  # fmt: skip
    counts, _, _ = fold(text, rest=[2, 4], one=[1])
    assert counts["Concat"] == 2  # the first, and one that builds the shape


@pytest.mark.parametrize(
    ("body", "out", "reason"),
    [
        ("y = Slice (x, zero, one, zero)", "1, 6, 4", "reads one sample of the batch"),
        ("y = Slice (x, minus, far, zero, minus)", "batch, 6, 4", "neither a strided view"),
        ("t = Transpose (x) y = Reshape (t, uneven)", "rows, 8", "mixes the samples"),
        ("f = Reshape (x, merged) y = Reshape (f, swapped) ", "6, batch, 4", None),
    ],
)
def test_what_mixes_the_samples_is_refused(body: str, out: str, reason: str | None) -> None:
    counts, refusals, modified = fold(
        f"g (float[batch, 6, 4] x) => (float[{out}] y) {{ {body} }}",
        zero=[0], one=[1], minus=[-1], far=[-END], merged=[-1, 4], swapped=[6, -1, 4], uneven=[-1, 8],
    )  # fmt: skip
    if reason is None:  # the samples stay in their order: this is a view, whatever its axes are called
        assert (counts, modified) == ({"Reshape": 1}, True)
    else:
        assert any(reason in r for r in refusals)
        assert not modified


@pytest.mark.parametrize(
    ("body", "out", "counts"),
    [
        # Four axes back and forth, the batch among them: what is left is one Transpose.
        ("t = Transpose <perm: ints = [1, 0, 2]> (x) u = Transpose <perm: ints = [1, 2, 0]> (t) "
         "y = Transpose <perm: ints = [2, 0, 1]> (u)", "6, batch, 4", {"Transpose": 1}),
        ("t = Transpose <perm: ints = [1, 0, 2]> (x) f = Reshape (t, merged) g = Reshape (f, swapped) "
         "y = Transpose <perm: ints = [1, 0, 2]> (g)", "batch, 6, 4", {"Identity": 1}),
        ("t = Transpose <perm: ints = [1, 0, 2]> (x) a = Gather <axis: int = 0> (t, order) "
         "b = Gather <axis: int = 0> (a, order) y = Transpose <perm: ints = [1, 0, 2]> (b)",
         "batch, 6, 4", {"Gather": 1}),
    ],
)  # fmt: skip
def test_the_batch_may_stand_behind_other_axes(body: str, out: str, counts: dict[str, int]) -> None:
    found, _, modified = fold(
        f"g (float[batch, 6, 4] x) => (float[{out}] y) {{ {body} }}",
        merged=[-1, 4], swapped=[6, -1, 4], order=[1, 0, 3, 5, 2, 4],
    )  # fmt: skip
    assert (found, modified) == (counts, True)


@pytest.mark.parametrize(("start", "end"), [([0], [3]), ([0], [16]), ([-3], [END]), ([2], [END]), ([0], [-1])])
def test_a_part_of_the_batch_is_not_taken_for_the_batch(start: list[int], end: list[int]) -> None:
    """At batch 2 and 3 the first three samples are all of them."""
    text = (
        "g (float[batch, 6, 4] x) => (float[part, 6, 4] y) { n = Neg (x) s = Slice (n, start, end, zero) y = Neg (s) }"
    )
    plain = parse(text, start=start, end=end, zero=[0])
    rewritten, _, _ = apply(FoldMovement, plain)
    assert ops(rewritten) == {"Neg": 2, "Slice": 1}
    assert differences(plain, rewritten, (1, 2, 3, 5, 20)) == []


def test_the_whole_batch_is() -> None:
    text = "g (float[batch, 6, 4] x) => (float[batch, 6, 4] y) { n = Neg (x) s = Slice (n, z, end, z) y = Neg (s) }"
    assert fold(text, z=[0], end=[END])[0] == {"Neg": 2}


def test_an_index_that_follows_the_batch_size_is_not_a_constant() -> None:
    """The source has no batch axis, but which row is read depends on the batch of the other input."""
    text = """g (float[batch, 6] x, float[9, 4] table) => (float[4] y) {
        size = Shape <start: int = 0, end: int = 1> (x)
        scalar = Squeeze (size, zero)
        row = Gather <axis: int = 0> (table, scalar)
        u = Unsqueeze (row, zero)
        y = Squeeze (u, zero)
    }"""
    counts, refusals, _ = fold(text, zero=[0])
    assert counts["Gather"] == 1
    assert any("depends on the batch size" in r for r in refusals)


def test_a_value_repeated_for_every_sample_is_left() -> None:
    text = """g (float[batch, 6] x, float[1, 4] token) => (float[batch, 1, 4] y) {
        size = Shape <start: int = 0, end: int = 1> (x)
        whole = Concat <axis: int = 0> (size, rest)
        e = Expand (token, whole)
        y = Unsqueeze (e, one)
    }"""
    counts, refusals, modified = fold(text, rest=[4], one=[1])
    assert counts["Expand"] == 1
    assert not modified
    assert any("depends on the batch size" in r for r in refusals)


def test_torchscript_shape_arithmetic_is_followed() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 24] y) {
        shape = Shape (x)
        size = Gather <axis: int = 0> (shape, i0)
        rows = Gather <axis: int = 0> (shape, i1)
        columns = Gather <axis: int = 0> (shape, i2)
        wide = Mul (rows, columns)
        b = Unsqueeze (size, zero)
        c = Unsqueeze (wide, zero)
        target = Concat <axis: int = 0> (b, c)
        r = Reshape (x, target)
        t = Transpose <perm: ints = [1, 0]> (r)
        y = Transpose <perm: ints = [1, 0]> (t)
    }"""
    counts, _, modified = fold(text, i0=0, i1=1, i2=2, zero=[0])
    assert modified
    assert counts["Reshape"] == 1
    assert "Transpose" not in counts


def test_a_static_batch_may_be_mixed() -> None:
    text = """g (float[2, 6, 4] x) => (float[2, 6, 4] y) {
        a = Slice (x, zero, one, zero)
        b = Slice (x, one, end, zero)
        y = Concat <axis: int = 0> (b, a)
    }"""
    assert fold(text, zero=[0], one=[1], end=[END])[0] == {"Gather": 1}


@pytest.mark.parametrize("shape", ["batch, 0, 4", "batch, 6, 0"])
def test_a_value_without_elements_is_left(shape: str) -> None:
    text = f"""g (float[{shape}] x) => (float[a, b, c] y) {{
        t = Transpose <perm: ints = [0, 2, 1]> (x)
        y = Transpose <perm: ints = [0, 2, 1]> (t)
    }}"""
    counts, refusals, modified = fold(text)
    assert (counts, modified) == ({"Transpose": 2}, False)
    assert refusals == ["holds no elements"]


def test_an_empty_slice_is_left() -> None:
    text = "g (float[batch, 6, 4] x) => (float[batch, 0, 4] y) { a = Identity (x) y = Slice (a, one, one, one) }"
    counts, refusals, _ = fold(text, one=[1])
    assert (counts, refusals) == ({"Identity": 1, "Slice": 1}, ["holds no elements"])


def test_zeros_alone_are_padded_again() -> None:
    """Nothing of the source is left in them, but they are not read from its first row."""
    text = """g (float[batch, 3] x) => (float[batch, 4] y) {
        a, b = Split <axis: int = 1> (x, two)
        p = Pad (a, pads)
        c, d = Split <axis: int = 1> (p, parts)
        q = Pad (d, more)
        y = Abs (q)
    }"""
    counts, _, modified = fold(text, two=[1, 2], pads=[0, 2, 0, 2], parts=[3, 2], more=[0, 1, 0, 1])
    assert modified
    assert "Split" not in counts
