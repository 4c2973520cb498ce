from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest

from exporters.collector import collector_paused, set_aside

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
