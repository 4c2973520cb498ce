"""The record of what was done to a graph: one Step a pass, with its remarks and what the graph costs after it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from msgspec import Meta

from deploycli.models.codec import Count


@dataclass(frozen=True)
class Remark:
    """One place where a pass could have acted and did not.

    Attributes:
        node: name of the node, which carries the PyTorch module path.
        reason: why the node was left as it is.
    """

    node: str
    reason: str


@dataclass(frozen=True)
class GraphCost:
    """What a graph costs to run on one sample, and to keep. `deploycli.exporters.graph.cost` says how it is counted.

    Attributes:
        movement_bytes: bytes written by the operators that copy; None where a shape is not known.
        multiply_adds: of products and convolutions; None where a shape, or what an operator computes, is not known.
        constant_bytes: of all stored tensors.
    """

    movement_bytes: Count | None
    multiply_adds: Count | None
    constant_bytes: Count


@dataclass(frozen=True)
class KernelFigures:
    """What TensorRT is predicted to make of a graph. `deploycli.exporters.graph.kernels` says how.

    Attributes:
        launches: kernels that run, one after another.
        moved_bytes: activations that they read and write for one sample.
        attentions: kernels that compute a whole attention.
    """

    launches: Count
    moved_bytes: Count
    attentions: Count

    def __str__(self) -> str:
        return f"{self.launches} launches, {self.moved_bytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class Step:
    """One step in the making of an artifact.

    Attributes:
        name: what ran, such as ``trace`` or ``fold-movement``.
        nodes: number of graph nodes after the step.
        seconds: wall time of the step.
        refusals: remarks on what the step left alone, and why.
        cost: what the graph costs after the step; None where it was not counted.
        remark: why passes could not act on the graph as a whole, or on large parts of it; empty where they could.

    Older manifests have no costs, or no remarks.
    """

    name: str
    nodes: Count
    seconds: Annotated[float, Meta(ge=0)]
    refusals: tuple[Remark, ...] = ()
    cost: GraphCost | None = None
    remark: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the step as JSON values."""
        return asdict(self)
