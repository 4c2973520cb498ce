"""Swin Transformer as a backbone for detection: the feature map of each stage, at any image size.

The parameters have the names of the authors' code
(https://github.com/SwinTransformer/Swin-Transformer-Object-Detection, mmdet/models/backbones/swin_transformer.py), so
the checkpoints of their detectors load, and those of the classifier but for its norm and head.

Four things differ from the classifier. Maps that windows do not tile are padded below and to the right in each block,
with zeros after the norm; what is padded is a key like any other, as in the training. Odd maps are padded before they
are merged. Windows never shrink and shifts are never dropped, be the map as small as it may. And each map that is given
has a LayerNorm of its own.
"""

# ruff: noqa: N806 - B, H, W, C and L are the paper's names of the axes

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploycli.models.crossformer import group_neighbours, ungroup_neighbours
from deploycli.models.errors import UsageError
from deploycli.models.family import Family, without_head
from deploycli.models.layers import PatchEmbed, drop_path_rates, init_transformer
from deploycli.models.swin import (
    BasicLayer,
    PatchMerging,
    SwinTransformerBlock,
    shifted_window_mask,
    table_window,
    translate,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def padded_to(resolution: tuple[int, int], unit: int) -> tuple[int, int]:
    """Return the smallest height and width that are multiples of the unit and hold the resolution."""
    height, width = resolution
    return height + -height % unit, width + -width % unit


def pad(x: Tensor, height: int, width: int) -> Tensor:
    """Pad a map [B, H, W, C] with zeros below and to the right, to [B, height, width, C]."""
    _, H, W, _ = x.shape
    return x if (height, width) == (H, W) else functional.pad(x, (0, 0, 0, width - W, 0, height - H))


class PaddedBlock(SwinTransformerBlock):
    """A block of the classifier whose windows tile a padded map.

    Args:
        dim: channels of a token.
        resolution: height and width of the feature map, tokens; any.
        num_heads: attention heads.
        window_size: side of a window, tokens.
        shift_size: how far the windows are shifted towards the lower right, tokens.
        block: further arguments of :class:`deploycli.models.swin.SwinTransformerBlock`.
    """

    def __init__(
        self,
        dim: int,
        resolution: tuple[int, int],
        num_heads: int,
        window_size: int,
        shift_size: int,
        **block: Any,
    ) -> None:
        padded = padded_to(resolution, window_size)
        super().__init__(dim, padded, num_heads, window_size, shift_size, **block)
        self.unpadded = resolution
        self.shift_size = shift_size  # also on a map that is one window
        mask = shifted_window_mask(padded, window_size, shift_size) if shift_size else None
        self.register_buffer("attn_mask", mask, persistent=False)

    def window_attention(self, x: Tensor) -> Tensor:
        """Pad the map of tokens [B, H*W, C], shift it, attend within its windows, shift it back, and crop."""
        (H, W), (Hp, Wp), shift = self.unpadded, self.resolution, self.shift_size
        x = pad(x.view(-1, H, W, x.shape[-1]), Hp, Wp)  # [B, H*W, C] -> [B, H, W, C] -> [B, Hp, Wp, C]
        if shift:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        windows = group_neighbours(x, self.window_size)  # [B, Hp, Wp, C] -> [B*nW, ws*ws, C]

        windows = self.attn(windows, self.attn_mask)

        x = ungroup_neighbours(windows, self.window_size, Hp, Wp)  # [B*nW, ws*ws, C] -> [B, Hp, Wp, C]
        if shift:
            x = torch.roll(x, shifts=(shift, shift), dims=(1, 2))
        return x[:, :H, :W].flatten(1, 2)  # [B, Hp, Wp, C] -> [B, H, W, C] -> [B, H*W, C]


class PaddedPatchMerging(PatchMerging):
    """A patch merging that pads odd maps.

    Args:
        resolution: height and width of the feature map, tokens; any.
        dim: channels of a token.
    """

    def __init__(self, resolution: tuple[int, int], dim: int) -> None:
        super().__init__(padded_to(resolution, 2), dim)
        self.unpadded = resolution

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, H*W, C] to [B, ceil(H/2) * ceil(W/2), 2*C]."""
        x = x.view(-1, *self.unpadded, x.shape[-1])  # [B, H*W, C] -> [B, H, W, C]
        return super().forward(pad(x, *self.resolution).flatten(1, 2))


class PaddedLayer(BasicLayer):
    """One stage on maps of any size."""

    BLOCK = PaddedBlock
    MERGING = PaddedPatchMerging


class SwinBackbone(nn.Module):
    """Patch embedding and stages; each map that is asked for is normalised.

    Args:
        img_size: height and width of the images, pixels; any.
        patch_size: side of a patch, pixels.
        in_chans: channels of the images.
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
        patch_norm: whether the patch embedding is normalised.
        stages: which maps are given, the first is 1; by default all.
    """

    def __init__(
        self,
        img_size: Sequence[int] = (224, 224),
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        patch_norm: bool = True,
        stages: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.img_size = (img_size[0], img_size[1])
        padded = padded_to(self.img_size, patch_size)
        self.patch_embed = PatchEmbed(padded, patch_size, in_chans, embed_dim, norm=patch_norm)
        self.pos_drop = nn.Dropout(drop_rate)

        H, W = self.patch_embed.grid_size
        self.resolutions = [(-(-H // 2**i), -(-W // 2**i)) for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, sum(depths))
        self.layers = nn.ModuleList(
            PaddedLayer(
                dim=embed_dim * 2**i,
                resolution=self.resolutions[i],
                num_heads=num_heads[i],
                window_size=window_size,
                drop_path=rates[sum(depths[:i]) : sum(depths[: i + 1])],
                downsample=i < len(depths) - 1,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
            )
            for i in range(len(depths))
        )
        self.stages = tuple(stages) or tuple(range(1, len(depths) + 1))
        for stage in self.stages:
            self.add_module(f"norm{stage - 1}", nn.LayerNorm(embed_dim * 2 ** (stage - 1)))

        self.apply(init_transformer)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of images [B, in_chans, H, W], each [B, C, H/stride, W/stride], rounded up.

        Raises:
            ValueError: the images have another size; masks hold for one size only.
        """
        if tuple(images.shape[2:]) != self.img_size:
            raise ValueError(f"images are {tuple(images.shape[2:])}, the model was built for {self.img_size}")
        (H, W), (Hp, Wp) = self.img_size, self.patch_embed.img_size
        if (Hp, Wp) != (H, W):
            images = functional.pad(images, (0, Wp - W, 0, Hp - H))  # [B, C, H, W] -> [B, C, Hp, Wp]
        x = self.pos_drop(self.patch_embed(images))  # [B, L, C]
        maps = {}
        layer: Any  # PyTorch's types do not tell what a list of modules holds
        for stage, layer in enumerate(self.layers, start=1):
            for block in layer.blocks:
                x = block(x)
            if stage in self.stages:
                tokens = self.get_submodule(f"norm{stage - 1}")(x).transpose(1, 2)  # [B, H*W, C] -> [B, C, H*W]
                maps[f"stage{stage}"] = tokens.unflatten(2, self.resolutions[stage - 1])  # [B, C, H, W]
            if stage == max(self.stages):
                break
            x = layer.downsample(x)
        return maps


def check_window(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint that was made for another window, and say which; any image size fits.

    Args:
        config: the configuration of the model to be loaded.
        state: the checkpoint by official names.
    """
    window = table_window(state, "layers.0")
    if window not in (None, config["window_size"]):
        raise UsageError(
            f"the checkpoint was made for a window of {window}",
            expected=f"a window of {config['window_size']}, as in the model",
            hint=f"--window-size {window}",
        )


FAMILY = Family(
    create=SwinBackbone,
    translate=translate,
    check_geometry=check_window,
    part=without_head,
    fresh=r"norm\d\.",
    derived=frozenset({"relative_position_index"}),
)
