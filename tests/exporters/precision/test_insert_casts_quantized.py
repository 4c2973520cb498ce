"""Graphs with Q/DQ: their scales take the reduced type, where it holds them and the opset allows it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.exporters.precision.casts import F16, F32, INT8, QUANTIZED, assert_close, source, typed


@pytest.mark.parametrize("opset", [13, 18, 19, 21, 23])
def test_quantized_graph(opset: int) -> None:
    graph = typed(source(QUANTIZED, opset, **INT8, t=np.full(8, 2.0**-6)))
    new = opset >= 19
    assert {graph.types[name] for name in ("d", "v")} == {F16 if new else F32}
    assert graph.constant("s").dtype == graph.constant("t").dtype == (np.float16 if new else np.float32)
    assert graph.ops["Cast"] == (2 if new else 5)
    assert all(("its scale is FP32" in reason) for reason in graph.notes.values())
    assert len(graph.notes) == (0 if new else 3)
    assert_close(graph, 2e-2)


def test_result_type_that_an_attribute_of_a_dequantizer_says() -> None:
    text = QUANTIZED.replace("(q, s, z)", "<output_dtype = 1> (q, s, z)").replace(
        "DequantizeLinear (q", "DequantizeLinear (q"
    )
    graph = typed(source(text, 23, **INT8, t=np.full(8, 2.0**-6)))
    assert graph.types["d"] == F16
    assert graph.ops["Cast"] == 2


def test_scales_that_fp16_cannot_hold_stay_fp32() -> None:
    scales = np.full(8, 2.0**-6)
    scales[3] = 2.0**-16
    graph = typed(source(QUANTIZED, 20, **INT8, t=scales))
    assert graph.notes.pop("block.3/DequantizeLinear") == "constant: 1 of 8 scales of t would lose their digits"
    assert set(graph.notes.values()) == {
        "constant: it is multiplied with what t scales, in FP32: NVIDIA's builder takes no two types"
    }
    assert graph.constant("t").dtype == np.float32
    assert_close(graph, 2e-2)
