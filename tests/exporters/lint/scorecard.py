"""How far the lint agrees with NVIDIA's parser and builder: precision and recall of its errors on graphs whose verdicts
are recorded.

Usage::

    python -m tests.exporters.lint.scorecard [--write]

An error is right where the compiler refuses the graph, crashes or hangs. Errors that say that the engine will differ
from ONNX in silence claim no refusal and are counted apart.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.lint import lint
from tests.benchmarks.measure import Printed, write_block
from tests.exporters.lint.corpus import SEEN, SIZE, TARGETS, nodes, recorded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import onnx


@dataclass(frozen=True)
class Judged:
    """A graph, and whether NVIDIA's compiler refuses it."""

    name: str
    model: onnx.ModelProto
    refused: bool


@dataclass(frozen=True)
class Score:
    """What the lint says of a corpus.

    Attributes:
        graphs: how many there are.
        refused: how many of them the compiler refuses.
        false_alarms: names of those that it takes and the lint does not.
        missed: names of those that it refuses and the lint passes.
        silent: how many of the others have errors of the lint that claim no refusal.
    """

    graphs: int
    refused: int
    false_alarms: tuple[str, ...]
    missed: tuple[str, ...]
    silent: int

    @property
    def precision(self) -> float:
        """Share of the graphs with errors that the compiler refuses."""
        found = self.refused - len(self.missed)
        return found / max(found + len(self.false_alarms), 1)

    @property
    def recall(self) -> float:
        """Share of the refused graphs with errors."""
        return (self.refused - len(self.missed)) / max(self.refused, 1)


def score(corpus: Iterable[Judged]) -> Score:
    """Lint every graph of a corpus."""
    graphs = refused = silent = 0
    alarms, missed = list[str](), list[str]()
    for judged in corpus:
        errors = lint(ir.from_proto(judged.model), targets=TARGETS).errors
        claims = any(not error.silent for error in errors)
        graphs += 1
        refused += judged.refused
        silent += bool(errors) and not claims and not judged.refused
        if claims and not judged.refused:
            alarms.append(judged.name)
        elif judged.refused and not claims:
            missed.append(judged.name)
    return Score(graphs, refused, tuple(alarms), tuple(missed), silent)


def half(*, seen: bool) -> Iterable[Judged]:
    """Yield a half of the generated corpus."""
    for made, record in recorded(range(SEEN) if seen else range(SEEN, SIZE)):
        yield Judged(made.name, made.model, record.refused)


def half_of_nodes(*, seen: bool) -> Iterable[Judged]:
    """Yield a half of ONNX's own operator tests."""
    for made, record in nodes.recorded().judged:
        if nodes.is_seen(made) is seen:
            yield Judged(made.name, made.model, record.refused)


CORPORA: dict[str, Callable[[], Iterable[Judged]]] = {
    "generated graphs, looked at while the rules were mended": lambda: half(seen=True),
    "generated graphs, only counted": lambda: half(seen=False),
    "ONNX's operator tests, looked at": lambda: half_of_nodes(seen=True),
    "ONNX's operator tests, only counted": lambda: half_of_nodes(seen=False),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    write = parser.parse_args().write
    table = Printed()
    table.line("| corpus | graphs | refused by the compiler | precision | recall | silent differences |")
    table.line("|---|---|---|---|---|---|")
    for name, corpus in CORPORA.items():
        found = score(corpus())
        cells = (found.graphs, found.refused, f"{found.precision:.3f}", f"{found.recall:.3f}", found.silent)
        table.line(f"| {name} | {' | '.join(map(str, cells))} |")
    if write:
        write_block("scorecard", table)
    aside = nodes.recorded()
    print(
        f"\nNot counted: {len(aside.lacking)} operator tests of what RTX lacks, {len(aside.changed)} without a verdict"
    )


if __name__ == "__main__":
    main()
