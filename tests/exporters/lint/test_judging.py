"""NVIDIA's parser as a judge: its verdicts, and what is said where there is none."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from deploycli.exporters.graph.onnx_file import write_model, write_outline
from deploycli.exporters.lint import lint
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.verdict import MOST_REFUSALS, Verdict
from deploycli.exporters.tensorrt.parser import judge, judging
from tests.exporters.lint.rtx import WHY
from tests.exporters.lint.texts import F16, Graph, attention, weight

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

real = pytest.mark.skipif(importlib.util.find_spec(RTX.module) is None, reason=WHY)

FINE = Graph("(float[2, 4] x) => (float[2, 4] y) { y = Abs (x) }")
REFUSED = Graph("(float[2, 4] x) => (float[2, 4] y) { a = Abs (x) y = Det (a) }")
NON_ZERO = Graph("(float[2, 4] x) => (int64[2, n] y) { y = NonZero (x) }")
ADDS = Graph("(float[2, 4] x, float[3, 4] z) => (float[2, 4] y) { y = Add (x, z) }")
SCATTER = Graph(
    '(float[2, 4] x, int64[2, 4] i) => (float[2, 4] y) { y = ScatterElements <reduction = "add"> (x, i, x) }'
)
ATTENTION = Graph(
    "(float16[2, 3, 49, 32] q, float16[2, 3, 49, 32] k) => (float16[2, 3, 49, 32] y) { y = Attention (q, k, k) }",
    opset=23,
)


def judged(model: onnx.ModelProto, folder: Path, **options: Any) -> Verdict:
    onnx.save(model, folder / "model.onnx")
    return judge(folder / "model.onnx", **options)


@real
class TestVerdict:
    def test_a_file_is_taken(self, tmp_path: Path) -> None:
        found = judged(FINE.proto(), tmp_path)
        assert found.is_taken
        assert found.judge.startswith("TensorRT for RTX 1.")
        assert found.to_json()["taken"] is True

    def test_a_refusal_names_node_and_operator(self, tmp_path: Path) -> None:
        (found,) = judged(REFUSED.proto(), tmp_path).refusals
        assert (found.node, found.index, found.operator, found.code) == ("Det.1", 1, "Det", "UNSUPPORTED_NODE")
        assert str(found) == "node 1 'Det.1' (Det): there is no form of it that is taken [UNSUPPORTED_NODE]"

    def test_where_the_parser_names_no_node_it_is_the_one_that_it_was_reading(self, tmp_path: Path) -> None:
        model = SCATTER.proto()
        model.graph.node[0].name = "a\x1b[31m [Abs]\n b"
        (found,) = judged(model, tmp_path).refusals
        assert (found.node, found.operator) == ("a\x1b[31m [Abs]\n b", "ScatterElements")
        assert r"'a\x1b[31m [Abs]\n b' (ScatterElements): Unsupported reduction" in str(found)

    def test_the_words_are_without_what_a_missing_driver_adds(self, tmp_path: Path) -> None:
        (found,) = judged(ADDS.proto(), tmp_path).refusals
        assert "broadcast dimensions must be conformable" in found.message
        assert "cuda" not in found.message.lower()
        assert "_src" not in found.message
        assert "\n" not in found.message

    def test_every_error_is_counted_and_the_first_are_told(self, tmp_path: Path) -> None:
        body = " ".join(f"y{i} = Det (x)" for i in range(MOST_REFUSALS + 7))
        found = judged(Graph(f"(float[2, 2] x) => (float y0) {{ {body} }}").proto(), tmp_path)
        assert [refusal.node for refusal in found.refusals] == [f"Det.{i}" for i in range(MOST_REFUSALS)]
        assert found.more == 7

    def test_a_node_of_an_inner_graph(self, tmp_path: Path) -> None:
        graph = Graph(
            """(float[2, 2] x, bool c) => (float y)
            { y = If (c) <then_branch = t () => (float z) { z = Det (x) },
                          else_branch = e () => (float w) { w = ReduceSum <keepdims = 0> (x) }> }"""
        )
        (found,) = judged(graph.proto(), tmp_path).refusals
        assert found.operator == "Det"
        assert found.inside[0].startswith("If.0")
        assert " in If.0 (If)" in found.where

    @pytest.mark.parametrize("nodes", [0, 1])
    def test_no_graph_is_a_refusal_though_the_parser_takes_it(self, tmp_path: Path, nodes: int) -> None:
        made = [helper.make_node("Abs", ["x"], ["y"])] * nodes
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
        model = helper.make_model(helper.make_graph(made, "g", [x], []), opset_imports=[helper.make_opsetid("", 20)])
        (found,) = judged(model, tmp_path).refusals
        assert str(found).startswith("the graph: it holds no graph: the parser reads ")

    def test_what_is_no_onnx_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"\xff" * 40)
        (found,) = judge(tmp_path / "model.onnx").refusals
        assert "Failed to parse the ONNX model" in found.message

    def test_weights_above_two_gigabytes(self, tmp_path: Path) -> None:
        shape = (2**15, 2**15)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", shape[0]])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", shape[1]])],
        )
        stored = graph.initializer.add(dims=shape, data_type=TensorProto.FLOAT, name="w", data_location=1)
        for key, value in (("location", "w.data"), ("offset", 0), ("length", 4 * 2**30)):
            stored.external_data.add(key=key, value=str(value))
        with (tmp_path / "w.data").open("wb") as file:
            file.truncate(4 * 2**30)  # a hole: it takes no room
        assert judged(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path).is_taken


@real
class TestPlugins:
    @pytest.mark.parametrize(("graph", "lacking"), [(NON_ZERO, "NonZero"), (SCATTER, "ScatterElements")])
    def test_an_operator_that_tensorrt_alone_has_is_no_disagreement(self, graph: Graph, lacking: str) -> None:
        report = graph.lint(rules=[2], parser=judging)
        assert report.parser is not None
        assert (report.parser.refusals, report.parser.lacking, report.parser.is_taken) == ((), (lacking,), False)
        assert (report.passed, report.disagreement) == (True, "")

    def test_nor_is_one_that_a_plugin_will_provide(self, tmp_path: Path) -> None:
        onnx.save(
            Graph("(float[2, 4] x) => (float[2, 4] y) { y = com.microsoft.Mine (x) }").proto(), tmp_path / "model.onnx"
        )
        report = lint(tmp_path / "model.onnx", plugins=["Mine"], parser=judging)
        assert report.parser is not None
        assert (report.parser.lacking, report.passed, report.disagreement) == (("Mine",), True, "")
        report = lint(tmp_path / "model.onnx", parser=judging)
        assert report.parser is not None
        assert ([r.operator for r in report.parser.refusals], report.parser.lacking) == (["Mine"], ())

    def test_what_else_is_refused_stays_refused(self, tmp_path: Path) -> None:
        graph = Graph("(float[2, 4] x) => (int64[2, n] y, float[2, 4] z) { z = Det (x) y = NonZero (x) }")
        onnx.save(graph.proto(), tmp_path / "model.onnx")
        report = lint(tmp_path / "model.onnx", parser=judging)
        assert report.parser is not None
        assert [r.operator for r in report.parser.refusals] == ["Det"]


@real
class TestDisagreement:
    def test_the_rules_find_nothing(self) -> None:
        report = lint(ADDS.model(), rules=[4], parser=judging)
        assert not report.errors
        assert (report.refused, report.passed) == (True, False)
        found = "the rules find no error, and the parser refuses node 0 'Add.0' (Add): ITensor::getDimensions: "
        assert report.disagreement.startswith(found)

    def test_the_parser_finds_nothing(self) -> None:
        report = lint(ATTENTION.model(), rules=[2], version="10.13", parser=judging)
        assert report.errors
        assert report.disagreement.startswith(
            "rule operator-support finds errors for TensorRT 10.13, and the parser takes the graph"
        )
        assert report.to_json()["parser"]["taken"] is True
        assert not report.passed

    @pytest.mark.parametrize("graph", [FINE, REFUSED])
    def test_they_agree(self, graph: Graph) -> None:
        assert graph.lint(parser=judging).disagreement == ""


@real
class TestOutline:
    @pytest.mark.parametrize(
        "graph",
        [
            FINE,
            REFUSED,
            ADDS,
            SCATTER,
            attention(mask=(1, 3, 197, 197), tokens=197),
            attention(quantize="qkpvo"),
            Graph(
                """(float16[b, 300] x) => (float16[b, 20000] y)
                { d = DequantizeLinear <axis = 1> (w, s) y = MatMul (x, d) }""",
                {"w": np.ones((300, 20000), np.int8), "s": weight(20000, dtype=F16)},
            ),
            Graph("(float[b, 9000] x) => (float[b, 9000] y) { y = Gather <axis = 1> (x, i) }", {"i": np.arange(9000)}),
            Graph(
                """(float[b, 64, 8, 8] x) => (float[b, 300, 6, 6] y)
                { y = Conv <kernel_shape = [3, 3]> (x, w) }""",
                {"w": weight(300, 64, 3, 3)},
            ),
            Graph("(float[b, 300] x) => (float[b, 301] y) { y = MatMul (x, w) }", {"w": weight(299, 301)}),
            Graph("(float16[b, 300] x) => (float16[b, 301] y) { y = MatMul (x, w) }", {"w": weight(300, 301)}),
        ],
    )
    def test_the_parser_says_of_the_outline_what_it_says_of_the_file(self, graph: Graph, tmp_path: Path) -> None:
        model = graph.model()
        write_model(model, tmp_path / "whole.onnx")
        write_outline(model, tmp_path / "outline.onnx")
        assert judge(tmp_path / "outline.onnx") == judge(tmp_path / "whole.onnx")

    def test_it_holds_what_decides_and_no_weights(self, tmp_path: Path) -> None:
        tensors = {
            "weights": weight(300, 300),
            "index": np.arange(30_000),
            "scale": weight(70_000),
            "bias": weight(300),
            "stored": np.ones((70_000, 2), np.int8),
        }
        graph = Graph(
            """(float[b, 300] x) => (float[b, 300] y, float[70000, 2] z, float[b, 30000] g)
            { a = MatMul (x, weights) y = Add (a, bias) z = DequantizeLinear <axis = 0> (stored, scale)
              g = Gather <axis = 1> (x, index) }""",
            tensors,
        )
        model = graph.model()
        write_outline(model, tmp_path / "outline.onnx")
        outline = onnx.load(tmp_path / "outline.onnx")
        found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in outline.graph.initializer}
        assert found.keys() == tensors.keys()
        for name, array in tensors.items():
            assert found[name].dtype == array.dtype
            expected = np.zeros_like(array) if name in ("weights", "stored") else array
            np.testing.assert_array_equal(found[name], expected)
        data = (tmp_path / "outline.onnx.data").stat()
        assert data.st_size >= 300 * 300 * 4 + 140_000
        assert data.st_blocks == 0
        assert isinstance(model.graph.initializers["weights"].const_value, ir.TensorProtocol)
        np.testing.assert_array_equal(model.graph.initializers["weights"].const_value.numpy(), tensors["weights"])

    def test_a_graph_in_memory_is_judged_once(self) -> None:
        graph = Graph("(float[b, 300] x) => (float[b, 300] y) { y = MatMul (x, w) }", {"w": weight(300, 300)})
        other = Graph(graph.text, {"w": weight(300, 300, seed=1)})
        first = graph.lint(parser=judging).parser
        asked: list[Path] = []

        def counted(path: Path) -> AbstractContextManager[Callable[[], Verdict]]:
            asked.append(path)
            return judging(path)

        assert other.lint(parser=counted).parser == first
        assert not asked
        Graph(graph.text, {"w": weight(300, 301)}).lint(parser=counted)
        assert asked


LIBRARIES = {
    "raise ImportError('libtensorrt_rtx.so.1: cannot open shared object file')": (
        "TensorRT for RTX is installed, but its shared library libtensorrt_rtx.so.1 is missing"
    ),
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": (
        "it was killed by SIGSEGV: it crashed, while loading TensorRT for RTX"
    ),
    "import time; time.sleep(60)": "it was stopped after 2 s, while loading TensorRT for RTX",
    "raise MemoryError": "not enough memory while loading TensorRT for RTX",
    "__version__ = '1.5.0.114'": "TensorRT for RTX 1.5.0.114 is installed",
    "": "is not NVIDIA's",
}


@pytest.mark.parametrize("code", LIBRARIES)
def test_a_library_that_does_not_work_is_told(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorrt_rtx").mkdir()
    (tmp_path / "tensorrt_rtx" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    found = judged(FINE.proto(), tmp_path, timeout=2)
    assert LIBRARIES[code] in found.problem
    assert (found.refusals, found.is_taken, found.to_json()["taken"]) == ((), False, None)
    assert capfd.readouterr() == ("", "")


def test_memory_is_looked_at_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploycli.exporters.tensorrt.parser.available", lambda: 100)
    assert "not enough memory" in judged(FINE.proto(), tmp_path).problem
