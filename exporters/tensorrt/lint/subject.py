"""The model under lint, and what every rule asks of it."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from exporters.tensorrt.lint import external
from exporters.tensorrt.lint.element_types import is_onnx
from exporters.tensorrt.lint.inference import Inference, constant_tensor
from exporters.tensorrt.lint.operators import ONNX_DOMAINS, Operators, Version, operators
from models.errors import UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from exporters.rewrite.movement_ops import Array

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
    ) -> None:
        self.model = model
        self.version = version
        self.plugins = frozenset(plugins)
        self.profiled = frozenset(profiled)
        self.graph = model.graph
        self.opset = next((v for domain, v in model.opset_imports.items() if domain in ONNX_DOMAINS), 0)
        self.nodes = tuple(node for node in _all_nodes(model) if node.outputs)
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
                self._faults[tensor] = self._wrong_entries.get(tensor.name or "") or external.fault(tensor)
            return self._faults[tensor]
        return external.inline_fault(tensor)

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


def operand(node: ir.Node, position: int) -> ir.Value | None:
    """Return an operand, or None where it is absent."""
    return node.inputs[position] if position < len(node.inputs) else None


def load(path: Path) -> tuple[ir.Model, dict[str, str]]:
    """Read an ONNX file without its external data.

    Returns:
        The model, and what is wrong with external data entries, by tensor name.

    Raises:
        UsageError: no such file, or it is no ONNX file.
    """
    return from_message(read_message(path), path)


def read_message(path: Path) -> onnx.ModelProto:
    """Read an ONNX file as a message, without its external data.

    Raises:
        UsageError: no such file, or it is no ONNX file.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}", expected="an ONNX file")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's exceptions differ between its implementations
        raise UsageError(f"{path} is no ONNX file: {first_line(error)}", expected="an ONNX file") from error
    if not proto.HasField("graph") or not (proto.ir_version or proto.opset_import):
        raise UsageError(f"{path} is no ONNX file: it holds no graph", expected="an ONNX file")
    return proto


def from_message(proto: onnx.ModelProto, path: Path) -> tuple[ir.Model, dict[str, str]]:
    """Return the model in a message of a file, and what is wrong with external data entries, by tensor name.

    Raises:
        UsageError: the graph cannot be drawn.
    """
    wrong = external.repair_entries(proto)
    try:
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
    except Exception as error:  # a graph that cannot be drawn: a value with two producers, a type of no number
        raise UsageError(
            f"the graph in {path} cannot be read: {first_line(_root(error))}", expected="a valid ONNX graph"
        ) from error
    return model, wrong


def _all_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the nodes of a graph and of those inside it.

    Raises:
        UsageError: a body is missing, or a name is no text: the file holds bytes there.
    """
    try:
        nodes = list(model.graph.all_nodes())
        graphs = [model.graph, *model.graph.subgraphs()]
    except Exception as error:  # of the iterator's own making
        raise UsageError(f"the graph cannot be read: {first_line(error)}", expected="a valid ONNX graph") from error
    values = [v for graph in graphs for v in (*graph.inputs, *graph.initializers.values(), *graph.outputs)]
    values += [v for node in nodes for v in (*node.inputs, *node.outputs) if v is not None]
    names: list[object] = [model.graph.name, *model.opset_imports, *(value.name for value in values)]
    for node in nodes:
        names += [node.name, node.op_type, node.domain, *node.attributes]
    broken = next((name for name in names if not isinstance(name, str | None)), None)
    if broken is not None:
        raise UsageError(f"the graph cannot be read: the name {broken!r} is no text", expected="a valid ONNX graph")
    return nodes


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
            f"the model's functions cannot be inlined: {first_line(_root(error))}", expected="a valid ONNX model"
        ) from error
    return copy


@contextmanager
def quiet() -> Iterator[None]:
    """Reading a broken graph warns and logs; what is wrong with it is the report's to say."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
