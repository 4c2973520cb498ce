"""What rounding to FP16 or BF16 does to constants, and which values are attention masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deploycli.exporters.graph.movement_ops import MOVEMENT

if TYPE_CHECKING:
    import onnx_ir as ir

    Array = npt.NDArray[Any]

MASKING = frozenset({"Add", "Cast", "Max", "Min", "Sub", "Sum", "Trilu", "Where", *MOVEMENT})
"""Operators through which a mask stays one: they add it, choose it or move it."""

NEAR_OVERFLOW = 0.5
"""A value beyond this share of the largest finite one is too near: a score is added to it, or an input not seen yet
reaches further."""

_ATTENTION_MASK = 3  # operand of ONNX's Attention


@dataclass(frozen=True)
class Rounding:
    """What becomes of a constant.

    Attributes:
        size: number of values.
        overflowed: finite or infinite values beyond the largest finite one of the reduced type.
        near: values beyond `NEAR_OVERFLOW` of it, those that overflow too.
        subnormal: values that are not zero and below the smallest normal number of the reduced type.
        flushed: values that are not zero and would be.
        kept: values that are still not zero.
        largest: largest magnitude; NaN where there is one.
    """

    size: int
    overflowed: int
    near: int
    subnormal: int
    flushed: int
    kept: int
    largest: float

    @property
    def vanishes(self) -> bool:
        """Whether nothing would be left, as of an epsilon that protects a division."""
        return self.flushed > 0 and self.kept == 0


def examine(array: Array, target: ir.DataType) -> Rounding:
    """Count what overflows and what is flushed to zero when FP32 values are rounded to a reduced type."""
    rounded, magnitude = reduced(array, target), np.abs(array)
    return Rounding(
        size=array.size,
        overflowed=int(array.size - np.isfinite(rounded).sum()),
        near=int((magnitude > NEAR_OVERFLOW * float(target.max)).sum()),
        subnormal=int(((magnitude > 0) & (magnitude < float(target.tiny))).sum()),
        flushed=int(((rounded == 0) & (array != 0)).sum()),
        kept=int((rounded != 0).sum()),
        largest=float(magnitude.max(initial=0.0)),
    )


def reduced(array: Array, target: ir.DataType, *, limit: float | None = None) -> Array:
    """Round FP32 values to a reduced type.

    Args:
        array: FP32 values.
        target: FP16 or BF16.
        limit: largest magnitude to write: a mask stays finite.
    """
    with np.errstate(over="ignore", under="ignore"):
        result: Array = (array if limit is None else array.clip(-limit, limit)).astype(target.numpy())
    return result


def feeds_softmax(value: ir.Value) -> bool:
    """Whether a value is only ever added to, or chosen for, what a Softmax reads: an attention mask or bias."""
    uses = value.uses()
    if not uses or value.is_graph_output():
        return False
    return all(
        use.node.op_type == "Softmax"
        or (use.node.op_type == "Attention" and use.idx == _ATTENTION_MASK)
        or (use.node.op_type in MASKING and all(feeds_softmax(output) for output in use.node.outputs))
        for use in uses
    )
