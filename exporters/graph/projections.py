"""A projection: rows multiplied by a stored matrix, and the bias that is added to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycli.exporters.graph.operators import is_onnx, only_reader

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array


@dataclass(frozen=True)
class Bias:
    """``MatMul(x, W) + b``, whose product nothing else reads.

    Attributes:
        add: the sum.
        position: which of its operands is b.
        numbers: b, one for each column; [M], or with axes of length 1 before it.
    """

    add: ir.Node
    position: int
    numbers: Array


def bias_of(product: ir.Node, analysis: Analysis) -> Bias | None:
    """Return the bias that is added to a product, one number for each of its columns; None where there is none."""
    result = product.outputs[0]
    add, dims = only_reader(result), analysis.dims(result)
    if add is None or not is_onnx(add, "Add") or not dims or analysis.dims(add.outputs[0]) != dims:
        return None
    position = 1 - next(iter(result.uses())).idx
    numbers = analysis.constant(add.inputs[position])
    fits = numbers is not None and numbers.shape[-1:] == dims[-1:] and numbers.size == dims[-1]
    return Bias(add, position, numbers) if numbers is not None and fits else None
