"""Vision Transformer (ViT), and DeiT, which adds a second token that learns from a teacher.

Papers: https://arxiv.org/abs/2010.11929 (An Image is Worth 16x16 Words) and https://arxiv.org/abs/2012.12877 (Training
data-efficient image transformers & distillation through attention). Parameters have the names of timm, in whose code
DeiT was published (https://github.com/facebookresearch/deit), so checkpoints of both load as they are.
"""

# ruff: noqa: N806 - B, N and C are the usual names of the axes

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deploycli.models.errors import UsageError
from deploycli.models.layers import DropPath, Mlp, PatchEmbed, drop_path_rates, init_transformer, trunc_normal
from deploycli.models.windows import check_halves

if TYPE_CHECKING:
    from collections.abc import Sequence

EPS = 1e-6  # of every LayerNorm; PyTorch's default is 1e-5


class Attention(nn.Module):
    """Multi-head self-attention over all tokens.

    Args:
        dim: channels of a token.
        num_heads: attention heads.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: scale of the queries; by default ``head_dim ** -0.5``.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, C] to [B, N, C]."""
        _, N, C = x.shape
        qkv = self.qkv(x).view(-1, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, N, 3, nH, D] -> 3 of [B, nH, N, D]

        attn = (q * self.scale) @ k.transpose(-2, -1)  # [B, nH, N, N]
        attn = self.attn_drop(attn.softmax(dim=-1))

        x = (attn @ v).transpose(1, 2).reshape(-1, N, C)  # [B, nH, N, D] -> [B, N, C]
        out: Tensor = self.proj_drop(self.proj(x))
        return out


class Block(nn.Module):
    """One encoder block: attention, then an MLP, each normalised before and added to the residual stream.

    Args:
        dim: channels of a token.
        num_heads: attention heads.
        mlp_ratio: hidden channels of the MLP over ``dim``.
        qkv_bias: see :class:`Attention`.
        qk_scale: see :class:`Attention`.
        drop: dropout rate of the projection and the MLP.
        attn_drop: dropout rate of the attention weights.
        drop_path: stochastic depth rate of both branches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, C] to [B, N, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class VisionTransformer(nn.Module):
    """ViT or DeiT with a linear classifier on the class token.

    Args:
        img_size: height and width, pixels.
        patch_size: side of a patch, pixels.
        in_chans: channels of the image.
        num_classes: outputs of each head.
        embed_dim: channels of a token.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_ratio: hidden channels of the MLPs over those of a token.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: scale of the queries; by default ``head_dim ** -0.5``.
        representation_size: channels of a tanh layer before the head, as in pre-training; None for no such layer.
        distilled: whether there is a distillation token with a head of its own, as in DeiT.
        drop_rate: dropout rate of the embedded tokens, projections and MLPs.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0 in the first one.

    Raises:
        UsageError: the patches do not tile the image, or both a representation layer and distillation were asked for.
    """

    def __init__(
        self,
        img_size: Sequence[int] = (224, 224),
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        representation_size: int | None = None,
        distilled: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = img_size
        check_halves((height, width), patch_size, stages=1)
        if representation_size is not None and distilled:
            raise UsageError("a distilled model with a representation layer", expected="one of the two")
        self.patch_embed = PatchEmbed((height, width), patch_size, in_chans, embed_dim)
        tokens = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1] + (2 if distilled else 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)

        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, rate)
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)

        self.pre_logits: nn.Module = nn.Identity()
        num_features = embed_dim
        if representation_size is not None:
            num_features = representation_size
            self.pre_logits = nn.Sequential(OrderedDict(fc=nn.Linear(embed_dim, num_features), act=nn.Tanh()))
        self.head = nn.Linear(num_features, num_classes)
        self.head_dist = nn.Linear(embed_dim, num_classes) if distilled else None

        self.apply(init_transformer)
        for table in (self.cls_token, self.dist_token, self.pos_embed):
            if table is not None:
                trunc_normal(table)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Classify images [B, in_chans, H, W].

        Returns:
            Logits [B, num_classes]. A distilled model gives the mean of its two heads; in training it gives both, since
            each has its own loss.
        """
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)  # [B, N, C]

        logits: Tensor = self.head(self.pre_logits(x[:, 0]))  # class token [B, C] -> [B, num_classes]
        if self.head_dist is None:
            return logits
        distilled: Tensor = self.head_dist(x[:, 1])  # distillation token [B, C] -> [B, num_classes]
        if self.training:
            return logits, distilled
        return (logits + distilled) / 2

    def embed(self, images: Tensor) -> Tensor:
        """Turn images [B, in_chans, H, W] into tokens [B, N, C]: class, distillation if any, and the patches."""
        patches = self.patch_embed(images)  # [B, H/patch * W/patch, C]
        special = self.cls_token if self.dist_token is None else torch.cat([self.cls_token, self.dist_token], dim=1)
        x = torch.cat([special.expand(images.shape[0], -1, -1), patches], dim=1)  # [B, N, C]
        tokens: Tensor = self.pos_drop(x + self.pos_embed)
        return tokens
