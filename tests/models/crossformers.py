"""Small CrossFormers and their weights, shared by the tests of this folder."""

from typing import Any

import torch

from deploycli.models.crossformer import CrossFormer
from deploycli.models.crossformer_pp import CrossFormerPP
from deploycli.models.registry import configure, resolve
from deploycli.models.spec import ModelSpec
from tests.weights import golden_weight

# Maps of 32, 16 and 8 tokens: two stages have long-distance attention, the last one is a single group.
TINY: dict[str, Any] = {
    "img_size": [64, 64],
    "patch_size": [2, 4],
    "embed_dim": 32,
    "depths": [2, 2, 2],
    "num_heads": [1, 2, 4],
    "group_size": 8,
    "num_classes": 5,
}

# Maps of 20x28, 10x14 and 5x7 tokens. Each stage pads, the first one so widely that some groups are padding alone.
TINY_PP: dict[str, Any] = {
    "img_size": [40, 56],
    "patch_size": [2, 4],
    "embed_dim": 32,
    "depths": [2, 4, 2],
    "num_heads": [1, 2, 4],
    "group_size": [4, 3, 7],
    "interval": [6, 2, 1],
    "num_classes": 5,
}


def tiny_spec(**changes: Any) -> ModelSpec:
    return _spec("crossformer_t", {**TINY, **changes})


def tiny_spec_pp(**changes: Any) -> ModelSpec:
    return _spec("crossformer_pp_s", {**TINY_PP, **changes})


def tiny_crossformer(**changes: Any) -> CrossFormer:
    return with_golden_weights(CrossFormer(**{**TINY, **changes}))


def tiny_crossformer_pp(**changes: Any) -> CrossFormerPP:
    return with_golden_weights(CrossFormerPP(**{**TINY_PP, **changes}))


def with_golden_weights(model: Any) -> Any:
    """Fill every learned parameter, none of them zero, and set the model to evaluation."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(golden_weight(key, tuple(parameter.shape))))
    return model.eval()


def _spec(name: str, config: dict[str, Any]) -> ModelSpec:
    height, width = config.pop("img_size")
    return configure(resolve(name), img_size=(height, width), **config).spec
