"""Histogram of the magnitudes of one tensor: measured a batch at a time, added up without loss.

The bins end at a power of two, so a value's bin is found without rounding, and doubling the range merges pairs of bins
exactly. The histogram of some values is therefore the same however they are split into batches, and in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

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
