"""A GELU that an exporter wrote out becomes one operator again.

Before -> after, for exports through TorchScript and for old opsets::

    Div, Erf, Add, Mul, Mul                 -> Gelu
    Pow, Mul, Add, Mul, Tanh, Add, Mul, Mul -> Gelu(approximate=tanh)

A GELU has a dozen spellings; what they share is that the result is a function of one value, made of an Erf or a Tanh
and of products and sums with single numbers. The function is computed on sample points and compared. Equal within
rounding.

Gelu is an operator from opset 20 on: an older graph is raised if nothing in it changes its meaning
(:mod:`deploycli.exporters.passes.common.opset`). Refused, for one: a GELU beside a GridSample of opset 16.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.builder import Builder, replace
from deploycli.exporters.graph.operators import ARITHMETIC
from deploycli.exporters.passes.common.fusion import Fusion, single_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array

_POINTS = np.concatenate([np.linspace(-12, 12, 481), [-1e3, -50.0, 50.0, 1e3]])
"""Where two functions are compared. Analytic ones of so few operators do not agree at all of these and differ."""

_SIGMOIDS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "Erf": ("none", np.vectorize(math.erf, otypes=[float])),
    "Tanh": ("tanh", np.tanh),
}
_ARITHMETIC: dict[str, Callable[..., Array]] = {**ARITHMETIC, "Neg": np.negative, "Pow": np.power}
_MOST_ABOVE, _MOST_BELOW = 8, 4
"""Operators before and after the Erf or Tanh of a GELU that was written out."""


class FuseGelu(Fusion["tuple[ir.Value, ir.Value]"]):
    """Let a GELU be one operator."""

    opset = 20

    def read(self, node: ir.Node, analysis: Analysis) -> tuple[ir.Value, ir.Value] | None:
        """Return x and GELU(x), between which the node lies."""
        return _read_gelu(node, analysis) if node.op_type in _SIGMOIDS and node.domain == "" else None

    def write(self, node: ir.Node, found: tuple[ir.Value, ir.Value], builder: Builder) -> None:
        """Write the operator in the place of the last one."""
        x, result = found
        last = result.producer()
        assert last is not None, "it is made of the Erf or Tanh"
        replace(result, builder.value("Gelu", [x], last, approximate=_SIGMOIDS[node.op_type][0]))


def _read_gelu(sigmoid: ir.Node, analysis: Analysis) -> tuple[ir.Value, ir.Value] | None:
    """Return x and GELU(x), between which an Erf or a Tanh lies."""
    assert sigmoid.inputs[0] is not None, "it has one operand"
    sources = _above(sigmoid.inputs[0], analysis)
    for result in _below(sigmoid.outputs[0]):
        for x in sources:
            fact = analysis[x]
            if fact is None or not fact.dtype.is_floating_point():
                continue
            values = _function(result, x, analysis)
            rounding = 4 * float(np.finfo(fact.dtype.numpy()).eps) * np.maximum(1, np.abs(_POINTS))
            if values is not None and bool(np.all(np.abs(values - _gelu(sigmoid.op_type)) <= rounding)):
                return x, result
    return None


def _gelu(sigmoid: str) -> Array:
    x, function = _POINTS, _SIGMOIDS[sigmoid][1]
    inner = x / math.sqrt(2) if sigmoid == "Erf" else math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    result: Array = x / 2 * (1 + function(inner))
    return result


def _above(value: ir.Value, analysis: Analysis) -> list[ir.Value]:
    """Return the values that a value may be a function of, nearest first."""
    found: dict[ir.Value, None] = {}
    waiting = [value]
    while waiting and len(found) <= _MOST_ABOVE:
        value = waiting.pop(0)
        found[value] = None
        node = value.producer()
        if node is not None and node.domain == "" and node.op_type in _ARITHMETIC:
            waiting += [v for v in node.inputs if v is not None and v not in found and analysis.constant(v) is None]
    return list(found)


def _below(value: ir.Value) -> Iterator[ir.Value]:
    """Yield the results of products and sums that a value goes through."""
    for _ in range(_MOST_BELOW):
        readers = value.consumers()
        if len(readers) != 1 or readers[0].domain != "" or readers[0].op_type not in _ARITHMETIC:
            return
        value = readers[0].outputs[0]
        yield value


def _function(result: ir.Value, x: ir.Value, analysis: Analysis) -> Array | None:
    """Compute a value at the sample points of another; None where it is made of anything else as well."""
    known: dict[ir.Value, Array | None] = {x: _POINTS}
    rank = len(analysis.axes(x) or ())

    def compute(value: ir.Value | None, steps: int) -> Array | None:
        if value is None or value in known or not steps:
            return None if value is None else known.get(value)
        number = single_number(value, analysis, rank)
        node = value.producer()
        if number is not None:
            known[value] = np.array(number)
        elif node is not None and node.domain == "":
            operands = [compute(v, steps - 1) for v in node.inputs]
            function = _SIGMOIDS[node.op_type][1] if node.op_type in _SIGMOIDS else _ARITHMETIC.get(node.op_type)
            present = [operand for operand in operands if operand is not None]
            if function is not None and len(present) == len(operands):
                with np.errstate(all="ignore"):  # a function that is not defined everywhere is no GELU
                    known[value] = function(*present)
        return known.setdefault(value, None)

    values = compute(result, _MOST_ABOVE + _MOST_BELOW)
    return None if values is None else np.broadcast_to(values, _POINTS.shape)
