"""Other people's Swins, ViTs and backbones through the same passes: as few nodes as ours, the outputs of their own."""

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.runtime.runtimes import EagerRuntime, OrtRuntime
from deploycli.exporters.trace import trace
from deploycli.models.build import build
from deploycli.models.outputs import output_names
from deploycli.models.registry import resolve
from deploycli.models.spec import TensorSpec
from tests.peers import import_timm, import_transformers


def randomized(module: nn.Module) -> nn.Module:
    """Give every parameter a value: fresh biases and tables are zero, and hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval()


def timm_swin(**kwargs: Any) -> nn.Module:
    return import_timm().create_model("swin_tiny_patch4_window7_224", **kwargs)


def torchvision_swin(**kwargs: Any) -> nn.Module:
    import_timm()  # makes torchvision importable
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(patch_size=[4, 4], stochastic_depth_prob=0.0, **kwargs)


def hf(kind: str, **kwargs: Any) -> nn.Module:
    transformers = import_transformers()
    config = getattr(transformers, f"{kind}Config")(attn_implementation="eager", **kwargs)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


TINY = {"depths": [2, 2], "num_heads": [1, 2]}


def cases() -> dict[str, tuple[nn.Module, int]]:
    """Small models with the structure of the large ones, and the side of their images."""
    return {
        "timm Swin": (timm_swin(img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(1, 2)), 32),
        "torchvision Swin": (torchvision_swin(embed_dim=16, window_size=[4, 4], **TINY), 32),
        "torchvision Swin, padded inside": (torchvision_swin(embed_dim=16, window_size=[4, 4], **TINY), 40),
        "transformers Swin": (hf("Swin", image_size=32, window_size=4, embed_dim=16, **TINY), 32),
        "transformers Swin, padded inside": (hf("Swin", image_size=40, window_size=4, embed_dim=16, **TINY), 40),
        "transformers Swin V2": (hf("Swinv2", image_size=32, window_size=4, embed_dim=16, **TINY), 32),
        "transformers DeiT": (
            hf(
                "DeiT", image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=64,
            ),
            32,
        ),
        "timm backbone": (
            timm_swin(
                img_size=64, window_size=2, embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2),
                features_only=True,
            ),
            64,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(cases()))
def test_equal_to_its_eager_self(name: str, tmp_path: Path) -> None:
    module, side = cases()[name]
    randomized(module)
    inputs = [TensorSpec("images", (3, side, side))]
    outputs = output_names(module, inputs)
    assert len(outputs) == (4 if name == "timm backbone" else 1)
    model = trace(module, inputs, outputs)
    rewrite(model)
    operators = Counter(node.op_type for node in model.graph)
    assert not operators.keys() & {"Mod", "Range", "ScatterND", "GatherND", "CastLike"}
    # The class token is repeated for a batch, and so are the masks of transformers' Swin: one shape, read once.
    assert operators["Shape"] <= (1 if name.startswith(("transformers DeiT", "transformers Swin")) else 0)
    assert operators["Where"] <= operators["Shape"]
    write_model(model, tmp_path / "model.onnx")
    with EagerRuntime(module, ["images"], outputs) as eager, OrtRuntime(tmp_path / "model.onnx") as runtime:
        for batch in (1, 3):
            images = np.random.default_rng(batch).standard_normal((batch, 3, side, side)).astype(np.float32)
            expected, found = eager.run({"images": images}), runtime.run({"images": images})
            for output in outputs:
                scale = np.abs(expected[output]).max()
                np.testing.assert_allclose(found[output] / scale, expected[output] / scale, atol=2e-5, rtol=0)


def rewritten_nodes(module: nn.Module) -> int:
    inputs = [TensorSpec("images", (3, 224, 224))]
    model = trace(module, inputs, output_names(module, inputs))
    rewrite(model)
    return model.graph.num_nodes()


@cache
def our_nodes(name: str) -> int:
    return rewritten_nodes(randomized(build(resolve(name).spec)))


@pytest.mark.parametrize(
    ("name", "make", "ours"),
    [
        ("timm", lambda: timm_swin(), "swin_t"),
        (
            "torchvision",
            lambda: torchvision_swin(
                embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=[7, 7]
            ),
            "swin_t",
        ),
        ("transformers", lambda: hf("Swin"), "swin_t"),
        ("transformers", lambda: hf("DeiT", hidden_size=192, num_attention_heads=3, intermediate_size=768), "deit_t"),
    ],
)  # fmt: skip
def test_within_a_tenth_of_our_own_node_count(name: str, make: Any, ours: str) -> None:
    theirs = rewritten_nodes(randomized(make()))
    assert theirs <= 1.1 * our_nodes(ours), name
