"""Name the tensors that a model returns, whatever it returns them in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deploycli.models.errors import UsageError
from deploycli.models.factory import contained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from deploycli.models.spec import TensorSpec


def output_names(module: nn.Module, inputs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """Run the model once, at batch 2, and name what it returns; see :func:`flatten`.

    Raises:
        UsageError: it returns nothing, or something that is no tensor.
    """
    with torch.inference_mode(), contained():
        names = tuple(flatten(module(*example(inputs, 2))))
    if not names:
        raise UsageError("the model returns no tensor", expected="one or more, each with the batch for its first axis")
    return names


def answers_numbers(module: nn.Module, inputs: Sequence[TensorSpec], place: int, value: float | None) -> bool:
    """Say whether a model answers with finite numbers where a whole input has one value.

    Args:
        module: the model.
        inputs: its inputs.
        place: which of them has the value; the others are zero.
        value: the value; None tries both ends of a mask, -1 and 1, or for integers the lowest and the highest.
    """
    spec = inputs[place]
    low, high = spec.values or (0, 1)
    tries = (value,) if value is not None else (-1.0, 1.0) if spec.dtype.startswith("float") else (low, high)
    for one in tries:
        tensors = example(inputs, 2)
        tensors[place].fill_(one)
        try:
            with torch.inference_mode(), contained():
                found = flatten(module(*tensors)).values()
        except Exception:  # a stranger's code raises what it likes
            return False
        if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
            return False
    return True


def example(inputs: Sequence[TensorSpec], batch: int) -> list[torch.Tensor]:
    """Return zeros, or the lowest integers that an input takes, one tensor [batch, *shape] an input."""
    return [
        torch.full((batch, *spec.shape), 0 if spec.values is None else spec.values[0], dtype=getattr(torch, spec.dtype))
        for spec in inputs
    ]


def flatten(outputs: object) -> dict[str, torch.Tensor]:
    """Name every tensor of a model's output.

    A lone tensor is ``logits`` if it is [B, classes], else ``output``; dictionaries and dataclasses give their keys,
    tuples and lists numbers: ``feature_maps_0``. What is None is left out. What has no name or that of another is
    numbered.

    Raises:
        UsageError: the output holds something that is no tensor.
    """
    if isinstance(outputs, torch.Tensor):
        return {"logits" if outputs.ndim == 2 else "output": outputs}
    named: dict[str, torch.Tensor] = {}
    for name, tensor in _flatten(outputs, ""):
        unique, count = name or "output", 2
        while unique in named:
            unique, count = f"{name or 'output'}_{count}", count + 1
        named[unique] = tensor
    return named


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
