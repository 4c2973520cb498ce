"""What is not taken of single operators, beside the nearest form that is: by the lint, and by the compiler itself."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from tests.exporters.lint.corpus import TARGETS
from tests.exporters.lint.judge import Judge
from tests.exporters.lint.rtx import WHY
from tests.exporters.lint.texts import F32, I64, Graph, weight

X3 = "(float[b,4,6] x) => (float[] y)"
X4 = "(float[b,4,8,8] x) => (float[] y)"
WEIGHTS = {"w": weight(1, 12, 4), "r": weight(1, 12, 3)}
LSTM = "(float[5,2,4] x) => (float[] y) {{ y = LSTM<{}> (x, w, r) }}"
LOOP = """(bool go, bfloat16[4] x) => (bfloat16[] y) {
    y = Loop<body = once (int64 i, bool go_in, bfloat16[4] v) => (bool go_out, bfloat16[4] w) {
        go_out = Identity (go_in) w = Identity (v)
    }> (k, go, x)
}"""

PAIRS = {
    "ArgMax": (
        Graph("(float[8] x) => (int64[] y) { y = ArgMax<axis=0> (x) }"),
        Graph("(float[4,8] x) => (int64[] y) { y = ArgMax<axis=0> (x) }"),
    ),
    "ArgMin": (
        Graph("(float[8] x) => (int64[] y) { y = ArgMin<axis=0> (x) }"),
        Graph("(float[4,8] x) => (int64[] y) { y = ArgMin<axis=0> (x) }"),
    ),
    "CumSum": (
        Graph(f"{X3} {{ y = CumSum (x, k) }}", {"k": I64(3)}),
        Graph(f"{X3} {{ y = CumSum (x, k) }}", {"k": I64(2)}),
    ),
    "Einsum": (
        Graph(f'{X3} {{ y = Einsum<equation="bIJ->bJI"> (x) }}'),
        Graph(f'{X3} {{ y = Einsum<equation="bij->bji"> (x) }}'),
    ),
    "Gemm": (
        Graph("(float[3,8] x, float[5] c) => (float[] y) { y = Gemm (x, w, c) }", {"w": weight(8, 4)}),
        Graph("(float[3,8] x, float[4] c) => (float[] y) { y = Gemm (x, w, c) }", {"w": weight(8, 4)}),
    ),
    "GridSample": (
        Graph("(float[2,3,8] x, float[2,5,1] g) => (float[] y) { y = GridSample (x, g) }"),
        Graph("(bfloat16[2,3,8,8] x, bfloat16[2,5,5,2] g) => (bfloat16[] y) { y = GridSample (x, g) }", opset=21),
    ),
    "GroupNormalization": (
        Graph(f"{X4} {{ y = GroupNormalization<num_groups=2> (x, s, s) }}", {"s": weight(1)}, opset=21),
        Graph(f"{X4} {{ y = GroupNormalization<num_groups=1> (x, s, s) }}", {"s": weight(1)}, opset=21),
    ),
    "InstanceNormalization": (
        Graph(f"{X4} {{ y = InstanceNormalization (x, s, s) }}", {"s": weight(2)}),
        Graph(f"{X4} {{ y = InstanceNormalization (x, s, s) }}", {"s": weight(1)}),
    ),
    "LayerNormalization": (
        Graph(f"{X3} {{ y = LayerNormalization (x, s) }}", {"s": weight(5)}),
        Graph(f"{X3} {{ y = LayerNormalization (x, s) }}", {"s": weight(1)}),
    ),
    "LSTM": (
        Graph(LSTM.format('hidden_size=3, direction="sideways"'), WEIGHTS),
        Graph(LSTM.format('hidden_size=3, direction="forward"'), WEIGHTS),
    ),
    "LogSoftmax": (
        Graph("(float[8] x) => (float[] y) { y = LogSoftmax<axis=0> (x) }"),
        Graph("(float[4,8] x) => (float[] y) { y = LogSoftmax<axis=0> (x) }"),
    ),
    "LpNormalization": (
        Graph(f"{X3} {{ y = LpNormalization<p=3> (x) }}"),
        Graph(f"{X3} {{ y = LpNormalization<p=1> (x) }}"),
    ),
    "MatMul": (
        Graph("(float[8] x, float[3,8,4] z) => (float[] y) { y = MatMul (x, z) }"),
        Graph("(float[8] x, float[1,8,4] z) => (float[] y) { y = MatMul (x, z) }"),
    ),
    "MeanVarianceNormalization": (
        Graph(f"{X3} {{ y = MeanVarianceNormalization<axes=[0,3]> (x) }}"),
        Graph(f"{X3} {{ y = MeanVarianceNormalization<axes=[0,2]> (x) }}"),
    ),
    "Resize": (
        Graph(
            f"""{X4} {{ y = Resize<mode="linear", coordinate_transformation_mode="tf_half_pixel_for_nn",
            nearest_mode="floor"> (x, , s) }}""",
            {"s": F32([1, 1, 2, 2])},
        ),
        Graph(
            f'{X4} {{ y = Resize<mode="linear", coordinate_transformation_mode="tf_half_pixel_for_nn"> (x, , s) }}',
            {"s": F32([1, 1, 2, 2])},
        ),
    ),
    "Softmax": (
        Graph("(float[8] x) => (float[] y) { y = Softmax<axis=0> (x) }"),
        Graph("(float[4,8] x) => (float[] y) { y = Softmax<axis=0> (x) }"),
    ),
    "TopK": (
        Graph(f"{X3} {{ y, i = TopK<k=7> (x) }}", opset=9),
        Graph(f"{X3} {{ y, i = TopK<k=6> (x) }}", opset=9),
    ),
    "EyeLike": (
        Graph("(uint8[4,8] x) => (float[] y) { y = EyeLike<dtype=1> (x) }", opset=16),
        Graph("(bool[4,8] x) => (float[] y) { y = EyeLike<dtype=1> (x) }", opset=16),
    ),
    "what an output is declared": (
        Graph("(float[4,8] x) => (uint16[4,8] y) { y = Relu (x) }"),
        Graph("(float[4,8] x) => (float[4,8] y) { y = Relu (x) }"),
    ),
    "Loop": (
        Graph(LOOP.replace("(k, go, x)", "(k, , x)"), {"k": I64(3)}, opset=11),
        Graph(LOOP, {"k": I64(3)}, opset=11),
    ),
    "Pow": (
        Graph("(float16[4,8] x, bool[4,7] z) => (float16[] y) { y = Pow (x, z) }", opset=17),
        Graph("(float16[4,8] x, bool[4,8] z) => (float16[] y) { y = Pow (x, z) }", opset=17),
    ),
    **{
        f"Pow of {base}": (
            Graph(f"({base}[4,8] x, {base}[4,8] z) => ({base}[4,8] y) {{ y = Pow (x, z) }}"),
            Graph(f"({base}[4,8] x, float[4,8] z) => ({base}[4,8] y) {{ y = Pow (x, z) }}"),
        )
        for base in ("bool", "int8")
    },
    "Expand of the batch": (
        Graph("(float[n,8] x) => (float[9,8] y) { y = Expand (x, s) }", {"s": np.array([9, 8], I64)}),
        Graph("(float[n,8] x) => (float[8,8] y) { y = Expand (x, s) }", {"s": np.array([8, 8], I64)}),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_lint_refuses_the_one_and_passes_the_other(name: str) -> None:
    bad, good = (graph.lint(targets=TARGETS).errors for graph in PAIRS[name])
    assert any(not error.silent for error in bad)
    assert good == ()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)
def test_so_does_the_compiler() -> None:
    with Judge(TARGETS) as judge:
        said = {name: tuple(judge(graph.proto()).kind for graph in pair) for name, pair in PAIRS.items()}
    assert {name: kinds for name, kinds in said.items() if kinds[0] == "accepted" or kinds[1] != "accepted"} == {}
