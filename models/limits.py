"""Limits for a model that a stranger's arguments make: how many weights, and how much memory.

A file of a kilobyte may name a depth of a billion. What is too large is refused while it is made: before its weights
are drawn, and before the kernel kills the process for lack of memory.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from deploycli.models.errors import IntegrityError
from deploycli.models.memory import available

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_ASIDE = 2**31
"""Address space that libraries and threads take while a model is made, bytes; most of it is never touched."""


@contextmanager
def weights_at_most(count: int, where: str) -> Iterator[None]:
    """Refuse to make more weights inside the block, as soon as a module has them and before they have values.

    Args:
        count: elements of all parameters that are made.
        where: what names the model, for the message.

    Raises:
        IntegrityError: there are more.
    """
    made = 0

    def weigh(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        if parameter is not None and not is_lazy(parameter):
            made += parameter.numel()
        if made > count:
            raise IntegrityError(
                f"{where}: it has more than {count:,} weights", expected="those of the files beside it"
            )

    hook = register_module_parameter_registration_hook(weigh)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def memory_that_is_left(mapped: int = 0) -> Iterator[None]:
    """Let the process take no more memory inside the block than the machine has: what asks for more is an exception.

    Args:
        mapped: bytes of files that are mapped inside the block.
    """
    left, taken = available(), _address_space()
    if sys.platform == "win32" or left is None or taken is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = taken + left + mapped + _ASIDE
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Return the bytes of address space that this process has; None on a system that does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None
