"""Backbones through the exporter: equal maps, and padding, shifts and windows as rows that are gathered."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.lint.rules import lint
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.exporters.trace import trace
from deploycli.models.spec import TensorSpec
from tests.models import test_crossformer_backbone, test_swin_backbone
from tests.weights import golden_image

MODELS = {
    "swin": (test_swin_backbone.tiny_backbone, (45, 71)),
    "crossformer": (test_crossformer_backbone.tiny_backbone, (40, 56)),
}


@pytest.mark.parametrize("batch", [1, None])
@pytest.mark.parametrize("kind", MODELS)
def test_the_rewritten_graph_equals_the_model(kind: str, batch: int | None, tmp_path: Path) -> None:
    create, size = MODELS[kind]
    model = create(img_size=size)
    names = ("stage1", "stage2", "stage3")
    graph = trace(model, [TensorSpec("images", (3, *size))], names, batch=batch)
    rewrite(graph)
    assert_moves_rows(graph)
    if batch is not None:  # with a dynamic one tokens stand first, where the attention has a single head
        assert lint(graph).findings == ()
    write_model(graph, tmp_path / "model.onnx")
    with OrtRuntime(tmp_path / "model.onnx") as runtime:
        for count in (1, 3) if batch is None else (1,):
            images = golden_image((count, 3, *size))
            with torch.inference_mode():
                expected = model(torch.from_numpy(images))
            found = runtime.run({"images": images})
            for name in names:
                scale = expected[name].abs().max().item()
                assert np.abs(found[name] - expected[name].numpy()).max() < 2e-5 * scale


def assert_moves_rows(graph: ir.Model) -> None:
    """No roll is left, which is two Slices and a Concat an axis, and no mask is computed."""
    counts = {
        op: sum(node.op_type == op for node in graph.graph) for op in ("Concat", "Slice", "Where", "Pad", "Gather")
    }
    blocks = sum(node.op_type == "Softmax" for node in graph.graph)
    assert counts["Gather"] > 0
    assert counts["Pad"] <= blocks + 3  # besides: the images, and odd maps before they are merged
    assert counts["Where"] == 0
    assert counts["Concat"] + counts["Slice"] <= blocks
