"""The lint as a library: its arguments, its report, and what it does with files that are no models."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deploycli.exporters.graph.onnx_file import quiet, read
from deploycli.exporters.lint import RULES, AttentionBlock, LintReport, lint
from deploycli.models.errors import DeployError, UsageError
from tests.exporters.lint.mutations import damage
from tests.exporters.lint.test_cases import CASES, TWINS
from tests.exporters.lint.texts import F16, F32, Graph, attention, scales, weight

RELU = Graph("(float[batch, 8] x) => (float[batch, 8] y) { y = Relu (x) }")
SPOILED = Graph(  # by rules 1, 4, 6, 8, 14, 15 and 18
    """(float16[8, 8] x, float[8, 8] unused) => (float16[8, 8] y) {
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)
        m = Gemm <alpha = 0.5> (d, w, b) y = Add (m, c) }""",
    scales(F16, w=weight(8, 8, dtype=F16), b=weight(8, dtype=F16), c=np.array([np.nan] * 8, F32), s=F16(0)),
    ir_version=11,
)


def test_rules_are_numbered_in_order_and_say_what_they_are() -> None:
    assert [rule.number for rule in RULES] == list(range(1, len(RULES) + 1))
    for rule in RULES:
        text = rule.check.__doc__ or ""
        assert text.startswith(f"Rule {rule.number}: ")
        assert "Source: " in text
        assert rule.summary
        assert not rule.summary.endswith(".")


def test_findings_come_by_rule_and_every_kind_is_counted() -> None:
    report = SPOILED.lint()
    rules = [f.number for f in report.findings]
    assert rules == sorted(rules)
    assert {1, 4, 6, 8, 14, 15, 18} <= set(rules)
    assert set(report.errors) | set(report.warnings) == set(report.findings)
    assert not report.passed
    assert report.tensorrt == "11.4"


@pytest.mark.parametrize("chosen", [[4, 6, 8, 14, 15], [15], {14, 4}, range(1, 20)])
def test_a_caller_selects_rules(chosen: list[int]) -> None:
    report = SPOILED.lint(rules=chosen)
    assert report.rules == tuple(rule.name for rule in RULES if rule.number in chosen)
    assert SPOILED.lint(rules=report.rules) == report
    everything = SPOILED.lint()
    assert report.findings == tuple(f for f in everything.findings if f.number in chosen)


def test_a_report_is_json_and_frozen() -> None:
    report = attention(quantize="qk").lint()
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["passed"] is report.passed is True
    assert [f["number"] for f in data["findings"]] == [f.number for f in report.findings]
    assert set(data["findings"][0]) == {"rule", "number", "level", "node", "message", "hint", "silent"}
    assert data["attention"][0]["fusable"] is False
    assert data["attention"][0]["tokens"] == [49, 49]
    with pytest.raises(FrozenInstanceError):
        report.findings[0].rule = "7"  # type: ignore[misc] # it must not be possible


def test_a_report_without_rules_does_not_pass() -> None:
    assert not LintReport("g", "11.4", (), (), ()).passed
    with pytest.raises(UsageError, match="no rules"):
        RELU.lint(rules=[])
    with pytest.raises(UsageError, match="no rule 0, 99"):
        RELU.lint(rules=[99, 0, 4])
    with pytest.raises(UsageError, match="no rule strong-typeing") as refused:
        RELU.lint(rules=["strong-typeing"])
    assert refused.value.hint == "strong-typing"


@pytest.mark.parametrize("version", ["11.4", "11.4.0.106", "10.12", "10.16.1", "11.0", "11.999"])
def test_versions_that_are_known(version: str) -> None:
    assert RELU.lint(version=version).tensorrt == version


@pytest.mark.parametrize(
    "version", ["", "11", "eleven", "10.11", "9.3", "12.0", "11.4.x", "11..4", "-11.4", "1" * 5000]
)
def test_versions_that_are_not(version: str) -> None:
    with pytest.raises(UsageError, match="TensorRT"):
        RELU.lint(version=version)


def test_plugins_and_profiles_widen_what_is_allowed() -> None:
    plugin = replace(RELU, text=RELU.text.replace("Relu", "com.microsoft.FastGelu"))
    assert [f.number for f in plugin.lint().findings] == [2]
    assert plugin.lint(plugins=["FastGelu"]).findings == ()
    quantizer = replace(RELU, text=RELU.text.replace("Relu", "com.microsoft.TRT_DynamicQuantize"))
    assert quantizer.lint(rules=[2]).findings == ()
    wide = replace(RELU, text=RELU.text.replace("8", "tokens"))
    assert [f.number for f in wide.lint().findings] == [10]
    assert wide.lint(profiled=["tokens"]).findings == ()


def test_functions_are_seen_through() -> None:
    relu = onnx.helper.make_node("BitShift", ["a", "a"], ["b"], direction="LEFT", name="inside")
    opsets = [onnx.helper.make_opsetid("", 20)]
    model = replace(RELU, text=RELU.text.replace("Relu", "com.microsoft.Own")).proto()
    model.functions.append(onnx.helper.make_function("com.microsoft", "Own", ["a"], ["b"], [relu], opsets))
    loaded = ir.from_proto(model)
    found = [f.message for f in lint(loaded, rules=[2]).findings]
    assert found == ["BitShift is not supported"]
    assert len(loaded.functions) == 1


def test_the_onnx_attention_operator_is_a_block() -> None:
    head = "(float16[batch, 3, 49, 32] q, float16[batch, 3, 49, 32] k, float16[batch, 3, 49, 32] v)"
    graph = Graph(
        f"{head} => (float16[batch, 3, 49, 32] y) {{ [a] y = Attention (q, k, v, m) }}",
        {"m": weight(49, 49, dtype=F16)},
        opset=23,
    )
    assert graph.lint().attention == (AttentionBlock("a", "fp16", 32, (49, 49), 49 * 49 * 2),)
    packed = (
        "(float16[batch, 49, 96] q, float16[batch, 49, 96] k, float16[batch, 49, 96] v) => (float16[batch, 49, 96] y)"
    )
    graph = Graph(f"{packed} {{ [a] y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v) }}", opset=23)
    assert graph.lint().attention == (AttentionBlock("a", "fp16", 32, (49, 49), 0),)
    graph = replace(graph, text=graph.text.replace("q_num_heads = 3", "softcap = 1.0, q_num_heads = 3"))
    assert not graph.lint().attention[0].fusable
    assert [f.number for f in replace(graph, version="10.13").lint().errors if f.number == 2] == [2]


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"not a model", b"\x89PNG\r\n\x1a\n", b"\x08\x0a", b"{}"])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no ONNX file"):
        lint(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "model.onnx", tmp_path):
        with pytest.raises(UsageError, match="there is no file"):
            lint(str(path))


def test_a_value_that_two_nodes_make(tmp_path: Path) -> None:
    model = RELU.proto()
    model.graph.node.append(model.graph.node[0])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match="redeclared"):
        lint(tmp_path / "model.onnx")


def test_nothing_goes_to_the_terminal(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for case in CASES:
        path.write_bytes(case.bad.proto().SerializeToString())
        lint(path)
    assert capfd.readouterr() == ("", "")


def test_reports_do_not_depend_on_the_process(tmp_path: Path) -> None:
    for i, graph in enumerate(
        (SPOILED, attention(mask=(1, 4, 3, 49, 49), five=True, cast=True), *(c.bad for c in CASES[::9]))
    ):
        (tmp_path / f"{i:03}.onnx").write_bytes(graph.proto().SerializeToString())
    program = """
import json, sys
from pathlib import Path
from deploycli.exporters.lint import lint
print(json.dumps([lint(path).to_json() for path in sorted(Path(sys.argv[1]).glob("*.onnx"))]))
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert '"rule": "attention-form"' in outputs[0]


BASES = [graph.proto() for graph in (*(c.bad for c in CASES), *(c.good for c in TWINS if c.good is not None))]


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(BASES) - 1), st.integers(0, 2**32), st.booleans())
@example(79, 480, False)  # an Attention of scalars
@example(156, 53412, False)  # a mask of no type
def test_a_damaged_model_gives_a_report_or_a_refusal(base: int, seed: int, in_memory: bool) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(BASES[base])
    damage(model, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            report = lint(path)
        except DeployError:
            return
        assert lint(path) == report
        json.dumps(report.to_json(), allow_nan=False)
        assert all(f.node and f.message for f in report.findings)
        if in_memory:
            with quiet():
                loaded = read(path)[0]
            lint(loaded, rules=[4, 6, 8, 15, 16])


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, len(BASES) - 1),
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_a_damaged_file_gives_a_report_or_a_refusal(base: int, bytes_: list[tuple[int, int]]) -> None:
    content = bytearray(BASES[base].SerializeToString())
    for position, byte in bytes_:
        content[position % len(content)] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        with contextlib.suppress(DeployError):
            lint(path)
