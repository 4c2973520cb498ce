"""Small Vision Transformers and their weights, shared by the tests of this folder."""

from typing import Any

import numpy.typing as npt
import torch

from deploycli.models.registry import configure, resolve
from deploycli.models.spec import ModelSpec
from deploycli.models.vit import VisionTransformer
from tests.models.swins import golden_state

TINY: dict[str, Any] = {
    "img_size": [32, 32],
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 5,
}


def tiny_spec(**changes: Any) -> ModelSpec:
    config = {**TINY, **changes}
    img_size = config.pop("img_size")
    return configure(resolve("vit_b_16"), img_size=tuple(img_size), **config).spec


def tiny_vit(**changes: Any) -> VisionTransformer:
    model = VisionTransformer(**{**TINY, **changes}).eval()
    model.load_state_dict(golden_state(model))
    return model


def to_jax(state: dict[str, torch.Tensor], heads: int = 3) -> dict[str, npt.NDArray[Any]]:
    """Name and lay the weights out as Google's published .npz files have them."""
    dim = state["cls_token"].shape[2]
    arrays = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for layer in ("head", "pre_logits"):
        ours = {"head": "head", "pre_logits": "pre_logits.fc"}[layer]
        if f"{ours}.weight" in state:
            arrays |= {f"{layer}/kernel": state[f"{ours}.weight"].T, f"{layer}/bias": state[f"{ours}.bias"]}
    for i in range(sum(key.endswith("norm1.weight") for key in state)):
        block, jax = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{jax}/{theirs}/scale"] = state[f"{block}.{ours}.weight"]
            arrays[f"{jax}/{theirs}/bias"] = state[f"{block}.{ours}.bias"]
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays[f"{jax}/MlpBlock_3/{theirs}/kernel"] = state[f"{block}.mlp.{ours}.weight"].T
            arrays[f"{jax}/MlpBlock_3/{theirs}/bias"] = state[f"{block}.mlp.{ours}.bias"]
        attention = f"{jax}/MultiHeadDotProductAttention_1"
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * dim, (j + 1) * dim)
            kernel = state[f"{block}.attn.qkv.weight"][rows].T
            arrays[f"{attention}/{part}/kernel"] = kernel.reshape(dim, heads, dim // heads)
            arrays[f"{attention}/{part}/bias"] = state[f"{block}.attn.qkv.bias"][rows].reshape(heads, dim // heads)
        arrays[f"{attention}/out/kernel"] = state[f"{block}.attn.proj.weight"].T.reshape(heads, dim // heads, dim)
        arrays[f"{attention}/out/bias"] = state[f"{block}.attn.proj.bias"]
    return {name: value.contiguous().numpy() for name, value in arrays.items()}
