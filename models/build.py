"""From a spec to a module, through its family. A new family is a module with a `FAMILY`, and its name here."""

from __future__ import annotations

import importlib
import random
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from deploycli.models.adapt import adapt
from deploycli.models.errors import UsageError
from deploycli.models.family import Family, own_names, whole
from deploycli.models.sources import FACTORY, LIBRARIES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from deploycli.models.spec import ModelSpec


FAMILIES = ("swin", "swin_backbone", "swin_v2", "vit", "crossformer", "crossformer_pp", "crossformer_backbone")
"""Modules with a ``FAMILY``."""


def build(spec: ModelSpec, *, seed: int = 0) -> nn.Module:
    """Build the model in evaluation mode, float32, with random weights.

    Args:
        spec: what to build.
        seed: determines the weights; the caller's random state is neither used nor changed.

    Raises:
        UsageError: the configuration is impossible, such as an image size that the windows do not tile.
    """
    with _seeded(seed):
        return adapt(family(spec.family).create(**spec.config).eval(), spec)


def family(name: str) -> Family:
    """Return the family of that name, importing only now what makes its models.

    Raises:
        UsageError: there is no such family.
    """
    if name in FAMILIES:
        found: Family = importlib.import_module(f"deploycli.models.{name}").FAMILY
        return found
    if name in (*LIBRARIES, FACTORY):
        from deploycli.models import external

        return Family(
            create=partial(external.make, name),
            strange=True,
            part=external.features_of if name == "timm" else whole,
            rename=external.by_own_names if name == "hf" else own_names,
        )
    raise UsageError(f"unknown model family {name!r}", expected=", ".join(FAMILIES))


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
