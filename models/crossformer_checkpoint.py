"""Checkpoints of CrossFormer and CrossFormer++: the authors' names, and what the buffers tell about the groups."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from deploycli.models.crossformer_layers import stage_resolutions
from deploycli.models.errors import UsageError
from deploycli.models.windows import effective_window

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def translate(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state as it is, and no renamed keys: only the authors publish these models, by the official names."""
    return state, {}


def check_geometry(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose groups are not the model's, and say which they are.

    The learned weights fit every group and image size, as the position bias is computed from offsets. The offsets
    themselves, where the checkpoint holds them, tell the group size of each stage. One that shrank to its map tells the
    image size; otherwise it is the number of groups alone that an image size changes, and any is as good.

    Args:
        config: the configuration of the model to be loaded.
        state: the checkpoint by official names.
    """
    height, width = config["img_size"]
    stride, stages = config["patch_size"][0], len(config["depths"])
    resolutions = stage_resolutions((height, width), stride, stages)
    own = [effective_window(resolution, config["group_size"]) for resolution in resolutions]
    made_for = [_group_size(state, stage) for stage in range(stages)]
    if all(found in (None, expected) for found, expected in zip(made_for, own, strict=True)):
        return
    group_size = max(size for size in made_for if size is not None)
    found, remedy = f"groups of {group_size}", f"group_size={group_size}"
    for stage, size in enumerate(made_for):
        if size is not None and size < group_size:
            side = size * stride * 2**stage
            found, remedy = f"{found} and images of {side}x{side}", f"{remedy}, img_size={side}"
            break
    raise UsageError(
        f"the checkpoint was made for {found}",
        expected=f"groups of {config['group_size']} and images of {height}x{width}, as in the model",
        hint=f"a model of that size: deploycli.models.registry.configure(..., {remedy})",
    )


def accept_any_geometry(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Do nothing: a checkpoint of CrossFormer++ fits any image and group size, as nothing in it depends on them."""


def _group_size(state: Mapping[str, Tensor], stage: int) -> int | None:
    """Return the group size whose offsets, (2 * group_size - 1)**2, a stage's first block holds."""
    offsets = state.get(f"layers.{stage}.blocks.0.attn.biases")
    return None if offsets is None or offsets.ndim != 2 else (math.isqrt(offsets.shape[0]) + 1) // 2
