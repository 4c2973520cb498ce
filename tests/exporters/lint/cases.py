"""What a case is: a graph that breaks one rule, and the same graph put right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.exporters.lint.texts import Graph


@dataclass(frozen=True)
class Case:
    """A broken graph.

    Attributes:
        name: what is wrong with it.
        rule: the rule that must say so.
        bad: the graph.
        good: its twin, of which no rule says anything; None where there is no such twin.
        says: part of the message.
        level: of the finding.
        also: other rules that speak of the same thing.
    """

    name: str
    rule: int
    bad: Graph
    good: Graph | None
    says: str
    level: str = "error"
    also: frozenset[int] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return f"{self.rule}: {self.name}"


def warns(name: str, rule: int, bad: Graph, good: Graph | None, says: str, *also: int) -> Case:
    return Case(name, rule, bad, good, says, "warning", frozenset(also))


def fails(name: str, rule: int, bad: Graph, good: Graph | None, says: str, *also: int) -> Case:
    return Case(name, rule, bad, good, says, "error", frozenset(also))
