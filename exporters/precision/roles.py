"""What an operator is to a transformer: patch embedding, head, second MLP layer, patch merging, attention.

Read from the graph, not from names, so that it holds for other people's models as well.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporters.rewrite.facts import Facts

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

MOVES = frozenset(
    {
        "Cast",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that move data, as far as the networks here use them."""

_PRODUCTS = frozenset({"Conv", "Einsum", "Gemm", "MatMul"})
_ACTIVATIONS = frozenset(
    {"Celu", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Selu", "Swish"}
)
_PARTS_OF_ACTIVATIONS = frozenset({"Erf", "Sigmoid", "Tanh"})  # a GELU or SiLU that was written out
_ELEMENTWISE = frozenset({"Add", "Div", "Mul", "Sub"})


class Stage(str, enum.Enum):
    """A named part of the network.

    Sources: FasterTransformer, swin_guide (the second MLP layer and the patch merging of large Swin models lose most in
    INT8); NVIDIA Model Optimizer (patch embeddings and heads are left alone).
    """

    PATCH_EMBED = "patch-embed"
    HEAD = "head"
    MLP_FC2 = "mlp.fc2"
    PATCH_MERGING = "patch-merging"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Weight:
    """The constant operand of a product.

    Attributes:
        position: which operand.
        axis: its axis of output channels.
        rows: length of the summed axis.
        columns: number of output channels.
    """

    position: int
    axis: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Attention:
    """Softmax(q k^T + bias) v.

    Attributes:
        scores: the product of queries and keys.
        mix: the product of probabilities and values.
        probability: operand position of the probabilities in the latter.
        queries: tokens that ask, or None where that is not static.
        keys: tokens that answer.
        head_size: channels of a head.
    """

    scores: ir.Node
    mix: ir.Node
    probability: int
    queries: int | None
    keys: int | None
    head_size: int | None


class Roles:
    """Answers what the operators of one graph are."""

    def __init__(self, graph: ir.Graph) -> None:
        self._facts = Facts(graph)

    def weight(self, node: ir.Node) -> Weight | None:
        """Return the constant operand of a product; None where both are activations, or it is not understood."""
        for position in (1, 0):
            if len(node.inputs) <= position:
                continue
            value = node.inputs[position]
            if value is None or value.const_value is None or value.is_graph_input():
                continue
            shape = value.const_value.shape.numpy()
            if node.op_type == "Conv":
                group = node.attributes.get_int("group", 1)
                return Weight(position, 0, shape[1] * group, shape[0]) if position == 1 and group == 1 else None
            if len(shape) != 2:
                continue
            rows_first = node.op_type == "MatMul" or not node.attributes.get_int("transB", 0)
            rows, columns = shape if rows_first else shape[::-1]
            return Weight(position, int(rows_first), rows, columns)
        return None

    def stage(self, node: ir.Node) -> Stage | None:
        """Return which named part of the network a product with a weight is."""
        weight = self.weight(node)
        if weight is None:
            return None
        source = node.inputs[1 - weight.position]
        origins = list(_origins(source)) if source is not None else []
        if origins and all(value.is_graph_input() for value in origins):
            return Stage.PATCH_EMBED
        if _leads_out(node):
            return Stage.HEAD
        if any(_is_activation(value.producer()) for value in origins):
            return Stage.MLP_FC2
        normalised = any((p := value.producer()) is not None and p.op_type == "LayerNormalization" for value in origins)
        if node.op_type == "Conv" or (normalised and weight.columns < weight.rows):
            return Stage.PATCH_MERGING
        return None

    def attention(self, softmax: ir.Node) -> Attention | None:
        """Return the attention around a Softmax, where there is one."""
        scores = self._scores(softmax.inputs[0])
        mixes = list(_readers(softmax.outputs[0]))
        if scores is None or len(mixes) != 1:
            return None
        mix, probability = mixes[0]
        if mix.op_type != "MatMul" or self.weight(mix) is not None:
            return None
        query, mixed = self._facts.dims(scores.inputs[0]), self._facts.dims(mix.inputs[probability])
        if query is None or mixed is None or len(query) < 2:
            return Attention(scores, mix, probability, None, None, None)
        return Attention(scores, mix, probability, query[-2], mixed[-1], query[-1])

    def _scores(self, value: ir.Value | None) -> ir.Node | None:
        """Return the product of two activations that a Softmax reads, through bias, mask and scale."""
        while value is not None and (node := value.producer()) is not None:
            if node.op_type == "MatMul":
                return node if self.weight(node) is None else None
            if node.op_type in _ELEMENTWISE or node.op_type == "Where":
                value = next((v for v in node.inputs if v is not None and self._computed(v)), None)
            elif node.op_type in MOVES:
                value = node.inputs[0]
            else:
                return None
        return None

    def residual_branch(self, node: ir.Node) -> int | None:
        """Return the operand of an addition that comes from a product, where the other is the stream it joins."""
        operands = [value for value in node.inputs if value is not None and self._computed(value)]
        if len(operands) != 2 or self._facts.dims(operands[0]) != self._facts.dims(operands[1]):
            return None
        branches = [i for i, value in enumerate(operands) if self._ends_in_product(value)]
        return branches[0] if len(branches) == 1 else None

    def _ends_in_product(self, value: ir.Value) -> bool:
        """Whether a value is a product with a weight, up to bias, layer scale and movement."""
        node = value.producer()
        if node is None:
            return False
        if node.op_type in _PRODUCTS:
            return self.weight(node) is not None
        operands = [v for v in node.inputs if v is not None and self._computed(v)]
        through = node.op_type in MOVES or node.op_type in _ELEMENTWISE
        return through and len(operands) == 1 and self._ends_in_product(operands[0])

    def _computed(self, value: ir.Value) -> bool:
        return self._facts.constant(value) is None


def _origins(value: ir.Value) -> Iterator[ir.Value]:
    """Yield the values that a value holds the elements of: movement is looked through, constants are left out."""
    node = value.producer()
    if node is None or node.op_type not in MOVES:
        if value.const_value is None or value.is_graph_input():
            yield value
        return
    for operand in node.inputs if node.op_type == "Concat" else node.inputs[:1]:
        if operand is not None:
            yield from _origins(operand)


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield the operators that read a value, and at which position; movement is looked through."""
    for node, position in value.uses():
        if node.op_type in MOVES:
            for output in node.outputs:
                yield from _readers(output)
        else:
            yield node, position


def _leads_out(node: ir.Node) -> bool:
    """Whether all that follows a product is arithmetic of single elements, up to the graph's outputs."""
    for output in node.outputs:
        if output.is_graph_output():
            continue
        readers = output.consumers()
        if not readers or any(r.op_type not in MOVES | _ELEMENTWISE or not _leads_out(r) for r in readers):
            return False
    return True


def _is_activation(node: ir.Node | None) -> bool:
    if node is None:
        return False
    if node.op_type in _ACTIVATIONS:
        return True
    if node.op_type != "Mul":
        return False
    near = [node]
    for _ in range(3):  # x * 0.5 * (1 + erf(x / sqrt(2)))
        operands = [value for n in near if n.op_type in _ELEMENTWISE for value in n.inputs if value is not None]
        near = [producer for value in operands if (producer := value.producer()) is not None]
        if any(n.op_type in _PARTS_OF_ACTIVATIONS for n in near):
            return True
    return False
