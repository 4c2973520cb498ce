"""CrossFormer against independent definitions and the authors' outputs."""

# ruff: noqa: N803, N806 - G is the paper's name of the group size

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.models.build import build
from deploycli.models.crossformer import (
    CrossFormer,
    group_at_interval,
    group_neighbours,
    relative_offsets,
    ungroup_at_interval,
    ungroup_neighbours,
)
from deploycli.models.errors import UsageError
from deploycli.models.layers import misfit, relative_position_index
from deploycli.models.registry import configure, resolve
from tests.models.crossformers import tiny_crossformer
from tests.weights import TOLERANCE


@pytest.mark.parametrize("name", ["crossformer_t", "crossformer_pp_s"])
def test_images_are_prepared_as_the_authors_do(name: str) -> None:
    """They resize the shorter side to 256 bicubically, and crop 224."""
    recipe = resolve(name).preprocessing
    assert (recipe.size, recipe.size[0] / recipe.crop_pct, recipe.interpolation) == ((224, 224), 256, "bicubic")
    assert recipe.mean == (0.485, 0.456, 0.406)
    assert recipe.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("long_name", ["crossformer_base", "crossformer_base_patch4_group7_224"])
def test_long_names_resolve(long_name: str) -> None:
    assert resolve(long_name).name == "crossformer_b"


def test_short_distance_groups_hold_neighbours() -> None:
    x, G = torch.arange(2 * 6 * 9).view(2, 6, 9, 1), 3
    expected = [
        [[x[b, G * i + r, G * j + c].item()] for r in range(G) for c in range(G)]
        for b, i, j in itertools.product(range(2), range(2), range(3))
    ]
    assert group_neighbours(x, G).tolist() == expected


def test_long_distance_groups_sample_at_the_interval() -> None:
    x, G = torch.arange(2 * 6 * 9).view(2, 6, 9, 1), 3
    rows, columns = 6 // G, 9 // G  # the interval on each axis
    expected = [
        [[x[b, rows * r + i, columns * c + j].item()] for r in range(G) for c in range(G)]
        for b, i, j in itertools.product(range(2), range(rows), range(columns))
    ]
    assert group_at_interval(x, G).tolist() == expected


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_ungrouping_undoes_grouping(batch: int, rows: int, columns: int, G: int, channels: int) -> None:
    x = torch.randn(batch, rows * G, columns * G, channels)
    for group, ungroup in ((group_neighbours, ungroup_neighbours), (group_at_interval, ungroup_at_interval)):
        groups = group(x, G)
        assert groups.shape == (batch * rows * columns, G * G, channels)
        assert torch.equal(ungroup(groups, G, rows * G, columns * G), x)


@pytest.mark.parametrize("group_size", [1, 2, 5, 7])
def test_index_finds_the_offset_of_each_pair(group_size: int) -> None:
    offsets, index = relative_offsets(group_size), relative_position_index(group_size)
    tokens = list(itertools.product(range(group_size), repeat=2))
    for (i, (qi, qj)), (j, (ki, kj)) in itertools.product(enumerate(tokens), repeat=2):
        assert offsets[index[i, j]].tolist() == [qi - ki, qj - kj]


@pytest.mark.parametrize("long_distance", [False, True])
def test_a_block_attends_as_defined(long_distance: bool) -> None:
    """Attention, written token by token on the whole map: who attends to whom, with which bias."""
    block = tiny_crossformer().layers[0].blocks[int(long_distance)]
    (side, _), G, heads = block.resolution, block.group_size, block.attn.num_heads
    interval = side // G
    assert (side, G, block.long_distance) == (32, 8, long_distance)
    x = torch.randn(2, side * side, 32, generator=torch.Generator().manual_seed(0))
    q, k, v = block.attn.qkv(x).view(2, side * side, 3, heads, -1).permute(2, 0, 3, 1, 4)

    token = torch.arange(side * side)
    position = torch.stack((token // side, token % side), dim=1)
    home, place = (position % interval, position // interval) if long_distance else (position // G, position % G)
    together = (home[:, None] == home[None, :]).all(-1)
    offset = (place[:, None] - place[None, :]).float()
    mlp = block.attn.pos
    bias = mlp.pos3(mlp.pos2(mlp.pos1(mlp.pos_proj(offset)))).permute(2, 0, 1)
    scores = q @ k.transpose(-2, -1) * block.attn.head_dim**-0.5 + bias
    attention = scores.masked_fill(~together, float("-inf")).softmax(-1)
    expected = block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block.group_attention(x), expected, rtol=1e-4, atol=1e-5)


def test_distances_alternate_and_a_small_map_is_one_group() -> None:
    model = tiny_crossformer(depths=[3, 2, 2])
    geometry = [[(b.resolution, b.group_size, b.long_distance) for b in layer.blocks] for layer in model.layers]
    assert geometry == [
        [((32, 32), 8, False), ((32, 32), 8, True), ((32, 32), 8, False)],
        [((16, 16), 8, False), ((16, 16), 8, True)],
        [((8, 8), 8, False), ((8, 8), 8, False)],  # not larger than the group
    ]
    shrunk = tiny_crossformer(img_size=(32, 32))
    assert [(b.group_size, b.long_distance) for b in shrunk.layers[2].blocks] == [(4, False)] * 2


def test_embeddings_see_several_scales_around_the_same_centre() -> None:
    """Change one pixel: exactly the tokens whose kernels reach it change, scale by scale."""
    embed = tiny_crossformer(patch_size=[4, 8, 16, 32]).patch_embed
    assert [conv.out_channels for conv in embed.projs] == [16, 8, 4, 4]
    images = torch.zeros(1, 3, 64, 64)
    changed = images.clone()
    changed[0, 1, 33, 50] = 1.0
    for conv, kernel in zip(embed.projs, (4, 8, 16, 32), strict=True):
        moved = (conv(images) != conv(changed)).any(1)[0]
        for i, j in itertools.product(range(16), repeat=2):
            top, left = 4 * i + 2 - kernel // 2, 4 * j + 2 - kernel // 2  # the centre is the 4x4 patch's
            assert moved[i, j] == (top <= 33 < top + kernel and left <= 50 < left + kernel)


def test_stochastic_depth_grows_evenly_over_all_blocks() -> None:
    drops = [block.drop_path for layer in tiny_crossformer(drop_path_rate=0.5).layers for block in layer.blocks]
    assert isinstance(drops[0], torch.nn.Identity)
    assert [d.rate for d in drops[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_can_be_trained() -> None:
    model = tiny_crossformer(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2).train()
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_options_change_the_model_as_named() -> None:
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(tiny_crossformer()(images), tiny_crossformer(qk_scale=32**-0.5)(images))
        assert not torch.allclose(tiny_crossformer()(images), tiny_crossformer(qk_scale=0.1)(images))
    lost = set(tiny_crossformer().state_dict()) - set(tiny_crossformer(qkv_bias=False).state_dict())
    assert len(lost) == 6
    assert all(key.endswith("attn.qkv.bias") for key in lost)


def test_images_need_not_be_square() -> None:
    model = tiny_crossformer(img_size=(32, 64), group_size=4)
    assert model(torch.randn(2, 3, 32, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"\(64, 32\)"):
        model(torch.randn(2, 3, 64, 32))


def test_samples_of_a_batch_do_not_meet() -> None:
    model, images = tiny_crossformer(), torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("img_size", "remedy"), [(256, "--img-size 224 or 448"), ((224, 300), "224x448"), (226, "224"), (3, "224")]
)
def test_a_size_that_does_not_fit_is_refused_with_those_that_do(img_size: Any, remedy: str) -> None:
    with pytest.raises(UsageError, match="group") as failure:
        build(configure(resolve("crossformer_t"), img_size=img_size).spec)
    assert remedy in failure.value.hint
    assert "window" not in str(failure.value)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 4))
def test_a_size_fits_exactly_if_a_model_of_it_runs(height: int, width: int, group_size: int, stages: int) -> None:
    config = {"img_size": (height, width), "patch_size": [2, 4], "embed_dim": 16, "num_heads": [1] * stages}
    config |= {"depths": [2] * stages, "group_size": group_size, "num_classes": 1}
    if misfit((height, width), 2, group_size, stages):
        with pytest.raises(UsageError):
            CrossFormer(**config)
    else:
        assert CrossFormer(**config)(torch.randn(1, 3, height, width)).shape == (1, 1)
