"""CrossFormer: A Versatile Vision Transformer Based on Cross-scale Attention.

Paper: https://arxiv.org/abs/2108.00154. Parameters and buffers have the names of the authors' code
(https://github.com/cheerss/CrossFormer, branch ``crossformer``, models/crossformer.py), so their checkpoints load as
they are.

The grouping and the position bias stand in the forward path as the paper states them; simplifying the traced graph is
the exporter's work, and this model is the reference that it is judged by.
"""

# ruff: noqa: N803, N806 - B, H, W, C and N are the paper's names of the axes

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deploycli.models.errors import UsageError
from deploycli.models.family import Family
from deploycli.models.layers import (
    DropPath,
    Mlp,
    check_fit,
    drop_path_rates,
    effective_window,
    init_transformer,
    relative_position_index,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def relative_offsets(group_size: int) -> Tensor:
    """Return every offset between two tokens of a group, row by row, [(2G-1)**2, 2], float32."""
    side = torch.arange(1 - group_size, group_size)
    offsets = torch.stack(torch.meshgrid(side, side, indexing="ij"))  # [2, 2G-1, 2G-1]
    return offsets.flatten(1).transpose(0, 1).float()


def cross_scale_convolutions(in_dim: int, out_dim: int, kernel_sizes: Sequence[int], stride: int) -> nn.ModuleList:
    """Return one convolution per scale, all on the same grid of centres; together they make ``out_dim`` channels.

    Larger kernels get fewer channels: 1/2, 1/4, 1/8, and the largest as many as the one before it.
    """
    last = len(kernel_sizes) - 1
    return nn.ModuleList(
        nn.Conv2d(in_dim, out_dim // 2 ** min(i + 1, last), kernel, stride, padding=(kernel - stride) // 2)
        for i, kernel in enumerate(kernel_sizes)
    )


class CrossScaleEmbedding(nn.Module):
    """The first cross-scale embedding layer: each token sees the image at several scales.

    Args:
        img_size: height and width, pixels.
        patch_size: kernels, pixels, ascending; the first is the stride.
        in_chans: channels of the image.
        embed_dim: channels of a token.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: Sequence[int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.projs = cross_scale_convolutions(in_chans, embed_dim, patch_size, stride=patch_size[0])
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [B, in_chans, H, W] as tokens [B, H/stride * W/stride, embed_dim], row by row.

        Raises:
            ValueError: the images have another size; the groups are laid out for one size only.
        """
        if tuple(images.shape[2:]) != self.img_size:
            raise ValueError(f"images are {tuple(images.shape[2:])}, the model was built for {self.img_size}")
        x = torch.cat([conv(images) for conv in self.projs], dim=1)  # [B, C/2], [B, C/4], ... -> [B, C, H, W]
        tokens: Tensor = self.norm(x.flatten(2).transpose(1, 2))  # [B, C, H, W] -> [B, H*W, C]
        return tokens


class PatchMerging(nn.Module):
    """The cross-scale embedding layer between two stages: half the resolution, twice the channels.

    Args:
        resolution: height and width of the feature map, tokens; both even.
        dim: channels of a token.
        merge_size: kernels, tokens, ascending; the stride is 2.
    """

    def __init__(self, resolution: tuple[int, int], dim: int, merge_size: Sequence[int]) -> None:
        super().__init__()
        self.resolution = resolution
        self.reductions = cross_scale_convolutions(dim, 2 * dim, merge_size, stride=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, H*W, C] to [B, H/2 * W/2, 2*C]."""
        x = self.norm(x).transpose(1, 2).reshape(-1, x.shape[-1], *self.resolution)  # [B, H*W, C] -> [B, C, H, W]
        x = torch.cat([conv(x) for conv in self.reductions], dim=1)  # 2 of [B, C, H/2, W/2]
        return x.flatten(2).transpose(1, 2)  # [B, 2*C, H/2, W/2] -> [B, H/2 * W/2, 2*C]


class DynamicPositionBias(nn.Module):
    """An MLP from the offset between two tokens to the bias of their attention, instead of a table of biases.

    Args:
        dim: channels of the hidden layers.
        num_heads: attention heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()

        def layer(out_dim: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, out_dim))

        self.pos_proj = nn.Linear(2, dim)
        self.pos1 = layer(dim)
        self.pos2 = layer(dim)
        self.pos3 = layer(num_heads)

    def forward(self, offsets: Tensor) -> Tensor:
        """Map offsets [..., 2] to biases [..., num_heads]."""
        biases: Tensor = self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))
        return biases


class GroupAttention(nn.Module):
    """Multi-head self-attention within groups, with dynamic position bias.

    Args:
        dim: channels of a token.
        group_size: side of a group, tokens.
        num_heads: attention heads.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: scale of the queries; by default ``head_dim ** -0.5``.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
        persistent: whether checkpoints hold the offsets and their index, which follow from the group size.
    """

    biases: Tensor
    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        group_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        persistent: bool = True,
    ) -> None:
        super().__init__()
        self.group_size = group_size
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale

        self.pos = DynamicPositionBias(dim // 16, num_heads)
        self.register_buffer("biases", relative_offsets(group_size), persistent)  # the authors' name for the offsets
        self.register_buffer("relative_position_index", relative_position_index(group_size), persistent)

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within groups.

        Args:
            x: groups [B*nG, N, C] of N = group_size**2 tokens.
            mask: what is added to the scores, [nG, 1, N], one value per key; or None.

        Returns:
            Groups [B*nG, N, C].
        """
        _, N, C = x.shape
        qkv = self.qkv(x).view(-1, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B*nG, N, 3, nH, D] -> 3 of [B*nG, nH, N, D]

        attn = (q * self.scale) @ k.transpose(-2, -1)  # [B*nG, nH, N, N]
        attn = attn + self.relative_position_bias()
        if mask is not None:
            nG = mask.shape[0]
            attn = attn.view(-1, nG, self.num_heads, N, N) + mask[None, :, None]  # [B, nG, nH, N, N]
            attn = attn.view(-1, self.num_heads, N, N)
        attn = self.attn_drop(attn.softmax(dim=-1))

        x = (attn @ v).transpose(1, 2).reshape(-1, N, C)  # [B*nG, nH, N, D] -> [B*nG, N, C]
        out: Tensor = self.proj_drop(self.proj(x))
        return out

    def relative_position_bias(self) -> Tensor:
        """Compute the bias of every offset and look that of each pair of tokens up, [nH, N, N]."""
        N = self.group_size**2
        biases: Tensor = self.pos(self.biases)  # [(2G-1)**2, nH]
        return biases[self.relative_position_index.view(-1)].view(N, N, -1).permute(2, 0, 1)


class Stage(nn.Module):
    """Blocks at one resolution, then a cross-scale embedding layer unless the stage is the last.

    Args:
        blocks: the blocks in order.
        downsample: the embedding layer, or None.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, H*W, C] to [B, H/2 * W/2, 2*C], or to the same shape in the last stage."""
        for block in self.blocks:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x


class CrossScaleTransformer(nn.Module):
    """The classifier around the blocks of either paper: embedding, stages, LayerNorm, mean over the tokens, head.

    Args:
        img_size: height and width of the images, pixels.
        patch_size: kernels of the first embedding layer, pixels, ascending; the first is the stride.
        in_chans: channels of the images.
        num_classes: outputs of the head.
        embed_dim: channels in the first stage; each further stage has twice as many.
        merge_size: kernels of the embedding layers between the stages, tokens, ascending; the stride is 2.
        blocks: the blocks of each stage.
        drop_rate: dropout rate of the embedding.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: Sequence[int],
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        merge_size: Sequence[int],
        blocks: Sequence[Sequence[nn.Module]],
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.patch_embed = CrossScaleEmbedding(img_size, patch_size, in_chans, embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)

        resolutions, last = stage_resolutions(img_size, patch_size[0], len(blocks)), len(blocks) - 1
        self.layers = nn.ModuleList(
            Stage(stage, PatchMerging(resolutions[i], embed_dim * 2**i, merge_size) if i < last else None)
            for i, stage in enumerate(blocks)
        )
        num_features = embed_dim * 2**last
        self.norm = nn.LayerNorm(num_features)
        self.head = nn.Linear(num_features, num_classes)

        self.apply(init_transformer)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images [B, in_chans, H, W]; return logits [B, num_classes]."""
        x = self.pos_drop(self.patch_embed(images))  # [B, L, C]
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x).mean(dim=1)  # [B, L, C] -> [B, C]
        logits: Tensor = self.head(x)
        return logits


def stage_resolutions(img_size: tuple[int, int], stride: int, stages: int) -> list[tuple[int, int]]:
    """Return height and width of each stage's feature map, tokens: it halves from stage to stage."""
    height, width = img_size
    return [(height // stride // 2**i, width // stride // 2**i) for i in range(stages)]


def group_neighbours(x: Tensor, G: int) -> Tensor:
    """Cut a feature map [B, H, W, C] into groups of G x G adjacent tokens, [B*nG, G*G, C] (short distance)."""
    _, H, W, C = x.shape
    x = x.view(-1, H // G, G, W // G, G, C)
    # [B, H/G, G, W/G, G, C] -> [B, H/G, W/G, G, G, C] -> [B*nG, G*G, C]
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, G * G, C)


def ungroup_neighbours(groups: Tensor, G: int, H: int, W: int) -> Tensor:
    """Put groups [B*nG, G*G, C] of adjacent tokens back together as a feature map [B, H, W, C]."""
    C = groups.shape[-1]
    x = groups.view(-1, H // G, W // G, G, G, C)
    # [B, H/G, W/G, G, G, C] -> [B, H/G, G, W/G, G, C] -> [B, H, W, C]
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, H, W, C)


def group_at_interval(x: Tensor, G: int) -> Tensor:
    """Sample a feature map [B, H, W, C] at intervals of H/G and W/G: groups [B*nG, G*G, C] that each span it all."""
    _, H, W, C = x.shape
    x = x.view(-1, G, H // G, G, W // G, C)
    # [B, G, H/G, G, W/G, C] -> [B, H/G, W/G, G, G, C] -> [B*nG, G*G, C]
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, G * G, C)


def ungroup_at_interval(groups: Tensor, G: int, H: int, W: int) -> Tensor:
    """Put groups [B*nG, G*G, C] that were sampled at the interval back together as a feature map [B, H, W, C]."""
    C = groups.shape[-1]
    x = groups.view(-1, H // G, W // G, G, G, C)
    # [B, H/G, W/G, G, G, C] -> [B, G, H/G, G, W/G, C] -> [B, H, W, C]
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, H, W, C)


class CrossFormerBlock(nn.Module):
    """One block: short- or long-distance attention, then an MLP, each normalised before and added to the stream.

    Args:
        dim: channels of a token.
        resolution: height and width of the feature map, tokens.
        num_heads: attention heads.
        group_size: side of a group; a map that is not larger is cut into groups of its shorter side, at no interval.
        long_distance: whether groups sample the map at an interval; otherwise they hold neighbours.
        mlp_ratio: hidden channels of the MLP over ``dim``.
        qkv_bias: see :class:`GroupAttention`.
        qk_scale: see :class:`GroupAttention`.
        drop: dropout rate of the projection and the MLP.
        attn_drop: dropout rate of the attention weights.
        drop_path: stochastic depth rate of both branches.
        persistent: see :class:`GroupAttention`.
    """

    def __init__(
        self,
        dim: int,
        resolution: tuple[int, int],
        num_heads: int,
        group_size: int,
        long_distance: bool,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        persistent: bool = True,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.group_size = self.effective_group(resolution, group_size)
        self.long_distance = long_distance and min(resolution) > group_size

        self.norm1 = nn.LayerNorm(dim)
        self.attn = GroupAttention(dim, self.group_size, num_heads, qkv_bias, qk_scale, attn_drop, drop, persistent)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def effective_group(self, resolution: tuple[int, int], group_size: int) -> int:
        """Return the side of the groups on a map: one that is not larger is cut into groups of its shorter side."""
        return effective_window(resolution, group_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, H*W, C] to [B, H*W, C]."""
        x = x + self.drop_path(self.group_attention(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out

    def group_attention(self, x: Tensor) -> Tensor:
        """Group the map of tokens [B, H*W, C], attend within the groups, and put them back."""
        H, W = self.resolution
        group, ungroup = (
            (group_at_interval, ungroup_at_interval) if self.long_distance else (group_neighbours, ungroup_neighbours)
        )
        groups = group(x.view(-1, H, W, x.shape[-1]), self.group_size)  # [B, H, W, C] -> [B*nG, G*G, C]
        groups = self.attn(groups)
        return ungroup(groups, self.group_size, H, W).flatten(1, 2)  # [B*nG, G*G, C] -> [B, H, W, C] -> [B, H*W, C]

    def extra_repr(self) -> str:
        """Show the geometry."""
        return f"resolution={self.resolution}, group_size={self.group_size}, long_distance={self.long_distance}"


class CrossFormer(CrossScaleTransformer):
    """The classifier; in each stage, blocks of short- and long-distance attention alternate.

    Args:
        img_size: height and width of the images, pixels.
        patch_size: kernels of the first embedding layer, pixels, ascending; the first is the stride.
        in_chans: channels of the images.
        num_classes: outputs of the head.
        embed_dim: channels in the first stage; each further stage has twice as many.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        group_size: side of a group, tokens.
        merge_size: kernels of the embedding layers between the stages, tokens, ascending; the stride is 2.
        mlp_ratio: hidden channels of the MLPs over their channels.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: scale of the queries; by default ``head_dim ** -0.5``.
        drop_rate: dropout rate of the embedding, the projections and the MLPs.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0 in the first.

    Raises:
        UsageError: the groups do not tile the feature maps of this image size.
    """

    def __init__(
        self,
        img_size: Sequence[int] = (224, 224),
        patch_size: Sequence[int] = (4, 8, 16, 32),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 1, 8, 6),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        group_size: int = 7,
        merge_size: Sequence[int] = (2, 4),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ) -> None:
        height, width = img_size
        stride, stages = patch_size[0], len(depths)
        check_fit((height, width), stride, group_size, stages, noun="group", option="")

        resolutions = stage_resolutions((height, width), stride, stages)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        blocks = [
            [
                CrossFormerBlock(
                    dim=embed_dim * 2**i,
                    resolution=resolutions[i],
                    num_heads=num_heads[i],
                    group_size=group_size,
                    long_distance=j % 2 == 1,
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


# --- Checkpoints of CrossFormer and CrossFormer++: the authors' names, and what the buffers tell about the groups


def check_geometry(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose groups are not the model's, and say which they are.

    The learned weights fit every group and image size, as the position bias is computed from offsets. The offsets
    themselves, where the checkpoint holds them, tell the group size of each stage. One that shrank to its map tells the
    image size; otherwise it is the number of groups alone that an image size changes, and any is as good.

    Args:
        config: the configuration of the model to be loaded.
        state: the checkpoint by official names.
    """
    height, width = config["img_size"]
    stride, stages = config["patch_size"][0], len(config["depths"])
    resolutions = stage_resolutions((height, width), stride, stages)
    own = [effective_window(resolution, config["group_size"]) for resolution in resolutions]
    made_for = [_group_size(state, stage) for stage in range(stages)]
    if all(found in (None, expected) for found, expected in zip(made_for, own, strict=True)):
        return
    group_size = max(size for size in made_for if size is not None)
    found, remedy = f"groups of {group_size}", f"group_size={group_size}"
    for stage, size in enumerate(made_for):
        if size is not None and size < group_size:
            side = size * stride * 2**stage
            found, remedy = f"{found} and images of {side}x{side}", f"{remedy}, img_size={side}"
            break
    raise UsageError(
        f"the checkpoint was made for {found}",
        expected=f"groups of {config['group_size']} and images of {height}x{width}, as in the model",
        hint=f"a model of that size: deploycli.models.registry.configure(..., {remedy})",
    )


def _group_size(state: Mapping[str, Tensor], stage: int) -> int | None:
    """Return the group size whose offsets, (2 * group_size - 1)**2, a stage's first block holds."""
    offsets = state.get(f"layers.{stage}.blocks.0.attn.biases")
    return None if offsets is None or offsets.ndim != 2 else (math.isqrt(offsets.shape[0]) + 1) // 2


FAMILY = Family(
    create=CrossFormer,
    check_geometry=check_geometry,
    head="head.weight",
    derived=frozenset({"biases", "relative_position_index"}),
)
