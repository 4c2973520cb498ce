"""CrossFormer and CrossFormer++ as backbones for detection: the feature map of each stage.

The parameters have the names of the authors' code (https://github.com/cheerss/CrossFormer, branch ``main``,
models/crossformer_backbone_det.py), so the checkpoints of their detectors load, and those of either classifier but for
its norm and head.

Both papers' blocks are here those of CrossFormer++: maps are padded to what groups and interval tile, and padding is
masked. The interval is a number of each stage, and a map that is not larger than the group is padded to one group. The
maps that are given are not normalised. They are halved between the stages: the authors' detectors pad their images to
multiples of 32 pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deploycli.models.crossformer import CrossScaleEmbedding, PatchMerging, Stage, stage_resolutions
from deploycli.models.crossformer_pp import CrossFormerPPBlock, cools
from deploycli.models.family import Family, without_head
from deploycli.models.layers import check_halves, drop_path_rates, init_transformer

if TYPE_CHECKING:
    from collections.abc import Sequence


class OneGroupBlock(CrossFormerPPBlock):
    """A block that pads a small map to one group, where the classifier cuts it into groups of its shorter side."""

    def effective_group(self, resolution: tuple[int, int], group_size: int) -> int:
        """Return the side of the groups on a map."""
        return max(resolution) if min(resolution) <= group_size else group_size


class CrossFormerBackbone(nn.Module):
    """Embedding and stages; in each stage, blocks of short- and long-distance attention alternate.

    Args:
        img_size: height and width of the images, pixels.
        patch_size: kernels of the first embedding layer, pixels, ascending; the first is the stride.
        in_chans: channels of the images.
        embed_dim: channels in the first stage; each further stage has twice as many.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        group_size: side of a group per stage, tokens.
        interval: interval of long-distance attention per stage, tokens.
        cooling: whether every third block ends in an amplitude cooling layer, as in CrossFormer++.
        merge_size: kernels of the embedding layers between the stages, tokens, ascending; the stride is 2.
        mlp_ratio: hidden channels of the MLPs over their channels.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: scale of the queries; by default ``head_dim ** -0.5``.
        drop_rate: dropout rate of the embedding, the projections and the MLPs.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0 in the first.
        stages: which maps are given, the first is 1; by default all.

    Raises:
        UsageError: the feature maps of this image size cannot be halved between the stages.
    """

    def __init__(
        self,
        img_size: Sequence[int] = (224, 224),
        patch_size: Sequence[int] = (4, 8, 16, 32),
        in_chans: int = 3,
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 1, 8, 6),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        group_size: Sequence[int] = (7, 7, 7, 7),
        interval: Sequence[int] = (8, 4, 2, 1),
        cooling: bool = False,
        merge_size: Sequence[int] = (2, 4),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        stages: Sequence[int] = (),
    ) -> None:
        super().__init__()
        height, width = img_size
        stride, count = patch_size[0], len(depths)
        check_halves((height, width), stride, count)
        self.patch_embed = CrossScaleEmbedding((height, width), patch_size, in_chans, embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)

        self.resolutions = stage_resolutions((height, width), stride, count)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.layers = nn.ModuleList(
            Stage(
                [
                    OneGroupBlock(
                        dim=embed_dim * 2**i,
                        resolution=self.resolutions[i],
                        num_heads=num_heads[i],
                        group_size=group_size[i],
                        long_distance=j % 2 == 1,
                        interval=interval[i],
                        cooling=cooling and cools(j, depths[i]),
                        mlp_ratio=mlp_ratio,
                        qkv_bias=qkv_bias,
                        qk_scale=qk_scale,
                        drop=drop_rate,
                        attn_drop=attn_drop_rate,
                        drop_path=next(rates),
                    )
                    for j in range(depths[i])
                ],
                PatchMerging(self.resolutions[i], embed_dim * 2**i, merge_size) if i < count - 1 else None,
            )
            for i in range(count)
        )
        self.stages = tuple(stages) or tuple(range(1, count + 1))

        self.apply(init_transformer)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of images [B, in_chans, H, W], each [B, C, H/stride, W/stride]."""
        x = self.pos_drop(self.patch_embed(images))  # [B, L, C]
        maps = {}
        layer: Any  # PyTorch's types do not tell what a list of modules holds
        for stage, layer in enumerate(self.layers, start=1):
            for block in layer.blocks:
                x = block(x)
            if stage in self.stages:
                # [B, H*W, C] -> [B, C, H*W] -> [B, C, H, W]
                maps[f"stage{stage}"] = x.transpose(1, 2).unflatten(2, self.resolutions[stage - 1])
            if stage == max(self.stages):
                break
            x = layer.downsample(x)
        return maps


FAMILY = Family(
    create=CrossFormerBackbone,
    part=without_head,
)
