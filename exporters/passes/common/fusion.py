"""What passes share that write one operator in place of several: its opset, and how arithmetic is read."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from deploycli.exporters.graph.builder import Builder
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.common.opset import raise_opset
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis


Found = TypeVar("Found")


class Fusion(GraphPass, Generic[Found]):
    """A pass that writes an operator, which old opsets lack, in place of several; `Found` is what it knows of these."""

    opset: ClassVar[int]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass; see the module's documentation."""
        self._model = model
        return super().call(model)

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        found = {node: read for node in graph if (read := self.read(node, analysis)) is not None}
        if not found:
            return False
        reason = raise_opset(self._model, self.opset)
        if reason is not None:
            self.remarks += [Remark(label(node), reason) for node in found]
            return False
        builder = Builder(graph, analysis)
        for node, read in found.items():
            self.write(node, read, builder)
        return True

    @abc.abstractmethod
    def read(self, node: ir.Node, analysis: Analysis) -> Found | None:
        """Read the operators around a node; None where they are not those."""

    @abc.abstractmethod
    def write(self, node: ir.Node, found: Found, builder: Builder) -> None:
        """Write the one operator in their place."""


def maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the operator of this type that makes a value, or None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def operand_of(value: ir.Value, op_type: str) -> ir.Value | None:
    """Return the first operand of the operator of this type that makes a value, or None."""
    node = maker(value, op_type)
    return None if node is None else node.inputs[0]


def single_number(value: ir.Value | None, analysis: Analysis, rank: int) -> float | None:
    """Return a constant of one element, and of no more axes than what it meets, to which it would add axes."""
    constant = analysis.constant(value)
    if constant is None or constant.size != 1 or constant.ndim > rank or constant.dtype.kind in "OSU":
        return None
    return float(constant.reshape(()))


def with_number(value: ir.Value, op_type: str, analysis: Analysis, rank: int) -> Iterator[tuple[ir.Value, float]]:
    """Yield the other operand and the number, where one of two operands is a number."""
    node = maker(value, op_type)
    if node is None:
        return
    for operand, other in (node.inputs, node.inputs[::-1]):
        number = single_number(other, analysis, rank)
        if operand is not None and number is not None:
            yield operand, number
