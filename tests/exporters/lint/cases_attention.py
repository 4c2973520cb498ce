"""Attentions of which no single kernel is made, rule 16; and some of which one is."""

from __future__ import annotations

from dataclasses import replace

from tests.exporters.lint.cases import Case, warns
from tests.exporters.lint.texts import F16, Graph, attention, weight

PLAIN = attention()


def edited(old: str, new: str, **constants: object) -> Graph:
    assert old in PLAIN.text
    return replace(PLAIN, text=PLAIN.text.replace(old, new), constants={**PLAIN.constants, **constants})  # type: ignore[dict-item] # arrays


def shown() -> Graph:
    """Probabilities that are an output too."""
    text = PLAIN.text.replace(
        "float16[batch, 3, 49, 32] y)", "float16[batch, 3, 49, 32] y, float16[batch, 3, 49, 49] p)"
    )
    return replace(PLAIN, text=text)


def wide_values(width: int) -> Graph:
    return Graph(
        f"""(float16[batch, 3, 49, 32] q, float16[batch, 3, 32, 49] k, float16[batch, 3, 49, {width}] v)
        => (float16[batch, 3, 49, {width}] y) {{ a = MatMul (q, k) p = Softmax (a) y = MatMul (p, v) }}"""
    )


FLAT = Graph(
    """(float16[batch, 49, 32] q, float16[batch, 32, 49] k, float16[batch, 49, 32] v) => (float16[batch, 49, 32] y)
    { a = MatMul (q, k) p = Softmax (a) y = MatMul (p, v) }"""
)

CASES: tuple[Case, ...] = (
    warns(
        "a mask that does not broadcast",
        16,
        attention(heads=1, mask=(1, 3, 49, 49)),
        attention(mask=(1, 3, 49, 49)),
        "its Add makes [batch, 3, 49, 49] of its scores [batch, 1, 49, 49]",
        10,
    ),
    warns("Tanh among the scores", 16, attention(between="Tanh"), PLAIN, "Tanh between"),
    warns(
        "Clip after the Softmax",
        16,
        edited("y = MatMul (p, v)", "b = Clip (p, , h) y = MatMul (b, v)", h=F16(0.5)),
        edited("y = MatMul (p, v)", "b = Mul (p, h) y = MatMul (b, v)", h=F16(0.5)),
        "Clip between the Softmax and the second product",
    ),
    warns("Softmax on another axis", 16, attention(axis=2), attention(axis=3), "Softmax is on axis 2"),
    warns("narrow heads", 16, attention(dim=8), attention(dim=9), "8 channels"),
    warns("wide heads", 16, attention(dim=264), attention(dim=256), "264 channels"),
    warns(
        "odd heads before 10.14",
        16,
        attention(dim=20, version="10.13"),
        attention(dim=20, version="10.14"),
        "20 channels",
    ),
    warns("values of another width", 16, wide_values(64), wide_values(32), "32 channels, their values 64"),
    warns("three dimensions", 16, FLAT, PLAIN, "its products are 3-D"),
    warns(
        "one head with a mask",
        16,
        attention(heads=1, mask=(49, 49)),
        attention(heads=1),
        "one head, a mask and a dynamic batch",
    ),
    warns("probabilities that are read elsewhere", 16, shown(), PLAIN, "p is read elsewhere too"),
    warns(
        "a result that is not quantized",
        16,
        attention(quantize="qkpv"),
        attention(quantize="qkpvo"),
        "its result is not",
    ),
    warns(
        "values that are not quantized",
        16,
        attention(quantize="qkpo"),
        attention(quantize="qkpvo"),
        "its values are not",
        15,
    ),
    warns(
        "heads that grow with the batch",
        16,
        Graph(
            """(float16[batch, 3, 49, 2] x, float16[batch, 3, 49, 9] u, float16[3, 49, 9, 32] v)
            => (float16[3, 49, 2, 32] y)
            { q = Transpose <perm = [1, 2, 3, 0]> (x) k = Transpose <perm = [1, 2, 0, 3]> (u)
              a = MatMul (q, k) p = Softmax (a) y = MatMul (p, v) }"""
        ),
        None,
        "channels of its heads",
    ),
)

FUSED: tuple[Graph, ...] = (
    attention(scale="after"),
    attention(scale="div"),
    attention(cast=True),
    attention(mask=(1, 4, 3, 49, 49), five=True),
    edited(
        "p = Softmax <axis = -1> (a)",
        "b = Add (a, m) c = Add (b, n) p = Softmax <axis = -1> (c)",
        m=weight(3, 49, 49, dtype=F16),
        n=weight(49, 49, dtype=F16, seed=1),
    ),
    edited(
        "p = Softmax <axis = -1> (a)",
        "b = Where (c, a, n) p = Softmax <axis = -1> (b)",
        c=weight(49, 49) > 0,
        n=F16(-100),
    ),
    edited("a = MatMul (qs, kt)", 'a = Einsum <equation = "bnid,bndj->bnij"> (qs, kt)'),
    edited("p = Softmax <axis = -1> (a)", "b = Clip (a, , h) p = Softmax <axis = -1> (b)", h=F16(50)),
)
"""Of which one kernel is made, though TensorRT documents none of these forms."""
