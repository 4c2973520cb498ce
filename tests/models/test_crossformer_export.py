"""CrossFormer through the exporter: equal outputs at every batch size, one constant per block, one move per group."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.exporters.trace import trace
from deploycli.models.spec import ModelSpec
from tests.models.crossformers import tiny_crossformer, tiny_crossformer_pp, tiny_spec, tiny_spec_pp
from tests.weights import golden_image

MODELS = {
    "crossformer": (tiny_crossformer, tiny_spec, 6),
    "crossformer_pp": (tiny_crossformer_pp, tiny_spec_pp, 8),
}


@cache
def exported(kind: str) -> tuple[torch.nn.Module, ModelSpec, ir.Model]:
    """The model, what it takes, and its rewritten graph; none of them is to be changed."""
    create, make_spec, _ = MODELS[kind]
    model, spec = create(), make_spec()
    graph = trace(model, spec.inputs, spec.outputs)
    rewrite(graph)
    return model, spec, graph


@pytest.mark.parametrize("kind", MODELS)
def test_the_rewritten_graph_equals_the_model(kind: str, tmp_path: Path) -> None:
    model, spec, graph = exported(kind)
    write_model(graph, tmp_path / "model.onnx")
    with OrtRuntime(tmp_path / "model.onnx") as runtime:
        for batch in (1, 3):
            images = golden_image((batch, *spec.inputs[0].shape))
            with torch.inference_mode():
                expected = model(torch.from_numpy(images)).numpy()
            assert np.abs(runtime.run({"images": images})["logits"] - expected).max() < 2e-5


@pytest.mark.parametrize("kind", MODELS)
def test_the_position_bias_is_one_constant_per_block(kind: str) -> None:
    model, _, exported_model = exported(kind)
    graph, blocks = exported_model.graph, MODELS[kind][-1]
    norms = [n for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm) and ".pos." not in n]
    counts = {op: sum(node.op_type == op for node in graph) for op in ("LayerNormalization", "Relu", "Softmax")}
    assert counts == {"LayerNormalization": len(norms), "Relu": 0, "Softmax": blocks}
    assert not [name for name in graph.initializers if ".pos." in name]


@pytest.mark.parametrize("kind", MODELS)
def test_no_grouping_needs_more_than_one_move_or_six_axes(kind: str) -> None:
    """Into the groups and back: each is one Gather, or one Transpose between two Reshapes."""
    graph, blocks = exported(kind)[-1].graph, MODELS[kind][-1]
    values = [value for node in graph for value in node.outputs]
    assert max(len(value.shape) for value in values if value.shape is not None) <= 6
    gathers = [node for node in graph if node.op_type == "Gather"]
    wide = [node for node in graph if node.op_type == "Transpose" and len(node.outputs[0].shape or ()) == 6]
    wide = [node for node in wide if not splits(node)]  # which is how query, key and value part
    assert 0 < len(gathers) + len(wide) <= 2 * blocks


def splits(node: ir.Node) -> bool:
    readers = [reader for view in node.outputs[0].consumers() for reader in view.outputs[0].consumers()]
    return any(reader.op_type == "Split" for reader in readers)
