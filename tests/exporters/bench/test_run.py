"""A bundle under the clock: what is timed, what is refused, what is missing, and that nothing is left changed."""

from __future__ import annotations

import gc
import json
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from onnx import helper

from deploycli.exporters.bench.candidate import BenchOptions, Candidate, Prepared
from deploycli.exporters.bench.report import failure_of
from deploycli.exporters.bench.requirement import Requirement
from deploycli.exporters.bench.run import bench, bench_all, collect
from deploycli.models.errors import (
    BuildError,
    DeployError,
    EnvironmentUnsuitable,
    ExportError,
    IntegrityError,
    NumericsError,
    RequirementError,
    UsageError,
)
from tests.exporters.bundle.bundles import graph, make, model_file, truth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

    from deploycli.exporters.bench.report import BenchReport
    from deploycli.exporters.bundle.bundle import Bundle

    Arrays = Mapping[str, npt.NDArray[Any]]

QUICK = BenchOptions(batches=(1, 8), rounds=5, warmup_runs=2)


@dataclass
class Shop:
    """Makes candidates that compute the linear bundle's outputs, and take as long as they are told to."""

    now: float = 0.0
    batches: list[int] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def candidate(
        self,
        name: str,
        precision: str = "fp32",
        *,
        seconds: float = 1.0,
        answer: Callable[[Arrays], Arrays] = lambda inputs: truth(inputs["images"]),
        unavailable: DeployError | None = None,
        fails: DeployError | None = None,
        artifact: str | None = None,
        batches: tuple[int, int] | None = None,
    ) -> Candidate:
        @contextmanager
        def opened() -> Iterator[Callable[[Arrays], Prepared]]:
            if unavailable is not None:
                raise unavailable
            yield prepare
            self.closed.append(name)

        def prepare(inputs: Arrays) -> Prepared:
            if fails is not None:
                raise fails
            self.batches.append(len(inputs["images"]))
            return Prepared(run, partial(answer, inputs))

        def run() -> None:
            self.now += seconds

        file = None if artifact == "" else model_file(artifact or f"{name}.onnx", precision, batches)
        return Candidate(name, precision, "cpu", opened, file)

    def bench(self, bundle: Bundle, *candidates: Candidate, **options: Any) -> BenchReport:
        requirements = options.pop("requirements", ())
        return bench(
            bundle,
            replace(QUICK, **options),
            providers=[lambda _bundle, _options: candidates],
            requirements=requirements,
            clock=self.clock,
        )


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def linear(tmp_path: Path) -> Bundle:
    return make(tmp_path)


def test_every_candidate_is_timed_at_every_batch_on_the_golden_inputs(shop: Shop, linear: Bundle) -> None:
    report = shop.bench(
        linear, shop.candidate("eager", seconds=3, artifact=""), shop.candidate("fast"), batches=(12, 1)
    )
    assert [(r.measurement.batch, r.measurement.candidate.name) for r in report.rows] == [
        (1, "eager"),
        (1, "fast"),
        (12, "eager"),
        (12, "fast"),
    ]
    assert shop.batches == [1, 1, 12, 12]
    assert [r.speedup.ratio for r in report.rows if r.speedup] == [1, 3, 1, 3]
    assert {r.baseline for r in report.rows} == {"eager fp32"}
    assert [r.measurement.seconds.tolist() for r in report.rows][:2] == [[3.0] * 5, [1.0] * 5]
    assert shop.closed == ["fast", "eager"]
    assert failure_of([report]) is None


@pytest.mark.parametrize(
    ("baseline", "expected"), [("", "first fp32"), ("second", "second fp32")], ids=["default", "named"]
)
def test_baseline(shop: Shop, linear: Bundle, baseline: str, expected: str) -> None:
    candidates = [shop.candidate("half", "fp16"), shop.candidate("first"), shop.candidate("second")]
    assert {r.baseline for r in shop.bench(linear, *candidates, baseline=baseline).rows} == {expected}


def test_no_fp32_is_no_baseline(shop: Shop, linear: Bundle) -> None:
    (row,) = shop.bench(linear, shop.candidate("half", "fp16"), batches=(1,)).rows
    assert (row.baseline, row.speedup) == ("", None)


WRONG: dict[str, Callable[[Arrays], Arrays]] = {
    "NaN": lambda inputs: {name: a * np.float32("nan") for name, a in truth(inputs["images"]).items()},
    "zero": lambda inputs: {name: 0 * a for name, a in truth(inputs["images"]).items()},
    "scaled": lambda inputs: {name: 3 * a for name, a in truth(inputs["images"]).items()},
    "another row": lambda inputs: {name: np.roll(a, 1, 1) for name, a in truth(inputs["images"]).items()},
    "missing": lambda inputs: {"logits": truth(inputs["images"])["logits"]},
    "one sample": lambda inputs: {name: a[:1] for name, a in truth(inputs["images"][:1]).items()},
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_fast_and_wrong_is_no_result(shop: Shop, linear: Bundle, how: str, precision: str) -> None:
    fast = shop.candidate("fast", precision, seconds=0.001, answer=WRONG[how])
    required = [Requirement(1.5, precision, "slow")]
    report = shop.bench(linear, shop.candidate("slow"), fast, batches=(8,), requirements=required)
    assert [row.measurement.candidate.name for row in report.rows] == ["slow"]
    (absence,) = report.absences
    assert absence.wrong
    assert (absence.candidate.name, absence.batch) == ("fast", 8)
    assert not report.verdicts[0].met
    failure = failure_of([report])
    assert isinstance(failure, NumericsError)
    assert "fast.onnx" in failure.found


def test_a_budget_is_the_precision_s_own(shop: Shop, linear: Bundle) -> None:
    def rounded(inputs: Arrays) -> Arrays:
        return {name: a.astype(np.float16).astype(np.float32) for name, a in truth(inputs["images"]).items()}

    report = shop.bench(linear, *(shop.candidate(p, p, answer=rounded) for p in ("fp32", "fp16")), batches=(4,))
    assert [row.measurement.candidate.name for row in report.rows] == ["fp16"]


def test_what_cannot_be_opened_or_prepared_is_reported(shop: Shop, linear: Bundle) -> None:
    report = shop.bench(
        linear,
        shop.candidate("no-gpu", unavailable=EnvironmentUnsuitable("there is no\n GPU", hint="buy one")),
        shop.candidate("no-compiler", fails=ExportError("no compiler")),
        shop.candidate("fixed", batches=(8, 8)),
        shop.candidate("engine", batches=(2, 4)),
        shop.candidate("good"),
    )
    assert [(a.candidate.name, a.batch, a.reason) for a in report.absences] == [
        ("no-gpu", None, "there is no GPU"),
        ("no-compiler", 1, "no compiler"),
        ("fixed", 1, "takes batch 8"),
        ("engine", 1, "takes batches 2 to 4"),
        ("no-compiler", 8, "no compiler"),
        ("engine", 8, "takes batches 2 to 4"),
    ]
    assert [r.measurement.candidate.name for r in report.rows] == ["good", "fixed", "good"]
    assert failure_of([report]) is None
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert len(data["absent"]) == 6


@pytest.mark.parametrize("how", ["unavailable", "fails"])
def test_what_was_asked_for_must_run(shop: Shop, linear: Bundle, how: str) -> None:
    good, bad = shop.candidate("good"), shop.candidate("bad", **{how: BuildError("broken")})
    with pytest.raises(BuildError, match="broken"):
        shop.bench(linear, good, bad, only=("good", "bad"))
    assert len(shop.bench(linear, good, bad, only=("good",)).rows) == 2
    # One of its precisions is enough.
    assert len(shop.bench(linear, bad, shop.candidate("bad", "fp16"), only=("bad",)).rows) == 2
    with pytest.raises(BuildError, match="broken"):
        shop.bench(linear, bad)  # nothing is left


def test_what_was_asked_for_must_take_one_of_the_batches(shop: Shop, linear: Bundle) -> None:
    fixed = shop.candidate("fixed", batches=(3, 3))
    with pytest.raises(UsageError, match="batch 1, 8 was asked for; fixed fp32 takes batch 3"):
        shop.bench(linear, shop.candidate("good"), fixed, only=("good", "fixed"))
    assert len(shop.bench(linear, fixed, only=("fixed",), batches=(1, 3)).rows) == 1


@pytest.mark.parametrize("error", [IntegrityError("another checkpoint")])
def test_changed_file_is_never_just_missing(shop: Shop, linear: Bundle, error: DeployError) -> None:
    with pytest.raises(IntegrityError):
        shop.bench(linear, shop.candidate("good"), shop.candidate("bad", unavailable=error))


@pytest.mark.parametrize(
    ("options", "requirements"),
    [({"only": ("eagle",)}, []), ({"baseline": "eagle"}, []), ({}, [Requirement(1.0, "fp32", "eagle")])],
)
def test_unknown_names_are_refused_before_anything_runs(
    shop: Shop, linear: Bundle, options: dict[str, Any], requirements: list[Requirement]
) -> None:
    with pytest.raises(UsageError, match="no candidate 'eagle'") as caught:
        shop.bench(linear, shop.candidate("eager"), shop.candidate("ort-cpu"), requirements=requirements, **options)
    assert caught.value.expected == "eager or ort-cpu"
    assert not shop.batches


def test_baseline_that_is_left_out_is_refused(linear: Bundle) -> None:
    with pytest.raises(UsageError, match="no candidate 'eager' to compare with"):
        collect(linear, BenchOptions(only=("ort-cpu",)), [Requirement(1.0, "fp32", "eager")])


def test_all_bundles_are_looked_at_before_one_is_timed(shop: Shop, tmp_path: Path) -> None:
    bundles = [make(tmp_path, "first"), make(tmp_path, "second")]

    def provider(bundle: Bundle, _options: BenchOptions) -> list[Candidate]:
        return [shop.candidate("engine")] if bundle.path.name == "first" else [shop.candidate("other")]

    with pytest.raises(UsageError, match="second has no candidate 'engine'"):
        bench_all(bundles, replace(QUICK, only=("engine",)), providers=[provider])
    assert not shop.batches


def test_requirement_met_and_not(shop: Shop, linear: Bundle) -> None:
    candidates = [shop.candidate("ort", seconds=2.0), shop.candidate("ort", "fp16", seconds=1.5)]
    required = [Requirement(1.3, "fp16"), Requirement(1.4, "fp16")]
    report = shop.bench(linear, *candidates, requirements=required)
    assert [verdict.met for verdict in report.verdicts] == [True, False]
    failure = failure_of([report])
    assert isinstance(failure, RequirementError)
    assert (failure.exit_code, failure.expected) == (6, "speedups of 1.4:fp16")
    assert "1.33 (1.33 to 1.33) over ort fp32 at batch 1" in failure.found


@pytest.mark.parametrize("ends", ["well", "interrupted", "failed"])
def test_threads_and_garbage_collection_are_put_back(shop: Shop, linear: Bundle, ends: str) -> None:
    seen = []

    def answer(inputs: Arrays) -> Arrays:
        seen.append(torch.get_num_threads())
        if ends == "interrupted":
            raise KeyboardInterrupt
        if ends == "failed":
            raise RuntimeError("a bug")
        return truth(inputs["images"])

    before = torch.get_num_threads()
    expected = {"well": None, "interrupted": KeyboardInterrupt, "failed": RuntimeError}[ends]
    if expected is None:
        shop.bench(linear, shop.candidate("one", answer=answer), threads=before + 1)
    else:
        with pytest.raises(expected):
            shop.bench(linear, shop.candidate("one", answer=answer), threads=before + 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
    assert gc.isenabled()


# --- the real providers ---


def test_fixed_batch_is_the_default(tmp_path: Path) -> None:
    bundle = make(tmp_path, batch=8)
    report = bench(bundle, replace(QUICK, batches=(), only=("ort-cpu",)))
    assert [row.measurement.batch for row in report.rows] == [8]
    assert report.options.batches == (8,)


def test_onnx_runtime_times_the_file(linear: Bundle) -> None:
    report = bench(linear, replace(QUICK, threads=1))
    assert [r.measurement.candidate.label for r in report.rows] == ["ort-cpu fp32"] * 2
    first = report.rows[0].measurement
    assert (first.transfers, first.cuda_graph, first.threads, first.rounds) == ("none", False, 1, 5)
    assert (first.seconds > 0).all()
    reasons = {a.candidate.name: a.reason for a in report.absences}
    assert set(reasons) == {"eager", "compile", "ort-cuda"}
    assert "weights are not at hand" in reasons["eager"]


def test_wrong_file_is_not_timed(tmp_path: Path) -> None:
    scaled = graph([helper.make_node("Mul", ["raw.logits", "three"], ["logits"])])
    bundle = make(tmp_path, model=scaled)
    report = bench(bundle, replace(QUICK, only=("ort-cpu",)))
    assert (report.rows, len(report.wrong)) == ((), 2)
    assert "model.onnx in ort-cpu, batch 1: output 'logits' relative error 2" in report.wrong[0]


def test_checkpoint_without_use_is_refused(linear: Bundle, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnsuitable, match="weights are not at hand"):
        bench(linear, replace(QUICK, checkpoint=tmp_path / "absent.pth"))
