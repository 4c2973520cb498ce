from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deploycli.exporters.precision import histogram
from deploycli.exporters.precision.histogram import BINS, Histogram

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ARRAYS = hnp.arrays(np.float32, st.integers(0, 40), elements=FLOATS)


def facts(h: Histogram) -> tuple[bytes, float, float, float, int]:
    return h.counts.tobytes(), h.top, h.lowest, h.highest, h.nonfinite


def total(parts: list[np.ndarray]) -> Histogram:
    return sum((Histogram.of(part) for part in parts), Histogram())


@given(st.lists(ARRAYS, max_size=5))
@settings(deadline=None)
def test_any_split_gives_the_histogram_of_the_whole(parts: list[np.ndarray]) -> None:
    whole = Histogram.of(np.concatenate([np.empty(0, np.float32), *parts]))
    assert facts(total(parts)) == facts(whole)
    assert facts(total(parts[::-1])) == facts(whole)


@given(st.lists(ARRAYS, min_size=1, max_size=5), FLOATS)
@settings(deadline=None)
def test_nothing_is_lost_and_the_ends_are_exact(parts: list[np.ndarray], value: float) -> None:
    parts.append(np.array([value], np.float32))
    values = np.concatenate(parts)
    h = total(parts)
    assert h.count == values.size == h.counts.sum()
    assert h.amax == np.abs(values).max()
    assert (h.lowest, h.highest) == (values.min(), values.max())
    assert h.amax < h.top
    assert math.frexp(h.top)[0] == 0.5


@given(hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2.0**20), 2.0**20, width=32)))
@settings(deadline=None)
def test_every_value_is_in_its_bin(values: np.ndarray) -> None:
    h = Histogram.of(values)
    bins = np.floor(np.abs(values.astype(np.float64)) / h.width).astype(int)  # exact: the width is a power of two
    assert np.array_equal(h.counts, np.bincount(bins, minlength=BINS))


def test_at_least_half_of_the_bins_are_in_use() -> None:
    for amax in (1.0, 1.5, np.nextafter(np.float32(2), np.float32(0)), 2.0, 1e-20, 3e38):
        h = Histogram.of(np.array([amax]))
        assert BINS // 2 <= np.flatnonzero(h.counts)[0] < BINS


def test_the_range_doubles_until_a_later_batch_fits() -> None:
    small, large = np.linspace(0, 1, 1000, endpoint=False), np.array([-100.0])
    h = Histogram.of(small) + Histogram.of(large)
    assert (h.top, h.amax, h.count) == (128, 100, 1001)
    assert h.counts[:16].sum() == 1000


def test_zeros_first_cost_no_resolution() -> None:
    later = np.array([1e-3, 5e-4])
    assert facts(Histogram.of(np.zeros(9)) + Histogram.of(later)) == facts(Histogram.of(np.append(np.zeros(9), later)))
    assert Histogram.of(np.zeros(9)).amax == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_counted_apart(bad: float) -> None:
    values = np.array([1, bad, -3, bad], np.float32)
    h = Histogram.of(values) + Histogram.of(np.full(2, bad))
    assert (h.nonfinite, h.count, h.amax, h.lowest, h.highest) == (4, 2, 3, -3, 1)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((7, 11, 13)).astype(np.float32)
    values[3, 3, 3], values[6, 0, 0] = np.nan, 40
    whole = Histogram.of(values)
    monkeypatch.setattr(histogram, "_CHUNK", 100)
    assert facts(Histogram.of(values)) == facts(whole)
    assert facts(Histogram.of(values.T)) == facts(whole)


def test_no_values() -> None:
    h = Histogram.of(np.empty((0, 3), np.float32))
    assert (h.count, h.amax, h.nonfinite) == (0, 0, 0)
    assert facts(h) == facts(Histogram())
