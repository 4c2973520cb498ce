"""What all passes of this package share: the facts they read, and the refusals they record."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.graph.analysis import Facts

if TYPE_CHECKING:
    from deploycli.exporters.graph.steps import Refusal


class GraphPass(ir.passes.InPlacePass, abc.ABC):
    """A pass over the main graph of a model.

    Args:
        facts: what is known of the graph, kept up to date from pass to pass; by default it is inferred anew.

    Attributes:
        refusals: where the last run could have acted and did not.
    """

    def __init__(self, facts: Facts | None = None) -> None:
        super().__init__()
        self._facts = facts
        self.refusals: list[Refusal] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass; see the documentation of its module."""
        self.refusals = []
        modified = self.transform(model.graph, self._facts or Facts(model.graph))
        return ir.passes.PassResult(model, modified)

    @abc.abstractmethod
    def transform(self, graph: ir.Graph, facts: Facts) -> bool:
        """Change the graph in place; return whether anything changed."""
