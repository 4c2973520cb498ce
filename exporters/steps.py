"""The record of what was done to a graph: one Step a pass, with its refusals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Refusal:
    """One place where a pass could have acted and did not.

    Attributes:
        node: name of the node, which carries the PyTorch module path.
        reason: why the node was left as it is.
    """

    node: str
    reason: str


@dataclass(frozen=True)
class Step:
    """One step in the making of an artifact.

    Attributes:
        name: what ran, such as ``trace`` or ``fold-movement``.
        nodes: number of graph nodes after the step.
        seconds: wall time of the step.
        refusals: what the step left alone, and why.
    """

    name: str
    nodes: int
    seconds: float
    refusals: tuple[Refusal, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the step as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Step:
        """Rebuild a step from :meth:`to_json`."""
        refusals = tuple(Refusal(r["node"], r["reason"]) for r in data["refusals"])
        return cls(data["name"], data["nodes"], data["seconds"], refusals)
