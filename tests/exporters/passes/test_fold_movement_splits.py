from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.movement_ops import swaps_last_axes
from deploycli.exporters.passes import fold_movement as movement
from deploycli.exporters.passes.fold_movement import FoldMovement, joint_lowerings
from deploycli.exporters.passes.windows_into_heads import WindowsIntoHeads
from tests.exporters.passes.graphs import apply, differences, ops, parse
from tests.exporters.passes.test_mutants import SEARCH
from tests.exporters.passes.test_windows_into_heads import mask

# Query, key and value of two heads with three channels, as timm and TorchScript write them.
UNBOUND = """g (float[batch, 5, 18] x) => (float[batch, 2, 5, 3] y) {
    heads = Reshape (x, s)
    moved = Transpose <perm = [2, 0, 3, 1, 4]> (heads)
    q5, k5, v5 = Split <axis = 0, num_outputs = 3> (moved)
    q = Squeeze (q5, zero)
    k = Squeeze (k5, zero)
    v = Squeeze (v5, zero)
    t = Transpose <perm = [0, 1, 3, 2]> (k)
    scores = MatMul (q, t)
    y = MatMul (scores, v)
}"""
# As merged projections are split.
SPLIT = """g (float[batch, 5, 18] x) => (float[batch, 2, 5, 3] y) {
    q3, k3, v3 = Split <axis = 2, num_outputs = 3> (x)
    q4 = Reshape (q3, s4)
    k4 = Reshape (k3, s4)
    v4 = Reshape (v3, s4)
    q = Transpose <perm = [0, 2, 1, 3]> (q4)
    t = Transpose <perm = [0, 2, 3, 1]> (k4)
    v = Transpose <perm = [0, 2, 1, 3]> (v4)
    scores = MatMul (q, t)
    y = MatMul (scores, v)
}"""
CONSTANTS: dict[str, Any] = {"s": [-1, 5, 3, 2, 3], "zero": [0], "s4": [-1, 5, 2, 3]}


def fold(text: str, **constants: Any) -> dict[str, int]:
    plain = parse(text, **{name: value for name, value in constants.items() if f" {name})" in text})
    rewritten, _, _ = apply(FoldMovement, plain)
    assert differences(plain, rewritten) == []
    assert not apply(FoldMovement, rewritten)[2], "a second run changes something"
    return ops(rewritten)


@pytest.mark.parametrize("text", [UNBOUND, SPLIT])
def test_query_key_and_value_move_together(text: str) -> None:
    assert fold(text, **CONSTANTS) == {"Reshape": 1, "Transpose": 2, "Split": 1, "MatMul": 2}


def test_one_head_is_not_moved() -> None:
    text = UNBOUND.replace("batch, 5, 18] x", "batch, 5, 9] x").replace("batch, 2, 5, 3] y", "batch, 1, 5, 3] y")
    counts = fold(text, **{**CONSTANTS, "s": [-1, 5, 3, 1, 3]})
    assert counts == {"Reshape": 1, "Transpose": 1, "Split": 1, "MatMul": 2}


def test_a_key_that_is_no_factor_is_transposed_on_its_own() -> None:
    """The twin: nothing reads the key in place, so that a second Transpose of it costs a copy."""
    text = UNBOUND.replace("scores = MatMul (q, t)", "n = Neg (t) scores = MatMul (q, n)")
    counts = fold(text, **CONSTANTS)
    assert counts["Transpose"] == 2  # all at once, and the key back
    text = text.replace("=> (", "=> (float[batch, 2, 3, 5] n, ")
    assert fold(text, **CONSTANTS)["Split"] == 1


def test_windows_in_heads_are_split_last() -> None:
    """Four windows an image: the views that windows-into-heads adds meet the splitting."""
    text = """g (float[batch, 12, 30] images) => (float[rows, 2, 3, 5] y) {
        heads = Reshape (images, s)
        moved = Transpose <perm = [2, 0, 3, 1, 4]> (heads)
        q5, k5, v5 = Split <axis = 0, num_outputs = 3> (moved)
        q = Squeeze (q5, zero)
        k = Squeeze (k5, zero)
        v = Squeeze (v5, zero)
        t = Transpose <perm = [0, 1, 3, 2]> (k)
        scores = MatMul (q, t)
        split = Reshape (scores, s5)
        shifted = Add (split, mask)
        joined = Reshape (shifted, s_scores)
        p = Softmax <axis = -1> (joined)
        y = MatMul (p, v)
    }"""
    shapes = {"s": [-1, 3, 3, 2, 5], "zero": [0], "s5": [-1, 4, 2, 3, 3], "s_scores": [-1, 2, 3, 3]}
    plain = parse(text, mask=mask(1, 4, 2, 3, 3), **shapes)
    folded = apply(FoldMovement, apply(WindowsIntoHeads, plain)[0])[0]
    assert differences(plain, folded) == []
    counts = ops(folded)
    # Reshape, Transpose, Reshape, Split, Transpose; the last Reshape is the result's own shape.
    assert (counts["Reshape"], counts["Transpose"], counts["Split"]) == (3, 2, 1)


@pytest.mark.parametrize(
    ("perm", "expected"), [((0, 1, 3, 2), True), ((1, 0), True), ((0, 2, 1, 3), False), ((), False)]
)
def test_which_permutation_a_product_reads_in_place(perm: tuple[int, ...], *, expected: bool) -> None:
    assert swaps_last_axes(perm) is expected


def test_parts_that_are_rotated_are_no_gathers() -> None:
    """As before a rotary embedding: of a prefix and of halves, Slices are one kernel, and Gathers one each."""
    text = """g (float[batch, 301, 192] x) => (
        float[batch, 2, 1, 32] y, float[batch, 2, 300, 16] a, float[batch, 2, 300, 16] b, float[batch, 2, 301, 32] w
    ) {
        heads = Reshape (x, s)
        moved = Transpose <perm = [2, 0, 3, 1, 4]> (heads)
        q5, k5, v5 = Split <axis = 0, num_outputs = 3> (moved)
        q = Squeeze (q5, zero)
        k = Squeeze (k5, zero)
        v = Squeeze (v5, zero)
        first = Slice (q, zero, one, two)
        rest = Slice (q, one, end, two)
        left, right = Split <axis = 3, num_outputs = 2> (rest)
        y = Neg (first)
        a = Neg (left)
        b = Neg (right)
        w = Add (k, v)
    }"""
    constants = {"s": [-1, 301, 3, 2, 32], "zero": [0], "one": [1], "two": [2], "end": [2**31 - 1]}
    plain = parse(text, **constants)
    rewritten, _, _ = apply(FoldMovement, plain)
    assert differences(plain, rewritten) == []
    assert "Gather" not in ops(rewritten)


def test_results_that_agree_in_no_static_axis_have_no_joint_form() -> None:
    index = np.arange(6)
    maps = [IndexMap.of(index, 12), IndexMap.of(index.reshape(2, 3) + 6, 12)]
    assert list(joint_lowerings(maps, (12,))) == []


# --- properties ------------------------------------------------------------------------------------------------------


@st.composite
def splittings(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Parts of one value, each transposed; some are read by products."""
    sizes = [draw(st.integers(1, 3)) for _ in range(4)]
    which = draw(st.integers(0, 3))
    sizes[which] = count = draw(st.integers(2, 3))
    order = draw(st.permutations(range(3)))
    left = [size for i, size in enumerate(sizes) if i != which]
    total = int(np.prod(sizes))
    lines, outputs = [], []
    for part in range(count):
        own = draw(st.sampled_from([list(order), [order[0], order[2], order[1]]]))
        perm = [0, *(1 + i for i in own)]
        lines += [
            f"p{part} = Gather <axis = {1 + which}> (heads, i{part})",
            f"t{part} = Transpose <perm = {perm}> (p{part})",
        ]
        shape = [left[i] for i in own]
        if draw(st.booleans()):
            lines.append(f"n{part} = Transpose <perm = [0, 1, 3, 2]> (t{part})")
            lines.append(f"y{part} = MatMul (n{part}, t{part})")
            shape = [shape[0], shape[2], shape[2]]
        else:
            lines.append(f"y{part} = Neg (t{part})")
        outputs.append(f"float[batch, {shape[0]}, {shape[1]}, {shape[2]}] y{part}")
    text = f"""g (float[batch, {total}] x) => ({", ".join(outputs)}) {{
        heads = Reshape (x, s)
        {chr(10).join(lines)}
    }}"""
    return text, {"s": [-1, *sizes]} | {f"i{part}": np.int64(part) for part in range(count)}


def check(case: tuple[str, dict[str, Any]]) -> list[str]:
    plain = parse(case[0], **case[1])
    rewritten, _, _ = apply(FoldMovement, plain)
    found = differences(plain, rewritten, (1, 3))
    return found or (["a second run changes something"] if apply(FoldMovement, rewritten)[2] else [])


@settings(max_examples=80, deadline=None)
@given(splittings())
def test_any_parts_in_any_order(case: tuple[str, dict[str, Any]]) -> None:
    assert check(case) == []


@pytest.mark.parametrize("mutant", ["parts in another order", "the swap is lost"])
def test_the_property_finds_a_fault(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant == "parts in another order":
        real = joint_lowerings
        monkeypatch.setattr(movement, "joint_lowerings", lambda *a: [lowerings[::-1] for lowerings in real(*a)])
    else:
        monkeypatch.setattr(movement, "_swap", lambda dims, *, swapped: ())

    def is_reported(case: tuple[str, dict[str, Any]]) -> bool:
        try:
            return check(case) != []
        except Exception:  # an operator that no runtime takes is a report, too
            return True

    find(splittings(), is_reported, settings=SEARCH)  # raises where nothing is reported
