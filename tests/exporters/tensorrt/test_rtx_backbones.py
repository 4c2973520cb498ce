"""Backbones at sizes that windows and groups do not tile, compiled by the real TensorRT for RTX."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.policy import Policy
from deploycli.exporters.target.settings import BuildSettings, ShapeRange
from deploycli.exporters.tensorrt import traffic
from deploycli.exporters.trace import trace
from deploycli.models.build import build
from deploycli.models.features import with_features
from deploycli.models.registry import configure, resolve
from tests.exporters.lint.rtx import WHY
from tests.exporters.tensorrt.test_rtx_families import AMPERE_AND_LATER, assert_computed_as_typed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)


@pytest.mark.parametrize(("name", "size"), [("swin_t", (90, 133)), ("crossformer_t", (96, 160))])
def test_a_backbone_compiles_with_fused_attention(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    small = {"embed_dim": 64, "depths": [2, 2], "num_heads": [2, 4]}
    spec = with_features(configure(resolve(name), img_size=size, **small), ()).spec
    model = trace(build(spec), spec.inputs, spec.outputs, batch=1)
    rewrite(model)
    cast(model, Policy(ir.DataType.FLOAT16))
    (path, *_) = write_model(model, tmp_path / "model.onnx")
    settings = BuildSettings({"images": ShapeRange(*[(1, 3, *size)] * 3)})
    engine = traffic.compiled(path, settings, tmp_path / "work", AMPERE_AND_LATER, timeout=120)
    assert_computed_as_typed(model, engine)
    assert sum(kernel.attention for kernel in engine.kernels) == 4
