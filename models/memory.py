"""Memory that could not be had, in whatever words that is said; limits for a model of a stranger's making; and Python's
garbage collector, kept from looking through what stays, and memory, given back when it is free.

Importing PyTorch and tracing a model make a million objects, and hardly any garbage. Looking for it took a fifth of an
export, and looking once more for it when the process ends another second.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from deploycli.models.errors import IntegrityError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator


if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

# PyTorch on the CPU and on a GPU, ONNX Runtime, C++, glibc, protobuf. Those that raise MemoryError need no words.
_WORDS = re.compile(
    r"not enough memory|can't allocate memory|cannot allocate memory|out of memory|bad_?\s?alloc|bad allocation"
    r"|failed to allocate memory|arena alloc failed|unable to allocate|storage size calculation overflowed",
    re.IGNORECASE,
)
_BYTES = re.compile(r"(?:allocate|of size|buffer of)\s+(\d+)(?!\S*\.)(?:\s*bytes)?(?![.\d]*\s*[KMGT]i?B)")
_UNITS = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTPE]i?B)\b")


_GROUPS = Path("/sys/fs/cgroup")
_OLD_GROUP = (("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),)


def shortage(error: BaseException) -> str | None:
    """Say what memory was asked for in vain, if an exception or one that led to it tells of that; else None.

    Returns:
        ``16.0 GiB``, or with more where the exception has more: ``16.0 GiB for an array with shape (65536, 65536)``;
        empty where it does not say how much.
    """
    for link in _chain(error):
        text = str(link)
        told = isinstance(link, MemoryError) or getattr(link, "errno", None) == errno.ENOMEM or _WORDS.search(text)
        if told:
            return _amount(text)
    return None


def _amount(text: str) -> str:
    if found := re.search(r"[Uu]nable to allocate (\d[\d.]* \w+.*)", first_line(Exception(text))):  # NumPy's sentence
        return found[1]
    if found := _BYTES.search(text):
        return size(int(found[1]))
    if found := _UNITS.search(text):
        return f"{found[1]} {found[2]}"
    return ""


def size(count: int) -> str:
    """Return a number of bytes for people: ``16.0 GiB``."""
    amount, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{amount:.1f} {units[0]}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that led to it."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def available() -> int | None:
    """Return the bytes that this process could still take: of the machine, or of its control group; None if unknown."""
    found = []
    try:
        text = Path("/proc/meminfo").read_text()
        found += [int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):  # another system
        pass
    for limit, used in (("memory.max", "memory.current"), *_OLD_GROUP):
        try:
            most, now = (int((_GROUPS / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # no such file; no limit, which is the word max
            continue
        found.append(max(0, most - now))
    return min(found, default=None)


# --- Limits for a model that a stranger's arguments make: how many weights, and how much memory
#
# A file of a kilobyte may name a depth of a billion. What is too large is refused while it is made: before its weights
# are drawn, and before the kernel kills the process for lack of memory.

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
    # Here, for a machine without PyTorch asks how much memory was wanted, too.
    from torch.nn.modules.module import register_module_parameter_registration_hook
    from torch.nn.parameter import is_lazy

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


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect nothing inside the block but by ``gc.collect()``; objects that are in no cycle are freed as always."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def set_aside() -> Iterator[None]:
    """Let collections inside the block look only at what was made inside it."""
    ours = gc.get_freeze_count() == 0  # otherwise the caller has set things aside, and knows for how long
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def free_memory() -> None:
    """Give back what nothing refers to any more, cycles included: another process, or a library, needs the room.

    glibc keeps freed pieces of up to 32 MB for itself, and most weights are no larger: what a model of 2.5 GB leaves
    is as much. Where there is no ``malloc_trim``, the collector alone runs. Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
