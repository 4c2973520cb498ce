"""What all passes of this package share: the analysis they read, and the remarks they record."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.graph.analysis import Analysis

if TYPE_CHECKING:
    from deploycli.exporters.graph.steps import Remark


class GraphPass(ir.passes.InPlacePass, abc.ABC):
    """A pass over the main graph of a model.

    Args:
        analysis: what is known of the graph, kept up to date from pass to pass; by default it is inferred anew.

    Attributes:
        remarks: where the last run could have acted and did not.
    """

    def __init__(self, analysis: Analysis | None = None) -> None:
        super().__init__()
        self._analysis = analysis
        self.remarks: list[Remark] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass; see the documentation of its module."""
        self.remarks = []
        modified = self.transform(model.graph, self._analysis or Analysis(model.graph))
        return ir.passes.PassResult(model, modified)

    @abc.abstractmethod
    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Change the graph in place; return whether anything changed."""
