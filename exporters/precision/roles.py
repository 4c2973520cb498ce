"""What an operator is to a transformer: patch embedding, head, second MLP layer, patch merging, attention.

Read from the graph, not from names, so that it holds for other people's models as well.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import onnx_ir as ir

from deploycli.exporters.graph.analysis import Analysis, dynamic_axes
from deploycli.exporters.graph.attention import is_read_in_place, joined, makers, readers
from deploycli.exporters.graph.movement_ops import MOVEMENT
from deploycli.exporters.graph.operators import ACTIVATIONS, ARITHMETIC, PRODUCTS, SOFTMAX

if TYPE_CHECKING:
    from deploycli.exporters.graph.attention import Attention

MOVES = frozenset({"Cast", *MOVEMENT})
"""Operators that move data, as far as a role is concerned."""

_ARITHMETIC = frozenset(ARITHMETIC)
_OF_SEVERAL = _ARITHMETIC | {"Concat", "Where"}
"""Operators all of whose operands are data."""
_ENDINGS = SOFTMAX | {"Sigmoid"}  # of a classifier that answers with probabilities
_PARTS_OF_ACTIVATIONS = frozenset({"Erf", "Sigmoid", "Tanh"})  # a GELU or SiLU that was written out


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
    """The stored matrix or kernel, operand 1, that a product multiplies an activation with.

    Attributes:
        axis: its axis of output channels.
        rows: input channels that are summed; of a grouped convolution, those of one group.
        columns: output channels; of a grouped convolution, those of one group.
    """

    axis: int
    rows: int
    columns: int


class Sizes(NamedTuple):
    """How large an attention is; None where that is not static.

    Attributes:
        queries: tokens that ask.
        keys: tokens that answer.
        head_size: channels of a head.
    """

    queries: int | None
    keys: int | None
    head_size: int | None


class Roles:
    """Answers what the operators of one graph are."""

    def __init__(self, graph: ir.Graph) -> None:
        self._analysis = Analysis(graph)

    def constants(self, node: ir.Node) -> tuple[int, ...]:
        """Return which of the two factors of a product do not depend on the graph's inputs."""
        return tuple(i for i, value in enumerate(node.inputs[:2]) if value is not None and not self._computed(value))

    def weight(self, node: ir.Node) -> Weight | str | None:
        """Return the weight of a product, or why it cannot be stored as INT8; None for a product of two activations."""
        constants = self.constants(node)
        if constants != (1,):
            reasons = {(): None, (0,): "its weight stands on the left", (0, 1): "it multiplies constants"}
            return reasons[constants]
        value = node.inputs[1]
        tensor = None if value is None else value.const_value
        if value is None or tensor is None or not value.is_initializer():
            return "its weight is computed, not stored: export without --no-rewrite"
        if tensor.dtype != ir.DataType.FLOAT:
            return f"its weight is {tensor.dtype.name}"
        shape = tuple(tensor.shape.numpy())
        if node.op_type == "Conv":
            return Weight(0, shape[1], shape[0] // node.attributes.get_int("group", 1))
        if len(shape) != 2:
            return f"its weight has {len(shape)} dimensions"
        if (node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)) != (1.0, 1.0):
            return "TensorRT makes FP32 constants of its alpha and beta"
        if node.attributes.get_int("transB", 0):
            return Weight(0, shape[1], shape[0])
        return Weight(1, shape[0], shape[1])

    def stage(self, node: ir.Node) -> Stage | None:
        """Return which named part of the network a product with a weight is."""
        weight = self.weight(node)
        if not isinstance(weight, Weight):
            return None
        source = node.inputs[0]
        pixels = self._origins(source, MOVES | _ARITHMETIC)  # perhaps normalised inside the graph
        if pixels and all(value.is_graph_input() for value in pixels):
            return Stage.PATCH_EMBED
        if self._leads_out(node.outputs[0]):
            return Stage.HEAD
        origins = self._origins(source, MOVES)
        if any(_is_activation(value.producer()) for value in origins):
            return Stage.MLP_FC2
        return Stage.PATCH_MERGING if self._merges(node, weight, origins) else None

    def projections(self, node: ir.Node) -> tuple[ir.Node, ...]:
        """Return the products that make one kernel with a product: its query, key and value, read in place.

        Empty where no attention reads the product in place, or where something else computes with the value too: that
        would have to be written in 8 bits and in another type. A part of it, such as the class token whose query is the
        only one, may be moved. The products, in the order in which they read their value.
        """
        source = node.inputs[0]
        readers_ = [] if source is None or source.is_graph_output() else dict.fromkeys(source.consumers())
        found = tuple(reader for reader in readers_ if self._is_projection(reader))
        is_read_by_others = any(reader not in found and reader.op_type not in MOVES for reader in readers_)
        return found if node in found and not is_read_by_others else ()

    def _is_projection(self, node: ir.Node) -> bool:
        return node.op_type == "MatMul" and self.constants(node) == (1,) and is_read_in_place(node, self._analysis)

    def ends_attention(self, node: ir.Node) -> bool:
        """Whether a product with a weight reads the heads of an attention, side by side."""
        makers_ = [value.producer() for value in self._origins(node.inputs[0], MOVES)]
        return bool(makers_) and all(maker is not None and self._multiplies_activations(maker) for maker in makers_)

    def attention(self, softmax: ir.Node) -> Attention | str:
        """Return the attention around a Softmax, or why there is none."""
        source, result = softmax.inputs[0], softmax.outputs[0]
        above = [end for end in makers(source, self._leads_to_scores) if self._multiplies_activations(end.node)]
        if len(above) != 1:
            return f"no attention: it reads {len(above)} products of two activations"
        below = list(readers(result, _leads_from_probabilities))
        if len(below) != 1 or not self._multiplies_activations(below[0].node):
            return "no attention: its result is not read by one product of two activations alone"
        shape = self._analysis.dims(source)
        axis = softmax.attributes.get_int("axis", -1)
        if axis != -1 and (shape is None or axis != len(shape) - 1):
            return f"its axis is {axis}; the keys of a fused attention are on the last one"
        return joined(above[0], softmax, below[0])

    def sizes(self, attention: Attention) -> Sizes:
        """Return how large an attention is."""
        scores = attention.softmax.inputs[0]
        return Sizes(self._size(scores, -2), self._size(scores, -1), self._size(attention.operands[0], -1))

    def residual_branch(self, node: ir.Node) -> int | None:
        """Return the operand of an addition that comes from a product, where the other is the stream it joins."""
        operands = [value for value in node.inputs if value is not None and self._computed(value)]
        if len(operands) != 2 or self._analysis.dims(operands[0]) != self._analysis.dims(operands[1]):
            return None
        paths = [self._path(value) for value in operands]
        found = [i for i, path in enumerate(paths) if path]
        if len(found) == 2:  # the stream ends in one too, such as a patch merging: it is what others read as well
            found = [i for i in found if all(len(value.uses()) == 1 for value in paths[i])]
        return found[0] if len(found) == 1 else None

    def _leads_to_scores(self, node: ir.Node) -> tuple[int, ...] | None:
        """Return the operands of arithmetic and movement that are computed."""
        if node.op_type not in MOVES | _ARITHMETIC | {"Where"}:
            return None
        count = len(node.inputs) if node.op_type in _OF_SEVERAL else 1
        return tuple(i for i, value in enumerate(node.inputs[:count]) if value is not None and self._computed(value))

    def _multiplies_activations(self, node: ir.Node) -> bool:
        return node.op_type == "MatMul" and not self.constants(node)

    def _origins(self, value: ir.Value | None, through: frozenset[str]) -> list[ir.Value]:
        """Return the values that a value is made of by these operators; constants are left out."""
        found: list[ir.Value] = []
        waiting, seen = [value], {value}
        while waiting:
            value = waiting.pop()
            if value is None or not self._computed(value):
                continue
            node = value.producer()
            if node is None or node.op_type not in through:
                found.append(value)
                continue
            operands = node.inputs if node.op_type in _OF_SEVERAL else node.inputs[:1]
            waiting += [operand for operand in operands if operand not in seen]
            seen.update(operands)
        return found

    def _leads_out(self, value: ir.Value) -> bool:
        """Whether all that follows a value is arithmetic of single elements up to the graph's outputs.

        What it meets there leads nowhere else either: the logits of two heads are averaged, but what is added to the
        residual stream of a backbone is no head.
        """
        readers = value.consumers()
        if not readers:
            return value.is_graph_output()
        for reader in readers:
            if reader.op_type not in MOVES | _ARITHMETIC | _ENDINGS:
                return False
            others = [v for v in reader.inputs if v is not None and v is not value and self._computed(v)]
            if reader.op_type in _ARITHMETIC and any(len(v.uses()) > 1 for v in others):
                return False
        return all(self._leads_out(output) for reader in readers for output in reader.outputs)

    def _merges(self, node: ir.Node, weight: Weight, origins: list[ir.Value]) -> bool:
        """Whether a product makes one token of several, perhaps of their normalisation."""
        if node.op_type == "Conv":
            return max(node.attributes.get_ints("strides", (1,))) > 1
        if weight.columns >= weight.rows:
            return False
        for value in origins:
            producer = value.producer()
            normed = producer is not None and producer.op_type == "LayerNormalization"
            for token in self._origins(producer.inputs[0], MOVES) if producer is not None and normed else [value]:
                maker = token.producer()
                # The heads of an attention come together in the same way.
                is_mix = maker is not None and maker.op_type == "MatMul" and not self.constants(maker)
                size = self._size(token, -1)
                if not is_mix and size is not None and size < weight.rows:
                    return True
        return False

    def _path(self, value: ir.Value) -> list[ir.Value]:
        """Return the values from this one back to a product with a weight, over bias, layer scale and movement.

        Empty where it is made of anything else.
        """
        path = [value]
        while (node := path[-1].producer()) is not None:
            if node.op_type in PRODUCTS:
                return path if self.constants(node) == (1,) else []
            operands = [v for v in node.inputs if v is not None and self._computed(v)]
            if node.op_type not in MOVES | _ARITHMETIC or len(operands) != 1:
                return []
            path.append(operands[0])
        return []

    def _computed(self, value: ir.Value) -> bool:
        return self._analysis.constant(value) is None

    def _size(self, value: ir.Value | None, axis: int) -> int | None:
        """Return the length of an axis, or None where it is not static."""
        dims = self._analysis.dims(value)
        if dims is None or len(dims) < -axis or len(dims) + axis in dynamic_axes(dims):
            return None
        return dims[axis]


def _leads_from_probabilities(node: ir.Node) -> range | None:
    return range(len(node.inputs)) if node.op_type in MOVES else None


def _is_activation(node: ir.Node | None) -> bool:
    if node is None:
        return False
    if node.op_type in ACTIVATIONS - _PARTS_OF_ACTIVATIONS:
        return True
    if node.op_type != "Mul":
        return False
    near = [node]
    for _ in range(3):  # x * 0.5 * (1 + erf(x / sqrt(2)))
        operands = [value for n in near if n.op_type in _ARITHMETIC for value in n.inputs if value is not None]
        near = [producer for value in operands if (producer := value.producer()) is not None]
        if any(n.op_type in _PARTS_OF_ACTIVATIONS for n in near):
            return True
    return False
