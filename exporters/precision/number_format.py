"""The 8-bit formats that a graph is quantised to: which numbers each has, and what rounds to which of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    Array = npt.NDArray[Any]


@dataclass(frozen=True)
class NumberFormat:
    """One 8-bit format, as Q/DQ pairs use it: symmetric.

    Attributes:
        name: of the precision, ``int8``; its files are called after it.
        title: for people, ``INT8``.
        dtype: element type of what is stored.
        largest: the largest number; a scale is a range over it.
        methods: how a range may follow from data, the default first.
    """

    name: str
    title: str
    dtype: ir.DataType
    largest: float
    methods: tuple[str, ...]

    @property
    def is_floating(self) -> bool:
        """Whether the numbers are the denser the smaller they are, as those of a floating-point format."""
        return self.dtype.is_floating_point()

    def round(self, values: Array) -> Array:
        """Return the nearest numbers of the format, half to even as QuantizeLinear rounds, the largest for all beyond.

        Args:
            values: FP32, already divided by their scale.
        """
        clipped = np.clip(values, -self.largest, self.largest).astype(np.float32)
        result: Array = (clipped if self.is_floating else np.rint(clipped)).astype(self.dtype.numpy())
        return result


INT8 = NumberFormat("int8", "INT8", ir.DataType.INT8, 127, ("mse", "max", "percentile", "entropy"))
"""Whole numbers, used from -127 to 127: symmetric, so that a product of extremes has one magnitude."""

FP8 = NumberFormat("fp8", "FP8", ir.DataType.FLOAT8E4M3FN, 448, ("max", "percentile"))
"""E4M3: three bits of significand from 2^-6 to 448, below it multiples of 2^-9. Of a range of which nothing is clipped
small values keep their digits, and so there is nothing to search for between the largest value and a percentile."""

FORMATS: Mapping[str, NumberFormat] = {each.name: each for each in (INT8, FP8)}
"""Precision -> format."""


def format_of(precision: str) -> NumberFormat:
    """Return the format of a precision.

    Raises:
        UsageError: it has none.
    """
    if precision not in FORMATS:
        raise UsageError(f"nothing is quantised to {precision!r}", expected=", ".join(FORMATS))
    return FORMATS[precision]
