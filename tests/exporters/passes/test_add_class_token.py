from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deploycli.exporters.passes import add_class_token as class_token
from deploycli.exporters.passes.add_class_token import AddClassToken
from deploycli.exporters.passes.pipeline import rewrite
from tests.exporters.passes.graphs import apply, differences, load, ops, parse, proto, reasons

RNG = np.random.default_rng(0)
TOKEN, OTHER, POSITION = (RNG.standard_normal(shape).astype(np.float32) for shape in ((1, 1, 4), (2, 4), (1, 7, 4)))

VIT = """g (float[batch, 6, 4] x) => (float[batch, 7, 4] y) {
    size = Shape <start = 0, end = 1> (x)
    shape = Concat <axis = 0> (size, rest)
    class = Expand (token, shape)
    tokens = Concat <axis = 1> (class, x)
    y = Add (tokens, position)
}"""
CONSTANTS: dict[str, Any] = {"token": TOKEN, "rest": np.array([1, 4]), "position": POSITION}


def test_the_class_token_is_added() -> None:
    plain = parse(VIT, **CONSTANTS)
    rewritten, _, modified = apply(AddClassToken, plain)
    assert modified
    assert differences(plain, rewritten) == []
    assert ops(rewritten) == {"Pad": 1, "Add": 2}


def test_it_meets_the_position_embedding() -> None:
    plain = parse(VIT, **CONSTANTS)
    model = load(plain)
    rewrite(model)
    assert differences(plain, proto(model)) == []
    assert ops(model) == {"Pad": 1, "Add": 1}


def test_tokens_of_tokens() -> None:
    """A distilled ViT that concatenates one after the other."""
    text = VIT.replace(
        "y = Add (tokens, position)",
        "again = Expand (other, shape) both = Concat <axis = 1> (again, tokens) y = Add (both, position)",
    )
    position = RNG.standard_normal((1, 8, 4)).astype(np.float32)
    constants = CONSTANTS | {"other": OTHER[:1], "position": position}
    plain = parse(text.replace("7, 4] y", "8, 4] y"), **constants)
    model = load(plain)
    rewrite(model)
    assert differences(plain, proto(model)) == []
    assert ops(model) == {"Pad": 2, "Add": 1}


def test_tokens_stand_before_and_behind() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 10, 4] y) {
        size = Shape <start = 0, end = 1> (x)
        a = Concat <axis = 0> (size, one)
        b = Concat <axis = 0> (size, two)
        first = Expand (token, a)
        last = Expand (other, b)
        tokens = Concat <axis = -2> (first, last, x, first)
        y = Add (tokens, bias)
    }"""
    constants = {"token": TOKEN, "other": OTHER, "bias": TOKEN[0, 0]}
    plain = parse(text, **constants, one=np.array([1, 4]), two=np.array([2, 4]))
    rewritten, _, _ = apply(AddClassToken, plain)
    assert differences(plain, rewritten) == []
    assert ops(rewritten) == {"Pad": 1, "Add": 2}


def test_tokens_that_nothing_is_added_to_stay() -> None:
    """With a rotary embedding there is no position to meet."""
    plain = parse(VIT.replace("Add (tokens, position)", "Neg (tokens)"), token=TOKEN, rest=np.array([1, 4]))
    _, graph_pass, modified = apply(AddClassToken, plain)
    assert (modified, reasons(graph_pass)) == (
        False,
        ["nothing is added behind it that its tokens could be added to"],
    )


@pytest.mark.parametrize(
    ("concat", "output", "refusals"),
    [
        ("Concat <axis = 1> (x, class, x)", "batch, 13, 4", ["a token stands between two parts of what varies"]),
        ("Concat <axis = 1> (class, x, x)", "batch, 13, 4", []),
        ("Concat <axis = 1> (class, class)", "batch, 2, 4", []),
    ],
)
def test_what_is_left(concat: str, output: str, refusals: list[str]) -> None:
    text = VIT.replace("batch, 7, 4] y", f"{output}] tokens").replace("y = Add (tokens, position)", "")
    plain = parse(text.replace("Concat <axis = 1> (class, x)", concat), token=TOKEN, rest=np.array([1, 4]))
    rewritten, graph_pass, modified = apply(AddClassToken, plain)
    assert (modified, reasons(graph_pass)) == (False, refusals)
    assert differences(plain, rewritten) == []


def test_a_token_of_each_sample_is_none() -> None:
    text = """g (float[batch, 6, 4] x, float[batch, 1, 4] t) => (float[batch, 7, 4] y) {
        y = Concat <axis = 1> (t, x)
    }"""
    _, _, modified = apply(AddClassToken, parse(text))
    assert not modified


def test_integers_stay() -> None:
    text = VIT.replace("float", "int64").replace("y = Add (tokens, position)", "y = Identity (tokens)")
    _, _, modified = apply(AddClassToken, parse(text, token=np.ones((1, 1, 4), np.int64), rest=np.array([1, 4])))
    assert not modified


def test_a_token_at_the_wrong_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = class_token._Tokens

    def swapped(concat: Any, axis: int, varying: Any, before: Any, after: Any) -> Any:
        return real(concat, axis, varying, after, before)

    monkeypatch.setattr(class_token, "_Tokens", swapped)
    plain = parse(VIT, **CONSTANTS)
    rewritten, _, _ = apply(AddClassToken, plain)
    assert differences(plain, rewritten) != []
