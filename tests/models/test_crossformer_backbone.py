"""CrossFormer and CrossFormer++ as backbones for detection, against a definition on the map without padding."""

# ruff: noqa: N803, N806 - H, W, C and G are the paper's names of the axes

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from deploycli.models.build import build
from deploycli.models.checkpoint import load
from deploycli.models.crossformer_backbone import CrossFormerBackbone
from deploycli.models.errors import UsageError
from deploycli.models.features import with_features
from deploycli.models.registry import configure, resolve
from tests.models.crossformers import tiny_crossformer, tiny_crossformer_pp, with_golden_weights
from tests.weights import TOLERANCE, golden_image

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

# Maps of 20x28, 10x14 and 5x7 tokens: groups of 7 do not tile the first two, and are larger than the last.
CONFIG: dict[str, Any] = {
    "img_size": [40, 56],
    "patch_size": [2, 4],
    "embed_dim": 32,
    "depths": [2, 2, 4],
    "num_heads": [1, 2, 4],
    "group_size": [6, 3, 6],
    "interval": [3, 4, 1],
}


def tiny_backbone(**changes: Any) -> CrossFormerBackbone:
    model: CrossFormerBackbone = with_golden_weights(CrossFormerBackbone(**{**CONFIG, **changes}))
    return model


def attended(block: Any, x: Tensor, G: int, interval: int) -> Tensor:
    """Attention, written token by token on the map: who attends to whom, with which bias."""
    (H, W), heads = block.resolution, block.attn.num_heads
    q, k, v = block.attn.qkv(x).view(len(x), H * W, 3, heads, -1).permute(2, 0, 3, 1, 4)
    token = torch.arange(H * W)
    position = torch.stack((token // W, token % W), dim=1)
    phase, place = position % interval, position // interval
    home = torch.cat((phase, place // G), dim=1)
    together = (home[:, None] == home[None, :]).all(-1)
    bias = block.attn.pos((place[:, None] - place[None, :]).to(x.dtype)).permute(2, 0, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    attention = scores.masked_fill(~together, float("-inf")).softmax(-1)
    found: Tensor = block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
    return found


def defined(model: nn.Module, images: Tensor, *, cooling: bool) -> dict[str, Tensor]:
    """What a backbone answers; a map whose shorter side is in a group is one group."""
    net: Any = model
    x = net.patch_embed(images)
    maps = {}
    for stage, layer in enumerate(net.layers):
        H, W = 20 >> stage, 28 >> stage
        G, depth = CONFIG["group_size"][stage], CONFIG["depths"][stage]
        small = min(H, W) <= G
        for i, block in enumerate(layer.blocks):
            interval = CONFIG["interval"][stage] if i % 2 and not small else 1
            x = x + attended(block, block.norm1(x), max(H, W) if small else G, interval)
            x = x + block.mlp(block.norm2(x))
            if cooling and i % 3 == 2 and i < depth - 1:
                x = block.ex_ln(block.ex_conv(x.mT.unflatten(2, (H, W))).flatten(2).mT)
        maps[f"stage{stage + 1}"] = x.mT.unflatten(2, (H, W))
        x = x if layer.downsample is None else layer.downsample(x)
    return maps


@pytest.mark.parametrize("cooling", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_are_as_defined(cooling: bool, dtype: torch.dtype) -> None:
    model = tiny_backbone(cooling=cooling).to(dtype)
    images = torch.from_numpy(golden_image((2, 3, 40, 56))).to(dtype)
    with torch.inference_mode():
        found, expected = model(images), defined(model, images, cooling=cooling)
    assert list(found) == ["stage1", "stage2", "stage3"]
    for name, value in expected.items():
        scale = value.abs().max().item()
        tolerance = (TOLERANCE if dtype == torch.float32 else 1e-12) * scale
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


def test_a_classifier_at_its_own_size_gives_the_same_last_map() -> None:
    """At 224 the authors' intervals are what the classifier's groups span; only there."""
    variant = resolve("crossformer_s")  # with long-distance attention in every stage
    classifier, backbone = build(variant.spec), build(with_features(variant, (4,)).spec)
    backbone.load_state_dict(classifier.state_dict(), strict=False)
    images = torch.from_numpy(golden_image((1, 3, 224, 224)))
    net: Any = classifier
    with torch.inference_mode():
        x = net.patch_embed(images)
        for layer in net.layers:
            x = layer(x)
        found = backbone(images)
    assert list(found) == ["stage4"]
    torch.testing.assert_close(found["stage4"].flatten(2), x.mT, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_crossformer, tiny_crossformer_pp])
def test_a_classifiers_checkpoint_loads_but_for_norm_and_head(make: Any, tmp_path: Path) -> None:
    classifier = make()
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    variant = configure(
        resolve("crossformer_t" if make is tiny_crossformer else "crossformer_pp_s"),
        img_size=(40, 56),
        patch_size=[2, 4],
        embed_dim=32,
        depths=[len(layer.blocks) for layer in classifier.layers],
        num_heads=[1, 2, 4],
    )
    spec = with_features(variant, (1, 3)).spec
    loaded = load(spec, tmp_path / "classifier.pth")
    assert (spec.outputs, spec.strides) == (("stage1", "stage3"), (2, 8))
    assert set(loaded.report.left_out) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    own, theirs = loaded.model.state_dict(), dict(classifier.named_parameters())
    assert set(loaded.report.loaded) == set(own) == theirs.keys() - set(loaded.report.left_out)
    assert all(torch.equal(own[key], theirs[key]) for key in own)


def test_a_size_that_does_not_halve_is_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError) as failure:
        build(with_features(configure(resolve("crossformer_t"), img_size=(800, 1333)), ()).spec)
    assert "800x1344" in failure.value.hint
