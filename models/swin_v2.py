"""Swin Transformer V2: Scaling Up Capacity and Resolution.

Paper: https://arxiv.org/abs/2111.09883. Parameters and buffers have the names of the authors' code
(https://github.com/microsoft/Swin-Transformer, models/swin_transformer_v2.py), so their checkpoints load as they are.

What differs from version 1: attention by the cosine of queries and keys, with a learned scale for each head; a position
bias that a small network computes of log-spaced offsets; and norms behind attention and MLP, not before them. The bias
does not depend on the image: the exporter folds it into a constant.
"""

# ruff: noqa: N806 - B, H, W, C and N are the paper's names of the axes

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploycli.models.errors import UsageError
from deploycli.models.family import Family
from deploycli.models.layers import init_transformer, relative_position_index
from deploycli.models.swin import BasicLayer, SwinTransformer, SwinTransformerBlock, translate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LARGEST_SCALE = 100.0
"""The learned scale of cosines is cut off there: a temperature of 0.01. Section 3.2."""

LARGEST_BIAS = 16.0
"""The position bias lies between 0 and this, by a sigmoid; so in the authors' code."""

_HIDDEN = 512  # channels of the network of the position bias; appendix A.1
_RANGE = 8.0  # offsets are stretched to -8 to 8 before their logarithm; so in the authors' code


def log_spaced_offsets(window_size: int, pretrained_window_size: int) -> Tensor:
    """Return every offset between two tokens of a window, log-spaced, [1, 2*ws-1, 2*ws-1, 2], float32.

    Equation 4: sign(x) * log2(1 + |x|), of offsets that end at -8 and 8 in the window of the training, over log2(8). A
    larger window extrapolates by less than its share.
    """
    most = (pretrained_window_size or window_size) - 1
    side = torch.arange(1 - window_size, window_size, dtype=torch.float32) * (_RANGE / most)
    side = side.sign() * (side.abs() + 1).log2() / math.log2(_RANGE)
    return torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1)[None]


class CosineWindowAttention(nn.Module):
    """Multi-head self-attention within windows by scaled cosines, with a continuous position bias.

    Args:
        dim: channels of a token.
        window_size: side of a window, tokens.
        num_heads: attention heads.
        qkv_bias: whether queries and values have a bias; keys have none.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
        pretrained_window_size: side of the window in the training that the weights come from; 0 for this one.
    """

    relative_coords_table: Tensor
    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pretrained_window_size: int = 0,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.head_dim = dim // num_heads

        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, _HIDDEN), nn.ReLU(inplace=True), nn.Linear(_HIDDEN, num_heads, bias=False)
        )
        self.register_buffer("relative_coords_table", log_spaced_offsets(window_size, pretrained_window_size))
        self.register_buffer("relative_position_index", relative_position_index(window_size))

        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
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
        qkv = functional.linear(x, self.qkv.weight, self.qkv_bias()).view(-1, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B*nW, N, 3, nH, D] -> 3 of [B*nW, nH, N, D]

        cosines = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
        attn = cosines * self.logit_scale.clamp(max=math.log(LARGEST_SCALE)).exp()  # [B*nW, nH, N, N]
        attn = attn + self.relative_position_bias()
        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(-1, nW, self.num_heads, N, N) + mask[None, :, None]  # [B, nW, nH, N, N]
            attn = attn.view(-1, self.num_heads, N, N)
        attn = self.attn_drop(attn.softmax(dim=-1))

        x = (attn @ v).transpose(1, 2).reshape(-1, N, C)  # [B*nW, nH, N, D] -> [B*nW, N, C]
        out: Tensor = self.proj_drop(self.proj(x))
        return out

    def qkv_bias(self) -> Tensor | None:
        """Return the bias of the projection, [3*C], which is zero for keys."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))

    def relative_position_bias(self) -> Tensor:
        """Compute the bias of each pair of tokens, [nH, N, N]."""
        N = self.window_size**2
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)  # [(2*ws-1)**2, nH]
        bias = table[self.relative_position_index.view(-1)].view(N, N, -1)  # [N*N, nH] -> [N, N, nH]
        scaled: Tensor = LARGEST_BIAS * bias.permute(2, 0, 1).sigmoid()
        return scaled


class SwinTransformerV2Block(SwinTransformerBlock):
    """One block: each branch is normalised behind its attention or MLP, and then added to the residual stream.

    Args:
        dim: channels of a token.
        resolution: height and width of the feature map, tokens.
        num_heads: attention heads.
        window_size: side of a window, tokens.
        shift_size: how far the windows are shifted, tokens.
        qkv_bias: see :class:`CosineWindowAttention`.
        drop: dropout rate of the projection and the MLP.
        attn_drop: dropout rate of the attention weights.
        pretrained_window_size: see :class:`CosineWindowAttention`.
        others: further arguments of :class:`deploycli.models.swin.SwinTransformerBlock`.
    """

    def __init__(
        self,
        dim: int,
        resolution: tuple[int, int],
        num_heads: int,
        window_size: int,
        shift_size: int,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        pretrained_window_size: int = 0,
        **others: Any,
    ) -> None:
        super().__init__(
            dim, resolution, num_heads, window_size, shift_size,
            qkv_bias=qkv_bias, drop=drop, attn_drop=attn_drop, **others,
        )  # fmt: skip
        attention = (dim, self.window_size, num_heads, qkv_bias, attn_drop, drop, pretrained_window_size)
        self.attn = CosineWindowAttention(*attention)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, H*W, C] to [B, H*W, C]."""
        x = x + self.drop_path(self.norm1(self.window_attention(x)))
        out: Tensor = x + self.drop_path(self.norm2(self.mlp(x)))
        return out


class PatchMergingV2(nn.Module):
    """Merge each 2x2 neighbourhood of tokens into one of twice the channels, which is normalised then.

    Args:
        resolution: height and width of the feature map, tokens; both even.
        dim: channels of a token.
    """

    def __init__(self, resolution: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.resolution = resolution
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, H*W, C] to [B, H/2 * W/2, 2*C]."""
        H, W = self.resolution
        C = x.shape[-1]
        x = x.view(-1, H, W, C)
        # The authors' order, which the weights of the reduction rely on: down the left column, then the right one.
        corners = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        x = torch.cat(corners, dim=-1).view(-1, H // 2 * (W // 2), 4 * C)  # 4 of [B, H/2, W/2, C]
        merged: Tensor = self.norm(self.reduction(x))
        return merged


class BasicLayerV2(BasicLayer):
    """One stage of version 2."""

    BLOCK = SwinTransformerV2Block
    MERGING = PatchMergingV2


class SwinTransformerV2(SwinTransformer):
    """The classifier; see :class:`deploycli.models.swin.SwinTransformer`.

    Gains of the norms behind a branch start at 1, not at 0 as in the authors' training: with random weights every block
    would add nothing, and agreement would prove nothing.

    Args:
        img_size: height and width of the images, pixels.
        window_size: side of a window, tokens.
        pretrained_window_sizes: per stage, side of the window in the weights' own training; 0 for this one.
        others: further arguments of :class:`deploycli.models.swin.SwinTransformer`.

    Raises:
        UsageError: the windows do not tile the feature maps of this image size.
    """

    LAYER = BasicLayerV2

    def __init__(
        self,
        img_size: Sequence[int] = (256, 256),
        window_size: int = 8,
        pretrained_window_sizes: Sequence[int] = (0, 0, 0, 0),
        **others: Any,
    ) -> None:
        self._pretrained = tuple(pretrained_window_sizes)  # read while the stages are made
        super().__init__(img_size=img_size, window_size=window_size, **others)
        self.apply(init_transformer)

    def options_of_stage(self, stage: int) -> Mapping[str, Any]:
        """Return what the blocks of a stage take besides."""
        return {"pretrained_window_size": self._pretrained[stage]}


# --- Checkpoints: as of version 1, but for the window, which no table tells


def check_geometry(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint that was made for another window, and say which.

    The bias is continuous, and would be computed for any window; but its offsets are relative to the window of the
    training, which ``pretrained_window_sizes`` tells, and only whoever fine-tunes may change it.

    Args:
        config: the configuration of the model to be loaded.
        state: the checkpoint by official names.
    """
    index = state.get("layers.0.blocks.0.attn.relative_position_index")
    if index is None or index.ndim != 2:
        return
    window = math.isqrt(index.shape[0])
    if window != config["window_size"]:
        raise UsageError(
            f"the checkpoint was made for a window of {window}",
            expected=f"a window of {config['window_size']}, as in the model",
            hint=f"--window-size {window} and an image size that it tiles, or the variant of that window",
        )


FAMILY = Family(
    create=SwinTransformerV2,
    translate=translate,
    check_geometry=check_geometry,
    head="head.weight",
    derived=frozenset({"attn_mask", "relative_position_index", "relative_coords_table"}),
)
