"""Other people's Swins, ViTs and backbones through the same passes: as few nodes as ours, the outputs of their own.

The models are small: a block more of theirs or of ours costs as many nodes at every size.
"""

from collections import Counter
from collections.abc import Callable
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
from deploycli.models.registry import configure, resolve
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


TINY = {"depths": [2, 1], "num_heads": [1, 2]}
DEIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

# Small models with the structure of the large ones, and the side of their images.
CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm Swin": (lambda: timm_swin(img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(1, 2)), 32),
    "torchvision Swin": (lambda: torchvision_swin(embed_dim=16, window_size=[4, 4], **TINY), 32),
    "torchvision Swin, padded inside": (lambda: torchvision_swin(embed_dim=16, window_size=[4, 4], **TINY), 40),
    "transformers Swin": (lambda: hf("Swin", image_size=32, window_size=4, embed_dim=16, **TINY), 32),
    "transformers Swin, padded inside": (lambda: hf("Swin", image_size=40, window_size=4, embed_dim=16, **TINY), 40),
    "transformers Swin V2": (lambda: hf("Swinv2", image_size=32, window_size=4, embed_dim=16, **TINY), 32),
    "transformers DeiT": (lambda: hf("DeiT", image_size=32, patch_size=8, **DEIT), 32),
    "timm backbone": (
        lambda: timm_swin(
            img_size=64, window_size=2, embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2), features_only=True
        ),
        64,
    ),
}  # fmt: skip
OURS = {  # of the same shape, by our own definitions
    "Swin": ("swin_t", {"patch_size": 4, "window_size": 4, "embed_dim": 16, **TINY}),
    "DeiT": ("deit_t", {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}),
}
LIKE_OURS = {
    "timm Swin": "Swin", "torchvision Swin": "Swin", "transformers Swin": "Swin", "transformers DeiT": "DeiT",
}  # fmt: skip


@cache
def our_nodes(kind: str) -> int:
    """How many nodes our own model of that shape has in the end."""
    name, config = OURS[kind]
    spec = configure(resolve(name), img_size=(32, 32), **config).spec
    model = trace(randomized(build(spec)), spec.inputs, spec.outputs)
    rewrite(model)
    return model.graph.num_nodes()


@pytest.mark.parametrize("name", CASES)
def test_equal_to_its_eager_self_in_nodes_like_ours(name: str, tmp_path: Path) -> None:
    make, side = CASES[name]
    module = randomized(make())
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
    if name in LIKE_OURS:
        assert model.graph.num_nodes() <= 1.1 * our_nodes(LIKE_OURS[name])
    write_model(model, tmp_path / "model.onnx")
    with EagerRuntime(module, ["images"], outputs) as eager, OrtRuntime(tmp_path / "model.onnx") as runtime:
        for batch in (1, 3):
            images = np.random.default_rng(batch).standard_normal((batch, 3, side, side)).astype(np.float32)
            expected, found = eager.run({"images": images}), runtime.run({"images": images})
            for output in outputs:
                scale = np.abs(expected[output]).max()
                np.testing.assert_allclose(found[output] / scale, expected[output] / scale, atol=2e-5, rtol=0)
