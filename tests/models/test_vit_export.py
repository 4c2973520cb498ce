"""ViT and DeiT through the exporter: equal outputs at every batch size, and nothing dynamic but the class token."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.exporters.trace import trace
from tests.models.vits import tiny_spec, tiny_vit
from tests.weights import golden_image


@pytest.mark.parametrize("kind", [{}, {"representation_size": 7}, {"distilled": True}], ids=str)
def test_the_rewritten_graph_equals_the_model(kind: dict[str, Any], tmp_path: Path) -> None:
    model, spec = tiny_vit(**kind), tiny_spec(**kind)
    graph = trace(model, spec.inputs, spec.outputs)
    plain = graph.graph.num_nodes()
    rewrite(graph)
    write_model(graph, tmp_path / "model.onnx")

    nodes = Counter(node.op_type for node in graph.graph)
    assert graph.graph.num_nodes() < 0.8 * plain
    assert (nodes["Shape"], nodes["Expand"], nodes["Where"]) == (0, 0, 0)  # the batch size is not computed
    assert nodes["Softmax"] == 3
    with OrtRuntime(tmp_path / "model.onnx") as runtime:
        for batch in (1, 2, 5):
            images = golden_image((batch, 3, 32, 32))
            with torch.inference_mode():
                expected = model(torch.from_numpy(images)).numpy()
            assert np.abs(runtime.run({"images": images})["logits"] - expected).max() < 2e-5
