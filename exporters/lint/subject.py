"""The model under lint, and what every rule asks of it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploycli.exporters.graph.attention import find_attention
from deploycli.exporters.graph.onnx_file import external_fault, inline_fault, root_of
from deploycli.exporters.graph.operators import ARITHMETIC, QDQ, VIEWS, is_onnx, operand, opset
from deploycli.exporters.graph.shapes import BATCH
from deploycli.exporters.lint.inference import Inference, constant_tensor
from deploycli.exporters.lint.versions import Operators, Version, operators
from deploycli.models.errors import UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from deploycli.exporters.graph.attention import Attention
    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.target.targets import Capability


CHUNK = 1 << 22
"""A large tensor is looked at in pieces of this many elements."""


class Subject:
    """A model under lint.

    Args:
        model: the model; it is not changed.
        version: TensorRT version.
        plugins: names of operators that the engine will find as plugins.
        profiled: symbolic axes beside the batch for which an optimization profile will exist.
        wrong_entries: tensor name -> what is wrong with its external data entry, as far as it is known already.
        targets: compute capabilities of the GPUs that the engine is for; empty where that is not known.

    Attributes:
        graph: its main graph.
        name: what to call the graph in a message.
        opset: version of the ONNX operator set; 0 where none is declared.
        nodes: all nodes, those of inner graphs too; none without a result, of which rule 12 speaks.
    """

    def __init__(
        self,
        model: ir.Model,
        version: Version,
        *,
        plugins: Collection[str] = (),
        profiled: Collection[str] = (),
        wrong_entries: dict[str, str] | None = None,
        targets: Sequence[Capability] = (),
    ) -> None:
        self.model = model
        self.version = version
        self.plugins = frozenset(plugins)
        self.profiled = frozenset(profiled)
        self.targets = tuple(targets)
        self.graph = model.graph
        self.opset = opset(model.opset_imports)
        self.nodes = tuple(node for node in model.graph.all_nodes() if node.outputs)
        self.name = model.graph.name or "graph"
        self._wrong_entries = wrong_entries or {}
        self._faults: dict[ir.ExternalTensor, str | None] = {}  # looking at a file takes time

    @property
    def operators(self) -> Operators:
        """What the TensorRT version supports."""
        return operators(self.version)

    @cached_property
    def inference(self) -> Inference:
        """Types, shapes and small values."""
        return Inference(self.graph, self.opset, self.read)

    @cached_property
    def tensors(self) -> tuple[tuple[str, ir.TensorProtocol], ...]:
        """Every stored tensor with its name: initializers and the contents of Constant nodes, inner graphs too."""
        found = []
        for graph in (self.graph, *self.graph.subgraphs()):
            found += [(name, v.const_value) for name, v in graph.initializers.items() if v.const_value is not None]
        for node in self.nodes:
            tensor = constant_tensor(node) if is_onnx(node, "Constant") else None
            if tensor is not None:
                found.append((node.outputs[0].name or node.name or "", tensor))
        return tuple(found)

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention blocks, in the order of the graph: MatMul, additions, Softmax, MatMul, and Casts and Q/DQ pairs
        among them.
        """

        def leads(node: ir.Node) -> Iterable[int] | None:
            return _leading(node, self) if is_onnx(node, *_BETWEEN) and node.outputs else None

        def is_product(node: ir.Node) -> bool:
            return is_onnx(node, *_PRODUCTS) and _multiplies_values(node, self)

        softmaxes = [node for node in self.nodes if is_onnx(node, "Softmax") and node.inputs]
        found = [find_attention(softmax, leads, is_product, _MOST_STEPS) for softmax in softmaxes]
        return tuple(attention for attention in found if attention is not None)

    def fault(self, tensor: ir.TensorProtocol) -> str | None:
        """Say why the data of a tensor cannot be read, or must not be; None where they can."""
        if isinstance(tensor, ir.ExternalTensor):
            if tensor not in self._faults:
                self._faults[tensor] = self._wrong_entries.get(tensor.name or "") or external_fault(tensor)
            return self._faults[tensor]
        return inline_fault(tensor)

    def read(self, tensor: ir.TensorProtocol) -> Array | None:
        """Return the data of a tensor, or None where they cannot be read or must not be."""
        if self.fault(tensor) is not None:
            return None
        try:
            array = tensor.numpy()
        except Exception:  # the data may be missing, short or of a type that numpy lacks
            return None
        return array if isinstance(array, np.ndarray) else None

    def stored(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """Return the tensor of an initializer or of a Constant node, seen through Identity; None for all else."""
        for _ in range(8):  # a chain of Identities may be a circle
            if value is None:
                return None
            if value.const_value is not None:
                return value.const_value
            node = value.producer()
            if node is None or not is_onnx(node, "Constant", "Identity"):
                return None
            if node.op_type == "Constant":
                return constant_tensor(node)
            value = node.inputs[0] if node.inputs else None
        return None

    def constant(self, value: ir.Value | None) -> Array | None:
        """Return the data of an initializer or of a Constant node; None for all else."""
        tensor = self.stored(value)
        return None if tensor is None else self.read(tensor)


def pieces(array: Array) -> Iterator[Array]:
    """Yield an array flat, in pieces of :data:`CHUNK` elements."""
    flat = array.reshape(-1)
    for start in range(0, max(flat.size, 1), CHUNK):
        yield flat[start : start + CHUNK]


def inlined(model: ir.Model) -> ir.Model:
    """Return the model without functions, as TensorRT's parser sees it; the model itself is not changed.

    Raises:
        UsageError: the functions call each other in a circle.
    """
    if not model.functions:
        return model
    try:
        copy = model.clone()
        common.InlinePass()(copy)
    except Exception as error:  # of the pass's own making
        raise UsageError(
            f"the model's functions cannot be inlined: {first_line(root_of(error))}", expected="a valid ONNX model"
        ) from error
    return copy


MOVES = VIEWS | {"Expand", "Gather", "Slice", "Split", "Transpose"}
"""Operators that move data and that TensorRT commutes with Q/DQ."""

_OF_TWO = frozenset({*ARITHMETIC, "Max", "Min"})
_BETWEEN = MOVES | _OF_TWO | {"Cast", "Clip", "Dropout", "Pow", "Tanh", "Where", *QDQ}
"""Operators that a search for the other end of an attention passes."""

_PRODUCTS = ("Einsum", "MatMul")

_MOST_STEPS = 14
"""Operators between two ends of an attention: a shifted window with Casts and Q/DQ has eight."""


def _multiplies_values(node: ir.Node, subject: Subject) -> bool:
    return len(node.inputs) == 2 and bool(node.outputs) and not any(is_weight(value, subject) for value in node.inputs)


def _leading(node: ir.Node, subject: Subject) -> tuple[int, ...]:
    """Return the operands through which an attention may lead."""
    if node.op_type == "Where":
        return (1, 2)
    if node.op_type in _OF_TWO:
        return tuple(i for i, value in enumerate(node.inputs) if not is_weight(value, subject))
    return (0,)


def is_weight(value: ir.Value | None, subject: Subject) -> bool:
    """Say whether a value is stored, or is a stored one that was quantized, dequantized, cast or moved."""
    for _ in range(_MOST_STEPS):
        if value is None:
            return False
        if subject.stored(value) is not None:
            return True
        node = value.producer()
        if node is None or not is_onnx(node, "Cast", *QDQ, *MOVES) or not node.inputs:
            return False
        value = node.inputs[0]
    return False


def made_by(value: ir.Value | None, *through: str) -> ir.Node | None:
    """Return the operator that makes a value, seen through data movement and through the operators named."""
    for _ in range(_MOST_STEPS):
        node = None if value is None else value.producer()
        if node is None or not is_onnx(node, *MOVES, *through) or not node.inputs:
            return node
        value = node.inputs[0]
    return None


def dequantized(value: ir.Value | None) -> ir.Node | None:
    """Return the DQ that a value comes from, seen through data movement; None where it is not quantized."""
    node = made_by(value)
    return node if node is not None and is_onnx(node, "DequantizeLinear") else None


def quantized_type(value: ir.Value | None, subject: Subject) -> ir.DataType | None:
    """Return the type in which a dequantized value was stored; None where it is not quantized."""
    node = dequantized(value)
    return None if node is None else subject.inference.dtype(operand(node, 0))


def requantized(value: ir.Value) -> bool:
    """Say whether a Q reads a value, seen through data movement."""
    for _ in range(_MOST_STEPS):
        readers = value.consumers()
        if any(is_onnx(reader, "QuantizeLinear") for reader in readers):
            return True
        if len(readers) != 1 or not is_onnx(readers[0], *MOVES) or not readers[0].outputs:
            return False
        value = readers[0].outputs[0]
    return False


def is_fixed(dim: int) -> bool:
    """Say whether a dimension does not grow with the batch."""
    return dim < BATCH or dim % BATCH != 0
