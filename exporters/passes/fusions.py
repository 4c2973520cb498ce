"""Operators that an exporter wrote out become one operator again.

Before -> after, for exports through TorchScript and for old opsets::

    ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div, Mul, Add -> LayerNormalization
    Div, Erf, Add, Mul, Mul                                    -> Gelu
    Pow, Mul, Add, Mul, Tanh, Add, Mul, Mul                    -> Gelu(approximate=tanh)

A normalisation is read operator by operator. A GELU has a dozen spellings; what they share is that the result is a
function of one value, made of an Erf or a Tanh and of products and sums with single numbers. The function is computed
on sample points and compared. Equal within rounding.

LayerNormalization is an operator from opset 17 on, Gelu from 20 on: an older graph is raised if nothing in it changes
its meaning (:mod:`deploycli.exporters.passes.opset`). Refused, for one: a GELU beside a Resize of opset 13.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.affine import BATCH
from deploycli.exporters.graph.builder import Builder
from deploycli.exporters.graph.rewiring import replace
from deploycli.exporters.graph.steps import Refusal
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass
from deploycli.exporters.passes.opset import raise_opset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deploycli.exporters.graph.analysis import Fact, Facts
    from deploycli.exporters.graph.movement_ops import Array


class Fusion(GraphPass):
    """A pass that writes an operator which old opsets lack."""

    opset: ClassVar[int]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass; see the module's documentation."""
        self._model = model
        return super().call(model)

    def raises(self, found: Sequence[ir.Node]) -> bool:
        """Raise the model for what was found."""
        if not found:
            return False
        reason = raise_opset(self._model, self.opset)
        if reason is not None:
            self.refusals += [Refusal(label(node), reason) for node in found]
        return reason is None


# --- layer normalisation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Normalization:
    """``(x - mean(x)) / sqrt(variance(x) + epsilon)`` over the axes from one on."""

    x: ir.Value
    axis: int
    epsilon: float


class FuseNormalization(Fusion):
    """Let a normalisation over the last axes be one operator."""

    opset = 17

    def transform(self, graph: ir.Graph, facts: Facts) -> bool:
        """Run the pass; see the module's documentation."""
        found = {node: read for node in graph if (read := _read_normalization(node, facts)) is not None}
        if not self.raises(list(found)):
            return False
        builder = Builder(graph, facts)
        for node, read in found.items():
            _write_normalization(node, read, builder)
        return True


def _read_normalization(node: ir.Node, facts: Facts) -> _Normalization | None:
    """Read a node as what is normalised, before its scale and shift."""
    for deviation, root in _quotients(node, facts):
        moment, axes = _operand_of(root, "Sqrt"), facts.axes(deviation)
        if axes is None or moment is None or not _is_single(facts[deviation]):
            continue
        for variance, epsilon in _with_number(moment, "Add", facts, len(axes)):
            mean = _mean(variance, facts)
            if mean is None:
                continue
            squared, axis = mean
            x = _deviation(deviation, axis, facts)
            if x is not None and any(_deviation(d, axis, facts) is x for d in _squares(squared, facts)):
                return _Normalization(x, axis, epsilon)
    return None


def _is_single(fact: Fact | None) -> bool:
    """Say whether numbers are of a type that LayerNormalization keeps: it computes in, and has its epsilon in, FP32."""
    return fact is not None and fact.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _quotients(node: ir.Node, facts: Facts) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield numerator and denominator of ``a / b`` and of ``a * (1 / b)``."""
    if node.domain != "" or node.op_type not in ("Div", "Mul"):
        return
    a, b = node.inputs
    assert a is not None, "an arithmetic operator has both operands"
    assert b is not None, "an arithmetic operator has both operands"
    if node.op_type == "Div":
        yield a, b
    elif node.op_type == "Mul":
        for numerator, inverse in ((a, b), (b, a)):
            root, division = _operand_of(inverse, "Reciprocal"), _maker(inverse, "Div")
            rank = len(facts.axes(numerator) or ())
            if division is not None and _number(division.inputs[0], facts, rank) == 1:
                root = division.inputs[1]
            if root is not None:
                yield numerator, root


def _mean(value: ir.Value, facts: Facts) -> tuple[ir.Value, int] | None:
    """Read a value as the mean over the last axes; return what is averaged, and the first of them."""
    node = _maker(value, "ReduceMean")
    if node is None or node.inputs[0] is None or not node.attributes.get_int("keepdims", 1):
        return None
    dims = facts.axes(node.inputs[0])
    given = facts.constant(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", None)
    if dims is None or given is None:
        return None
    axes = sorted(int(axis) % len(dims) for axis in given)
    first = len(dims) - len(axes)
    are_static = all(dim is not None and dim % BATCH for dim in dims[first:])
    return (node.inputs[0], first) if axes == list(range(first, len(dims))) and axes and are_static else None


def _deviation(value: ir.Value, axis: int, facts: Facts) -> ir.Value | None:
    """Read a value as ``x - mean(x)`` over the axes from one on."""
    node = _maker(value, "Sub")
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return None
    return node.inputs[0] if _mean(node.inputs[1], facts) == (node.inputs[0], axis) else None


def _squares(value: ir.Value, facts: Facts) -> Iterator[ir.Value]:
    node = value.producer()
    if node is None or node.domain != "" or len(node.inputs) != 2:
        return
    a, b = node.inputs
    rank = len(facts.axes(a) or ())
    is_square = (node.op_type == "Mul" and a is b) or (node.op_type == "Pow" and _number(b, facts, rank) == 2)
    if a is not None and is_square:
        yield a


def _write_normalization(node: ir.Node, read: _Normalization, builder: Builder) -> None:
    """Write a normalisation with the scale and the shift that follow, as far as they are constants."""
    facts, result = builder.facts, node.outputs[0]
    dims, fact = facts.axes(read.x), facts[read.x]
    assert dims is not None, "its mean was read"
    assert fact is not None, "its mean was read"
    shape = tuple(dim for dim in dims[read.axis :] if dim is not None)
    scale: Array = np.ones(shape, fact.dtype.numpy())
    shift, last = None, node
    following = _only_reader(result, "Mul", shape, len(dims), facts)
    if following is not None:
        last, scale = following
    following = _only_reader(last.outputs[0], "Add", shape, len(dims), facts)
    if following is not None:
        last, shift = following
    operands = [read.x, builder.constant(scale), *([] if shift is None else [builder.constant(shift)])]
    axis = read.axis - len(dims)
    normed = builder.value("LayerNormalization", operands, last, axis=axis, epsilon=read.epsilon)
    replace(last.outputs[0], normed)


def _only_reader(
    value: ir.Value, op_type: str, shape: tuple[int, ...], rank: int, facts: Facts
) -> tuple[ir.Node, Array] | None:
    """Return the operator that alone reads a value, and its constant, if that varies over the last axes only."""
    readers = list(value.uses())
    if len(readers) != 1 or value.is_graph_output():
        return None
    node, position = readers[0]
    if node.op_type != op_type or node.domain != "":
        return None
    constant = facts.constant(node.inputs[1 - position])
    if constant is None or constant.ndim > rank:  # it would add axes to the result
        return None
    while constant.ndim > len(shape) and constant.shape[0] == 1:
        constant = constant[0]
    try:
        return node, np.broadcast_to(constant, shape)
    except ValueError:  # it varies over other axes
        return None


# --- GELU ------------------------------------------------------------------------------------------------------------

_POINTS = np.concatenate([np.linspace(-12, 12, 481), [-1e3, -50.0, 50.0, 1e3]])
"""Where two functions are compared. Analytic ones of so few operators do not agree at all of these and differ."""

_SIGMOIDS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "Erf": ("none", np.vectorize(math.erf, otypes=[float])),
    "Tanh": ("tanh", np.tanh),
}
_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Div": np.divide,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Pow": np.power,
    "Sub": np.subtract,
}
_MOST_ABOVE, _MOST_BELOW = 8, 4
"""Operators before and after the Erf or Tanh of a GELU that was written out."""


class FuseGelu(Fusion):
    """Let a GELU be one operator."""

    opset = 20

    def transform(self, graph: ir.Graph, facts: Facts) -> bool:
        """Run the pass; see the module's documentation."""
        found = {}
        for node in graph:
            read = _read_gelu(node, facts) if node.op_type in _SIGMOIDS and node.domain == "" else None
            if read is not None:
                found[node] = read
        if not self.raises(list(found)):
            return False
        builder = Builder(graph, facts)
        for node, (x, result) in found.items():
            last = result.producer()
            assert last is not None, "it is made of the Erf or Tanh"
            replace(result, builder.value("Gelu", [x], last, approximate=_SIGMOIDS[node.op_type][0]))
        return True


def _read_gelu(sigmoid: ir.Node, facts: Facts) -> tuple[ir.Value, ir.Value] | None:
    """Return x and GELU(x), between which an Erf or a Tanh lies."""
    assert sigmoid.inputs[0] is not None, "it has one operand"
    sources = _above(sigmoid.inputs[0], facts)
    for result in _below(sigmoid.outputs[0]):
        for x in sources:
            fact = facts[x]
            if fact is None or not fact.dtype.is_floating_point():
                continue
            values = _function(result, x, facts)
            rounding = 4 * float(np.finfo(fact.dtype.numpy()).eps) * np.maximum(1, np.abs(_POINTS))
            if values is not None and bool(np.all(np.abs(values - _gelu(sigmoid.op_type)) <= rounding)):
                return x, result
    return None


def _gelu(sigmoid: str) -> Array:
    x, function = _POINTS, _SIGMOIDS[sigmoid][1]
    inner = x / math.sqrt(2) if sigmoid == "Erf" else math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    result: Array = x / 2 * (1 + function(inner))
    return result


def _above(value: ir.Value, facts: Facts) -> list[ir.Value]:
    """Return the values that a value may be a function of, nearest first."""
    found: dict[ir.Value, None] = {}
    waiting = [value]
    while waiting and len(found) <= _MOST_ABOVE:
        value = waiting.pop(0)
        found[value] = None
        node = value.producer()
        if node is not None and node.domain == "" and node.op_type in _ARITHMETIC:
            waiting += [v for v in node.inputs if v is not None and v not in found and facts.constant(v) is None]
    return list(found)


def _below(value: ir.Value) -> Iterator[ir.Value]:
    """Yield the results of products and sums that a value goes through."""
    for _ in range(_MOST_BELOW):
        readers = value.consumers()
        if len(readers) != 1 or readers[0].domain != "" or readers[0].op_type not in _ARITHMETIC:
            return
        value = readers[0].outputs[0]
        yield value


def _function(result: ir.Value, x: ir.Value, facts: Facts) -> Array | None:
    """Compute a value at the sample points of another; None where it is made of anything else as well."""
    known: dict[ir.Value, Array | None] = {x: _POINTS}
    rank = len(facts.axes(x) or ())

    def compute(value: ir.Value | None, steps: int) -> Array | None:
        if value is None or value in known or not steps:
            return None if value is None else known.get(value)
        number = _number(value, facts, rank)
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


# --- reading ---------------------------------------------------------------------------------------------------------


def _maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _operand_of(value: ir.Value, op_type: str) -> ir.Value | None:
    node = _maker(value, op_type)
    return None if node is None else node.inputs[0]


def _number(value: ir.Value | None, facts: Facts, rank: int) -> float | None:
    """Return a constant of one element, and of no more axes than what it meets, to which it would add axes."""
    constant = facts.constant(value)
    if constant is None or constant.size != 1 or constant.ndim > rank or constant.dtype.kind in "OSU":
        return None
    return float(constant.reshape(()))


def _with_number(value: ir.Value, op_type: str, facts: Facts, rank: int) -> Iterator[tuple[ir.Value, float]]:
    """Yield the other operand and the number, where one of two operands is a number."""
    node = _maker(value, op_type)
    if node is None:
        return
    for operand, other in (node.inputs, node.inputs[::-1]):
        number = _number(other, facts, rank)
        if operand is not None and number is not None:
            yield operand, number
