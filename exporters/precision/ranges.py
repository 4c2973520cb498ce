"""What is no range: it would quantise a tensor to nothing, or was not measured at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.unique import listed
from deploycli.models.errors import NumericsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deploycli.exporters.precision.histogram import Histogram

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 127 * float(np.finfo(np.float32).tiny)
"""Below it the scale, ``amax / 127``, is no normal float32."""

MOST_NAMES = 5
"""Tensors that a message names."""

_HINT = "exclude them from INT8, or calibrate with data that the model was made for"


def check_ranges(ranges: Mapping[str, float]) -> None:
    """Refuse degenerate ranges.

    Raises:
        NumericsError: a range that is NaN, infinite, zero or negative; or several tensors that all have the same one.
    """
    if wrong := [f"{name} ({amax:g})" for name, amax in ranges.items() if not SMALLEST <= amax <= LARGEST]:
        raise NumericsError(
            f"the INT8 range of {listed(wrong, MOST_NAMES)} is degenerate",
            expected="a finite amax above zero",
            hint=_HINT,
        )
    if len(ranges) > 1 and len(set(ranges.values())) == 1:
        (amax,) = set(ranges.values())
        raise NumericsError(
            f"the INT8 ranges of all {len(ranges)} tensors are the same, {amax:g}: {listed(ranges, MOST_NAMES)}",
            expected="ranges that were measured, which differ",
            hint="calibrate with data that the model was made for",
        )


def check_varied(histograms: Mapping[str, Histogram]) -> None:
    """Refuse tensors that do not depend on the data.

    Raises:
        NumericsError: all values of a tensor with more than one are the same, zero included.
    """
    constant = [f"{name} ({h.lowest:g})" for name, h in histograms.items() if h.count > 1 and h.lowest == h.highest]
    if constant:
        raise NumericsError(
            f"all values of {listed(constant, MOST_NAMES)} are the same",
            expected="activations that depend on the input",
            hint=_HINT,
        )
