"""Tensors of a checkpoint, judged: what cannot become a model's weight is one sentence with the key."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""The types that hold a weight as it is; what is narrower needs scales that are not in a state dict."""

NAMED_IN_A_MESSAGE = 4
_LONGEST_NAME = 120
_SMALL = 1 << 20  # bytes; a tensor may repeat its elements up to here, as a mask that was expanded does


def shown(name: object) -> str:
    """Return a name from a file as it can be shown: what does not print is escaped, what is long is cut."""
    text = name if isinstance(name, str) and name and name.isprintable() else repr(name)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}..."


def some(names: Sequence[object]) -> str:
    """Name the first few, and say how many there are."""
    more = len(names) - NAMED_IN_A_MESSAGE
    return f"({len(names)}): {', '.join(map(shown, names[:NAMED_IN_A_MESSAGE]))}{', ...' if more > 0 else ''}"


def require_dense(key: str, value: Tensor) -> None:
    """Refuse a tensor that is no plain array of numbers in memory, or that claims more elements than it holds.

    Raises:
        UsageError: with the key.
    """
    if type(value) not in (Tensor, nn.Parameter):
        form = f"a {type(value).__name__}"
    elif value.is_nested:
        form = "a nested tensor"
    elif value.layout != torch.strided:
        form = "a sparse tensor"
    elif value.is_quantized:
        form = f"a quantized tensor ({_short(value.dtype)})"
    elif value.is_meta:
        form = "a meta tensor, which has a shape and no values"
    elif (claimed := value.numel() * value.element_size()) > max(_SMALL, held := value.untyped_storage().nbytes()):
        form = f"{claimed:,} bytes by its shape {list(value.shape)}, and {held:,} in the file"
    else:
        return
    raise UsageError(
        f"{shown(key)} is {form}", expected="a dense tensor of numbers", hint="save the FP32 model's state_dict()"
    )


def require_floats(key: str, value: Tensor, *, in_file: str = "") -> None:
    """Refuse a tensor whose numbers are not floating-point ones of 16 bits or more.

    Args:
        key: its name in the model.
        value: dense.
        in_file: its name in the file, where it is another.

    Raises:
        UsageError: with the key.
    """
    if value.dtype not in FLOATS:
        raise UsageError(
            f"{shown(key)} holds {_numbers(value.dtype)}{_called(key, in_file)}",
            expected="float32, float64, float16 or bfloat16, as the model's weights are",
            hint="the checkpoint before it was quantized or converted",
        )


def converted(key: str, value: Tensor, like: Tensor, *, in_file: str = "") -> Tensor:
    """Return a tensor in the type of the model's own, where that loses nothing but digits.

    Args:
        key: its name in the model.
        value: dense.
        like: the model's own tensor.
        in_file: its name in the file, where it is another.

    Raises:
        UsageError: with the key: complex numbers, integers or the like where the model has floats; a number that is not
            finite, or not in that type; a fraction where the model counts.
    """
    if like.is_floating_point() or (like.is_complex() and not value.is_complex()):
        require_floats(key, value, in_file=in_file)
    elif not like.is_complex() and not _exact(value, like.dtype):
        raise UsageError(
            f"{shown(key)} holds {_numbers(value.dtype)} that {_short(like.dtype)} cannot hold{_called(key, in_file)}",
            expected=f"{_short(like.dtype)}, as in the model",
            hint="another checkpoint",
        )
    result = value.to(like.dtype)
    finite = result.isfinite()
    if finite.all() or torch.equal(result, like):  # a mask of -inf is the model's own
        return result
    original = value[~finite]
    if not original.isfinite().all():
        raise UsageError(
            f"{shown(key)} holds NaN or infinity{_called(key, in_file)}",
            expected="finite weights",
            hint="another checkpoint",
        )
    raise UsageError(
        f"{shown(key)} holds {original.flatten()[0].item():.3g}, beyond {_short(like.dtype)}{_called(key, in_file)}",
        expected=f"numbers up to {torch.finfo(like.dtype).max:.3g}",
        hint="another checkpoint",
    )


def to_single(module: nn.Module) -> nn.Module:
    """Cast a module's floating-point tensors to float32, in place; complex ones and integers stay as they are.

    Raises:
        UsageError: a number is beyond float32.
    """
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        if value.dtype == torch.float64 and not value.is_meta:
            beyond = value.isfinite() & ~value.float().isfinite()
            if beyond.any():
                raise UsageError(
                    f"{shown(name)} of the model holds {value[beyond][0].item():.3g}, beyond float32",
                    expected=f"numbers up to {torch.finfo(torch.float32).max:.3g}",
                )
    return module.float()


def _exact(value: Tensor, dtype: torch.dtype) -> bool:
    """Say whether an integer type, or bool, holds the very numbers."""
    if value.is_complex() or (value.is_floating_point() and value.dtype not in FLOATS):
        return False
    return bool((value.to(dtype).to(torch.float64) == value.to(torch.float64)).all())


def _called(key: str, in_file: str) -> str:
    return f" ({shown(in_file)} in the file)" if in_file not in ("", key) else ""


def _numbers(dtype: torch.dtype) -> str:
    name = _short(dtype)
    if dtype.is_complex:
        return f"complex numbers ({name}), whose imaginary part would be lost"
    if dtype.is_floating_point and dtype not in FLOATS:
        return f"{name} numbers, which mean nothing without their scales"
    if dtype.is_floating_point:
        return f"{name} numbers"
    return "truth values (bool)" if dtype == torch.bool else f"integers ({name})"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
