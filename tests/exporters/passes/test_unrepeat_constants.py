from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from deploycli.exporters.passes import unrepeat_constants as repeated
from deploycli.exporters.passes.unrepeat_constants import UnrepeatConstants
from tests.exporters.passes.graphs import apply, differences, ops, parse, reasons
from tests.exporters.passes.test_mutants import SEARCH

RNG = np.random.default_rng(0)


def constant(*dims: int) -> Any:
    return RNG.integers(1, 9, dims).astype(np.float32)


# Two windows an image, three heads: the mask is spelled out for the batch and added to the bias.
MASKED = """g (float[batch, 2, 3, 4, 4] x) => (float[rows, 3, 4, 4] y) {
    scores = Reshape (x, s4)
    shape = Shape <start = 0, end = 1> (x)
    target = Concat <axis = 0> (shape, rest)
    spelled = Expand (mask, target)
    rows = Reshape (spelled, m4)
    both = Add (bias, rows)
    z = Add (scores, both)
    y = Neg (z)
}"""
CONSTANTS = {
    "s4": [-1, 3, 4, 4], "rest": [1, 1, 1, 1], "m4": [-1, 1, 4, 4],
    "mask": constant(1, 2, 1, 4, 4), "bias": constant(1, 3, 4, 4),
}  # fmt: skip


def run(text: str, **constants: Any) -> tuple[dict[str, int], list[str], bool]:
    plain = parse(text, **{name: value for name, value in constants.items() if re.search(rf"\b{name}\b", text)})
    rewritten, graph_pass, modified = apply(UnrepeatConstants, plain)
    assert differences(plain, rewritten) == []
    assert not apply(UnrepeatConstants, rewritten)[2], "a second run changes something"
    return ops(rewritten), reasons(graph_pass), modified


def test_a_mask_of_windows_is_one_constant() -> None:
    assert run(MASKED, **CONSTANTS) == ({"Reshape": 3, "Add": 1, "Neg": 1}, [], True)


def test_a_mask_for_whole_images_needs_no_reshape() -> None:
    text = """g (float[batch, 3, 4, 4] x) => (float[batch, 3, 4, 4] y) {
        shape = Shape <start = 0, end = 1> (x)
        target = Concat <axis = 0> (shape, rest)
        spelled = Expand (seen, target)
        mask = Where (spelled, zero, low)
        z = Add (mask, x)
        y = Neg (z)
    }"""
    seen = RNG.integers(0, 2, (1, 1, 4, 4)).astype(bool)
    numbers = {"zero": np.float32(0), "low": np.float32(-100), "rest": [1, 4, 4]}
    assert run(text, seen=seen, **numbers) == ({"Add": 1, "Neg": 1}, [], True)
    assert run(text, seen=np.ones_like(seen), **numbers) == ({"Neg": 1}, [], True)  # nothing is masked


def test_a_constant_that_is_cut_by_the_batch_is_left_alone() -> None:
    """The twin: one row of the table for each sample."""
    text = """g (float[batch, 4] x) => (float[batch, 4] y) {
        n = Shape <start = 0, end = 1> (x)
        rows = Slice (table, zero, n, zero)
        z = Add (x, rows)
        y = Neg (z)
    }"""
    table = np.repeat(constant(1, 4), 8, 0)
    table[5:] += 1  # alike in all that two batch sizes show
    counts, refusals, modified = run(text, table=table, zero=[0])
    assert (counts, refusals, modified) == ({"Shape": 1, "Slice": 1, "Add": 1, "Neg": 1}, [], False)


def test_windows_that_lie_outside_of_the_samples_are_refused() -> None:
    """The whole batch of the first window comes before that of the second."""
    text = MASKED.replace(
        "rows = Reshape (spelled, m4)", "t = Transpose <perm = [1, 0, 2, 3, 4]> (spelled) rows = Reshape (t, m4)"
    )
    counts, refusals, modified = run(text, **CONSTANTS)
    assert (counts["Expand"], refusals, modified) == (1, ["its constant is not the same for every sample"], False)


@pytest.mark.parametrize("other", ["Mul (x, x)", "Add (x, c)"])
def test_what_is_computed_or_constant_is_left_alone(other: str) -> None:
    text = f"g (float[batch, 4] x) => (float[batch, 4] y) {{ z = {other} y = Neg (z) }}"
    assert run(text, c=constant(4))[1:] == ([], False)


@st.composite
def masks(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Masks spelled out for a batch, with or without windows, moved and computed with, in any order."""
    windows = draw(st.integers(1, 3))
    lines = ["v0 = Expand (mask, target)"]
    if draw(st.booleans()):
        lines.append("v1 = Mul (v0, two)")
    if draw(st.integers(0, 3)) == 0:
        lines.append(f"w = Transpose <perm = [1, 0, 2, 3]> ({lines[-1].split()[0]})")
    lines.append(f"r = Reshape ({lines[-1].split()[0]}, s3)")
    if draw(st.booleans()):
        lines.append("b = Add (r, bias)")
    operator = draw(st.sampled_from(["Add", "Sub", "Mul"]))
    operands = draw(st.permutations(["scores", lines[-1].split()[0]]))
    text = f"""g (float[batch, {windows}, 2, 4] x) => (float[rows, 2, 4] y) {{
        scores = Reshape (x, s3)
        shape = Shape <start = 0, end = 1> (x)
        target = Concat <axis = 0> (shape, rest)
        {chr(10).join(lines)}
        z = {operator} ({", ".join(operands)})
        y = Neg (z)
    }}"""
    constants: dict[str, Any] = {
        "mask": draw(st.sampled_from([constant(1, windows, 2, 4), np.zeros((1, windows, 2, 4), np.float32)])),
        "s3": [-1, 2, 4], "rest": [1, 1, 1], "two": np.float32(2), "bias": constant(2, 4),
    }  # fmt: skip
    return text, {name: value for name, value in constants.items() if f"{name})" in text or f"({name}," in text}


def check(case: tuple[str, dict[str, Any]]) -> list[str]:
    plain = parse(case[0], **case[1])
    return differences(plain, apply(UnrepeatConstants, plain)[0], (1, 2, 5))


@settings(max_examples=60, deadline=None)
@given(masks())
def test_any_mask(case: tuple[str, dict[str, Any]]) -> None:
    assert check(case) == []


@pytest.mark.parametrize("mutant", ["not compared with every sample", "operands swapped"])
def test_the_property_finds_a_fault(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant == "operands swapped":
        real = repeated._write
        monkeypatch.setattr(repeated, "_write", lambda node, i, *rest: real(node, 1 - i, *rest))
    else:
        real_computed = repeated._computed

        def first_window(value: Any, batch: int, *rest: Any) -> Any:
            run = real_computed(value, batch, *rest)
            return None if run is None else np.concatenate([run[: len(run) // batch]] * batch)

        monkeypatch.setattr(repeated, "_computed", first_window)

    def is_reported(case: tuple[str, dict[str, Any]]) -> bool:
        try:
            return check(case) != []
        except Exception:  # an operator that no runtime takes is a report, too
            return True

    find(masks(), is_reported, settings=SEARCH)  # raises where nothing is reported
