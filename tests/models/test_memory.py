from __future__ import annotations

import ctypes
import gc
import re
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploycli.models.memory import collector_paused, free_memory, set_aside

if TYPE_CHECKING:
    from collections.abc import Iterator


class Ring:
    """An object in a cycle with itself: only the collector frees it."""

    def __init__(self) -> None:
        self.self = self


def dead_ring() -> weakref.ref[Ring]:
    return weakref.ref(Ring())


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    gc.unfreeze()  # what an earlier test of this process has set aside, such as one of the command's end
    yield
    gc.unfreeze()
    gc.enable()
    gc.freeze()  # as tests/conftest.py does, for those that follow


def test_the_collector_pauses_and_goes_on() -> None:
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_collector_goes_on_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), collector_paused():
        _ = 1 / 0
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()


def test_only_what_was_made_inside_is_collected_inside() -> None:
    with collector_paused():
        before = dead_ring()
        with set_aside():
            inside = dead_ring()
            gc.collect()
            assert inside() is None
            assert before() is not None
        assert gc.get_freeze_count() == 0
        gc.collect()
        assert before() is None


def test_what_the_caller_set_aside_stays_aside() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with set_aside():
        pass
    assert 0 < gc.get_freeze_count() <= count


def test_memory_of_cycles_is_given_back() -> None:
    with collector_paused():
        ring = dead_ring()
        free_memory()
        assert ring() is None


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc keeps what is freed"
)
def test_memory_in_many_pieces_is_given_back() -> None:
    def resident() -> int:
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) // 1024

    np.ones(30 << 20, np.uint8)  # freed at once: from now on glibc takes what is smaller from the heap, and keeps it
    pieces = [np.ones(1 << 20, np.uint8) for _ in range(128)]
    held = pieces[-1]  # above the others, so that the heap cannot just end earlier
    del pieces
    kept = resident()
    free_memory()
    assert kept - resident() > 64
    assert held.all()
