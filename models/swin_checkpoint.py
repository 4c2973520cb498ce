"""Checkpoints of the Swin Transformer: timm's names, and what the shapes tell about the image and the window."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from deploycli.models.errors import UsageError
from deploycli.models.windows import effective_window

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def translate(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename timm's keys to the authors'; the authors' own pass unchanged.

    timm merges patches at the start of a stage, the authors at the end of the one before, and timm's head is a module
    whose linear layer is ``fc``. Older timm releases have one of the two, so each is told apart by itself.

    Returns:
        The state by official names, and ``{name in the file: official name}`` for the renamed keys.
    """
    merging_first = not any(key.startswith("layers.0.downsample.") for key in state)

    def official(key: str) -> str:
        if merging_first:
            key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", key)
        return re.sub(r"^head\.fc\.", "head.", key)

    names = {key: official(key) for key in state}
    # A name that two keys claim is left to the one that had it; the other is reported as unexpected, not overwritten.
    claims = Counter(names.values())
    renamed = {key: name for key, name in names.items() if key != name and claims[name] == 1}
    return {renamed.get(key, key): value for key, value in state.items()}, renamed


def check_geometry(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint that was made for another window or image size, and say which.

    The bias table of the first stage tells the window. The number of patches follows from the position embedding, or
    from the first mask, or from a last stage that is one window; a checkpoint with none of them fits any image size.

    Args:
        config: the configuration of the model to be loaded.
        state: the checkpoint by official names.
    """
    patch, stages = config["patch_size"], len(config["depths"])
    height, width = (side // patch for side in config["img_size"])
    window = _table_window(state, "layers.0")
    if window is None:
        return  # not even a first block: the key report says it better
    patches = _patches(state, window, stages)
    same_window = window == effective_window((height, width), config["window_size"])
    if same_window and patches in (None, height * width):
        return
    made_for, remedy = f"a window of {window}", f"--window-size {window}"
    if patches is not None:
        side = math.isqrt(patches) * patch
        square = (side // patch) ** 2 == patches
        made_for += f" and images of {side}x{side}" if square else f" and images of {patches} patches"
        remedy += f" --img-size {side}" if square else ""
    raise UsageError(
        f"the checkpoint was made for {made_for}",
        expected=f"window {config['window_size']} and images of {height * patch}x{width * patch}, as in the model",
        hint=f"{remedy}, or the variant of that size",
    )


def _patches(state: Mapping[str, Tensor], window: int, stages: int) -> int | None:
    """Return the number of patches of the images that the checkpoint was made for, where it shows."""
    if (embedding := state.get("absolute_pos_embed")) is not None and embedding.ndim == 3:
        return int(embedding.shape[1])
    if (mask := state.get("layers.0.blocks.1.attn_mask")) is not None and mask.ndim == 3:
        return int(mask.shape[0]) * window * window
    last = _table_window(state, f"layers.{stages - 1}")
    if last is not None and last < window:  # the window shrank to the map
        side = last << (stages - 1)
        return side * side
    return None


def _table_window(state: Mapping[str, Tensor], stage: str) -> int | None:
    """Return the window whose offsets, (2 * window - 1)**2, a stage's bias table holds."""
    table = state.get(f"{stage}.blocks.0.attn.relative_position_bias_table")
    return None if table is None or table.ndim != 2 else (math.isqrt(table.shape[0]) + 1) // 2
