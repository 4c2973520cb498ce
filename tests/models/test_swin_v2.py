"""Swin V2 against independent definitions, the authors' outputs, and timm's implementation."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploycli.models.build import build
from deploycli.models.checkpoint import load
from deploycli.models.errors import UsageError
from deploycli.models.registry import configure, resolve, variants
from deploycli.models.swin_v2 import SwinTransformerV2, log_spaced_offsets
from tests.models.swins import to_timm_names
from tests.peers import import_timm
from tests.weights import TOLERANCE, golden_image, golden_weight

GOLDEN = Path(__file__).parents[1] / "golden"

TINY: dict[str, Any] = {
    "img_size": [32, 32],
    "patch_size": 2,
    "num_classes": 5,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "pretrained_window_sizes": [0, 0],
}


def golden_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(golden_weight(name, tuple(p.shape))) for name, p in module.named_parameters()}


def tiny(**changes: Any) -> SwinTransformerV2:
    module = SwinTransformerV2(**{**TINY, **changes}).eval()
    module.load_state_dict(golden_state(module), strict=False)
    return module


@pytest.mark.parametrize("name", ["swinv2_tiny_patch4_window8_256", "swinv2_wider_windows"])
def test_equals_the_authors_outputs_in_float64(name: str) -> None:
    """In float32 they are compared in test_published; there rounding hides what is smaller."""
    told = json.loads((GOLDEN / f"{name}.json").read_text())
    _, _, *size = told["image"]
    module = SwinTransformerV2(img_size=size, **told.get("config", {})).eval()
    state = golden_state(module)
    module.load_state_dict(state, strict=False)
    assert any((value > math.log(100)).any() for key, value in state.items() if "logit_scale" in key), "one is cut off"
    images = torch.from_numpy(golden_image(tuple(told["image"]))).double()
    with np.load(GOLDEN / f"{name}.npz") as arrays, torch.inference_mode():
        expected = arrays["logits"]
        assert np.abs(module.double()(images).numpy() - expected).max() / np.abs(expected).max() < 1e-6


@pytest.mark.parametrize("variant", [v for v in variants() if v.spec.family == "swin_v2"], ids=lambda v: v.name)
def test_every_variant_has_timms_parameters(variant: Any) -> None:
    timm = import_timm()
    tag = variant.pretrained.repo.removeprefix("timm/")
    with torch.device("meta"):
        ours = build(variant.spec)
        theirs = timm.create_model(tag, num_classes=timm.get_pretrained_cfg(tag).num_classes)
    shapes = {key: value.shape for key, value in to_timm_names(dict(ours.named_parameters())).items()}
    assert shapes == {key: value.shape for key, value in theirs.named_parameters()}


def test_equals_timm_under_the_same_weights() -> None:
    ours = build(configure(resolve("swinv2_t"), img_size=(128, 128)).spec)
    state = golden_state(ours)
    ours.load_state_dict(state, strict=False)
    theirs = import_timm().create_model("swinv2_tiny_window8_256", img_size=128, window_size=8).eval()
    theirs.load_state_dict(to_timm_names(state), strict=False)
    images = torch.from_numpy(golden_image((2, 3, 128, 128)))
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=10 * TOLERANCE)


@pytest.mark.parametrize(("window", "pretrained"), [(4, 0), (8, 0), (8, 6), (24, 12)])
def test_offsets_are_log_spaced(window: int, pretrained: int) -> None:
    """Written offset by offset: equation 4."""
    table = log_spaced_offsets(window, pretrained)
    assert table.shape == (1, 2 * window - 1, 2 * window - 1, 2)
    most = (pretrained or window) - 1
    for row in range(2 * window - 1):
        for column in range(2 * window - 1):
            for axis, offset in enumerate((row - window + 1, column - window + 1)):
                stretched = 8 * offset / most
                expected = math.copysign(math.log2(1 + abs(stretched)), stretched) / 3
                assert table[0, row, column, axis].item() == pytest.approx(expected, abs=1e-6)
    inside = table[..., 0].abs() <= math.log2(9) / 3 + 1e-6
    assert bool(inside.all()) == (not pretrained or pretrained >= window)


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_attends_as_defined(block: int) -> None:
    """Token by token on the map: cosines, the learned scale, the bias of the pair; who shares a shifted window."""
    b = tiny().layers[0].blocks[block]
    (height, width), window, heads = b.resolution, b.window_size, b.attn.num_heads
    x = torch.randn(2, height * width, 16, generator=torch.Generator().manual_seed(0))
    a = b.attn
    bias = torch.cat((a.q_bias, torch.zeros(16), a.v_bias))
    q, k, v = (x @ a.qkv.weight.T + bias).view(2, -1, 3, heads, 8).permute(2, 0, 3, 1, 4)
    cosines = (q / q.norm(dim=-1, keepdim=True)) @ (k / k.norm(dim=-1, keepdim=True)).transpose(-2, -1)
    scale = a.logit_scale.exp().minimum(torch.tensor(100.0))
    token = torch.arange(height * width)
    position = torch.stack((token // width, token % width), dim=1)
    moved = (position - b.shift_size) % height
    home = moved // window
    region = torch.where(position < b.shift_size, 1, 0)  # wrapped around: not a neighbour of what it meets
    together = (home[:, None] == home[None]).all(-1) & (region[:, None] == region[None]).all(-1)
    place = moved % window
    offsets = (place[:, None] - place[None] + window - 1).clamp(0, 2 * window - 2)
    table = 16 * torch.sigmoid(a.cpb_mlp(a.relative_coords_table))[0]  # [2*ws-1, 2*ws-1, nH]
    pairs = table[offsets[..., 0], offsets[..., 1]].permute(2, 0, 1)
    attention = (cosines * scale + pairs).masked_fill(~together, float("-inf")).softmax(-1)
    mixed = (attention @ v).transpose(1, 2).flatten(2) @ a.proj.weight.T + a.proj.bias
    torch.testing.assert_close(b.window_attention(x), mixed, rtol=1e-4, atol=1e-4)


def test_no_bias_of_queries_and_values() -> None:
    module = tiny(qkv_bias=False)
    assert not any(name.endswith(("q_bias", "v_bias")) for name, _ in module.named_parameters())
    assert torch.isfinite(module(torch.randn(1, 3, 32, 32))).all()


def test_random_weights_use_every_block() -> None:
    module = build(configure(resolve("swinv2_t"), img_size=(128, 128)).spec)
    x = torch.randn(1, 32 * 32, 96)
    block = module.layers[0].blocks[0]
    assert not torch.allclose(block(x), x)


@pytest.mark.parametrize("names", ["authors", "timm"])
def test_checkpoints_load_strictly(tmp_path: Path, names: str) -> None:
    spec = configure(resolve("swinv2_t"), img_size=(128, 128)).spec
    module = build(spec)
    state = golden_state(module)
    whole = {**dict(module.named_buffers()), **state} if names == "authors" else to_timm_names(state)
    torch.save({"model": whole}, tmp_path / "w.pth")
    loaded = load(spec, tmp_path / "w.pth")
    for key, value in state.items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


def test_a_checkpoint_of_another_window_is_refused(tmp_path: Path) -> None:
    spec = configure(resolve("swinv2_t"), img_size=(128, 128), window_size=4).spec
    other = build(configure(resolve("swinv2_t"), img_size=(128, 128)).spec)
    torch.save({"model": other.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="made for a window of 8") as refused:
        load(spec, tmp_path / "w.pth")
    assert "--window-size 8" in refused.value.hint
