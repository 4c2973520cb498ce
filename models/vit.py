"""Vision Transformer (ViT), and DeiT, which adds a second token that learns from a teacher.

Papers: https://arxiv.org/abs/2010.11929 (An Image is Worth 16x16 Words) and https://arxiv.org/abs/2012.12877 (Training
data-efficient image transformers & distillation through attention). Parameters have the names of timm, in whose code
DeiT was published (https://github.com/facebookresearch/deit), so checkpoints of both load as they are.
"""

# ruff: noqa: N806 - B, N and C are the usual names of the axes

from __future__ import annotations

import math
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deploycli.models.errors import UsageError
from deploycli.models.family import Family
from deploycli.models.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    check_halves,
    drop_path_rates,
    init_transformer,
    trunc_normal,
)
from deploycli.models.registry import variants
from deploycli.models.values import require_floats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


# --- Checkpoints of ViT and DeiT: the arrays that JAX saved, the variant that fits, and images of another size

POSITIONS = "pos_embed"

# Google's names, of which ours are parts. https://github.com/google-research/vision_transformer
_JAX_STEM = {
    "cls_token": ["cls"],
    POSITIONS: ["Transformer/posembed_input/pos_embedding"],
    "patch_embed.proj.weight": ["embedding/kernel"],
    "patch_embed.proj.bias": ["embedding/bias"],
    "norm.weight": ["Transformer/encoder_norm/scale"],
    "norm.bias": ["Transformer/encoder_norm/bias"],
}
_JAX_BLOCK = {
    "norm1.weight": ["LayerNorm_0/scale"],
    "norm1.bias": ["LayerNorm_0/bias"],
    "attn.qkv.weight": [f"MultiHeadDotProductAttention_1/{part}/kernel" for part in ("query", "key", "value")],
    "attn.qkv.bias": [f"MultiHeadDotProductAttention_1/{part}/bias" for part in ("query", "key", "value")],
    "attn.proj.weight": ["MultiHeadDotProductAttention_1/out/kernel"],
    "attn.proj.bias": ["MultiHeadDotProductAttention_1/out/bias"],
    "norm2.weight": ["LayerNorm_2/scale"],
    "norm2.bias": ["LayerNorm_2/bias"],
    "mlp.fc1.weight": ["MlpBlock_3/Dense_0/kernel"],
    "mlp.fc1.bias": ["MlpBlock_3/Dense_0/bias"],
    "mlp.fc2.weight": ["MlpBlock_3/Dense_1/kernel"],
    "mlp.fc2.bias": ["MlpBlock_3/Dense_1/bias"],
}
_JAX_HEADS = {
    "pre_logits": {"pre_logits.fc.weight": ["pre_logits/kernel"], "pre_logits.fc.bias": ["pre_logits/bias"]},
    "head": {"head.weight": ["head/kernel"], "head.bias": ["head/bias"]},
}


def translate(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Bring the arrays of Google's ``.npz`` files to PyTorch's names and layouts; other checkpoints pass unchanged.

    Returns:
        The state by official names, and ``{name in the file: official name}`` for the renamed keys.

    Raises:
        UsageError: an array is missing or holds no floats, or queries, keys and values differ in shape.
    """
    if not any("/" in key for key in state):
        return state, {}
    sources = _jax_sources(state)
    missing = [name for names in sources.values() for name in names if name not in state]
    if missing:
        raise UsageError(
            f"the checkpoint lacks {missing[0]}" + (f" and {len(missing) - 1} more arrays" if missing[1:] else ""),
            expected="every array of a Vision Transformer that was saved from JAX",
            hint="copy or download it again",
        )
    translated = {official: _joined(names, state) for official, names in sources.items()}
    renamed = {name: official for official, names in sources.items() for name in names}
    return translated | {key: value for key, value in state.items() if key not in renamed}, renamed


def _jax_sources(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return what each official parameter is made of; representation layer and head only where the file has them."""
    blocks = {match[0] for key in state if (match := re.match(r"Transformer/encoderblock_\d+/", key))}
    sources = dict(_JAX_STEM)
    for i in range(len(blocks)):
        for ours, theirs in _JAX_BLOCK.items():
            sources[f"blocks.{i}.{ours}"] = [f"Transformer/encoderblock_{i}/{name}" for name in theirs]
    for layer, names in _JAX_HEADS.items():
        if any(key.startswith(f"{layer}/") for key in state):
            sources |= names
    return sources


def _joined(names: list[str], state: Mapping[str, Tensor]) -> Tensor:
    """Return one array in PyTorch's layout, or queries, keys and values one below the other."""
    for name in names:
        require_floats(name, state[name])  # joined with floats, integers would become some
    parts = [_pytorch_layout(name, state[name]) for name in names]
    if any(part.shape != parts[0].shape for part in parts):
        raise UsageError(
            f"{', '.join(names)} have shapes {', '.join(str(list(state[name].shape)) for name in names)}",
            expected="equal shapes",
            hint="copy or download the checkpoint again",
        )
    return torch.cat(parts) if parts[1:] else parts[0]


def _pytorch_layout(name: str, array: Tensor) -> Tensor:
    """Transpose what JAX applies from the right, and merge the heads of queries, keys, values and the projection."""
    if name.endswith("/bias"):
        return array.flatten()  # [C], or by head [nH, D]
    if not name.endswith("/kernel") or array.ndim < 2:
        return array  # a gain, the class token, the position embedding
    if array.ndim == 4:
        return array.permute(3, 2, 0, 1)  # convolution [H, W, in, out] -> [out, in, H, W]
    if name.endswith("/out/kernel") and array.ndim == 3:
        array = array.flatten(0, 1)  # [nH, D, C] -> [nH*D, C]
    return array.flatten(1).T  # [in, out], or by head [C, nH, D] -> [out, in]


def check_geometry(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another variant, and name the one that it fits.

    The image size is not compared: :func:`resample` adapts to it.

    Args:
        config: the configuration of the model to be loaded; its ``num_classes`` is the checkpoint's.
        state: the checkpoint by official names.
    """
    told = _told_by(state)
    differing = [key for key in told if told[key] != config[key]]
    if differing:
        raise UsageError(
            f"the checkpoint has {', '.join(_phrase(key, told[key]) for key in differing)}",
            expected=f"{', '.join(_phrase(key, config[key]) for key in differing)}, as in the model",
            hint=" or ".join(_fitting(told, config, state)) or "another model name; `deploycli list` shows them",
        )


def _told_by(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the constructor's arguments that names and shapes tell; an incomplete checkpoint tells fewer."""
    told: dict[str, Any] = {"distilled": "dist_token" in state or "head_dist.weight" in state}
    patches = state.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 4:
        told |= {"patch_size": patches.shape[-1], "embed_dim": patches.shape[0]}
    if blocks := {match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}:
        told["depth"] = len(blocks)
    if "head.weight" in state:  # without a head, the layer before it may have been cut off as well
        layer = state.get("pre_logits.fc.weight")
        told["representation_size"] = None if layer is None or layer.ndim != 2 else layer.shape[0]
    return told


def _phrase(key: str, value: Any) -> str:
    match key:
        case "distilled":
            return "a distillation token" if value else "no distillation token"
        case "representation_size":
            return f"{f'a {value}-channel' if value else 'no'} representation layer (pre_logits)"
        case "patch_size":
            return f"patches of {value}x{value}"
        case "embed_dim":
            return f"tokens of {value} channels"
    return f"{value} blocks"


def _fitting(told: Mapping[str, Any], config: Mapping[str, Any], state: Mapping[str, Tensor]) -> list[str]:
    """Name the variants that a checkpoint fits; where there are several, those of its head, and of its image size."""
    fitting = [v for v in variants() if v.spec.family == "vit" and told.items() <= v.spec.config.items()]
    fitting = [v for v in fitting if v.spec.config["num_classes"] == config["num_classes"]] or fitting
    if (positions := state.get(POSITIONS)) is not None and positions.ndim == 3:
        fitting = [v for v in fitting if _tokens(v.spec.config) == positions.shape[1]] or fitting
    return [v.name for v in fitting]


def resample(config: Mapping[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Resample the position embedding bicubically, with antialiasing, where the model's images have another size.

    A checkpoint does not say how its patches lie. A square number of them is taken for a square, as timm takes it.

    Args:
        config: the configuration of the model to be loaded.
        state: the checkpoint by official names.

    Returns:
        The state, and the names of what was resampled in it.

    Raises:
        UsageError: the patches form no square, and are not as many as the model's; or the embedding holds no floats.
    """
    positions = state.get(POSITIONS)  # [1, special + patches, C]
    if positions is None or positions.ndim != 3:
        return state, ()
    special, grid = _special(config), _grid(config)
    patches = positions.shape[1] - special
    side = math.isqrt(max(patches, 0))
    if (side, side) == grid or (patches == math.prod(grid) and side * side != patches):
        return state, ()
    if patches < 1 or side * side != patches:
        raise UsageError(
            f"the checkpoint was made for images of {patches} patches, which form no square",
            expected=f"{grid[0]}x{grid[1]} patches as in the model, or a square number of them to be resampled",
            hint="--img-size, as the checkpoint was trained",
        )
    require_floats(POSITIONS, positions)
    table = positions[:, special:].float().transpose(1, 2)  # [1, side*side, C] -> [1, C, side*side]
    table = table.reshape(-1, positions.shape[2], side, side)
    table = torch.nn.functional.interpolate(table, size=grid, mode="bicubic", antialias=True)
    table = table.flatten(2).transpose(1, 2)  # [1, C, H, W] -> [1, H*W, C]
    return {**state, POSITIONS: torch.cat([positions[:, :special], table], dim=1)}, (POSITIONS,)


def _tokens(config: Mapping[str, Any]) -> int:
    """Return the number of all tokens."""
    return _special(config) + math.prod(_grid(config))


def _special(config: Mapping[str, Any]) -> int:
    """Return the number of tokens before those of the patches."""
    return 2 if config["distilled"] else 1


def _grid(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many patches an image has in height and width."""
    height, width = config["img_size"]
    return height // config["patch_size"], width // config["patch_size"]


FAMILY = Family(
    create=VisionTransformer,
    translate=translate,
    check_geometry=check_geometry,
    head="head.weight",
    resample=resample,
)
