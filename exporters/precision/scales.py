"""Which values of a graph may be stored scaled by powers of two, and what follows for the others.

A value x is stored as ``x * 2^-k``. Most operators are homogeneous, so the exponents ``k`` of what they read and make
obey linear equations, whatever the numbers are::

    Add, Relu, Concat, ReduceMean, ..     all k are one                  a group: a residual stream is one
    MatMul, Conv, Mul, ..                 k(y) = k(a) + k(b)             a constant b takes what is left over
    LayerNormalization(x, gamma, beta)    k(y) = k(gamma) = k(beta)      k(x) is free: epsilon * 2^(-2 k(x))
    Gelu, Softmax, Exp, graph outputs     k = 0

A power of two changes no digit of a binary number, so the scaled graph computes the same digits, unless a number leaves
the range of its type. A constant has an exponent wherever an operator reads it: operators may share it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import onnx_ir as ir

from deploycli.exporters.graph.builder import inner_graphs
from deploycli.exporters.graph.movement_ops import MOVEMENT
from deploycli.exporters.graph.operators import TRAILING_NORMALIZATIONS, is_onnx, operand
from deploycli.exporters.graph.unique import label
from deploycli.exporters.precision.dtypes import type_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_MOST_TRIES = 5000
"""Choices of one search; a graph of 40 blocks takes some hundreds."""

_EPSILON = 1e-5
"""Of every normalisation of ONNX, where the attribute is absent."""

_EPSILONS = TRAILING_NORMALIZATIONS | {"GroupNormalization", "InstanceNormalization"}
"""Normalisations that add the attribute ``epsilon`` to a mean of squares, and read a scale and a bias behind x."""


@dataclass(frozen=True)
class Use:
    """A constant where an operator reads it.

    Attributes:
        node: the operator.
        position: of the operand.
        is_factor: it is multiplied by, so that each of its digits counts; otherwise it is added, or compared.
    """

    node: ir.Node
    position: int
    is_factor: bool = field(default=False, compare=False)

    @property
    def value(self) -> ir.Value:
        """The constant."""
        value = self.node.inputs[self.position]
        assert value is not None, "a use is of a value"
        return value


@dataclass
class Group:
    """What has one exponent.

    Attributes:
        values: computed values, and graph inputs.
        uses: constants.
        pinned: what needs the values as they are; empty where nothing does.
        norms: normalisations that read one of the values, and are given another epsilon.
    """

    values: list[ir.Value] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    pinned: str = ""
    norms: list[ir.Node] = field(default_factory=list)


_Key: TypeAlias = "ir.Value | Use"
_Coefficients: TypeAlias = "Mapping[int, int]"
"""Group -> factor of its exponent in a sum that is zero."""


class Scales:
    """The groups of a graph, and the equations between their exponents.

    Args:
        graph: an FP32 graph whose constants are initializers; other types are left alone.

    Attributes:
        groups: in the order of the graph.
    """

    def __init__(self, graph: ir.Graph) -> None:
        relations = _Relations(graph)
        roots = {root: i for i, root in enumerate(dict.fromkeys(map(relations.root, relations.parents)))}
        self.groups = [Group() for _ in roots]
        self._of: dict[_Key, int] = {key: roots[relations.root(key)] for key in relations.parents}
        for key, group in self._of.items():
            if isinstance(key, Use):
                self.groups[group].uses.append(key)
            else:
                self.groups[group].values.append(key)
        for pinned, reason in relations.pins:
            group_of = self.groups[self._of[pinned]]
            group_of.pinned = group_of.pinned or reason
        for node, read in relations.norms:
            self.groups[self._of[read]].norms.append(node)
        self._equations: dict[int, list[_Coefficients]] = defaultdict(list)
        for result, factors in relations.products:
            coefficients: dict[int, int] = defaultdict(int)
            if result is not None:
                coefficients[self._of[result]] += 1
            for factor in factors:
                coefficients[self._of[factor]] -= 1
            for group in coefficients:
                self._equations[group].append(coefficients)

    def of(self, key: ir.Value | Use) -> int | None:
        """Return the number of the group of a value, or of a constant where it is read."""
        return self._of.get(key)

    def solve(self, wanted: Mapping[int, int], fits: Callable[[int, int], str]) -> dict[int, int] | str:
        """Find exponents that obey all equations; the fewer groups have one, the better.

        Args:
            wanted: group -> its exponent.
            fits: says why a group cannot have an exponent other than zero; empty where it can.

        Returns:
            Group -> exponent, zeros left out; or why there are none.
        """
        found: dict[int, int] = {}
        for group, exponent in wanted.items():
            if reason := fits(group, exponent):
                return reason
            found[group] = exponent
        order, at, reasons = list(found), 0, dict[str, None]()
        choices: list[tuple[int, int, Iterator[tuple[int, int]]]] = []  # what was known, where it was looked at
        for _ in range(_MOST_TRIES):
            while at < len(order) and (broken := self._broken(order[at], found)) is None:
                at += 1
            if at == len(order):
                return {group: exponent for group, exponent in found.items() if exponent}
            assert broken is not None, "the loop ended at an equation"
            choices.append((len(order), at, self._ways(broken, found)))
            while choices:
                known, at, ways = choices[-1]
                for group in order[known:]:
                    del found[group]
                del order[known:]
                chosen = next(((group, k) for group, k in ways if not _noted(fits(group, k), reasons)), None)
                if chosen is not None:
                    found[chosen[0]] = chosen[1]
                    order.append(chosen[0])
                    break
                choices.pop()
            if not choices:
                return "; ".join(list(reasons)[:2]) or "no powers of two obey all operators"
        return f"no powers of two were found in {_MOST_TRIES} tries"

    def _broken(self, group: int, found: Mapping[int, int]) -> _Coefficients | None:
        """Return an equation of a group that does not hold, where what is not known is zero."""
        return next((e for e in self._equations[group] if _rest(e, found)), None)

    def _ways(self, equation: _Coefficients, found: Mapping[int, int]) -> Iterator[tuple[int, int]]:
        """Yield what may be changed so that an equation holds: constants first, for they move nothing else."""
        rest = _rest(equation, found)
        unknown = [group for group in equation if group not in found and equation[group]]
        for group in sorted(unknown, key=lambda group: bool(self.groups[group].values)):
            exponent, odd = divmod(-rest, equation[group])
            if not odd:
                yield group, exponent


def _rest(equation: _Coefficients, found: Mapping[int, int]) -> int:
    return sum(factor * found.get(group, 0) for group, factor in equation.items())


def _noted(reason: str, reasons: dict[str, None]) -> str:
    if reason:
        reasons[reason] = None
    return reason


def epsilon_of(node: ir.Node) -> float:
    """Return what a normalisation adds to a mean of squares."""
    return float(node.attributes.get_float("epsilon", _EPSILON))


# --- what operators do to a scale -----------------------------------------------------------------------------------


class _Relations:
    """Goes through a graph and notes which values share an exponent, and how the others follow from each other."""

    def __init__(self, graph: ir.Graph) -> None:
        self.parents: dict[_Key, _Key] = {}
        self.pins: list[tuple[_Key, str]] = []
        self.products: list[tuple[_Key | None, tuple[_Key, ...]]] = []
        self.norms: list[tuple[ir.Node, _Key]] = []
        for value in graph.inputs:
            self._pin(self._key(value), "a caller gives it as it is")
        for node in graph:
            rule = _RULES.get(node.op_type) if is_onnx(node) else None
            if rule is None or not rule(node, self):
                self.pin(node, *self.keys(node))
            for value in _captured(node):
                self._pin(self._key(value), f"the graphs inside {label(node)} read it")
        for value in graph.outputs:
            self._pin(self._key(value), "it is an output")

    def root(self, key: _Key) -> _Key:
        """Return what stands for a group."""
        while self.parents[key] != key:
            self.parents[key] = key = self.parents[self.parents[key]]
        return key

    def read(self, node: ir.Node, position: int, *, factor: bool = False) -> _Key | None:
        """Return an operand; None where it is absent or of another type."""
        value = operand(node, position)
        if value is None or type_of(value) != ir.DataType.FLOAT:
            return None
        is_constant = value.is_initializer() and not value.is_graph_input()
        return self._known(Use(node, position, factor) if is_constant else value)

    def made(self, node: ir.Node, position: int = 0) -> _Key | None:
        """Return a result; None where it is of another type."""
        return self._key(node.outputs[position]) if position < len(node.outputs) else None

    def keys(self, node: ir.Node) -> list[_Key]:
        """Return all FP32 operands and results."""
        found = (*(self.read(node, i) for i in range(len(node.inputs))), *map(self._key, node.outputs))
        return [key for key in found if key is not None]

    def tie(self, *keys: _Key | None) -> None:
        """Note that values share their exponent."""
        first, *others = (key for key in keys if key is not None)
        for key in others:
            self.parents[self.root(key)] = self.root(first)

    def pin(self, node: ir.Node, *keys: _Key | None) -> None:
        """Note that an operator needs values as they are."""
        for key in keys:
            self._pin(key, f"{label(node)} is not linear")

    def multiply(self, result: _Key | None, *factors: _Key | None) -> None:
        """Note that exponents add up: that of the result, or zero where there is none."""
        self.products.append((result, tuple(key for key in factors if key is not None)))

    def _pin(self, key: _Key | None, reason: str) -> None:
        if key is not None:
            self.pins.append((key, reason))

    def _key(self, value: ir.Value | None) -> _Key | None:
        is_float = value is not None and value.name and type_of(value) == ir.DataType.FLOAT
        return self._known(value) if is_float and value is not None else None

    def _known(self, key: _Key) -> _Key:
        self.parents.setdefault(key, key)
        return key


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what the graphs inside an operator read from outside: all that they read does no harm."""
    for graph in inner_graphs(node):
        yield from graph.outputs
        for inner in graph.all_nodes():
            yield from (value for value in inner.inputs if value is not None and value.graph is node.graph)


def _tied(node: ir.Node, relations: _Relations) -> bool:
    """All FP32 operands and results are scaled alike."""
    keys = relations.keys(node)
    if keys:
        relations.tie(*keys)
    return True


def _tied_without_attributes(node: ir.Node, relations: _Relations) -> bool:
    """As of new opsets; in old ones numbers stand in attributes."""
    return not {"max", "min", "value"} & node.attributes.keys() and _tied(node, relations)


def _first(node: ir.Node, relations: _Relations) -> bool:
    """Other operands say what is done, and are no numbers of the result."""
    relations.tie(relations.read(node, 0), relations.made(node))
    return len([output for output in node.outputs if output.name]) == 1


def _slope(node: ir.Node, relations: _Relations) -> bool:
    relations.tie(relations.read(node, 0), relations.made(node))
    relations.pin(node, relations.read(node, 1, factor=True))
    return True


def _product(node: ir.Node, relations: _Relations) -> bool:
    result = relations.made(node)
    relations.multiply(result, *(relations.read(node, i, factor=True) for i in range(2)))
    if result is not None:
        relations.tie(result, relations.read(node, 2))
    return len(node.inputs) <= 3


def _einsum(node: ir.Node, relations: _Relations) -> bool:
    relations.multiply(relations.made(node), *(relations.read(node, i, factor=True) for i in range(len(node.inputs))))
    return True


def _quotient(node: ir.Node, relations: _Relations) -> bool:
    relations.multiply(relations.read(node, 0, factor=True), relations.made(node), relations.read(node, 1, factor=True))
    return True


def _power(node: ir.Node, relations: _Relations) -> bool:
    value = operand(node, 1)
    tensor = None if value is None or not value.is_initializer() or value.is_graph_input() else value.const_value
    if tensor is None or tensor.size != 1 or tensor.numpy().item() != 2:
        return False
    relations.multiply(relations.made(node), relations.read(node, 0), relations.read(node, 0))
    return True


def _square(node: ir.Node, relations: _Relations) -> bool:
    relations.multiply(relations.made(node), relations.read(node, 0), relations.read(node, 0))
    return True


def _root(node: ir.Node, relations: _Relations) -> bool:
    relations.multiply(relations.read(node, 0), relations.made(node), relations.made(node))
    return True


def _reciprocal(node: ir.Node, relations: _Relations) -> bool:
    relations.multiply(None, relations.made(node), relations.read(node, 0))
    return True


def _convert(node: ir.Node, relations: _Relations) -> bool:
    return type_of(node.inputs[0]) == type_of(node.outputs[0]) and _tied(node, relations)


def _normalization(node: ir.Node, relations: _Relations) -> bool:
    """What is normalised may have any scale, and the result has that of its scale and bias."""
    if any(output.name and output.uses() for output in node.outputs[1:]):
        return False
    read = relations.read(node, 0)
    if read is not None:
        relations.norms.append((node, read))
    relations.tie(relations.made(node), relations.read(node, 1, factor=True), relations.read(node, 2))
    return True


def _unit_vectors(node: ir.Node, relations: _Relations) -> bool:
    relations.read(node, 0)
    relations.pin(node, relations.made(node))
    return True


def _batch_normalization(node: ir.Node, relations: _Relations) -> bool:
    if node.attributes.get_int("training_mode", 0) or len(node.outputs) > 1:
        return False
    relations.tie(relations.read(node, 0), relations.read(node, 3))
    relations.tie(relations.made(node), relations.read(node, 2))
    relations.multiply(relations.made(node), relations.read(node, 0), relations.read(node, 1, factor=True))
    return True


def _attention(node: ir.Node, relations: _Relations) -> bool:
    """Scores are as they are; the result is a mean of values."""
    if len(node.inputs) > 4 or len(node.outputs) > 1:
        return False
    relations.tie(relations.read(node, 2), relations.made(node))
    relations.pin(node, *(relations.read(node, position) for position in (0, 1, 3)))
    return True


def _free(node: ir.Node, relations: _Relations) -> bool:
    """What it says does not depend on a scale."""
    relations.keys(node)
    return True


_RULES: Mapping[str, Callable[[ir.Node, _Relations], bool]] = {
    **dict.fromkeys(MOVEMENT, _tied),
    **dict.fromkeys(("Abs", "Add", "Max", "Mean", "Min", "Neg", "Relu", "Sub", "Sum", "Where"), _tied),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LeakyRelu", "MaxPool"), _first),
    **dict.fromkeys(("CumSum", "Dropout", "ReduceL1", "ReduceL2"), _first),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _first),
    **dict.fromkeys(("Clip", "Pad"), _tied_without_attributes),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul", "Mul"), _product),
    **dict.fromkeys(sorted(_EPSILONS), _normalization),
    **dict.fromkeys(("ArgMax", "ArgMin", "Shape", "Size"), _free),
    "Attention": _attention,
    "BatchNormalization": _batch_normalization,
    "Cast": _convert,
    "Div": _quotient,
    "Einsum": _einsum,
    "LpNormalization": _unit_vectors,
    "PRelu": _slope,
    "Pow": _power,
    "Reciprocal": _reciprocal,
    "ReduceSumSquare": _square,
    "Sqrt": _root,
}
"""Operator -> what it makes of scales; False where it needs its operands as they are, as all others do."""
