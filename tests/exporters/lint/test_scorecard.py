"""The lint's agreement with NVIDIA's compiler, and the verdicts that it is measured by."""

from __future__ import annotations

import importlib.util
import random
from typing import TYPE_CHECKING

import pytest

from deploycli.exporters.target.product import RTX
from deploycli.exporters.tensorrt import library
from tests.exporters.lint.corpus import SIZE, TARGETS, nodes, recorded, sample
from tests.exporters.lint.corpus.records import FILE, Records, digest_of
from tests.exporters.lint.judge import Judge
from tests.exporters.lint.rtx import WHY
from tests.exporters.lint.scorecard import half, half_of_nodes, score

if TYPE_CHECKING:
    from pathlib import Path

_LIVE = 15
"""Graphs that are judged anew."""


@pytest.mark.parametrize("seen", [True, False])
def test_the_lint_agrees_with_the_compiler(seen: bool) -> None:
    found = score(half(seen=seen))
    assert found.graphs == SIZE // 2
    assert found.refused > found.graphs // 4
    if seen:
        assert (found.false_alarms, found.missed) == ((), ())
    assert found.precision >= 0.99, "of the unseen half only numbers are shown"
    assert found.recall >= 0.97, "of the unseen half only numbers are shown"


@pytest.mark.parametrize("seen", [True, False])
def test_the_lint_agrees_with_the_compiler_on_onnx_own_tests(seen: bool) -> None:
    known = nodes.recorded()
    if len(known.changed) > len(nodes.samples()) // 4:
        pytest.skip(f"{len(known.changed)} of {len(nodes.samples())} graphs are others in this version of onnx")
    found = score(half_of_nodes(seen=seen))
    shown = (found.false_alarms, found.missed) if seen else "of the unseen half only numbers are shown"
    assert found.refused > found.graphs // 4
    assert found.precision >= 0.98, shown
    assert found.recall >= 0.98, shown


def test_what_is_left_out_is_refused() -> None:
    assert all(record.refused for _, record in nodes.recorded().lacking)


def test_graphs_are_the_same_wherever_they_are_made() -> None:
    chosen = range(0, SIZE, 97)
    assert [digest_of(sample(i).model) for i in chosen] == [digest_of(sample(i).model) for i in chosen]
    assert len({digest_of(sample(i).model) for i in chosen}) == len(chosen)


def test_a_stale_record_is_noticed() -> None:
    made = next(iter(recorded()))[0]
    records = Records.load(FILE)
    assert records.of(made) is not None
    made.model.graph.node[0].op_type = "Other"
    assert records.of(made) is None


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)
@pytest.mark.parametrize("corpus", ["generated", "nodes"])
def test_the_compiler_says_what_is_recorded(corpus: str) -> None:
    file: Path = FILE if corpus == "generated" else nodes.FILE
    if Records.load(file).library != library.version(RTX):
        pytest.skip("the verdicts are those of another version")
    if corpus == "generated":
        sampled = list(recorded(random.sample(range(SIZE), _LIVE)))
    else:
        known = nodes.recorded()
        graphs = [*known.judged, *known.lacking]
        sampled = random.sample(graphs, min(_LIVE, len(graphs)))
    with Judge(TARGETS) as judge:
        said = {made.name: judge(made.model).kind for made, _ in sampled}
    assert said == {made.name: record.kind for made, record in sampled}
