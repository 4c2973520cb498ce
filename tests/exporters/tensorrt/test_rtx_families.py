"""Every family in every precision, compiled by the real TensorRT for RTX: each product computes in the graph's type."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import pytest

from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.graph.products import COUNTED
from deploycli.exporters.precision.dtypes import type_of
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.number_format import FP8, INT8
from deploycli.exporters.precision.placement import DEFAULT_HIGH_PRECISION
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.exporters.target.settings import BuildSettings, ShapeRange
from deploycli.exporters.target.targets import TARGETS
from deploycli.exporters.tensorrt import traffic
from tests.exporters.lint.rtx import WHY
from tests.exporters.precision.networks import FAMILIES, family, images, quantized

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.target.targets import Capability
    from deploycli.exporters.tensorrt.traffic import Reading

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)

NAMES = ("swin", "vit", "deit distilled", "crossformer")
EIGHT_BITS = {"int8": INT8, "fp8": FP8}
TYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
TYPES |= {each.dtype: name for name, each in EIGHT_BITS.items()}
AMPERE_AND_LATER = TARGETS[1:]
"""Turing has no BF16."""


def typed(name: str, precision: str, scheme: str = "gemm", targets: tuple[Capability, ...] = ()) -> ir.Model:
    """A network as `build-trt` types it."""
    model = family(name)
    if precision in EIGHT_BITS:
        choices: dict[str, Any] = {"high_precision": DEFAULT_HIGH_PRECISION, "scale_type": ir.DataType.FLOAT16}
        choices |= {"scheme": scheme, "number_format": EIGHT_BITS[precision], "targets": targets}
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
            pair = producer is not None and producer.op_type == "DequantizeLinear"
            stored = type_of(producer.inputs[0] if pair and producer is not None else operands[0])
            found[node.name or ""] = TYPES[stored]
    return found


def compiled(
    model: ir.Model, name: str, targets: tuple[Capability, ...], folder: Path, *, batches: tuple[int, ...] = (1, 4, 8)
) -> Reading:
    """What an engine of a network launches, for the smallest, the best and the largest batch."""
    folder.mkdir(exist_ok=True)
    (path, *_) = write_model(model, folder / "model.onnx")
    sizes = [(batch, 3, *FAMILIES[name][1]) for batch in batches]
    settings = BuildSettings({"images": ShapeRange(*sizes)})
    return traffic.compiled(path, settings, folder / "work", targets, timeout=120)


def moved(engine: Reading) -> int:
    """Bytes of activations that all kernels read and write."""
    sizes = [kernel.moved for kernel in engine.kernels]
    assert None not in sizes
    return sum(size or 0 for size in sizes)


def assert_computed_as_typed(model: ir.Model, engine: Reading) -> dict[str, str]:
    """Return what each product computes in, which is what the graph says."""
    expected = products(model)
    found = {node: set[str]() for node in expected}
    for kernel in engine.kernels:
        for node in found.keys() & set(kernel.nodes if kernel.product else ()):
            found[node].add(kernel.precision)
    assert found == {node: {kind} for node, kind in expected.items()}
    return expected


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_every_product_computes_in_the_type_of_the_graph(name: str, precision: str, tmp_path: Path) -> None:
    model = typed(name, precision)
    expected = assert_computed_as_typed(model, compiled(model, name, AMPERE_AND_LATER, tmp_path))
    share = list(expected.values()).count(precision) / len(expected)
    assert share >= (0.4 if precision == "int8" else 0.8)  # of one block with its patch embedding and two heads, 4 of 9


@pytest.mark.parametrize(
    ("precision", "target", "products_a_block"), [("int8", (8, 6), 3), ("fp8", (8, 9), 5), ("fp8", (12, 0), 2)]
)
@pytest.mark.parametrize("name", ["swin", "vit"])
def test_auto_moves_fewer_bytes_with_no_kernel_more(
    name: str, precision: str, target: Capability, products_a_block: int, tmp_path: Path
) -> None:
    model = typed(name, precision, "auto", (target,))
    engine = compiled(model, name, (target,), tmp_path / precision, batches=(8, 8, 8))
    kinds = list(assert_computed_as_typed(model, engine).values())
    assert kinds.count(precision) == products_a_block * {"swin": 3, "vit": 1}[name]
    fp16 = compiled(typed(name, "fp16"), name, (target,), tmp_path / "fp16", batches=(8, 8, 8))
    assert len(engine.kernels) <= len(fp16.kernels)
    assert moved(engine) < moved(fp16)


def test_fp8_of_every_product_is_fp8(tmp_path: Path) -> None:
    model = typed("vit", "fp8", "full", ((8, 9),))
    kinds = list(assert_computed_as_typed(model, compiled(model, "vit", ((8, 9),), tmp_path)).values())
    assert kinds.count("fp8") >= 4
