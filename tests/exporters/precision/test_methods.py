"""Histograms of any split are that of the whole; each method against a slow computation on the samples, or on the bins
one at a time.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deploycli.exporters.precision import methods
from deploycli.exporters.precision.methods import BINS, METHODS, Histogram, Method, _divergences
from deploycli.models.codec import decode
from deploycli.models.errors import UsageError

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
    monkeypatch.setattr(methods, "_CHUNK", 100)
    assert facts(Histogram.of(values)) == facts(whole)
    assert facts(Histogram.of(values.T)) == facts(whole)


def test_no_values() -> None:
    h = Histogram.of(np.empty((0, 3), np.float32))
    assert (h.count, h.amax, h.nonfinite) == (0, 0, 0)
    assert facts(h) == facts(Histogram())


RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal(50_000).astype(np.float32)
SAMPLES = {
    "normal": NORMAL,
    "laplace": RNG.laplace(size=50_000).astype(np.float32),
    "uniform": RNG.uniform(-3, 3, 50_000).astype(np.float32),
    "rectified": np.maximum(NORMAL, 0),
    "outliers": np.append(NORMAL, np.float32([30, -31, 60])),
    "two values": np.float32([0.5, -3] * 1000),
    "one value": np.float32([2.5]),
}
each_distribution = pytest.mark.parametrize("name", SAMPLES)
each_method = pytest.mark.parametrize("method", METHODS)


def amax(method: str, values: Any, **parameters: float) -> float:
    return Method.of(method, **parameters).amax(Histogram.of(values))


@each_distribution
def test_max(name: str) -> None:
    assert amax("max", SAMPLES[name]) == np.abs(SAMPLES[name]).max()


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 99.99, 100.0])
@each_distribution
def test_percentile_is_at_most_a_bin_above_the_exact_one(name: str, percentile: float) -> None:
    magnitudes = np.sort(np.abs(SAMPLES[name]))
    exact = magnitudes[-(-round(percentile * 100) * len(magnitudes) // 10_000) - 1]
    found = amax("percentile", magnitudes, percentile=percentile)
    assert exact <= found <= exact + magnitudes[-1] / 1024


def squared_error(values: Any, threshold: float) -> float:
    scale = threshold / 127
    return float(np.mean((values - np.clip(np.round(values / scale), -127, 127) * scale) ** 2))


@each_distribution
def test_mse_is_the_best_of_all_ranges(name: str) -> None:
    values = SAMPLES[name].astype(np.float64)
    largest = np.abs(values).max()
    best = min(squared_error(values, t) for t in np.linspace(largest / 400, largest, 400))
    # a bin is not evenly filled where there are two values only, which any range serves well
    assert squared_error(values, amax("mse", values)) <= max(best * 1.02, (largest / 1024) ** 2)


def test_mse_of_an_outlier_depends_on_its_weight() -> None:
    bulk = RNG.uniform(-1, 1, 100_000)
    assert amax("mse", np.append(bulk, 1.5)) < 1.1  # rounding 100 000 values costs more than clipping one
    assert amax("mse", np.append(bulk, 2000.0)) > 1000


def divergence(counts: Any, end: int) -> float:
    """KL(P || Q) as pytorch-quantization computes it, one bin at a time."""
    reference = counts[:end].astype(np.float64)
    level = np.arange(end) * 128 // end
    merged = np.zeros(end)
    for number in range(128):
        members = (level == number) & (reference > 0)
        if members.any():
            merged[members] = reference[members].sum() / members.sum()
    reference[-1] += counts[end:].sum()
    p, q = reference / reference.sum(), merged / max(merged.sum(), 1)
    if (q[p > 0] == 0).any():
        return np.inf
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


@each_distribution
def test_entropy_is_the_least_divergence_of_all_ranges(name: str) -> None:
    h = Histogram.of(SAMPLES[name])
    used = int(np.flatnonzero(h.counts)[-1]) + 1
    counts = h.counts[:used].copy()
    counts[0] = counts[1]
    ends = np.arange(128, used + 1)
    every = _divergences(counts.astype(np.float64), ends)
    for place in {*range(0, len(ends), 7), len(ends) - 1}:
        np.testing.assert_allclose(every[place], divergence(counts, ends[place]), rtol=0, atol=1e-9)
    found = Method.of("entropy").amax(h)
    assert every[-1 if found == h.amax else round(found / h.width) - 128] <= every.min() + 1e-9


def test_entropy_on_known_distributions() -> None:
    assert amax("entropy", SAMPLES["uniform"]) > 2.9  # nothing to clip
    assert 3 < amax("entropy", SAMPLES["normal"]) < 5
    assert amax("entropy", SAMPLES["outliers"]) < 10  # of 60


def test_zeros_change_no_entropy_range() -> None:
    values = np.abs(NORMAL) + np.float32(0.1)
    assert amax("entropy", np.append(values, np.zeros(10**6))) == amax("entropy", values)


@each_method
@given(
    values=hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(2.0**-30, 2.0**30, width=32) | st.just(0.0)),
    exponent=st.integers(-40, 40),
)
@settings(deadline=None, max_examples=50)
def test_a_power_of_two_scales_the_range_exactly(method: str, values: Any, exponent: int) -> None:
    assume(values.any())
    factor = np.float32(2.0**exponent)
    assert amax(method, values * factor) == amax(method, values) * factor


@each_method
@given(hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
@settings(deadline=None, max_examples=50)
def test_a_range_is_within_the_largest_magnitude(method: str, values: Any) -> None:
    largest = np.abs(values).max(initial=0)
    found = amax(method, values)
    assert 0 < found <= largest if largest else found == 0


def test_a_method_has_all_its_parameters() -> None:
    assert Method.of("percentile") == Method("percentile", {"percentile": 99.99})
    assert Method.of("percentile", percentile=99).parameters == {"percentile": 99.0}
    assert Method.of("mse").parameters == {}
    assert str(Method.of("percentile")) == "percentile (percentile 99.99)"
    assert str(Method.of("max")) == "max"


@each_method
def test_a_method_survives_json(method: str) -> None:
    text = json.dumps(Method.of(method).to_json())
    assert decode(text, Method, where="it", what="a method") == Method.of(method)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("median", {}),
        ("max", {"percentile": 99}),
        ("percentile", {"percentile": 0}),
        ("percentile", {"percentile": 100.1}),
        ("percentile", {"percentile": float("nan")}),
        ("percentile", {"histogram": 1}),
    ],
)
def test_wrong_methods_are_refused(name: str, parameters: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Method.of(name, **parameters)
