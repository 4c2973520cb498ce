from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from exporters.precision.request import Typing
from exporters.precision.typed import cast_bundle
from tests.digits import NAMES, checkpoint, registered
from tests.peers import import_timm

if TYPE_CHECKING:
    from pathlib import Path

    from exporters.bundle import Bundle
    from tests.deploycli.conftest import Command


def test_an_exported_bundle_passes(deploycli: Command, true_bundle: Bundle) -> None:
    result = deploycli("lint", true_bundle.path)
    assert (result.code, result.err) == (0, "")
    assert "passed 0 errors" in result.out
    assert "attention blocks have a form that TensorRT can fuse" in result.out


def test_every_file_of_a_bundle_is_judged(deploycli: Command, smallest: str) -> None:
    assert deploycli("export", smallest).code == 0
    assert deploycli("cast", smallest, "--allow-fp16", "softmax").code == 0
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
    assert "error 6 layers.0.mlp/QuantizeLinear" in result.out
    assert "try: " in result.out
    assert "FAILED" in result.out
    assert deploycli("lint", "bad.onnx", "--rules", "4,8").code == 0


def test_a_plain_export_of_timms_gets_the_right_complaints(deploycli: Command, tmp_path: Path) -> None:
    """PyTorch's exporter leaves the mask in five dimensions and the scale on both factors."""
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
    rules = {finding["rule"] for finding in report["findings"]}
    assert {16} <= rules, report["findings"]
    assert not any(block["fusable"] for block in report["attention"])
    assert len(report["attention"]) == 2


def test_uint8_of_onnxruntime_gets_the_right_complaints(deploycli: Command, smallest: str, tmp_path: Path) -> None:
    assert deploycli("export", smallest).code == 0

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # it has no types
        def __init__(self) -> None:
            self._feeds = iter([{"images": np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype("f")}])

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[type-arg]  # of tests
            return next(self._feeds, None)

    source = tmp_path / "artifacts" / smallest / "model.onnx"
    quantize_static(source, tmp_path / "uint8.onnx", Reader(), activation_type=QuantType.QUInt8)
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


def test_a_softmax_in_fp32_is_said(deploycli: Command, smallest: str, tmp_path: Path) -> None:
    from exporters.bundle import Bundle

    assert deploycli("export", smallest).code == 0
    derived = cast_bundle(Bundle.open(tmp_path / "artifacts" / smallest), Typing())
    result = deploycli("lint", derived.bundle.path / "model.fp16.onnx")
    assert result.code == 0
    assert "--allow-fp16 softmax" in result.out
