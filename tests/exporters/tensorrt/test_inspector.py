"""What TensorRT's inspector says of layers, read. TensorRT for RTX's own, which is real, is in test_rtx.py.

The listings here are written by hand after NVIDIA's documentation ("Engine Inspector" of TensorRT 10 and 11; "Migrating
IEngineInspector usage from TensorRT 10.x to 11.x") and listings that people have published in issues.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from deploycli.exporters.tensorrt.inspector import (
    DEFAULT_ASSERTIONS,
    PrecisionAssertion,
    default_assertion,
    parse_layers,
)
from deploycli.models.errors import BuildError, UsageError

BLOCKS = 4
TYPES = {"fp32": "Float", "fp16": "Half", "int8": "Int8"}
KERNELS = {"fp32": "f32f32_f32f32", "fp16": "f16f16_f16f32", "int8": "i8i8_i8i32"}


def swin(version: int, precision: str = "fp16", *, hidden: bool = False) -> list[dict[str, Any]]:
    """The layers of a Swin's first blocks; where shapes are dynamic, TensorRT may hide the types of tensors."""
    around = "fp32" if precision == "fp32" else "fp16"

    def tensor(dtype: str) -> dict[str, Any]:
        shown = "N/A due to dynamic shapes" if hidden else dtype
        layout = {"Format/Datatype": shown} if version == 10 else {"Format": "Row major linear", "DataType": shown}
        return {"Name": "t", "Location": "Device", "Dimensions": [-1, 96], **layout}

    def layer(kind: str, name: str, reads: list[str], tactic: str = "", *nodes: str) -> dict[str, Any]:
        metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)
        found = {"Name": name, "LayerType": kind, "Inputs": list(map(tensor, reads)), "StreamId": 0}
        return {**found, "Outputs": [tensor(TYPES[around])], "TacticName": tactic, "Metadata": metadata}

    def product(node: str, types: str = precision, kind: str = "gemm") -> dict[str, Any]:
        found = layer(kind, f"{node}_myl0_1", 2 * [TYPES[types]], f"sm80_xmma_gemm_{KERNELS[types]}_f32_tn_n", node)
        return {**found, "Constants": [{"Name": "weight", "Format/Datatype": TYPES[types]}]}

    generated = (
        "kgen",
        "__myl_CastMeaSubMulAddSqrDivMulAddCast_myl0_0",
        [TYPES[around], "Float"],
        "__myl_CastMeaSub_0x5d",
    )
    layers = [
        layer("Reformat", "Reformatting CopyNode", ["Row major linear FP32 format"], "0x00000000000003e8"),
        product("patch_embed.proj/Conv", around, "CaskConvolution"),
        layer("Constant", "constant_bias", []),
        {"Name": "", "LayerType": "signal", "Inputs": [], "Outputs": []},
    ]
    for block in (f"layers.0.blocks.{place}" for place in range(BLOCKS)):
        ops = [f"{block}.attn/{op}" for op in ("MatMul", "Softmax", "MatMul_1")]
        layers += [
            layer(*generated, f"{block}.norm1/LayerNormalization"),
            product(f"{block}.attn.qkv/MatMul"),
            layer("kgen", "_gemm_mha_v2_myl0_2", 3 * [TYPES[around]], "_gemm_mha_v2_0x1", *ops)
            | ({"Precision": "FP16"} if hidden else {}),
            *(product(f"{block}.{part}/MatMul") for part in ("attn.proj", "mlp.fc1", "mlp.fc2")),
            layer(*generated, f"{block}.norm2/LayerNormalization"),
        ]
    return [*layers, layer(*generated, "norm/LayerNormalization"), product("head/MatMul", around)]


def text(version: int, precision: str = "fp16", *, hidden: bool = False) -> str:
    return json.dumps({"Layers": swin(version, precision, hidden=hidden), "Bindings": ["images", "logits"]})


def layer(kind: str, *types: str, **more: object) -> str:
    inputs = [{"Name": "x", "DataType": dtype} for dtype in types]
    return json.dumps([{"Name": "one", "LayerType": kind, "Inputs": inputs, "Outputs": [], **more}])


@pytest.mark.parametrize("version", [10, 11])
def test_a_swin_in_fp16(version: int) -> None:
    layers = parse_layers(text(version))
    # A convolution, five products in each of four blocks with the fused attention, the head.
    assert layers.products_per_type == {"fp16": 22}
    assert layers.per_type == {"fp16": 31}  # and the kernels with LayerNorms, which are FP32 inside
    assert layers.fused_attention == 4
    assert layers.share("fp16") == 1.0
    assert layers.share("fp32") == layers.share("int8") == 0.0
    assert DEFAULT_ASSERTIONS["fp16"].breach(layers) == ""
    (attention, *_) = (found for found in layers.layers if found.fused_attention)
    assert attention.nodes == tuple(f"layers.0.blocks.0.attn/{op}" for op in ("MatMul", "Softmax", "MatMul_1"))


@pytest.mark.parametrize("version", [10, 11])
def test_a_swin_in_int8(version: int) -> None:
    layers = parse_layers(text(version, "int8"))
    assert layers.products_per_type == {"int8": 16, "fp16": 6}
    assert layers.share("int8") == pytest.approx(16 / 22)
    assert layers.share("fp16") == 1.0  # INT8 is narrower still
    assert DEFAULT_ASSERTIONS["int8"].breach(layers) == ""
    breach = PrecisionAssertion("int8", 0.8).breach(layers)
    assert breach == "72.7% of 22 products are int8 (16 int8, 6 fp16), expected int8>=80%"


def test_products_that_no_layer_names_are_not_proven() -> None:
    layers = parse_layers(text(11))
    assert PrecisionAssertion("fp16", 0.8).breach(layers, ["a/MatMul"] * 5) == ""
    breach = PrecisionAssertion("fp16", 0.8).breach(layers, ["a/MatMul"] * 6)
    assert breach == "78.6% of 28 products are fp16 (22 fp16, 6 in no layer, such as a/MatMul), expected fp16>=80%"


@pytest.mark.parametrize(
    ("name", "kind", "product"),
    [
        ("__myl_FcAddAdd_myl0_10", "runtime_fusion", True),
        ("__myl_Fc_myl0_1", "runtime_fusion", True),
        ("__myl_MulAdd_myl0_10", "runtime_fusion", False),
        ("patch_embed.proj/Conv_U1_myl0_2", "correlation", True),
        ("up/ConvTranspose_myl0_2", "deconv", True),
        ("__myl_FcAdd_myl0_3", "kgen", False),
    ],
)
def test_products_of_every_kind_count(name: str, kind: str, product: bool) -> None:
    (found,) = parse_layers(layer(kind, "Half", Name=name)).layers
    assert found.product is product


def test_an_engine_in_fp32_breaks_what_fp16_promises() -> None:
    layers = parse_layers(text(11, "fp32"))
    assert DEFAULT_ASSERTIONS["fp32"].breach(layers) == ""
    assert DEFAULT_ASSERTIONS["fp16"].breach(layers).startswith("0.0% of 22 products are fp16 (22 fp32)")


def test_float_islands_in_kernels_of_their_own_do_not_count_as_products() -> None:
    data = json.loads(text(11))
    island = json.loads(layer("kgen", "Float", TacticName="__myl_MeaSubMul_0x1"))[0]
    layers = parse_layers(json.dumps({**data, "Layers": data["Layers"] + 20 * [island]}))
    assert layers.per_type == {"fp16": 31, "fp32": 20}
    assert DEFAULT_ASSERTIONS["fp16"].breach(layers) == ""


def test_dynamic_shapes_hide_types_but_not_kernels() -> None:
    layers = parse_layers(text(10, hidden=True))
    assert layers.detailed
    assert layers.products_per_type == {"fp16": 22}


def test_names_alone_prove_nothing() -> None:
    layers = parse_layers(json.dumps([layer["Name"] for layer in swin(10)]))
    assert not layers.detailed
    assert layers.fused_attention == 4
    assert DEFAULT_ASSERTIONS["fp16"].breach(layers).endswith("so fp16>=80% is not proven")
    assert parse_layers(json.dumps({"Layers": ["one"]})).to_json()["computing"] == 0


@pytest.mark.parametrize(
    ("entry", "precision", "product"),
    [
        (layer("gemm", "Half", "Half"), "fp16", True),
        (layer("gemm", "BFloat16"), "bf16", True),
        (layer("gemm", "Int8", "Float"), "int8", True),
        (layer("gemm", "FP8"), "fp8", True),
        (layer("gemm", "E4M3"), "fp8", True),
        (layer("MatrixMultiply", "Float"), "fp32", True),
        (layer("CaskGemmConvolution", "Half"), "fp16", True),
        (layer("kgen", "Half", "Float"), "fp16", False),
        (layer("kgen", "Half", TacticName="__myl_FcGemmAdd_0x1"), "fp16", True),
        (layer("kgen", "Half", TacticName="_gemv_mha_0x1"), "fp16", True),
        (layer("kgen", "UInt8"), "other", False),
        (layer("kgen", "Int64", "Bool"), "other", False),
        (layer("gemm", Precision="FP16"), "fp16", True),
        (layer("gemm", Weights={"Type": "Int8", "Count": 4}), "int8", True),
        (layer("gemm", TacticName="sm80_xmma_gemm_f32f32_f32f32_f32_tn"), "fp32", True),
        (layer("gemm", "N/A due to dynamic shapes", TacticName="sm89_xmma_gemm_i8i8_i8i32"), "int8", True),
    ],
)  # fmt: skip
def test_what_one_layer_computes_in(entry: str, precision: str, product: bool) -> None:
    if "FcGemm" in entry:
        product = False  # a generated kernel is named after what it fuses; that alone does not count
    (found,) = parse_layers(entry).layers
    assert (found.precision, found.product) == (precision, product)


@pytest.mark.parametrize("kind", ["Reformat", "Constant", "NoOp", "signal", "wait", "ShapeHostToDevice"])
def test_bookkeeping_computes_nothing(kind: str) -> None:
    (found,) = parse_layers(layer(kind, "Half", TacticName="gemm")).layers
    assert not found.computes
    assert not found.product


@pytest.mark.parametrize(("name", "fused"), [("fmha_v2", True), ("x_mha_1", True), ("alphamharmonic", False)])
def test_fused_attention_is_a_word(name: str, fused: bool) -> None:
    assert parse_layers(json.dumps([name])).fused_attention == fused


def test_layers_without_a_known_product_are_all_judged() -> None:
    layers = parse_layers(layer("Myelin", "Half"))
    assert layers.share("fp16") == 1.0


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[]", '{"Layers": []}', '{"Layers": {}}', "3", '"text"', "[" * 9999]
)
def test_what_is_no_listing(content: str) -> None:
    with pytest.raises(BuildError, match="engine inspector"):
        parse_layers(content)


@pytest.mark.parametrize("content", ["fp16>=80%", " int8 >= 12.5 % ", "fp32>=100%"])
def test_assertions_are_read_and_written(content: str) -> None:
    assert str(PrecisionAssertion.parse(content)) == content.replace(" ", "")


@pytest.mark.parametrize("content", ["", "fp16", "fp16>80%", "fp16>=0%", "fp16>=101%", "fp64>=5%", "fp16>=-1%"])
def test_what_is_no_assertion(content: str) -> None:
    with pytest.raises(UsageError, match="is no assertion"):
        PrecisionAssertion.parse(content)


@pytest.mark.parametrize(
    ("precision", "quantized", "expected"),
    [
        ("int8", 0.9, "int8>=45%"),
        ("int8", 0.35, "int8>=18%"),
        ("int8", 0.001, "int8>=1%"),
        ("int8", 0.0, "int8>=50%"),
        ("fp16", 0.35, "fp16>=80%"),
    ],
)
def test_of_a_graph_that_is_little_quantized_less_is_asked(precision: str, quantized: float, expected: str) -> None:
    assert str(default_assertion(precision, quantized)) == expected
