"""Every rule on graphs that break it, and on twins that do not."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from deploycli.exporters.lint import RULES
from tests.exporters.lint import (
    cases_attention,
    cases_compiled,
    cases_placement,
    cases_quantization,
    cases_structure,
    cases_types,
)

if TYPE_CHECKING:
    from tests.exporters.lint.cases import Case

CASES: tuple[Case, ...] = (
    *cases_structure.CASES,
    *cases_types.CASES,
    *cases_quantization.CASES,
    *cases_placement.CASES,
    *cases_attention.CASES,
    *cases_compiled.CASES,
)
TWINS = tuple(case for case in CASES if case.good is not None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_broken_graph_is_found(case: Case) -> None:
    report = case.bad.lint()
    found = [f for f in report.findings if f.number == case.rule]
    assert any(f.level == case.level and case.says in f.message for f in found), report.findings
    assert {f.number for f in report.findings} == {case.rule} | case.also, report.findings
    assert report.passed is (not any(f.level == "error" for f in report.findings))


@pytest.mark.parametrize("case", TWINS, ids=str)
def test_its_twin_is_clean(case: Case) -> None:
    assert case.good is not None
    report = case.good.lint()
    assert report.findings == ()
    assert report.passed


def test_every_rule_has_cases() -> None:
    counts = Counter(case.rule for case in CASES)
    elsewhere = {13, 20}  # need files and GPUs: see test_external_data.py, and test_targets.py of the target
    assert set(counts) | elsewhere == {rule.number for rule in RULES}


def test_names_are_unique() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("name", cases_placement.CLEAN)
def test_what_is_legal_is_not_found(name: str) -> None:
    assert cases_placement.CLEAN[name].lint().findings == ()
