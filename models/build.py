"""From a spec to a module."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from deploycli.models.families import family

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from deploycli.models.spec import ModelSpec


def build(spec: ModelSpec, *, seed: int = 0) -> nn.Module:
    """Build the model in evaluation mode, float32, with random weights.

    Args:
        spec: what to build.
        seed: determines the weights; the caller's random state is neither used nor changed.

    Raises:
        UsageError: the configuration is impossible, such as an image size that the windows do not tile.
    """
    with _seeded(seed):
        return family(spec.family).create(**spec.config).eval()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed what a model may draw its weights from, and put back the caller's state after."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
