"""From a spec to a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from models.families import family

if TYPE_CHECKING:
    from torch import nn

    from models.spec import ModelSpec


def build(spec: ModelSpec, *, seed: int = 0) -> nn.Module:
    """Build the model in evaluation mode, float32, with random weights.

    Args:
        spec: what to build.
        seed: determines the weights; the caller's random state is neither used nor changed.

    Raises:
        UsageError: the configuration is impossible, such as an image size that the windows do not tile.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family(spec.family).create(**spec.config).eval()
