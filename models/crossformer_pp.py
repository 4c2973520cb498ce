"""CrossFormer++: A Versatile Vision Transformer Hinging on Cross-scale Attention.

Paper: https://arxiv.org/abs/2303.06908. Parameters have the names of the authors' code
(https://github.com/cheerss/CrossFormer, branch ``main``, models/crossformer.py), so their checkpoints load as they are;
the buffers that follow from the configuration are in none of them.

Three things differ from CrossFormer. The group size is each stage's own and grows with depth (progressive group size).
The interval is a number instead of the map's side over the group size, so maps are padded to what groups and interval
tile, and padding is masked. Every third block ends in an amplitude cooling layer.
"""

# ruff: noqa: N803, N806 - B, H, W, C, G and I (the interval) are the paper's names of the axes

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploycli.models.crossformer import (
    CrossFormerBlock,
    CrossScaleTransformer,
    group_neighbours,
    stage_resolutions,
    ungroup_neighbours,
)
from deploycli.models.family import Family
from deploycli.models.layers import check_halves, drop_path_rates

if TYPE_CHECKING:
    from collections.abc import Sequence

# What the score of a padded key loses. The authors' -1e6 is minus infinity in float16, and a group of padding alone is
# then NaN. From -1e4 on, e^x is as much zero in float32, unless scores themselves reach the thousands.
MASKED = -1e4


def sample_at_interval(x: Tensor, interval: int) -> Tensor:
    """Split a feature map [B, H, W, C] into I*I maps [B*I*I, H/I, W/I, C] of every I-th row and column each."""
    _, H, W, C = x.shape
    x = x.view(-1, H // interval, interval, W // interval, interval, C)
    # [B, H/I, I, W/I, I, C] -> [B, I, I, H/I, W/I, C] -> [B*I*I, H/I, W/I, C]
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, H // interval, W // interval, C)


def interleave(samples: Tensor, interval: int) -> Tensor:
    """Put the maps [B*I*I, H/I, W/I, C] of :func:`sample_at_interval` back together as one, [B, H, W, C]."""
    _, rows, columns, C = samples.shape
    x = samples.view(-1, interval, interval, rows, columns, C)
    # [B, I, I, H/I, W/I, C] -> [B, H/I, I, W/I, I, C] -> [B, H, W, C]
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, rows * interval, columns * interval, C)


def group_tokens(x: Tensor, group_size: int, interval: int) -> Tensor:
    """Cut each sample of a feature map [B, H, W, C] into groups, [B*nG, G*G, C]; at interval 1 it is its own sample."""
    if interval > 1:
        x = sample_at_interval(x, interval)
    return group_neighbours(x, group_size)


def ungroup_tokens(groups: Tensor, group_size: int, interval: int, H: int, W: int) -> Tensor:
    """Put the groups [B*nG, G*G, C] of :func:`group_tokens` back together as a feature map [B, H, W, C]."""
    x = ungroup_neighbours(groups, group_size, H // interval, W // interval)
    return interleave(x, interval) if interval > 1 else x


def padding_mask(resolution: tuple[int, int], padded: tuple[int, int], group_size: int, interval: int) -> Tensor:
    """Return what is added to the scores of the groups, [nG, 1, G*G]: -1e4 for each padded key, 0 for the others."""
    padding = torch.ones(1, *padded, 1)
    padding[:, : resolution[0], : resolution[1]] = 0
    keys = group_tokens(padding, group_size, interval).transpose(1, 2)  # [nG, G*G, 1] -> [nG, 1, G*G]
    return torch.zeros_like(keys).masked_fill(keys > 0, MASKED)


class CrossFormerPPBlock(CrossFormerBlock):
    """A block of CrossFormer on a padded map, and an amplitude cooling layer where asked for.

    Args:
        dim: channels of a token.
        resolution: height and width of the feature map, tokens; padding below and to the right makes the groups fit.
        num_heads: attention heads.
        group_size: side of a group; a map that is not larger is cut into groups of its shorter side, at no interval.
        long_distance: whether groups sample the map at the interval; otherwise they hold neighbours.
        interval: distance of the sampled tokens.
        cooling: whether an amplitude cooling layer follows.
        block: further arguments of :class:`CrossFormerBlock`.
    """

    attn_mask: Tensor | None

    def __init__(
        self,
        dim: int,
        resolution: tuple[int, int],
        num_heads: int,
        group_size: int,
        long_distance: bool,
        interval: int,
        cooling: bool,
        **block: Any,
    ) -> None:
        super().__init__(dim, resolution, num_heads, group_size, long_distance, persistent=False, **block)
        self.interval = interval if self.long_distance else 1
        reach = self.group_size * self.interval  # tokens from the first row of a group to that of the next
        self.padded = (resolution[0] + -resolution[0] % reach, resolution[1] + -resolution[1] % reach)

        is_padded = self.padded != resolution
        mask = padding_mask(resolution, self.padded, self.group_size, self.interval) if is_padded else None
        self.register_buffer("attn_mask", mask, persistent=False)

        self.cooling = cooling
        if cooling:
            self.ex_conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
            self.ex_ln = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, H*W, C] to [B, H*W, C]."""
        x = super().forward(x)
        return self.cool(x) if self.cooling else x

    def group_attention(self, x: Tensor) -> Tensor:
        """Pad and group the map of tokens [B, H*W, C], attend within the groups, put them back, and crop."""
        (H, W), (Hp, Wp) = self.resolution, self.padded
        x = x.view(-1, H, W, x.shape[-1])
        if self.attn_mask is not None:
            x = functional.pad(x, (0, 0, 0, Wp - W, 0, Hp - H))  # [B, H, W, C] -> [B, Hp, Wp, C]
        groups = group_tokens(x, self.group_size, self.interval)  # [B, Hp, Wp, C] -> [B*nG, G*G, C]

        groups = self.attn(groups, self.attn_mask)

        x = ungroup_tokens(groups, self.group_size, self.interval, Hp, Wp)  # [B*nG, G*G, C] -> [B, Hp, Wp, C]
        if self.attn_mask is not None:
            x = x[:, :H, :W]  # [B, Hp, Wp, C] -> [B, H, W, C]
        return x.flatten(1, 2)  # [B, H, W, C] -> [B, H*W, C]

    def cool(self, x: Tensor) -> Tensor:
        """Amplitude cooling layer: a depthwise convolution and a LayerNorm, without a residual that would add up."""
        x = x.transpose(1, 2).reshape(-1, x.shape[-1], *self.resolution)  # [B, H*W, C] -> [B, C, H, W]
        x = self.ex_conv(x).flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, H*W, C]
        cooled: Tensor = self.ex_ln(x)
        return cooled

    def extra_repr(self) -> str:
        """Show the geometry."""
        return f"{super().extra_repr()}, interval={self.interval}, padded={self.padded}"


def cools(block: int, depth: int) -> bool:
    """Say whether a block of a stage ends in an amplitude cooling layer: every third, but not where the stage ends."""
    return block % 3 == 2 and block < depth - 1


class CrossFormerPP(CrossScaleTransformer):
    """The classifier; in each stage, blocks of short- and long-distance attention alternate.

    Args:
        img_size: height and width of the images, pixels.
        patch_size: kernels of the first embedding layer, pixels, ascending; the first is the stride.
        in_chans: channels of the images.
        num_classes: outputs of the head.
        embed_dim: channels in the first stage; each further stage has twice as many.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        group_size: side of a group per stage, tokens.
        interval: interval of long-distance attention per stage, tokens.
        merge_size: kernels of the embedding layers between the stages, tokens, ascending; the stride is 2.
        mlp_ratio: hidden channels of the MLPs over their channels.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: scale of the queries; by default ``head_dim ** -0.5``.
        drop_rate: dropout rate of the embedding, the projections and the MLPs.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0 in the first.

    Raises:
        UsageError: the feature maps of this image size cannot be halved between the stages.
    """

    def __init__(
        self,
        img_size: Sequence[int] = (224, 224),
        patch_size: Sequence[int] = (4, 8, 16, 32),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        group_size: Sequence[int] = (4, 4, 14, 7),
        interval: Sequence[int] = (4, 2, 1, 1),
        merge_size: Sequence[int] = (2, 4),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
    ) -> None:
        height, width = img_size
        stride, stages = patch_size[0], len(depths)
        check_halves((height, width), stride, stages)

        resolutions = stage_resolutions((height, width), stride, stages)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        blocks = [
            [
                CrossFormerPPBlock(
                    dim=embed_dim * 2**i,
                    resolution=resolutions[i],
                    num_heads=num_heads[i],
                    group_size=group_size[i],
                    long_distance=j % 2 == 1,
                    interval=interval[i],
                    cooling=cools(j, depths[i]),
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=next(rates),
                )
                for j in range(depths[i])
            ]
            for i in range(stages)
        ]
        super().__init__((height, width), patch_size, in_chans, num_classes, embed_dim, merge_size, blocks, drop_rate)


# A checkpoint fits any image and group size, as nothing in it depends on them.
FAMILY = Family(
    create=CrossFormerPP,
    head="head.weight",
)
