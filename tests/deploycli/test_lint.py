from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_static

from deploycli.exporters.cast import cast_bundle
from deploycli.exporters.precision.options import CastOptions
from tests.calibration import Batches
from tests.deploycli.commands import assert_refused
from tests.digits import NAMES, checkpoint, registered
from tests.exporters.lint.rtx import WHY
from tests.peers import import_timm

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.bundle.bundle import Bundle
    from tests.deploycli.conftest import Command

installed = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)


def test_an_exported_bundle_passes(deploycli: Command, true_bundle: Bundle) -> None:
    result = deploycli("lint", true_bundle.path)
    assert (result.code, result.err) == (0, "")
    assert "passed 0 errors" in result.out
    assert "attention blocks have a form that TensorRT can fuse" in result.out


def test_every_file_of_a_bundle_is_judged(deploycli: Command, smallest: str) -> None:
    assert deploycli("export", smallest).code == 0
    assert deploycli("cast", smallest).code == 0
    result = deploycli("lint", "--json")
    reports = json.loads(result.out)
    assert result.code == 0
    assert [report["model"].rpartition("/")[2] for report in reports] == ["model.onnx", "model.fp16.onnx"]
    assert all(report["passed"] for report in reports)


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_of_our_typed_graphs_can_be_fused(deploycli: Command, name: str) -> None:
    with registered():
        assert deploycli("export", name, "--checkpoint", checkpoint(name)).code == 0
    arguments = ("--precision", "int8", "--allow-random-calibration", "--samples", 2, "--dry-run", "--json")
    result = deploycli("build-trt", name, *arguments)
    assert result.code == 0, result.err
    planned = json.loads(result.out)
    assert [engine["precision"] for engine in planned] == ["fp16", "int8"]
    for engine in planned:
        report = engine["lint"]
        assert report["passed"]
        assert report["attention"]
        assert [block["reasons"] for block in report["attention"] if not block["fusable"]] == []


def test_errors_are_exit_3_and_name_rule_node_and_remedy(deploycli: Command, tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[2, 4] x) => (float[2, 4] y) {
            s = Constant <value_float = 0.0> ()
            z = Constant <value: tensor = int8 {0}> ()
            q = QuantizeLinear (x, s, z)
            y = DequantizeLinear (q, s, z)
        }
    """)
    model.graph.node[2].name = "layers.0.mlp/QuantizeLinear"
    onnx.save(model, tmp_path / "bad.onnx")
    result = deploycli("lint", "bad.onnx")
    assert result.code == 3
    assert "error quantization (6) layers.0.mlp/QuantizeLinear" in result.out
    assert "try: " in result.out
    assert "FAILED" in result.out
    assert deploycli("lint", "bad.onnx", "--rules", "4,8").code == 0


def test_a_plain_export_of_timms(deploycli: Command, tmp_path: Path) -> None:
    timm = import_timm()
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=4, embed_dim=32, depths=(2,), num_heads=(2,), window_size=8, num_classes=8
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            model, (torch.zeros(2, 3, 64, 64),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=20, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(str(tmp_path / "timm.onnx"))
    result = deploycli("lint", "timm.onnx", "--json")
    (report,) = json.loads(result.out)
    assert report["passed"], report["findings"]
    assert len(report["attention"]) == 2
    assert all("its products are FP32" in block["reasons"][0] for block in report["attention"])


def test_uint8_of_onnxruntime_gets_the_right_complaints(deploycli: Command, smallest: str, tmp_path: Path) -> None:
    assert deploycli("export", smallest).code == 0
    noise = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    source = tmp_path / "artifacts" / smallest / "model.onnx"
    quantize_static(source, tmp_path / "uint8.onnx", Batches([noise]), activation_type=QuantType.QUInt8)
    result = deploycli("lint", "uint8.onnx", "--json")
    (report,) = json.loads(result.out)
    assert result.code == 3
    messages = " ".join(finding["message"] for finding in report["findings"] if finding["level"] == "error")
    assert "UINT8" in messages.upper()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensorrt", "9.3"], "9.3"),
        (["--rules", "four"], "four"),
        (["--rules", "99"], "99"),
        (["nowhere.onnx"], "nowhere.onnx"),
        (["--tensorrt", "eleven"], "eleven"),
    ],
)
def test_what_cannot_be_read_is_exit_2(
    deploycli: Command, true_bundle: Bundle, arguments: list[str], message: str
) -> None:
    paths = [] if arguments[0].endswith(".onnx") else [true_bundle.path]
    result = deploycli("lint", *paths, *arguments)
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize("keep", [(), ("Softmax",)])
def test_attention_is_fused_wherever_its_softmax_is_computed(
    deploycli: Command, smallest: str, tmp_path: Path, keep: tuple[str, ...]
) -> None:
    from deploycli.exporters.bundle.bundle import Bundle

    assert deploycli("export", smallest).code == 0
    derived = cast_bundle(Bundle.open(tmp_path / "artifacts" / smallest), CastOptions(keep=keep))
    assert sum("Softmax" in refusal.node for step in derived.artifact.steps for refusal in step.refusals) == 2 * len(
        keep
    )
    (report,) = json.loads(deploycli("lint", derived.bundle.path / "model.fp16.onnx", "--rules", "16", "--json").out)
    assert [finding["message"] for finding in report["findings"] if "Softmax" in finding["message"]] == []
    assert len(report["attention"]) == 2


def test_cast_and_build_trt_type_a_graph_alike(deploycli: Command, smallest: str, tmp_path: Path) -> None:
    for folder, command in (("a", ("cast",)), ("b", ("build-trt", "--dry-run"))):
        assert deploycli("export", smallest, "-o", folder).code == 0
        assert deploycli(*command, "-o", folder).code == 0
    files = [tmp_path / folder / smallest / "model.fp16.onnx" for folder in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


ADDS = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[2, 2] x, float[3, 2] z) => (float[3, 2] y) { y = Add (x, z) }
""")


@pytest.fixture
def refused(tmp_path: Path) -> str:
    """A file in which rule 4 finds nothing, and that NVIDIA's parser refuses."""
    ADDS.graph.node[0].name = "blocks.0\x1b[31m/Add"
    onnx.save(ADDS, tmp_path / "refused.onnx")
    return "refused.onnx"


class TestParser:
    @installed
    def test_what_the_parser_alone_refuses_is_exit_3(self, deploycli: Command, refused: str) -> None:
        result = deploycli("lint", refused, "--rules", "4", "--parser", "rtx")
        assert result.code == 3
        assert r"node 0 'blocks.0\x1b[31m/Add' (Add): ITensor::getDimensions: Error Code 4: Shape Error" in result.out
        assert "they disagree: the rules find no error, and the parser refuses" in result.out
        assert "FAILED 0 errors, 0 warnings, 1 rules; refused by the parser" in result.out
        assert "\x1b" not in result.out
        (report,) = json.loads(deploycli("lint", refused, "--rules", "4", "--parser", "rtx", "--json").out)
        assert (report["passed"], report["findings"], report["parser"]["taken"]) == (False, [], False)
        assert report["parser"]["refusals"][0]["operator"] == "Add"
        assert report["disagreement"]

    @installed
    def test_a_file_that_it_takes(self, deploycli: Command, true_bundle: Bundle) -> None:
        result = deploycli("lint", true_bundle.path, "--parser", "rtx")
        assert (result.code, result.err) == (0, "")
        assert "the parser of TensorRT for RTX 1." in result.out
        assert " takes it" in result.out

    def test_none_asks_nobody_and_neither_does_a_choice_of_rules(self, deploycli: Command, refused: str) -> None:
        for options in (("--parser", "none", "--rules", "4"), ("--rules", "4")):
            result = deploycli("lint", refused, *options)
            assert result.code == 0
            assert "parser" not in result.out
        (report,) = json.loads(deploycli("lint", refused, "--rules", "4", "--json").out)
        assert report["parser"] is None

    def test_without_the_library(self, deploycli: Command, refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        result = deploycli("lint", refused, "--rules", "4", "--parser", "rtx")
        assert_refused(
            result, 7, "TensorRT for RTX is not installed", "expected: TensorRT for RTX 1.7 or later", "try: "
        )
        result = deploycli("lint", refused, "--json")
        assert json.loads(result.out)[0]["parser"] is None

    def test_a_library_that_crashes_ends_nothing(
        self, deploycli: Command, refused: str, true_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "site" / "tensorrt_rtx").mkdir(parents=True)
        (tmp_path / "site" / "tensorrt_rtx" / "__init__.py").write_text("import os; os.abort()")
        monkeypatch.syspath_prepend(tmp_path / "site")
        result = deploycli("lint", refused, true_bundle.path, "--rules", "4", "--parser", "rtx")
        assert (result.code, result.err) == (7, "")
        told = "no verdict of the parser of TensorRT for RTX: it was killed by SIGABRT: it gave up, while loading"
        assert result.out.count(told) == 2
        assert result.out.count("passed 0 errors") == 2
        assert deploycli("lint", true_bundle.path).code == 0  # nobody asked for it


@installed
def test_no_command_writes_what_the_parser_refuses(deploycli: Command, refused: str, tmp_path: Path) -> None:
    result = deploycli("optimize", refused, "-o", "out.onnx", "--check", "0")
    assert_refused(result, 3, "/Add", "try: --no-lint writes it all the same")
    assert not (tmp_path / "out.onnx").exists()
    assert deploycli("optimize", refused, "-o", "out.onnx", "--check", "0", "--no-lint").code == 0
    assert (tmp_path / "out.onnx").exists()
