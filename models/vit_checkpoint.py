"""Checkpoints of ViT and DeiT: the arrays that JAX saved, the variant that fits, and images of another size."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch

from deploycli.models.errors import UsageError
from deploycli.models.registry import variants
from deploycli.models.values import require_floats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

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
