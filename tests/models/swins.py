"""Small Swin Transformers and their weights, shared by the tests of this folder."""

from typing import Any

import torch

from deploycli.models.registry import configure, resolve
from deploycli.models.spec import ModelSpec
from deploycli.models.swin import SwinTransformer
from tests.weights import golden_weight

DERIVED = ("attn_mask", "relative_position_index")

# Two of its three stages have shifted windows, the last one is a single shrunk window.
TINY: dict[str, Any] = {
    "img_size": [64, 64],
    "embed_dim": 8,
    "depths": [2, 2, 2],
    "num_heads": [1, 2, 4],
    "window_size": 8,
    "num_classes": 5,
    "patch_size": 2,
}


def tiny_spec(**changes: Any) -> ModelSpec:
    config = {**TINY, **changes}
    img_size = config.pop("img_size")
    return configure(resolve("swin_t"), img_size=tuple(img_size), **config).spec


def golden_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights for every learned parameter, none of them zero, by official names."""
    return {
        key: torch.from_numpy(golden_weight(key, tuple(value.shape)))
        for key, value in model.state_dict().items()
        if not key.endswith(DERIVED)
    }


def tiny_swin(**changes: Any) -> SwinTransformer:
    model = SwinTransformer(**{**TINY, **changes}).eval()
    model.load_state_dict(golden_state(model), strict=False)
    return model


def to_timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename as timm does: a stage merges patches at its start, and the head is a module with a layer ``fc``."""

    def timm_name(key: str) -> str:
        parts = key.split(".")
        if parts[0] == "head":
            return f"head.fc.{parts[1]}"
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) + 1)
        return ".".join(parts)

    return {timm_name(key): value for key, value in state.items() if not key.endswith(DERIVED)}
