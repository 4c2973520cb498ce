"""The judge: every verdict it can give, on graphs and processes that earn it."""

from __future__ import annotations

import importlib.util
import os
import signal

import onnx
import pytest

from tests.exporters.lint.judge import Judge
from tests.exporters.lint.rtx import WHY

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)


def graph(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 20]> g {text}')


RELU = graph("(float[batch, 8] x) => (float[batch, 8] y) { y = Relu (x) }")
PRODUCT = graph("(bfloat16[batch, 8, 8] x) => (bfloat16[batch, 8, 8] y) { y = MatMul (x, x) }")
SHIFT = graph("(float[8] x) => (float[8] y) { [here] y = BitShift (x, x) }")


def test_the_compiler_takes_a_graph_or_says_why_not() -> None:
    with Judge(targets=[(7, 5)]) as judge:  # which computes no BF16: that is for the builder to say
        verdicts = [judge(model) for model in (RELU, SHIFT, PRODUCT, b"")]
    assert [v.kind for v in verdicts] == ["accepted", "unparsed", "unbuilt", "unparsed"]
    assert [v.refused for v in verdicts] == [False, True, True, True]
    assert "'here' (BitShift)" in verdicts[1].message
    assert "sm75" in verdicts[2].message


def test_a_crash_and_a_hang_are_verdicts_and_the_next_graph_is_judged() -> None:
    with Judge() as judge:
        assert not judge(RELU).refused
        assert judge._child is not None
        os.kill(judge._child.pid, signal.SIGSEGV)
        crashed = judge(RELU)
        assert (crashed.kind, "SIGSEGV" in crashed.message) == ("crashed", True)
        assert not judge(RELU).refused
        os.kill(judge._child.pid, signal.SIGSTOP)
        judge._limit = 0.1
        assert judge(RELU).kind == "hung"
