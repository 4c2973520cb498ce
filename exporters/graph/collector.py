"""Python's garbage collector, kept from looking through what stays, and memory, given back when it is free.

Importing PyTorch and tracing a model make a million objects, and hardly any garbage. Looking for it took a fifth of an
export, and looking once more for it when the process ends another second.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


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
