"""The lint on what this tool exports, and on what others make of it."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16

from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.lint import lint
from deploycli.exporters.passes.common.names import name_nodes
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.trace import MODULE_KEY, trace
from deploycli.models.spec import TensorSpec
from tests.calibration import Batches
from tests.models.crossformers import tiny_crossformer
from tests.models.swins import tiny_swin
from tests.models.vits import tiny_vit

if TYPE_CHECKING:
    from pathlib import Path

    import torch

ONE_HEAD = "it has one head, a mask and a dynamic batch"

MODELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "swin": (tiny_swin, {"img_size": [32, 32], "depths": [2, 1], "num_heads": [1, 2], "window_size": 8}, 32),
    "vit": (tiny_vit, {"depth": 2, "embed_dim": 64, "num_heads": 2}, 32),
    "crossformer": (tiny_crossformer, {"depths": [1, 1, 1]}, 64),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family once, FP32, as `deploycli export` writes it."""
    folder = tmp_path_factory.mktemp("exported")
    paths = {}
    for name, (make, options, size) in MODELS.items():
        module: torch.nn.Module = make(**options)
        model = trace(module, [TensorSpec("images", (3, size, size))], ["logits"])
        rewrite(model)
        name_nodes(model, MODULE_KEY)
        paths[name] = folder / f"{name}.onnx"
        write_model(model, paths[name], "always" if name == "vit" else "auto")
    return paths


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("version", ["10.12", "10.16.1", "11.4", "11.99"])
def test_an_export_has_no_errors(exported: dict[str, Path], name: str, version: str) -> None:
    report = lint(exported[name], version=version)
    assert report.errors == ()
    assert report.passed
    assert {f.number for f in report.warnings} <= {11, 16, 17}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_memory_is_judged_like_its_file_and_not_changed(exported: dict[str, Path], name: str) -> None:
    model = ir.load(exported[name])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    first, second = lint(model), lint(exported[name])
    assert (first.findings, first.attention) == (second.findings, second.attention)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_attention_is_found_as_it_is_traced() -> None:
    make, options, size = MODELS["swin"]
    model = trace(make(**options), [TensorSpec("images", (3, size, size))], ["logits"])
    name_nodes(model, MODULE_KEY)
    report = lint(model, rules=[16])
    nodes = [f"layers.{i}.blocks.{j}.attn/Softmax" for i, j in ((0, 0), (0, 1), (1, 0))]
    assert [block.node for block in report.attention] == nodes
    assert [ONE_HEAD in block.reasons for block in report.attention] == [True, False, False]  # two masks


@pytest.mark.parametrize(("name", "blocks"), [("vit", 2), ("crossformer", 3)])
def test_fp32_is_a_reason_against_a_plain_attention(exported: dict[str, Path], name: str, blocks: int) -> None:
    report = lint(exported[name])
    assert len(report.attention) == blocks
    for block in report.attention:
        assert block.precision == "fp32"
        assert block.head_dim == 32
        assert block.reasons[-1] == "its products are FP32; fused kernels are FP16, BF16, INT8 and FP8"
        assert set(block.reasons[:-1]) <= {ONE_HEAD}
    assert len([f for f in report.findings if f.number == 16]) == (name == "crossformer")


def to_fp16(path: Path) -> onnx.ModelProto:
    """Another tool's conversion."""
    model = convert_float_to_float16(onnx.load(path), keep_io_types=False)
    assert isinstance(model, onnx.ModelProto)
    return model


# As TensorRT for RTX 1.7.1 compiles them: heads of 8 channels, and one head with a bias, are no kernel.
@pytest.mark.parametrize(
    ("name", "fused"),
    [("vit", [True, True]), ("crossformer", [False, True, True]), ("swin", [False, False, False])],
)
def test_fp16(exported: dict[str, Path], name: str, fused: list[bool]) -> None:
    report = lint(ir.from_proto(to_fp16(exported[name])))
    assert report.errors == ()
    assert {block.precision for block in report.attention} == {"fp16"}
    assert [block.fusable for block in report.attention] == fused


@pytest.mark.parametrize("name", MODELS)
def test_one_weight_left_in_fp32_is_found(exported: dict[str, Path], name: str) -> None:
    model = to_fp16(exported[name])
    weights = [t for t in model.graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT16]
    wide = numpy_helper.to_array(weights[0]).astype(np.float32)
    weights[0].CopyFrom(numpy_helper.from_array(wide, weights[0].name))
    report = lint(ir.from_proto(model), rules=[4])
    assert len(report.errors) >= 1
    assert weights[0].name in report.errors[0].message


def quantized(path: Path, target: Path, **options: Any) -> Path:
    noise = np.random.default_rng(0).standard_normal((2, 2, 3, 32, 32)).astype(np.float32)
    logging.disable(logging.WARNING)
    try:
        quantize_static(str(path), str(target), Batches(noise), quant_format=QuantFormat.QDQ, **options)
    finally:
        logging.disable(logging.NOTSET)
    return target


def test_uint8_of_onnxruntime_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    path = quantized(exported["vit"], tmp_path / "uint8.onnx", activation_type=QuantType.QUInt8)
    report = lint(path)
    assert not report.passed
    messages = {f.message for f in report.errors if f.number == 6}
    assert {"its zero point is not 0", "it dequantizes UINT8", "it dequantizes INT32"} <= messages
    warned = {f.message for f in report.warnings if f.number == 15}
    assert {
        "the input of LayerNormalization is quantized",
        "the input of Softmax is quantized",
        "a Q/DQ pair between a GEMM and its bias",
        "its bias is quantized",
        "one scale for all channels of the weight of MatMul",
    } <= warned


def test_int8_of_onnxruntime_as_tensorrt_wants_it(exported: dict[str, Path], tmp_path: Path) -> None:
    operators = ["MatMul", "Gemm", "Conv"]
    path = quantized(
        exported["vit"],
        tmp_path / "int8.onnx",
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=operators,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "ForceQuantizeNoInputCheck": True,
            "OpTypesToExcludeOutputQuantization": [*operators, "Add", "Softmax"],
            "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1, "Conv": 0, "Gemm": 0},
            "QDQDisableWeightAdjustForInt32Bias": True,
        },
    )
    report = lint(path)
    assert report.errors == ()
    assert not [f for f in report.findings if f.number in (15, 16)]
    assert [(block.precision, block.fusable) for block in report.attention] == [("int8", True)] * 2


def test_a_plain_trace_is_judged_too() -> None:
    model = trace(tiny_vit(depth=1), [TensorSpec("images", (3, 32, 32))], ["logits"])
    report = lint(copy.copy(model))
    assert {f.number for f in report.findings} <= {11, 12, 16}  # its nodes have no names yet
