"""Swin Transformer, version 1: Hierarchical Vision Transformer using Shifted Windows.

Paper: https://arxiv.org/abs/2103.14030. Parameters and buffers have the names of the authors' code
(https://github.com/microsoft/Swin-Transformer, models/swin_transformer.py), so their checkpoints load as they are.

The shift, the mask and the bias lookup stand in the forward path as the paper states them; simplifying the traced
graph is the exporter's work, and this model is the reference that it is judged by.
"""

# ruff: noqa: N803, N806 - B, H, W, C and N are the paper's names of the axes

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deploycli.models.errors import UsageError
from deploycli.models.family import Family
from deploycli.models.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    check_fit,
    drop_path_rates,
    effective_window,
    init_transformer,
    relative_position_index,
    trunc_normal,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MASKED = -100.0  # what a masked pair's score loses: e^-100 is zero in float32, and -100 itself survives float16


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """Cut a feature map [B, H, W, C] into windows [B*nW, window_size, window_size, C], row by row."""
    _, H, W, C = x.shape
    x = x.view(-1, H // window_size, window_size, W // window_size, window_size, C)
    # [B, H/ws, ws, W/ws, ws, C] -> [B, H/ws, W/ws, ws, ws, C] -> [B*nW, ws, ws, C]
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window_size, window_size, C)


def window_reverse(windows: Tensor, window_size: int, H: int, W: int) -> Tensor:
    """Put windows [B*nW, window_size, window_size, C] back together as a feature map [B, H, W, C]."""
    C = windows.shape[-1]
    x = windows.view(-1, H // window_size, W // window_size, window_size, window_size, C)
    # [B, H/ws, W/ws, ws, ws, C] -> [B, H/ws, ws, W/ws, ws, C] -> [B, H, W, C]
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, H, W, C)


def shifted_window_mask(resolution: tuple[int, int], window_size: int, shift_size: int) -> Tensor:
    """Return what is added to the scores of shifted windows, [nW, ws*ws, ws*ws].

    After the cyclic shift, windows at the lower and right edges hold tokens from opposite borders of the map. Number
    the nine regions that were not neighbours before; a pair from two regions gets -100, any other pair 0.
    """
    bands = (slice(0, -window_size), slice(-window_size, -shift_size), slice(-shift_size, None))
    region = torch.zeros(1, *resolution, 1)
    for i, rows in enumerate(bands):
        for j, columns in enumerate(bands):
            region[:, rows, columns] = 3 * i + j
    windows = window_partition(region, window_size).flatten(1)  # [nW, ws*ws]
    apart = windows[:, None, :] != windows[:, :, None]  # [nW, ws*ws, ws*ws]
    return torch.zeros_like(apart, dtype=torch.float32).masked_fill(apart, MASKED)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with relative position bias (W-MSA; SW-MSA with a mask).

    Args:
        dim: channels of a token.
        window_size: side of a window, tokens.
        num_heads: attention heads.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: scale of the queries; by default ``head_dim ** -0.5``.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale

        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        trunc_normal(self.relative_position_bias_table)
        self.register_buffer("relative_position_index", relative_position_index(window_size))

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within windows.

        Args:
            x: windows [B*nW, N, C] of N = window_size**2 tokens.
            mask: what is added to the scores, [nW, N, N], or None.

        Returns:
            Windows [B*nW, N, C].
        """
        _, N, C = x.shape
        qkv = self.qkv(x).view(-1, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B*nW, N, 3, nH, D] -> 3 of [B*nW, nH, N, D]

        attn = (q * self.scale) @ k.transpose(-2, -1)  # [B*nW, nH, N, N]
        attn = attn + self.relative_position_bias()
        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(-1, nW, self.num_heads, N, N) + mask[None, :, None]  # [B, nW, nH, N, N]
            attn = attn.view(-1, self.num_heads, N, N)
        attn = self.attn_drop(attn.softmax(dim=-1))

        x = (attn @ v).transpose(1, 2).reshape(-1, N, C)  # [B*nW, nH, N, D] -> [B*nW, N, C]
        out: Tensor = self.proj_drop(self.proj(x))
        return out

    def relative_position_bias(self) -> Tensor:
        """Look the bias of each pair of tokens up, [nH, N, N]."""
        N = self.window_size**2
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]  # [N*N, nH]
        return bias.view(N, N, -1).permute(2, 0, 1)


class SwinTransformerBlock(nn.Module):
    """One block: (shifted) window attention, then an MLP, each normalised before and added to the residual stream.

    Args:
        dim: channels of a token.
        resolution: height and width of the feature map, tokens.
        num_heads: attention heads.
        window_size: side of a window; a map that is not larger than the window is one window, without a shift.
        shift_size: how far the windows are shifted towards the lower right, tokens.
        mlp_ratio: hidden channels of the MLP over ``dim``.
        qkv_bias: see :class:`WindowAttention`.
        qk_scale: see :class:`WindowAttention`.
        drop: dropout rate of the projection and the MLP.
        attn_drop: dropout rate of the attention weights.
        drop_path: stochastic depth rate of both branches.
    """

    attn: nn.Module
    attn_mask: Tensor | None

    def __init__(
        self,
        dim: int,
        resolution: tuple[int, int],
        num_heads: int,
        window_size: int,
        shift_size: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.window_size = effective_window(resolution, window_size)
        self.shift_size = shift_size if min(resolution) > window_size else 0

        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, self.window_size, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

        mask = shifted_window_mask(resolution, self.window_size, self.shift_size) if self.shift_size else None
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, H*W, C] to [B, H*W, C]."""
        x = x + self.drop_path(self.window_attention(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out

    def window_attention(self, x: Tensor) -> Tensor:
        """Shift the map of tokens [B, H*W, C], attend within its windows, and shift it back."""
        H, W = self.resolution
        ws, shift, C = self.window_size, self.shift_size, x.shape[-1]

        x = x.view(-1, H, W, C)
        if shift:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        windows = window_partition(x, ws).flatten(1, 2)  # [B, H, W, C] -> [B*nW, ws*ws, C]

        windows = self.attn(windows, self.attn_mask)

        x = window_reverse(windows.view(-1, ws, ws, C), ws, H, W)  # [B*nW, ws*ws, C] -> [B, H, W, C]
        if shift:
            x = torch.roll(x, shifts=(shift, shift), dims=(1, 2))
        return x.flatten(1, 2)  # [B, H, W, C] -> [B, H*W, C]

    def extra_repr(self) -> str:
        """Show the geometry."""
        return f"resolution={self.resolution}, window_size={self.window_size}, shift_size={self.shift_size}"


class PatchMerging(nn.Module):
    """Merge each 2x2 neighbourhood of tokens into one of twice the channels.

    Args:
        resolution: height and width of the feature map, tokens; both even.
        dim: channels of a token.
    """

    def __init__(self, resolution: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.resolution = resolution
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, H*W, C] to [B, H/2 * W/2, 2*C]."""
        H, W = self.resolution
        C = x.shape[-1]
        x = x.view(-1, H, W, C)
        # The authors' order, which the weights of the reduction rely on: down the left column, then the right one.
        corners = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        x = torch.cat(corners, dim=-1).view(-1, H // 2 * (W // 2), 4 * C)  # 4 of [B, H/2, W/2, C]
        merged: Tensor = self.reduction(self.norm(x))
        return merged


class BasicLayer(nn.Module):
    """One stage: blocks that alternate between regular and shifted windows, then a patch merging unless it is the last.

    Args:
        dim: channels of a token.
        resolution: height and width of the feature map, tokens.
        num_heads: attention heads.
        window_size: side of a window, tokens.
        drop_path: stochastic depth rate of each block; its length is the number of blocks.
        downsample: whether a patch merging follows.
        block: further arguments of :class:`SwinTransformerBlock`.
    """

    BLOCK: type[SwinTransformerBlock] = SwinTransformerBlock
    MERGING: Callable[[tuple[int, int], int], nn.Module] = PatchMerging

    def __init__(
        self,
        dim: int,
        resolution: tuple[int, int],
        num_heads: int,
        window_size: int,
        drop_path: Sequence[float],
        downsample: bool,
        **block: Any,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            self.BLOCK(
                dim,
                resolution,
                num_heads,
                window_size,
                shift_size=0 if i % 2 == 0 else window_size // 2,
                drop_path=rate,
                **block,
            )
            for i, rate in enumerate(drop_path)
        )
        self.downsample = type(self).MERGING(resolution, dim) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, H*W, C] to [B, H/2 * W/2, 2*C], or to the same shape in the last stage."""
        for block in self.blocks:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x


class SwinTransformer(nn.Module):
    """The classifier: patch embedding, stages, LayerNorm, mean over the tokens, linear head.

    Args:
        img_size: height and width of the images, pixels.
        patch_size: side of a patch, pixels.
        in_chans: channels of the images.
        num_classes: outputs of the head.
        embed_dim: channels in the first stage; each further stage has twice as many.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: side of a window, tokens.
        mlp_ratio: hidden channels of the MLPs over their channels.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: scale of the queries; by default ``head_dim ** -0.5``.
        drop_rate: dropout rate of the embedding, the projections and the MLPs.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0 in the first.
        ape: whether an absolute position embedding is added to the patches.
        patch_norm: whether the patch embedding is normalised.

    Raises:
        UsageError: the windows do not tile the feature maps of this image size.
    """

    LAYER: type[BasicLayer] = BasicLayer

    def __init__(
        self,
        img_size: Sequence[int] = (224, 224),
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        ape: bool = False,
        patch_norm: bool = True,
    ) -> None:
        super().__init__()
        height, width = img_size
        check_fit((height, width), patch_size, window_size, len(depths))
        self.patch_embed = PatchEmbed((height, width), patch_size, in_chans, embed_dim, norm=patch_norm)
        H, W = self.patch_embed.grid_size
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, H * W, embed_dim)) if ape else None
        self.pos_drop = nn.Dropout(drop_rate)

        rates = drop_path_rates(drop_path_rate, sum(depths))
        self.layers = nn.ModuleList(
            self.LAYER(
                dim=embed_dim * 2**i,
                resolution=(H // 2**i, W // 2**i),
                num_heads=num_heads[i],
                window_size=window_size,
                drop_path=rates[sum(depths[:i]) : sum(depths[: i + 1])],
                downsample=i < len(depths) - 1,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                **self.options_of_stage(i),
            )
            for i in range(len(depths))
        )
        num_features = embed_dim * 2 ** (len(depths) - 1)
        self.norm = nn.LayerNorm(num_features)
        self.head = nn.Linear(num_features, num_classes)

        self.apply(init_transformer)
        if self.absolute_pos_embed is not None:
            trunc_normal(self.absolute_pos_embed)

    def options_of_stage(self, stage: int) -> Mapping[str, Any]:
        """Return what the blocks of a stage take besides."""
        return {}

    def forward(self, images: Tensor) -> Tensor:
        """Classify images [B, in_chans, H, W]; return logits [B, num_classes]."""
        x: Tensor = self.patch_embed(images)  # [B, L, C]
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed
        x = self.pos_drop(x)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x).mean(dim=1)  # [B, L, C] -> [B, C]
        logits: Tensor = self.head(x)
        return logits


# --- Checkpoints of the Swin Transformer: timm's names, and what the shapes tell about the image and the window


def translate(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename timm's keys to the authors'; the authors' own pass unchanged.

    timm merges patches at the start of a stage, the authors at the end of the one before, and timm's head is a module
    whose linear layer is ``fc``. Older timm releases have one of the two, so each is told apart by itself.

    Returns:
        The state by official names, and ``{name in the file: official name}`` for the renamed keys.
    """
    merging_first = not any(key.startswith("layers.0.downsample.") for key in state)

    def official(key: str) -> str:
        if merging_first:
            key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", key)
        return re.sub(r"^head\.fc\.", "head.", key)

    names = {key: official(key) for key in state}
    # A name that two keys claim is left to the one that had it; the other is reported as unexpected, not overwritten.
    claims = Counter(names.values())
    renamed = {key: name for key, name in names.items() if key != name and claims[name] == 1}
    return {renamed.get(key, key): value for key, value in state.items()}, renamed


def check_geometry(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint that was made for another window or image size, and say which.

    The bias table of the first stage tells the window. The number of patches follows from the position embedding, or
    from the first mask, or from a last stage that is one window; a checkpoint with none of them fits any image size.

    Args:
        config: the configuration of the model to be loaded.
        state: the checkpoint by official names.
    """
    patch, stages = config["patch_size"], len(config["depths"])
    height, width = (side // patch for side in config["img_size"])
    window = table_window(state, "layers.0")
    if window is None:
        return  # not even a first block: the key report says it better
    patches = _patches(state, window, stages)
    same_window = window == effective_window((height, width), config["window_size"])
    if same_window and patches in (None, height * width):
        return
    made_for, remedy = f"a window of {window}", f"--window-size {window}"
    if patches is not None:
        side = math.isqrt(patches) * patch
        square = (side // patch) ** 2 == patches
        made_for += f" and images of {side}x{side}" if square else f" and images of {patches} patches"
        remedy += f" --img-size {side}" if square else ""
    raise UsageError(
        f"the checkpoint was made for {made_for}",
        expected=f"window {config['window_size']} and images of {height * patch}x{width * patch}, as in the model",
        hint=f"{remedy}, or the variant of that size",
    )


def _patches(state: Mapping[str, Tensor], window: int, stages: int) -> int | None:
    """Return the number of patches of the images that the checkpoint was made for, where it shows."""
    if (embedding := state.get("absolute_pos_embed")) is not None and embedding.ndim == 3:
        return int(embedding.shape[1])
    if (mask := state.get("layers.0.blocks.1.attn_mask")) is not None and mask.ndim == 3:
        return int(mask.shape[0]) * window * window
    last = table_window(state, f"layers.{stages - 1}")
    if last is not None and last < window:  # the window shrank to the map
        side = last << (stages - 1)
        return side * side
    return None


def table_window(state: Mapping[str, Tensor], stage: str) -> int | None:
    """Return the window whose offsets, (2 * window - 1)**2, a stage's bias table holds."""
    table = state.get(f"{stage}.blocks.0.attn.relative_position_bias_table")
    return None if table is None or table.ndim != 2 else (math.isqrt(table.shape[0]) + 1) // 2


FAMILY = Family(
    create=SwinTransformer,
    translate=translate,
    check_geometry=check_geometry,
    head="head.weight",
    derived=frozenset({"attn_mask", "relative_position_index"}),
)
