"""The authors' outputs of DeiT, CrossFormer and Swin V2, through the checkpoint, the passes and the written file.

Swin's are in tests/deploycli/test_golden.py, where the command line makes them. The larger models' are what the models
compute (tests/models), and small models of every kind are what their graphs compute (tests/models/test_*_export.py).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.exporters.trace import trace
from deploycli.models.checkpoint import load
from deploycli.models.registry import resolve
from tests.weights import golden_image, golden_weight

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    ("model", "nodes"),
    [("deit_tiny_distilled_patch16_224", 330), ("crossformer_tiny", 500), ("swinv2_tiny_patch4_window8_256", 450)],
)
def test_golden_logits_through_onnx(model: str, nodes: int, tmp_path: Path) -> None:
    told = json.loads((GOLDEN / f"{model}.json").read_text())
    weights = {key: torch.from_numpy(golden_weight(key, tuple(told["shapes"][key]))) for key in told["learned"]}
    checkpoint = tmp_path / "official.pth"
    torch.save({"model": weights}, checkpoint)
    loaded = load(resolve(model).spec, checkpoint)
    checkpoint.unlink()  # up to 350 MB, which pytest would keep
    graph = trace(loaded.model, loaded.spec.inputs, loaded.spec.outputs)
    rewrite(graph)
    assert graph.graph.num_nodes() <= nodes
    assert max(len(v.shape) for node in graph.graph for v in node.outputs if v.shape is not None) <= 6
    write_model(graph, tmp_path / "model.onnx")
    with np.load(GOLDEN / f"{model}.npz", allow_pickle=False) as arrays:
        expected = arrays["logits"]
    with OrtRuntime(tmp_path / "model.onnx") as runtime:
        found = runtime.run({"images": golden_image(tuple(told["image"]))})["logits"]
    (tmp_path / "model.onnx").unlink()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() / np.abs(expected).max() < 2e-5
