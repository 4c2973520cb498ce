"""Attentions that are not of the documented form, rule 16."""

from __future__ import annotations

from dataclasses import replace

from tests.exporters.tensorrt.cases import Case, warns
from tests.exporters.tensorrt.texts import F16, Graph, attention, weight

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


FLAT = Graph(
    """(float16[batch, 49, 32] q, float16[batch, 32, 49] k, float16[batch, 49, 32] v) => (float16[batch, 49, 32] y)
    { a = MatMul (q, k) p = Softmax (a) y = MatMul (p, v) }"""
)

CASES: tuple[Case, ...] = (
    warns("the scale after the product", 16, attention(scale="after"), PLAIN, "its scale (Mul) comes after"),
    warns("a division after the product", 16, attention(scale="div"), PLAIN, "its scale (Div) comes after"),
    warns("Softmax in FP32", 16, attention(cast=True), PLAIN, "its Softmax runs in FP32 between Casts"),
    warns(
        "a mask in 5-D",
        16,
        attention(mask=(1, 4, 3, 49, 49), five=True),
        attention(heads=12, mask=(1, 12, 49, 49)),
        "its mask is added in 5-D, [B, nW, N, S, S]",
    ),
    warns(
        "a mask that does not broadcast",
        16,
        attention(heads=1, mask=(1, 3, 49, 49)),
        attention(mask=(1, 3, 49, 49)),
        "does not broadcast",
        10,
    ),
    warns(
        "two masks",
        16,
        edited(
            "p = Softmax <axis = -1> (a)",
            "b = Add (a, m) c = Add (b, n) p = Softmax <axis = -1> (c)",
            m=weight(3, 49, 49, dtype=F16),
            n=weight(49, 49, dtype=F16, seed=1),
        ),
        attention(mask=(3, 49, 49)),
        "2 terms are added",
    ),
    warns("Tanh among the scores", 16, attention(between="Tanh"), PLAIN, "Tanh between"),
    warns(
        "a choice among the scores",
        16,
        edited(
            "p = Softmax <axis = -1> (a)",
            "b = Where (c, a, n) p = Softmax <axis = -1> (b)",
            c=weight(49, 49) > 0,
            n=F16(-100),
        ),
        PLAIN,
        "Where between",
    ),
    warns("Softmax on another axis", 16, attention(axis=2), attention(axis=3), "Softmax is on axis 2"),
    warns("narrow heads", 16, attention(dim=8), attention(dim=16), "8 channels"),
    warns("wide heads", 16, attention(dim=264), attention(dim=256), "264 channels"),
    warns(
        "odd heads before 10.14",
        16,
        attention(dim=20, version="10.13"),
        attention(dim=20, version="10.14"),
        "20 channels",
    ),
    warns("three dimensions", 16, FLAT, PLAIN, "its products are 3-D"),
    warns("probabilities that are read elsewhere", 16, shown(), PLAIN, "p is read elsewhere too"),
    warns(
        "Einsum",
        16,
        edited("a = MatMul (qs, kt)", 'a = Einsum <equation = "bnid,bndj->bnij"> (qs, kt)'),
        PLAIN,
        "its products are Einsum",
        19,
    ),
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
        "Dropout and Clip among the scores",
        16,
        edited("p = Softmax <axis = -1> (a)", "b = Clip (a, , h) p = Softmax <axis = -1> (b)", h=F16(50)),
        PLAIN,
        "Clip between",
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
