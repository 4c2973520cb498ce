"""What rounding to FP16 or BF16 does to constants, and which constants are attention masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx_ir as ir

    Array = npt.NDArray[Any]

_LAYOUT = frozenset(
    {"Cast", "Concat", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
_ADDITIVE = frozenset({"Add", "Max", "Min", "Sum", "Where"})


@dataclass(frozen=True)
class Rounding:
    """What becomes of a constant.

    Attributes:
        size: number of values.
        overflowed: finite or infinite values beyond the largest finite one of the reduced type.
        flushed: values that are not zero and would be.
        kept: values that are still not zero.
        largest: largest magnitude.
    """

    size: int
    overflowed: int
    flushed: int
    kept: int
    largest: float

    @property
    def vanishes(self) -> bool:
        """Whether nothing would be left, as of an epsilon that protects a division."""
        return self.flushed > 0 and self.kept == 0


def examine(array: Array, target: ir.DataType) -> Rounding:
    """Count what overflows and what is flushed to zero when FP32 values are rounded to a reduced type."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = array.astype(target.numpy())
    overflowed = int(array.size - np.isfinite(rounded).sum())
    flushed = int(((rounded == 0) & (array != 0)).sum())
    kept = int((rounded != 0).sum())
    largest = float(np.abs(array).max()) if array.size else 0.0
    return Rounding(array.size, overflowed, flushed, kept, largest)


def reduced(array: Array, target: ir.DataType, *, clip: float | None = None) -> Array:
    """Round FP32 values to a reduced type.

    Args:
        array: FP32 values.
        target: FP16 or BF16.
        clip: largest magnitude to write: a mask stays finite.
    """
    with np.errstate(under="ignore"):
        result: Array = (array if clip is None else array.clip(-clip, clip)).astype(target.numpy())
    return result


def feeds_softmax(value: ir.Value) -> bool:
    """Whether a constant is only ever added to, or chosen for, what a Softmax reads: an attention mask or bias."""
    readers = value.consumers()
    if not readers or value.is_graph_output():
        return False
    return all(
        reader.op_type == "Softmax"
        or (reader.op_type in _ADDITIVE | _LAYOUT and all(feeds_softmax(output) for output in reader.outputs))
        for reader in readers
    )
