"""Rule 16 against what the compiler does: attentions in many forms, and verdicts that were recorded once."""

from __future__ import annotations

import importlib.util
import os
import random
from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

from deploycli.exporters.lint import lint
from deploycli.exporters.target.product import RTX
from deploycli.exporters.tensorrt import library
from tests.exporters.lint.cases_attention import FUSED
from tests.exporters.lint.corpus import attentions
from tests.exporters.lint.corpus.records import Records
from tests.exporters.lint.judge import Judge
from tests.exporters.lint.rtx import WHY

if TYPE_CHECKING:
    from tests.exporters.lint.corpus import Sample
    from tests.exporters.lint.texts import Graph

_EVERY = 1 if "DEPLOYCLI_WHOLE_CORPUS" in os.environ else 3
"""Of each half, one form in so many is looked at; all of them where ``$DEPLOYCLI_WHOLE_CORPUS`` is set."""

_LIVE = 4
"""Graphs that are judged anew."""

real = pytest.mark.skipif(importlib.util.find_spec(RTX.module) is None, reason=WHY)


def predicted(made: Sample) -> str:
    blocks = lint(ir.from_proto(made.model), rules=[16], targets=attentions.targets_of(made)).attention
    return attentions.FUSED if blocks and all(block.fusable for block in blocks) else attentions.APART


@pytest.mark.parametrize("seen", [True, False])
def test_the_rule_says_what_the_compiler_does(seen: bool) -> None:
    records = Records.load(attentions.FILE)
    judged, wrong, numbers = [], [], attentions.half(seen=seen)[::_EVERY]
    for made in attentions.samples(numbers):
        record = records.of(made)
        assert record is not None, f"no verdict on {made.name}: python -m tests.exporters.lint.corpus --record"
        if record.kind in (attentions.FUSED, attentions.APART):
            judged.append(record.kind)
            if predicted(made) != record.kind:
                wrong.append(f"{made.name}: {record.kind}")
    assert len(judged) > 0.9 * len(numbers)
    assert min(judged.count(attentions.FUSED), judged.count(attentions.APART)) > len(judged) / 4
    shown = wrong if seen else "of the unseen half only numbers are shown"
    assert len(wrong) <= 0.02 * len(judged), shown


@real
def test_the_record_is_what_the_compiler_does_now() -> None:
    records = Records.load(attentions.FILE)
    if records.library != library.version(RTX):
        pytest.skip(f"recorded with TensorRT for RTX {records.library}")
    numbers = [number for number in range(attentions.SIZE) if "FP8" not in str(attentions.form(number))]
    chosen = list(attentions.samples(random.Random(0).sample(numbers, _LIVE)))
    with Judge(attentions.targets_of(chosen[0])) as judge:
        found = {sample.name: attentions.record_of(sample, judge(sample.model)) for sample in chosen}
    assert found == {sample.name: records.of(sample) for sample in chosen}
    assert len({record.kind for record in found.values()}) > 1


@pytest.mark.parametrize("graph", FUSED)
def test_forms_that_no_document_promises(graph: Graph) -> None:
    (block,) = graph.lint(rules=[16]).attention
    assert block.reasons == ()


@real
def test_they_are_fused() -> None:
    with Judge(((8, 6),)) as judge:
        for graph in FUSED:
            verdict = judge(graph.proto())
            assert "mha" in verdict.layers, (graph.text, verdict)
