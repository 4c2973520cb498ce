"""The generated corpus: graphs by number, each the same wherever it is made.

The first half may be looked at while the lint is mended; the other half is only counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.exporters.lint.corpus.draft import Draft
from tests.exporters.lint.corpus.recipes import BASIC
from tests.exporters.lint.corpus.recipes_graphs import GRAPHS
from tests.exporters.lint.corpus.recipes_quantized import QUANTIZED
from tests.exporters.lint.corpus.records import FILE, Records

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx

    from deploycli.exporters.target.targets import Capability
    from tests.exporters.lint.corpus.records import Record

SEED = "2026"

SIZE = 3200

SEEN = SIZE // 2
"""So many, the first ones, may be looked at."""

TARGETS: tuple[Capability, ...] = ((12, 0),)
"""What is compiled for: a GPU that computes every type. What others lack is rule 20's, and is tested apart."""

RECIPES = {**BASIC, **QUANTIZED, **GRAPHS}


@dataclass(frozen=True)
class Sample:
    """One graph.

    Attributes:
        index: its number.
        name: what it is about.
        model: the graph.
    """

    index: int
    name: str
    model: onnx.ModelProto


def sample(index: int, seed: str = SEED) -> Sample:
    """Make a graph."""
    draft = Draft(f"{seed}.{index}")
    recipe = draft.pick(RECIPES)
    recipe(draft)
    words = [recipe.__name__.strip("_"), *draft.tags]
    return Sample(index, f"{index:04} {'-'.join(words)}", draft.model())


def recorded(indices: Iterable[int] = range(SIZE)) -> Iterator[tuple[Sample, Record]]:
    """Yield graphs with their verdicts, by default all.

    Raises:
        LookupError: the verdict is on another graph, or there is none: record anew.
    """
    records = Records.load(FILE)
    for index in indices:
        made = sample(index)
        record = records.of(made)
        if record is None:
            raise LookupError(f"no verdict on {made.name}: python -m {__name__} --record")
        yield made, record
