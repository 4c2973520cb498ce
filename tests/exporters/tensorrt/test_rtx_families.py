"""Every family in every precision, compiled by the real TensorRT for RTX: each product computes in the graph's type."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.graph.products import COUNTED
from deploycli.exporters.precision.dtypes import type_of
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.placement import DEFAULT_HIGH_PRECISION
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.exporters.target.settings import BuildSettings, ShapeRange
from deploycli.exporters.target.targets import TARGETS
from deploycli.exporters.tensorrt.child import run_build
from deploycli.exporters.tensorrt.inspector import parse_layers
from deploycli.exporters.tensorrt.traffic import read_engine
from tests.exporters.lint.rtx import WHY
from tests.exporters.precision.networks import FAMILIES, family, images, quantized

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)

NAMES = ("swin", "vit", "deit distilled", "crossformer")
TYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
AMPERE_AND_LATER = TARGETS[1:]
"""Turing has no BF16."""


def typed(name: str, precision: str) -> ir.Model:
    """A network as `build-trt` types it."""
    model = family(name)
    if precision == "int8":
        choices = {"scheme": "gemm", "high_precision": DEFAULT_HIGH_PRECISION, "scale_type": ir.DataType.FLOAT16}
        model, _ = quantized(lambda: family(name), images(name), **choices)
    cast(model, Policy(REDUCED_TYPES["bf16" if precision == "bf16" else "fp16"]))
    return model


def products(model: ir.Model) -> dict[str, str]:
    """Product of the graph -> what it multiplies in, as the graph says."""
    found = {}
    for node in model.graph:
        operands = [value for value in node.inputs[:2] if value is not None]
        if node.op_type in COUNTED and any(value.const_value is None for value in operands):
            producer = operands[0].producer()
            quantized_ = producer is not None and producer.op_type == "DequantizeLinear"
            found[node.name or ""] = "int8" if quantized_ else TYPES[type_of(operands[0])]
    return found


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_every_product_computes_in_the_type_of_the_graph(name: str, precision: str, tmp_path: Path) -> None:
    model = typed(name, precision)
    (path, *_) = write_model(model, tmp_path / "model.onnx")
    sizes = [(batch, 3, *FAMILIES[name][1]) for batch in (1, 4, 8)]
    settings = BuildSettings({"images": ShapeRange(*sizes)})
    result = run_build(path, settings, tmp_path / "work", timeout=120, compiler="rtx", targets=AMPERE_AND_LATER)
    assert result.layers is not None
    (found_in,) = read_engine(path, [(parse_layers(result.layers.read_text("utf-8")), None)])
    expected = products(model)
    found = {node: set[str]() for node in expected}
    for kernel in found_in.kernels:
        for node in found.keys() & set(kernel.nodes if kernel.product else ()):
            found[node].add(kernel.precision)
    assert found == {node: {kind} for node, kind in expected.items()}
    share = list(expected.values()).count(precision) / len(expected)
    assert share >= (0.4 if precision == "int8" else 0.8)  # of one block with its patch embedding and two heads, 4 of 9
