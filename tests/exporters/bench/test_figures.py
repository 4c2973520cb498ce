"""The clock, the figures and the promises, without a clock that runs: times are made up."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from typing import NoReturn

import numpy as np
import pytest

from deploycli.exporters.bench import report as report_module
from deploycli.exporters.bench.candidate import BenchOptions, Candidate
from deploycli.exporters.bench.measurement import Absence, Measurement, speedup
from deploycli.exporters.bench.report import BenchReport, Host, Row, describe_host, failure_of
from deploycli.exporters.bench.requirement import Requirement, judge
from deploycli.exporters.bench.run import MIN_ROUNDS, interleave, warm_up
from deploycli.models.errors import NumericsError, RequirementError, UsageError
from tests.exporters.bundle.bundles import model_file

HOST = Host("Linux", "a CPU", 4, 0.5, (), {"numpy": "2"})


class World:
    """A clock that stands still unless something runs."""

    def __init__(self) -> None:
        self.now = 100.0
        self.ran: list[str] = []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> None:
        self.ran.append(name)
        self.now += seconds


def unusable() -> NoReturn:
    raise AssertionError("never opened")


def candidate(name: str = "ort-cpu", precision: str = "fp32", **options: str) -> Candidate:
    file = None if name in ("eager", "compile") else model_file(f"model.{precision}.onnx", precision)
    return Candidate(name, precision, options.pop("device", "cpu"), unusable, **{"file": file, **options})  # type: ignore[arg-type]


def measured(what: Candidate, *seconds: float, batch: int = 1) -> Measurement:
    return Measurement(what, batch, np.array(seconds), 0.1, 0.2, "none", False, None, ())


# --- the clock ---


def test_interleaving_times_only_the_second_run_of_each_turn() -> None:
    world = World()
    calls = {"a": 0, "b": 0}

    def run(name: str, seconds: float) -> None:
        calls[name] += 1
        world.work(name, seconds if calls[name] % 2 == 0 else 50.0)  # untimed runs are slow

    times = interleave([lambda: run("a", 1.0), lambda: run("b", 2.0)], BenchOptions(rounds=7), clock=world.clock)
    np.testing.assert_allclose(times, [[1.0] * 7, [2.0] * 7])
    assert calls == {"a": 14, "b": 14}


def test_every_round_runs_all_in_an_order_of_its_own_that_the_seed_repeats() -> None:
    def order(seed: int) -> list[tuple[str, ...]]:
        world = World()
        runs = [lambda name=name: world.work(name, 1.0) for name in "abcd"]
        interleave(runs, BenchOptions(rounds=12, seed=seed), clock=world.clock)
        turns = world.ran[::2]
        assert turns == world.ran[1::2]
        return [tuple(turns[i : i + 4]) for i in range(0, len(turns), 4)]

    rounds = order(0)
    assert all(sorted(names) == ["a", "b", "c", "d"] for names in rounds)
    assert len(set(rounds)) > 6
    assert order(0) == rounds
    assert order(1) != rounds


def test_no_round_begins_after_the_seconds_are_over() -> None:
    world = World()
    ticks: list[tuple[int, int]] = []
    times = interleave(
        [lambda: world.work("a", 0.5)],
        BenchOptions(seconds=9.5),
        clock=world.clock,
        tick=lambda done, total: ticks.append((done, total)),
    )
    assert times.shape == (1, 10)  # of a second each, the untimed run included
    assert ticks[0] == (0, 10)
    assert [done for done, _ in ticks] == [0, 2, 4, 6, 8, 9]


def test_something_slow_is_still_timed_a_few_times() -> None:
    world = World()
    assert (
        interleave([lambda: world.work("a", 60.0)], BenchOptions(seconds=1), clock=world.clock).shape[1] == MIN_ROUNDS
    )


@pytest.mark.parametrize(("seconds", "runs"), [(0.0, 10), (0.4, 3), (5.0, 1)])
def test_warm_up_ends_with_its_runs_or_its_seconds(seconds: float, runs: int) -> None:
    world = World()
    assert warm_up(lambda: world.work("a", seconds), BenchOptions(), world.clock) == runs == len(world.ran)


def test_garbage_is_collected_again_whatever_happens() -> None:
    def interrupted() -> None:
        assert not gc.isenabled()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave([interrupted], BenchOptions(rounds=1))
    assert gc.isenabled()


@pytest.mark.parametrize(
    "wrong", [{"batches": (1, 0)}, {"rounds": 0}, {"threads": 0}, {"seconds": 0.0}, {"seconds": float("nan")}]
)
def test_numbers_that_make_no_benchmark(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        BenchOptions(**wrong)  # type: ignore[arg-type]


# --- the figures ---


def test_percentiles_are_times_that_were_measured() -> None:
    found = measured(candidate(), *(np.random.default_rng(0).permutation(100) + 1.0), batch=8)
    assert [found.percentile(q) for q in (0.5, 0.9, 0.95, 0.99, 1.0)] == [50.5, 90, 95, 99, 100]
    figures = found.to_json()
    assert (figures["rounds"], figures["batch"]) == (100, 8)
    assert figures["images_per_second"] == pytest.approx(8 / 50.5)
    assert figures["images_per_second_overall"] == pytest.approx(800 / 5050)
    assert (figures["seconds"]["min"], figures["seconds"]["max"], figures["seconds"]["mean"]) == (1, 100, 50.5)
    assert figures["seconds"]["std"] == pytest.approx(np.arange(100).std())


@pytest.mark.parametrize(("rounds", "share", "rank"), [(1, 0.99, 1), (20, 0.95, 19), (20, 0.9, 18), (10, 0.99, 10)])
def test_percentile_ranks(rounds: int, share: float, rank: int) -> None:
    assert measured(candidate(), *range(1, rounds + 1)).percentile(share) == rank


def test_what_slows_a_round_down_cancels_in_the_speedup() -> None:
    rng = np.random.default_rng(0)
    drift = np.exp(rng.normal(0, 1, 200))
    fast, slow = measured(candidate(), *drift), measured(candidate("eager"), *(1.5 * drift))
    found = speedup(fast, slow)
    assert found.ratio == pytest.approx(1.5)
    assert (found.low, found.high) == pytest.approx((1.5, 1.5))
    assert str(found) == "1.50 (1.50 to 1.50)"


def test_noise_of_its_own_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    first, second = (measured(candidate(), *(1 + rng.exponential(0.5, 50))) for _ in range(2))
    found = speedup(first, second)
    assert found.low < found.ratio < found.high
    assert 0.05 < found.high - found.low < 1
    assert speedup(first, second) == found
    more = [measured(candidate(), *(1 + rng.exponential(0.5, 5000))) for _ in range(2)]
    assert speedup(*more).high - speedup(*more).low < (found.high - found.low) / 3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "default threads"),
        ({"threads": 1}, "1 thread"),
        ({"threads": 2, "notes": ("x",)}, "2 threads; x"),
        (
            {"candidate": candidate("trt", device="cuda"), "transfers": "excluded"},
            "transfers excluded; no CUDA graph",
        ),
        (
            {"candidate": candidate("trt", device="cuda"), "transfers": "included", "cuda_graph": True},
            "transfers included; CUDA graph",
        ),
        ({"candidate": candidate(precision="fp16", emulated="in FP32")}, "default threads; in FP32"),
    ],
)
def test_conditions(changes: dict[str, object], text: str) -> None:
    assert replace(measured(candidate(), 1.0), **changes).conditions() == text  # type: ignore[arg-type]


# --- the promises ---


@pytest.mark.parametrize(
    ("text", "requirement"),
    [
        ("1.05", Requirement(1.05)),
        ("1.05:fp16", Requirement(1.05, "fp16")),
        ("2:int8:eager", Requirement(2, "int8", "eager")),
        ("1.5::compile", Requirement(1.5, "", "compile")),
    ],
)
def test_requirement_is_read_and_written(text: str, requirement: Requirement) -> None:
    assert Requirement.parse(text) == requirement
    assert str(requirement) == text


@pytest.mark.parametrize("text", ["", "fast", "0", "-1", "inf", "nan", "1.05:fp17", "fp16:1.05"])
def test_requirement_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        Requirement.parse(text)


EAGER, FP32, FP16 = candidate("eager"), candidate(), candidate("trt", "fp16", device="cuda")
FP32_CUDA, ENGINE = candidate("ort-cuda", device="cuda"), candidate("trt", device="cuda")


@pytest.mark.parametrize(
    ("text", "times", "met", "why"),
    [
        ("1.5:fp16", {FP32_CUDA: [3, 6], FP16: [2, 4]}, True, "model.fp16.onnx in trt: 1.50"),
        ("1.5:fp16", {FP32_CUDA: [3, 5], FP16: [2, 4]}, False, "1.25 (1.25 to 1.25) over ort-cuda fp32 at batch 8"),
        # The FP32 engine is the harder baseline; what is on another device is none.
        ("1.5:fp16", {FP32_CUDA: [9, 9], ENGINE: [2.5, 9], FP16: [2, 4]}, False, "1.25 (1.25 to 1.25) over trt fp32"),
        ("1.5:fp16", {FP32: [9, 9], EAGER: [9, 9], FP16: [2, 4]}, False, "no other FP32 file on cuda was measured"),
        ("1.5:fp16:eager", {FP32: [2, 4], EAGER: [9, 9], FP16: [2, 4]}, True, "over eager fp32"),
        ("1.5:fp32:eager", {FP32: [2, 4], EAGER: [3, 6]}, True, "model.fp32.onnx in ort-cpu"),
        ("1.5:fp32", {FP32: [2, 4], EAGER: [3, 6]}, False, "no other FP32 file on cpu was measured at batch 1"),
        # eager in FP16 does not ship
        (
            "1.5:fp16",
            {FP32: [9, 9], candidate("eager", "fp16"): [1, 1]},
            False,
            "no fp16 file gave a speed that counts",
        ),
        ("1.5:fp16", {FP32_CUDA: [3, 6], FP16: [2, None]}, False, "was not measured at batch 8"),
        ("1.5:int8", {FP32_CUDA: [3, 6]}, False, "there is none to time"),
        ("1.5", {FP32_CUDA: [3, 6], ENGINE: [1, 3], FP16: [2, 4]}, True, "model.fp32.onnx in trt: 3.00"),
        # One file must do at all batch sizes: not one here, another there.
        (
            "1.5:fp16",
            {FP32_CUDA: [3, 6], FP16: [1, 6], candidate("ort-cuda", "fp16", device="cuda"): [3, 1]},
            False,
            "1.00 (1.00 to 1.00)",
        ),
    ],
)
def test_requirement_is_judged(text: str, times: dict[Candidate, list[float | None]], met: bool, why: str) -> None:
    found = [
        measured(what, *[second] * 6, batch=batch)
        for what, seconds in times.items()
        for batch, second in zip((1, 8), seconds, strict=True)
        if second is not None
    ]
    verdict = judge(Requirement.parse(text), found, [])
    assert verdict.met is met
    assert why in verdict.reason
    json.dumps(verdict.to_json(), allow_nan=False)


def test_emulated_precision_meets_no_requirement() -> None:
    fast = measured(candidate(precision="fp16", emulated="computes FP16 in FP32"), 1.0)
    absent = Absence(candidate("ort-cuda", "fp16", device="cuda"), "no CUDA")
    verdict = judge(Requirement(1.05, "fp16"), [fast, measured(FP32, 9.0)], [absent])
    assert not verdict.met
    assert "ort-cpu fp16: computes FP16 in FP32" in verdict.reason
    assert "ort-cuda fp16: no CUDA" in verdict.reason


# --- the report ---


def report(*rows: Measurement, absences: tuple[Absence, ...] = (), met: bool | None = None) -> BenchReport:
    verdicts = () if met is None else (replace(judge(Requirement(1.05), [], []), met=met),)
    return BenchReport(
        "bundle", "random", HOST, BenchOptions(), tuple(Row(m, "", None) for m in rows), absences, verdicts
    )


def test_wrong_outputs_weigh_more_than_a_broken_promise() -> None:
    wrong = Absence(FP16, "NaN", 1, wrong=True)
    assert failure_of([report(met=True)]) is None
    assert isinstance(failure_of([report(met=True), report(met=False)]), RequirementError)
    assert isinstance(failure_of([report(met=False), report(absences=(wrong,))]), NumericsError)
    # PyTorch in FP16 is no file of the bundle: nothing is broken if it overflows.
    assert failure_of([report(absences=(Absence(candidate("eager", "fp16"), "NaN", 1, wrong=True),))]) is None


# --- the machine ---


def test_host_is_described_as_json() -> None:
    found = describe_host()
    assert found.cores >= 1
    assert found.cpu
    assert {"python", "numpy", "onnxruntime", "torch"} <= set(found.versions)
    assert json.loads(json.dumps(found.to_json()))["cores"] == found.cores


def test_gpus_are_described_with_their_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        stdout = "NVIDIA X, 580.1, 345 MHz, 1980 MHz, 700.00 W, 31\nbroken line\n"

    monkeypatch.setattr(report_module.subprocess, "run", lambda *_args, **_options: Done)
    (gpu,) = describe_host().gpus
    assert (gpu["name"], gpu["clocks.sm"], gpu["driver_version"]) == ("NVIDIA X", "345 MHz", "580.1")


def test_no_nvidia_smi_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(report_module.subprocess, "run", absent)
    assert describe_host().gpus == ()


def test_busy_machine_is_called_so() -> None:
    assert HOST.busy == replace(HOST, load=None).busy == ""
    assert "load 3.5 on 4 cores" in replace(HOST, load=3.5).busy
