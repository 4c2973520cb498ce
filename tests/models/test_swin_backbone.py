"""Swin as a backbone for detection, against a definition of its own: window by window, token by token."""

# ruff: noqa: N806 - H, W and C are the paper's names of the axes

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from deploycli.models.build import build
from deploycli.models.checkpoint import load
from deploycli.models.errors import UsageError
from deploycli.models.features import with_features
from deploycli.models.registry import configure, resolve
from deploycli.models.swin_backbone import SwinBackbone
from tests.models.swins import TINY, golden_state, tiny_spec, tiny_swin, to_timm_names
from tests.weights import TOLERANCE, golden_image

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from deploycli.models.spec import ModelSpec

CONFIG: dict[str, Any] = {key: value for key, value in TINY.items() if key != "num_classes"} | {"window_size": 4}


def backbone_spec(stages: tuple[int, ...] = (), **changes: Any) -> ModelSpec:
    config = {**TINY, "window_size": 4, **changes}
    img_size = config.pop("img_size")
    return with_features(configure(resolve("swin_t"), img_size=tuple(img_size), **config), stages).spec


def tiny_backbone(**changes: Any) -> SwinBackbone:
    model = SwinBackbone(**{**CONFIG, **changes}).eval()
    model.load_state_dict(golden_state(model), strict=False)
    return model


def defined(state: dict[str, Tensor], images: Tensor, config: dict[str, Any]) -> dict[str, Tensor]:
    """What a backbone answers, from its weights alone."""
    patch, window = config["patch_size"], config["window_size"]
    _, _, height, width = images.shape
    canvas = images.new_zeros(*images.shape[:2], -(-height // patch) * patch, -(-width // patch) * patch)
    canvas[:, :, :height, :width] = images
    x = conv2d(canvas, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = normed(state, "patch_embed.norm", x.permute(0, 2, 3, 1))
    maps = {}
    for stage, (depth, heads) in enumerate(zip(config["depths"], config["num_heads"], strict=True)):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            x = x + attended(state, name, normed(state, f"{name}.norm1", x), heads, window, window // 2 * (block % 2))
            hidden = gelu(dense(state, f"{name}.mlp.fc1", normed(state, f"{name}.norm2", x)))
            x = x + dense(state, f"{name}.mlp.fc2", hidden)
        maps[f"stage{stage + 1}"] = normed(state, f"norm{stage}", x).permute(0, 3, 1, 2)
        if stage < len(config["depths"]) - 1:
            x = merged(state, f"layers.{stage}.downsample", x)
    return maps


def normed(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def dense(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def attended(state: dict[str, Tensor], name: str, x: Tensor, heads: int, window: int, shift: int) -> Tensor:
    """Attention of each window: the map has a frame of zeros below and to the right, and is a torus."""
    B, H, W, C = x.shape
    rows, columns = -(-H // window) * window, -(-W // window) * window
    torus = x.new_zeros(B, rows, columns, C)
    torus[:, :H, :W] = x
    result = torch.zeros_like(torus)
    table = state[f"{name}.attn.relative_position_bias_table"].view(2 * window - 1, 2 * window - 1, heads)
    inside = list(itertools.product(range(window), repeat=2))
    bias = torch.stack(
        [torch.stack([table[i - k + window - 1, j - m + window - 1] for k, m in inside]) for i, j in inside]
    )
    for top, left in itertools.product(range(0, rows, window), range(0, columns, window)):
        unrolled = [(top + i + shift, left + j + shift) for i, j in inside]
        cells = torch.tensor([(r % rows, c % columns) for r, c in unrolled])
        turns = [(r >= rows, c >= columns) for r, c in unrolled]  # who came from the other side meets no one from here
        apart = torch.tensor([[a != b for b in turns] for a in turns])
        tokens = torus[:, cells[:, 0], cells[:, 1]]
        q, k, v = dense(state, f"{name}.attn.qkv", tokens).view(B, window**2, 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + bias.permute(2, 0, 1) - 100 * apart
        found = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        result[:, cells[:, 0], cells[:, 1]] = dense(state, f"{name}.attn.proj", found)
    return result[:, :H, :W]


def merged(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    B, H, W, C = x.shape
    out = x.new_zeros(B, -(-H // 2), -(-W // 2), 4, C)
    for column, row in itertools.product(range(2), repeat=2):
        part = x[:, row::2, column::2]
        out[:, : part.shape[1], : part.shape[2], 2 * column + row] = part
    return dense(state, f"{name}.reduction", normed(state, f"{name}.norm", out.flatten(3)))


SIZES = [
    (64, 64),  # 32, 16 and 8 tokens: nothing is padded
    (45, 71),  # odd pixels, odd maps: 23x36, 12x18, 6x9
    (8, 8),  # 4 tokens are one window, and still shifted; then less than a window
    (2, 50),  # one row of tokens
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_are_as_defined(size: tuple[int, int], dtype: torch.dtype) -> None:
    model = tiny_backbone(img_size=size).to(dtype)
    images = torch.from_numpy(golden_image((2, 3, *size))).to(dtype)
    with torch.inference_mode():
        found, expected = model(images), defined(model.state_dict(), images, CONFIG)
    assert list(found) == ["stage1", "stage2", "stage3"]
    tolerance = TOLERANCE if dtype == torch.float32 else 1e-12
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


def test_a_classifier_gives_the_same_maps_where_nothing_is_padded() -> None:
    """And where no map is as small as the window, for there the classifier drops the shift."""
    classifier = tiny_swin(window_size=4)
    backbone = tiny_backbone()
    images = torch.from_numpy(golden_image((2, 3, 64, 64)))
    with torch.inference_mode():
        x, maps = classifier.patch_embed(images), backbone(images)
        for stage, layer in enumerate(classifier.layers):
            for block in layer.blocks:
                x = block(x)
            expected = backbone.get_submodule(f"norm{stage}")(x).transpose(1, 2)
            torch.testing.assert_close(maps[f"stage{stage + 1}"].flatten(2), expected, rtol=0, atol=TOLERANCE)
            x = x if layer.downsample is None else layer.downsample(x)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.sets(st.integers(1, 3), min_size=1))
def test_any_size_gives_maps_of_the_strides(height: int, width: int, window: int, stages: set[int]) -> None:
    spec = backbone_spec(tuple(stages), img_size=(height, width), window_size=window)
    with torch.inference_mode():
        maps = build(spec)(torch.zeros(2, 3, height, width))
    assert spec.strides == tuple(2**stage for stage in sorted(stages))
    assert {name: tuple(value.shape) for name, value in maps.items()} == {
        f"stage{stage}": (2, 8 * 2 ** (stage - 1), -(-height // 2**stage), -(-width // 2**stage))
        for stage in sorted(stages)
    }
    assert spec.outputs == tuple(maps)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(46, 71\), the model was built for \(45, 71\)"):
        tiny_backbone(img_size=(45, 71))(torch.zeros(1, 3, 46, 71))


# --- checkpoints


@pytest.mark.parametrize("names", [dict, to_timm_names])
def test_a_classifiers_checkpoint_loads_but_for_norm_and_head(names: Any, tmp_path: Path) -> None:
    classifier = build(tiny_spec(window_size=4))
    classifier.load_state_dict(golden_state(classifier), strict=False)
    torch.save({"model": names(classifier.state_dict())}, tmp_path / "classifier.pth")  # with the masks of its size
    loaded = load(backbone_spec(img_size=(45, 71)), tmp_path / "classifier.pth")
    head = "head.fc" if names is to_timm_names else "head"
    assert set(loaded.report.left_out) == {"norm.weight", "norm.bias", f"{head}.weight", f"{head}.bias"}
    assert set(loaded.report.fresh) == {f"norm{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    assert {"left_out": 4, "fresh": 6}.items() <= loaded.weights.report.items()
    own, theirs = loaded.model.state_dict(), classifier.state_dict()
    for key in loaded.report.loaded:
        assert torch.equal(own[key], theirs[key])
    assert len(loaded.report.loaded) == len(golden_state(classifier)) - 4
    assert torch.equal(own["norm1.weight"], torch.ones(16))


def test_a_detectors_checkpoint_brings_the_norms(tmp_path: Path) -> None:
    state = golden_state(tiny_backbone())
    detector = {f"backbone.{key}": value for key, value in state.items()} | {"neck.conv.weight": torch.ones(3)}
    torch.save({"state_dict": detector}, tmp_path / "detector.pth")
    loaded = load(backbone_spec((2, 3)), tmp_path / "detector.pth")
    assert set(loaded.report.left_out) == {"backbone.norm0.weight", "backbone.norm0.bias", "neck.conv.weight"}
    assert loaded.report.fresh == ()
    images = torch.from_numpy(golden_image((1, 3, 64, 64)))
    with torch.inference_mode():
        found, expected = loaded.model(images), tiny_backbone()(images)
    assert list(found) == ["stage2", "stage3"]
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_half_of_the_norms_is_a_fault(tmp_path: Path) -> None:
    state = golden_state(tiny_backbone())
    del state["norm1.bias"]
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(UsageError, match=r"missing \(1\): norm1.bias"):
        load(backbone_spec(), tmp_path / "damaged.pth")


def test_a_checkpoint_of_another_window_is_refused(tmp_path: Path) -> None:
    torch.save(golden_state(tiny_backbone()), tmp_path / "4.pth")
    with pytest.raises(UsageError, match="made for a window of 4") as failure:
        load(backbone_spec(window_size=5), tmp_path / "4.pth")
    assert failure.value.hint == "--window-size 4"


# --- what has no maps


def test_what_has_no_maps_says_so() -> None:
    with pytest.raises(UsageError, match="--features of vit_b_16, which has no feature maps"):
        with_features(resolve("vit_b_16"), ())
    with pytest.raises(UsageError, match="--features 5, and swin_t has 4 stages"):
        with_features(resolve("swin_t"), (2, 5))
    with pytest.raises(UsageError, match="absolute positions"):
        with_features(configure(resolve("swin_t"), ape=True), ())
