"""What NVIDIA's own parser says of a graph, beside the rules: `deploycli.exporters.tensorrt.parser` asks it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MOST_REFUSALS = 20
"""Errors of the parser that are kept; it gives one for every node that its checks refuse."""


@dataclass(frozen=True)
class Refusal:
    """One error of the parser.

    Attributes:
        node: name of the node in the file; empty where it has none, or the graph as a whole is refused. Where the
            parser does not say on which node it fails, it is the one that it was reading, by the parser's own name
            ``node_of_<result>`` where it has none.
        index: its place in the order in which the parser reads the graph; -1 where that is not said.
        operator: its operator, or empty.
        message: the parser's words, on one line.
        code: its error code, such as ``UNSUPPORTED_NODE``; empty where the parser calls it no error.
        inside: functions and inner graphs that the node is in, outermost first.
    """

    node: str
    index: int
    operator: str
    message: str
    code: str = ""
    inside: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """What is refused: the node and its operator."""
        if not self.operator:
            return "the graph"
        place = f" {self.index}" if self.index >= 0 else ""
        name = f" {self.node!r}" if self.node else ""
        return f"node{place}{name} ({self.operator})" + "".join(f" in {outer}" for outer in reversed(self.inside))

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f" [{self.code}]" if self.code else "")


def shown(refusals: Collection[Refusal], more: int) -> list[str]:
    """Return the parser's errors for people, one a line."""
    return [*map(str, refusals), *([f"and {more} more"] if more else [])]


@dataclass(frozen=True)
class Verdict:
    """What the parser says of a file: it takes it, it refuses it, or there is a reason why nothing is known.

    Attributes:
        judge: whose parser, with its version where that is known.
        refusals: its errors, at most `MOST_REFUSALS`; none where it takes the file.
        more: how many errors there are beside them.
        lacking: operators that it refuses since TensorRT for RTX lacks them, and that TensorRT, or a plugin of the
            user's, has: neither they nor what comes after them are judged.
        problem: why there is no verdict; empty where there is one.
    """

    judge: str
    refusals: tuple[Refusal, ...] = ()
    more: int = 0
    lacking: tuple[str, ...] = ()
    problem: str = ""

    @property
    def is_taken(self) -> bool:
        """Whether the parser takes the file."""
        return not (self.refusals or self.lacking or self.problem)

    def excusing(self, operators: Collection[str]) -> Verdict:
        """Return the verdict in which it is no fault of the file that some operators are refused."""
        left = tuple(refusal for refusal in self.refusals if refusal.operator not in operators)
        lacking = {refusal.operator for refusal in self.refusals} & set(operators)
        return replace(self, refusals=left, lacking=tuple(sorted(lacking)))

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON values; ``taken`` is null where there is none."""
        taken = None if self.problem or (self.lacking and not self.refusals) else self.is_taken
        return {**asdict(self), "taken": taken}


Parser = Callable[[Path], AbstractContextManager[Callable[[], Verdict]]]
"""Lets a parser begin to read a file; the context yields what waits for its verdict."""
