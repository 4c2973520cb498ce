"""From the magnitudes of a tensor to its range in 8 bits: one function and one line of `METHODS` a method.

A tensor is measured a batch at a time, as a `Histogram` of its magnitudes. The bins end at a power of two, so a value's
bin is found without rounding, and doubling the range merges pairs of bins exactly. The histogram of some values is
therefore the same however they are split into batches, and in any order: it adds up without loss.

A range is one number, amax: symmetric INT8 stands for the multiples of ``amax / 127`` from ``-amax`` to ``amax``. (The
level -128 is not counted on: it would help one side only.) FP8 has the levels of E4M3 times ``amax / 448``; ``entropy``
and ``mse`` look for the best range of evenly spread levels, and are not for it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycli.models.errors import InvalidValue

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


BINS = 2048
"""Between half of them and all are in use: the range ends at the first power of two above the largest magnitude."""

_SMALLEST_TOP = 2.0**-100  # BINS / top is a float32; all that is smaller shares the first bins
_CHUNK = 1 << 16  # values at a time: what is computed of them stays in the cache


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of |x|, and the exact ends of x. Add two of the same tensor; ``Histogram()`` is that of no values.

    Attributes:
        counts: values in ``[i * width, (i + 1) * width)`` for each bin i, [2048] int64.
        top: end of the last bin, a power of two above every magnitude.
        lowest: smallest finite value; inf where there is none.
        highest: largest finite value; -inf where there is none.
        nonfinite: number of values that are NaN or infinite; they are in no bin.
    """

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    top: float = _SMALLEST_TOP
    lowest: float = math.inf
    highest: float = -math.inf
    nonfinite: int = 0

    @property
    def count(self) -> int:
        """Number of finite values."""
        return int(self.counts.sum())

    @property
    def amax(self) -> float:
        """The largest finite magnitude; 0 where there is no value."""
        return max(-self.lowest, self.highest, 0.0)

    @property
    def width(self) -> float:
        """Width of a bin: a power of two."""
        return self.top / BINS

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Histogram:
        """Count values, as float32, of any shape."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        result = cls()
        scaled, bins = np.empty(_CHUNK, np.float32), np.empty(_CHUNK, np.intp)
        for start in range(0, flat.size, _CHUNK):
            result += cls._of_chunk(flat[start : start + _CHUNK], result.top, scaled, bins)
        return result

    @classmethod
    def _of_chunk(
        cls, values: npt.NDArray[np.float32], top: float, scaled: npt.NDArray[np.float32], bins: npt.NDArray[np.intp]
    ) -> Histogram:
        """Count values in bins up to ``top`` or above; the two buffers save the memory of every chunk."""
        lowest, highest = float(values.min()), float(values.max())
        nonfinite = 0
        if not math.isfinite(lowest) or not math.isfinite(highest):  # NaN is both the smallest and the largest
            finite = values[np.isfinite(values)]
            nonfinite = values.size - finite.size
            if finite.size == 0:
                return cls(nonfinite=nonfinite)
            values, lowest, highest = finite, float(finite.min()), float(finite.max())
        top = max(top, _top_of(max(-lowest, highest)))
        scaled, bins = scaled[: values.size], bins[: values.size]
        np.abs(values, out=scaled)
        np.multiply(scaled, np.float32(BINS / top), out=scaled)  # exact, and below BINS
        np.copyto(bins, scaled, casting="unsafe")  # drops the fraction
        return cls(np.bincount(bins, minlength=BINS), top, lowest, highest, nonfinite)

    def __add__(self, other: Histogram) -> Histogram:
        """Return the histogram of the values of both."""
        top = max(self.top, other.top)
        return Histogram(
            _widened(self.counts, top / self.top) + _widened(other.counts, top / other.top),
            top,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            self.nonfinite + other.nonfinite,
        )


def _top_of(amax: float) -> float:
    """Return the smallest power of two above a magnitude."""
    if amax < _SMALLEST_TOP:
        return _SMALLEST_TOP
    _, exponent = math.frexp(amax)  # amax = m * 2**exponent, 0.5 <= m < 1
    return math.ldexp(1.0, exponent)


def _widened(counts: npt.NDArray[np.int64], factor: float) -> npt.NDArray[np.int64]:
    """Return the counts in bins that are ``factor``, a power of two, times as wide."""
    if factor == 1:
        return counts
    merged = int(min(factor, BINS))
    result = np.zeros(BINS, np.int64)
    result[: BINS // merged] = counts.reshape(-1, merged).sum(axis=1)
    return result


LEVELS = 128
"""Magnitudes that INT8 has, 0 to 127."""


@dataclass(frozen=True)
class Method:
    """A calibration method with all of its parameters; make it with `Method.of`.

    Attributes:
        name: key of `METHODS`: ``max``, ``percentile``, ``entropy`` or ``mse``.
        parameters: every keyword of the method's function, defaults filled in, such as ``{"percentile": 99.99}``.
    """

    name: str
    parameters: Mapping[str, float]

    def __post_init__(self) -> None:
        """Refuse a method that there is not, and values outside its limits."""
        defaults = _defaults(self.name)
        if odd := sorted(self.parameters.keys() ^ defaults.keys()):
            raise InvalidValue(
                f"the calibration method {self.name} with or without the parameter {', '.join(odd)}",
                expected=", ".join(defaults) or "no parameters",
            )
        self.amax(Histogram.of(np.ones(1)))  # the limits of the parameters stand in the functions

    @classmethod
    def of(cls, name: str, **parameters: float) -> Method:
        """Fill in the defaults.

        Raises:
            UsageError: unknown name, unknown parameter, or a value outside its limits.
        """
        return cls(name, {key: float(value) for key, value in (_defaults(name) | parameters).items()})

    def amax(self, histogram: Histogram) -> float:
        """Return the magnitude that the largest level stands for: the scale is ``amax / 127``, of FP8 ``amax / 448``.

        It is never above the largest magnitude; 0 where all values are 0 or there are none.
        """
        if histogram.amax == 0:
            return 0.0
        return min(METHODS[self.name](histogram, **self.parameters), histogram.amax)

    def to_json(self) -> dict[str, Any]:
        """Return the method as JSON values."""
        return {"name": self.name, "parameters": dict(self.parameters)}

    def __str__(self) -> str:
        parameters = ", ".join(f"{key} {value:g}" for key, value in self.parameters.items())
        return f"{self.name} ({parameters})" if parameters else self.name


def _defaults(name: str) -> dict[str, float]:
    if name not in METHODS:
        raise InvalidValue(f"no calibration method is called {name!r}", expected=f"one of {', '.join(METHODS)}")
    parameters = inspect.signature(METHODS[name]).parameters.items()
    return {key: parameter.default for key, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def maximum(histogram: Histogram) -> float:
    """Return the largest magnitude: nothing is clipped."""
    return histogram.amax


def percentile(histogram: Histogram, *, percentile: float = 99.99) -> float:
    """Return the end of the first bin up to which ``percentile`` % of the magnitudes lie.

    That is at most one bin above the exact percentile, 1/1024 of the largest magnitude.

    Raises:
        UsageError: a percentile outside (0, 100].
    """
    if not 0 < percentile <= 100:
        raise InvalidValue(f"the percentile is {percentile:g}", expected="above 0, at most 100")
    below = np.cumsum(histogram.counts)
    rank = math.ceil(Fraction(str(percentile)) / 100 * int(below[-1]))  # 99.9 % as it is written, not as it is rounded
    return float(np.searchsorted(below, rank) + 1) * histogram.width


def entropy(histogram: Histogram) -> float:
    """Return the range that loses the least information: the smallest Kullback-Leibler divergence.

    For each candidate of i bins, P is the distribution of the magnitudes with all those above in the last bin; Q is
    that of the i bins after they were merged into 128 levels, spread evenly over the bins that are not empty.
    Zeros are exact at any scale and often a large part, so the first bin counts as much as the second.

    Sources: S. Migacz, 8-bit Inference with TensorRT, GTC 2017; NVIDIA's pytorch-quantization (``calib/histogram.py``)
    for the first bin and the even split. The code of ``onnxruntime.quantization`` is not used: it gives all bins that
    the number of levels does not divide to the last level, rounds Q down to integers, takes one bin more on the
    positive side of a symmetric histogram, cuts rectified values at a third of their range, and takes a second each.
    """
    used = int(np.flatnonzero(histogram.counts)[-1]) + 1
    counts = histogram.counts[:used].astype(np.float64)
    counts[0] = counts[1] if used > 1 else counts[0]
    if used <= LEVELS or not counts[:-1].any():
        return histogram.amax
    ends = np.arange(LEVELS, used + 1)  # [C] bins of each candidate
    divergence = _divergences(counts, ends)
    best = ends.size - 1 - int(np.argmin(divergence[::-1]))  # of equals the widest
    return float(ends[best]) * histogram.width


def _divergences(counts: Floats, ends: npt.NDArray[np.int64]) -> Floats:
    """Return KL(P || Q) of the candidates that keep ``ends`` bins, [C].

    With the sums over ranges of bins from prefix sums, a candidate costs 128 levels instead of all its bins:
    sum P log(P / Q) = sum P log P - sum over levels of (the level's P) log(the level's Q).
    """
    total = counts.sum()
    edges = -(-np.arange(LEVELS + 1) * ends[:, None] // LEVELS)  # [C, 129], bin b of i is in level b * 128 // i
    kept = _prefix(counts)[edges]  # [C, 129]
    levels = np.diff(kept)  # [C, 128], values in each level
    height = levels / np.maximum(np.diff(_prefix(counts > 0)[edges]), 1)  # Q before it is normalised
    last = counts[ends - 1]  # [C]
    outside = total - kept[:, -1]
    p_log_p = _prefix(_x_log_x(counts))[ends] - _x_log_x(last) + _x_log_x(last + outside)
    p_log_q = (levels * _log(height)).sum(axis=1) + outside * _log(height[:, -1])
    divergence = (p_log_p - p_log_q) / total - np.log(total) + _log(kept[:, -1])
    return np.where(last > 0, divergence, np.inf)  # P in a bin where Q is 0


def mse(histogram: Histogram) -> float:
    """Return the range with the smallest mean squared error of quantisation, rounding and clipping together.

    All ends of bins are tried. Within a bin the magnitudes are taken as evenly spread, and the error is integrated
    exactly: between two rounding boundaries the sum of (x - q)^2 is M2 - 2 q M1 + q^2 M0, with Mp the sum of x^p.
    """
    used = int(np.flatnonzero(histogram.counts)[-1]) + 1
    counts = histogram.counts[:used].astype(np.float64)
    bins = np.arange(used + 1, dtype=np.float64)
    moments = [_prefix(counts * np.diff(bins**p) / p) for p in (1, 2, 3)]  # Mp below each bin; lengths in bins
    # [C, 128] all levels of all candidates, and [C, 129] what is rounded to them: all above the last is clipped
    levels = np.arange(1, used + 1)[:, None] / (LEVELS - 1) * np.arange(LEVELS)
    bounds = np.full((used, LEVELS + 1), float(used))
    bounds[:, 0] = 0
    bounds[:, 1:-1] = (levels[:, :-1] + levels[:, 1:]) / 2
    index = np.minimum(bounds.astype(np.intp), used - 1)
    m0, m1, m2 = (
        np.diff(moment[index] + counts[index] * (bounds**p - bins[index] ** p) / p)
        for p, moment in enumerate(moments, start=1)
    )
    errors = (m2 - 2 * levels * m1 + levels**2 * m0).sum(axis=1)
    return float(np.argmin(errors) + 1) * histogram.width


def _prefix(values: npt.NDArray[Any]) -> Floats:
    """Return the sums of the first 0, 1, ... values."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _log(x: Floats) -> Floats:
    """Return log x, and 0 for 0."""
    return np.log(np.where(x > 0, x, 1.0))


def _x_log_x(x: Floats) -> Floats:
    return x * _log(x)


METHODS: Mapping[str, Callable[..., float]] = {
    "max": maximum,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
"""Name -> function of a histogram that has a value other than 0; keyword-only parameters have defaults."""
