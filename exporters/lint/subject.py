"""The model under lint, and what every rule asks of it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploycli.exporters.graph.onnx_file import external_fault, inline_fault, root_of
from deploycli.exporters.graph.operators import is_onnx, opset
from deploycli.exporters.lint.inference import Inference, constant_tensor
from deploycli.exporters.lint.operators import Operators, Version, operators
from deploycli.models.errors import UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

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
