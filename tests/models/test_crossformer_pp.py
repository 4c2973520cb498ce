"""CrossFormer++ against independent definitions and the authors' outputs."""

# ruff: noqa: N806 - C and G are the paper's names of the axes

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.models import crossformer_pp
from deploycli.models.build import build
from deploycli.models.crossformer_pp import (
    MASKED,
    CrossFormerPP,
    group_tokens,
    interleave,
    padding_mask,
    sample_at_interval,
    ungroup_tokens,
)
from deploycli.models.errors import UsageError
from deploycli.models.registry import configure, resolve
from tests.models.crossformers import TINY_PP, tiny_crossformer_pp
from tests.weights import TOLERANCE, golden_image

AUTHORS_MASK = -1e6


def test_samples_take_every_nth_row_and_column() -> None:
    x, interval = torch.arange(2 * 4 * 6).view(2, 4, 6, 1), 2
    expected = torch.cat([x[b, i::2, j::2][None] for b, i, j in itertools.product(range(2), repeat=3)])
    assert torch.equal(sample_at_interval(x, interval), expected)


def test_groups_are_cut_from_the_samples() -> None:
    """A token's row is (block * G + place) * interval + phase; one group shares the block and the phase."""
    x, (G, interval), (rows, columns) = torch.arange(2 * 12 * 18).view(2, 12, 18, 1), (3, 2), (2, 3)
    expected = [
        [[x[b, (i * G + r) * interval + p, (j * G + c) * interval + q].item()] for r in range(G) for c in range(G)]
        for b, p, q, i, j in itertools.product(*map(range, (2, interval, interval, rows, columns)))
    ]
    assert group_tokens(x, G, interval).tolist() == expected


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_ungrouping_undoes_grouping(batch: int, rows: int, columns: int, group_size: int, interval: int) -> None:
    height, width = rows * group_size * interval, columns * group_size * interval
    x = torch.randn(batch, height, width, 2)
    groups = group_tokens(x, group_size, interval)
    assert groups.shape == (batch * rows * columns * interval**2, group_size**2, 2)
    assert torch.equal(ungroup_tokens(groups, group_size, interval, height, width), x)
    assert torch.equal(interleave(sample_at_interval(x, interval), interval), x)


def test_exactly_the_padded_keys_are_masked() -> None:
    mask = padding_mask((5, 7), (6, 12), 3, 2)
    position = torch.arange(6 * 12).view(1, 6, 12, 1)
    for group, keys in zip(mask, group_tokens(position, 3, 2)[..., 0], strict=True):
        expected = [0.0 if key // 12 < 5 and key % 12 < 7 else MASKED for key in keys.tolist()]
        assert group.tolist() == [expected]


@pytest.mark.parametrize(("stage", "block"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)])
def test_a_padded_block_attends_as_defined(stage: int, block: int) -> None:
    """Attention, written token by token on the map without padding: who attends to whom, with which bias."""
    b = tiny_crossformer_pp().layers[stage].blocks[block]
    (height, width), G, heads, C = b.resolution, b.group_size, b.attn.num_heads, 32 * 2**stage
    interval = TINY_PP["interval"][stage] if block == 1 and stage < 2 else 1
    x = torch.randn(2, height * width, C, generator=torch.Generator().manual_seed(0))
    q, k, v = b.attn.qkv(x).view(2, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)

    token = torch.arange(height * width)
    position = torch.stack((token // width, token % width), dim=1)
    phase, place = position % interval, position // interval
    home = torch.cat((phase, place // G), dim=1)
    together = (home[:, None] == home[None, :]).all(-1)
    bias = b.attn.pos((place[:, None] - place[None, :]).float()).permute(2, 0, 1)
    scores = q @ k.transpose(-2, -1) * b.attn.head_dim**-0.5 + bias
    attention = scores.masked_fill(~together, float("-inf")).softmax(-1)
    expected = b.attn.proj((attention @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(b.group_attention(x), expected, rtol=1e-4, atol=1e-5)


def test_geometry_follows_groups_intervals_and_the_map() -> None:
    model = tiny_crossformer_pp()
    geometry = [[(b.resolution, b.group_size, b.interval, b.padded) for b in s.blocks[:2]] for s in model.layers]
    assert geometry == [
        [((20, 28), 4, 1, (20, 28)), ((20, 28), 4, 6, (24, 48))],
        [((10, 14), 3, 1, (12, 15)), ((10, 14), 3, 2, (12, 18))],
        [((5, 7), 5, 1, (5, 10)), ((5, 7), 5, 1, (5, 10))],  # not larger than the group of 7
    ]
    small = build(resolve("crossformer_pp_s").spec)
    padded = [(i, j) for i, s in enumerate(small.layers) for j, b in enumerate(s.blocks) if b.attn_mask is not None]
    assert padded == [(0, 1), (1, 1)]  # at 224 pixels, 56 and 28 tokens become 64 and 32


def test_the_mask_equals_the_authors_and_survives_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.from_numpy(golden_image((2, 3, 40, 56)))
    model = tiny_crossformer_pp()
    masks = [m for name, m in model.named_buffers() if name.endswith("attn_mask")]
    assert len(masks) == 7
    assert any((m == MASKED).all(-1).any() for m in masks)  # some groups are padding alone
    monkeypatch.setattr(crossformer_pp, "MASKED", AUTHORS_MASK)
    authors = tiny_crossformer_pp()
    with torch.inference_mode():
        # Not close but equal: either way a padded key's weight is exactly zero beside any other.
        assert torch.equal(model(images), authors(images))

        x = torch.randn(1, 20 * 28, 32).half()
        ours, theirs = (m.layers[0].blocks[1].half() for m in (model, authors))
        groups = group_tokens(torch.nn.functional.pad(x.view(1, 20, 28, 32), (0, 0, 0, 20, 0, 4)), 4, 6)
        assert ours.attn(groups, ours.attn_mask).isfinite().all()
        assert theirs.attn(groups, theirs.attn_mask).isnan().any()


@pytest.mark.parametrize(
    ("name", "cooled"),
    [
        ("crossformer_pp_s", [[], [], [2, 5, 8, 11, 14], []]),
        ("crossformer_pp_h", [[2], [2], [2, 5, 8, 11, 14], []]),
    ],
)
def test_every_third_block_cools_unless_it_ends_a_stage(name: str, cooled: list[list[int]]) -> None:
    with torch.device("meta"):
        model = build(resolve(name).spec)
    assert [[j for j, b in enumerate(stage.blocks) if b.cooling] for stage in model.layers] == cooled
    with_layer = {key.rsplit(".", 2)[0] for key in model.state_dict() if ".ex_" in key}
    assert with_layer == {f"layers.{i}.blocks.{j}" for i, blocks in enumerate(cooled) for j in blocks}


def test_cooling_replaces_each_token_by_its_neighbourhood() -> None:
    block = tiny_crossformer_pp().layers[1].blocks[2]
    x = torch.randn(2, 140, 64)
    kernel, padded = block.ex_conv.weight[:, 0], torch.nn.functional.pad(x.view(2, 10, 14, 64), (0, 0, 1, 1, 1, 1))
    mixed = sum(padded[:, i : i + 10, j : j + 14] * kernel[:, i, j] for i in range(3) for j in range(3))
    expected = block.ex_ln((mixed + block.ex_conv.bias).reshape(2, 140, 64))
    torch.testing.assert_close(block.cool(x), expected, rtol=1e-4, atol=1e-5)
    without = super(type(block), block).forward(x)
    torch.testing.assert_close(block(x), block.cool(without), rtol=0, atol=0)


def test_checkpoints_hold_learned_weights_only() -> None:
    model = tiny_crossformer_pp()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_can_be_trained() -> None:
    model = tiny_crossformer_pp(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.35).train()
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 40, 56)), torch.arange(4)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    drops = [block.drop_path for layer in model.layers for block in layer.blocks]
    assert [d.rate for d in drops[1:]] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35])


def test_samples_of_a_batch_do_not_meet() -> None:
    model, images = tiny_crossformer_pp(), torch.randn(3, 3, 40, 56)
    with torch.inference_mode():
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("img_size", "remedy"), [(250, "--img-size 224 or 256 or 288"), ((256, 100), "256x96"), (8, "32")]
)
def test_a_map_that_cannot_be_halved_is_refused_with_sizes_that_can(img_size: Any, remedy: str) -> None:
    with pytest.raises(UsageError, match="multiples of 32") as failure:
        build(configure(resolve("crossformer_pp_s"), img_size=img_size).spec)
    assert remedy in failure.value.hint


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 5))
def test_every_multiple_of_the_stride_runs(rows: int, columns: int, group_size: int, interval: int) -> None:
    config = {"patch_size": [2, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 1], "num_classes": 1}
    config |= {"img_size": (4 * rows, 4 * columns), "group_size": [group_size] * 2, "interval": [interval] * 2}
    assert CrossFormerPP(**config)(torch.randn(1, 3, 4 * rows, 4 * columns)).isfinite().all()
