"""Name the tensors that a model returns, whatever it returns them in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from models.errors import UsageError
from models.factory import contained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from models.spec import TensorSpec


def output_names(module: nn.Module, inputs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """Run the model once, at batch 2, and name what it returns; see :func:`flatten`."""
    example = [torch.zeros(2, *spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs]
    with torch.inference_mode(), contained():
        return tuple(flatten(module(*example)))


def flatten(outputs: object) -> dict[str, torch.Tensor]:
    """Name every tensor of a model's output.

    A lone tensor is ``logits`` if it is [B, classes], else ``output``; dictionaries and dataclasses give their keys,
    tuples and lists numbers: ``feature_maps_0``. What is None is left out.

    Raises:
        UsageError: the output holds something that is no tensor.
    """
    if isinstance(outputs, torch.Tensor):
        return {"logits" if outputs.ndim == 2 else "output": outputs}
    return dict(_flatten(outputs, ""))


def _flatten(value: object, name: str) -> list[tuple[str, torch.Tensor]]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        fields = getattr(value, "_fields", range(len(value)))  # a named tuple has names
        items = list(zip(fields, value, strict=True))
    elif hasattr(value, "__dataclass_fields__"):
        items = [(field, getattr(value, field)) for field in value.__dataclass_fields__]
    else:
        raise UsageError(
            f"the model returns {type(value).__name__}" + (f" as {name}" if name else ""),
            expected="tensors, in tuples, lists, dictionaries or dataclasses",
        )
    prefix = f"{name}_" if name else ""
    named = [(f"{prefix}{key}" if prefix or isinstance(key, str) else f"output_{key}", item) for key, item in items]
    return [pair for key, item in named for pair in _flatten(item, key)]
