"""Attention in a graph: a product of queries and keys, a Softmax, a product with values, and what stands between.

There is one way to walk from a Softmax to its products. Who asks says which operators lead on, and so how much of what
exporters write is an attention: for the passes a constant mask and Reshapes, for INT8 arithmetic and movement, for the
lint Casts and Q/DQ pairs as well. They are `masked_scores` below, `Roles.attention` of
:mod:`deploycli.exporters.precision.roles`, and `Subject.attentions` of :mod:`deploycli.exporters.lint.subject`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import onnx_ir as ir

from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.operators import is_onnx, operand
from deploycli.exporters.graph.regions import moved, moves_one

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.shapes import Dims

    Leads: TypeAlias = Callable[[ir.Node], Iterable[int] | None]
    """Positions of the operands of a node through which the way leads on; None where it ends at this node."""

MOST_STEPS = 2**30
"""A way may have any number of steps."""


@dataclass(frozen=True)
class Step:
    """An operator on the way, and the position of the operand that leads on."""

    node: ir.Node
    position: int


@dataclass(frozen=True)
class End:
    """Where a way ends.

    Attributes:
        node: the operator.
        position: of a reader, the position at which it reads; of a maker 0.
        steps: what stands between, in the order of the data.
    """

    node: ir.Node
    position: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Attention:
    """An attention made of primitive operators.

    Attributes:
        scores: the product of queries and keys, [.., Sq, Skv].
        before: what stands between it and the Softmax, in the order of the data.
        softmax: the Softmax.
        after: what stands between that and the second product.
        mix: the product of the probabilities and the values, [.., Sq, D].
        probability: operand of ``mix`` that holds the probabilities.
    """

    scores: ir.Node
    before: tuple[Step, ...]
    softmax: ir.Node
    after: tuple[Step, ...]
    mix: ir.Node
    probability: int

    @property
    def operands(self) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None, ir.Value | None]:
        """Queries, keys, probabilities and values, as the products read them."""
        queries, keys, *_ = self.scores.inputs
        return queries, keys, self.mix.inputs[self.probability], self.mix.inputs[1 - self.probability]


def joined(above: End, softmax: ir.Node, below: End) -> Attention:
    """Return the attention that a Softmax makes of the products on its two sides."""
    return Attention(above.node, above.steps, softmax, below.steps, below.node, below.position)


def find_attention(
    softmax: ir.Node, leads: Leads, is_product: Callable[[ir.Node], bool], most: int
) -> Attention | None:
    """Return the attention around a Softmax, of the nearest products on its two sides; None where there is none.

    Args:
        softmax: the operator.
        leads: which operators a way leads through.
        is_product: whether a node is a product of two values that are no constants.
        most: steps of a way.
    """
    above = next((end for end in makers(softmax.inputs[0], leads, most) if is_product(end.node)), None)
    below = next((end for end in readers(softmax.outputs[0], leads, most) if is_product(end.node)), None)
    return None if above is None or below is None else joined(above, softmax, below)


def is_product_of_activations(node: ir.Node, analysis: Analysis) -> bool:
    """Say whether a node is a MatMul of two values of which none is a constant."""
    return is_onnx(node, "MatMul") and all(analysis.constant(value) is None for value in node.inputs)


IN_PLACE, TURNED_IN_PLACE = (1, 2, 0, 3), (1, 2, 3, 0)
"""How a Transpose turns ``[N, G, h, d]``, tokens first, into the operands of an attention, which reads it in place:
queries and values to ``[G, h, N, d]``, keys to ``[G, h, d, N]``."""


def is_read_in_place(product: ir.Node, analysis: Analysis) -> bool:
    """Say whether attention reads a product in place: heads of tokens that stand first.

    What a query's bias adds to the scores is computed from the keys as the attention reads them.
    """
    value, dims = product.outputs[0], analysis.dims(product.outputs[0])
    if not is_onnx(product, "MatMul") or dims is None or len(dims) != 3 or 0 in dims:
        return False
    found = IndexMap.identity(dims)
    while uses := list(value.uses()):
        if any(is_product_of_activations(use.node, analysis) for use in uses):
            return found.key in _in_place(dims, found.shape)
        if len(uses) > 1 or value.is_graph_output():
            return False
        reader, position = uses[0].node, uses[0].idx
        if position or not moves_one(reader, analysis) or len(reader.outputs) > 1:
            return False
        try:
            (found,) = moved(reader, {value: found}, analysis)
        except ValueError:
            return False
        (value,) = reader.outputs
    return False


def _in_place(dims: Dims, result: Dims) -> Iterator[object]:
    """Yield the keys of the maps by which a product, [N, G, h*d], is read in place, as queries, values or keys."""
    tokens, windows, channels = dims
    for perm, (rows, size) in ((IN_PLACE, result[-2:]), (TURNED_IN_PLACE, result[:-3:-1])):
        if rows == tokens and channels % size == 0:
            heads = IndexMap.identity(dims).reshape(tokens, windows, channels // size, size)
            yield heads.transpose(perm).reshape(result).key


def masked_scores(softmax: ir.Node, analysis: Analysis) -> End | None:
    """Return the product that a Softmax reads, seen through Reshapes and added constants; None if it is none."""

    def leads(node: ir.Node) -> tuple[int, ...] | None:
        if node.op_type == "Add" and node.domain == "":
            varying = tuple(i for i, value in enumerate(node.inputs) if analysis.constant(value) is None)
            return varying if len(varying) == 1 else ()
        return (0,) if node.op_type == "Reshape" and node.domain == "" else None

    end = next(makers(softmax.inputs[0], leads), None)
    return end if end is not None and end.node.op_type == "MatMul" and end.node.domain == "" else None


def makers(value: ir.Value | None, leads: Leads, most: int = MOST_STEPS) -> Iterator[End]:
    """Yield the operators that a value is made by, seen through those that lead on: depth first, each once."""
    waiting: list[tuple[ir.Value | None, int, tuple[Step, ...]]] = [(value, most, ())]
    seen = set[ir.Node]()
    while waiting:
        value, left, steps = waiting.pop()
        node = None if value is None else value.producer()
        if node is None or not left or node in seen:
            continue
        seen.add(node)
        positions = leads(node)
        if positions is None:
            yield End(node, 0, steps)
            continue
        further = [(operand(node, i), left - 1, (Step(node, i), *steps)) for i in positions]
        waiting += reversed(further)


def readers(value: ir.Value, leads: Leads, most: int = MOST_STEPS) -> Iterator[End]:
    """Yield the operators that read a value, seen through those that lead on: depth first.

    One that leads on and is reached twice is an end the second time.
    """
    waiting: list[tuple[ir.Node, int, int, tuple[Step, ...]]] = []
    seen = set[ir.Node]()

    def wait(value: ir.Value, left: int, steps: tuple[Step, ...]) -> None:
        waiting.extend((use.node, use.idx, left - 1, steps) for use in reversed(list(value.uses())) if left)

    wait(value, most, ())
    while waiting:
        node, position, left, steps = waiting.pop()
        positions = leads(node)
        if positions is None or position not in positions or node in seen:
            yield End(node, position, steps)
            continue
        seen.add(node)
        for output in reversed(node.outputs):
            wait(output, left, (*steps, Step(node, position)))
