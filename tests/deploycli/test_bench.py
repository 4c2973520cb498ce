"""``deploycli bench``: what is printed, the JSON, and the exit codes. No test looks at how long anything took."""

from __future__ import annotations

import json
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from deploycli.exporters.bench import run as bench_module
from deploycli.exporters.bench.ort import ort_candidates
from tests.deploycli.commands import assert_refused
from tests.exporters.bundle.bundles import make, record_again

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deploycli.exporters.bench.candidate import Arrays, BenchOptions, Candidate, Prepare, Prepared
    from deploycli.exporters.bundle.bundle import Bundle
    from tests.deploycli.conftest import Command

QUICK = ("--rounds", 3, "--warmup", 1)


def slowed(candidate: Candidate, pause: float = 0.05) -> Candidate:
    """The same, under another name, but a run takes a twentieth of a second more."""

    @contextmanager
    def opened() -> Iterator[Prepare]:
        with candidate.open() as prepare:

            def prepare_slow(inputs: Arrays) -> Prepared:
                prepared = prepare(inputs)

                def run() -> None:
                    prepared.run()
                    time.sleep(pause)

                return replace(prepared, run=run, notes=("slowed down",))

            yield prepare_slow

    return replace(candidate, name="slow", open=opened)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the ONNX file stands one that is much slower."""

    def provider(bundle: Bundle, options: BenchOptions) -> list[Candidate]:
        return [slowed(c) for c in ort_candidates(bundle, options) if c.name == "ort-cpu"]

    monkeypatch.setattr(bench_module, "PROVIDERS", (provider, ort_candidates))


@pytest.fixture
def linear(tmp_path: Path) -> Bundle:
    return make(tmp_path / "artifacts")


def test_eager_and_onnx_runtime(true_bundle: Bundle, deploycli: Command) -> None:
    result = deploycli("bench", true_bundle.path, "--only", "eager,ort-cpu", "--batches", "1,3", *QUICK)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith(f"{true_bundle.path} (checkpoint ")
    assert "cores; python" in lines[1] or "core; python" in lines[1]
    rows = [line.split() for line in lines if line[:1].isdigit()]
    assert [row[:4] for row in rows] == [
        [batch, name, "fp32", "cpu"] for batch in ("1", "3") for name in ("eager", "ort-cpu")
    ]
    assert "over eager fp32" in result.out
    assert f"eager fp32: {torch.get_num_threads()} thread" in result.out
    assert "timing 2 candidates at batch 3, rounds (1/3)" in result.err


def test_json(linear: Bundle, deploycli: Command) -> None:
    result = deploycli("bench", "linear", "--json", "--batches", "1,8", "--threads", 1, "--seed", 7, *QUICK)
    (report,) = result.json()
    assert set(report) == {
        "schema_version",
        "bundle",
        "weights",
        "host",
        "options",
        "measurements",
        "absent",
        "requirements",
        "unreleasable",
    }
    assert report["schema_version"] == 1
    assert set(report["host"]) == {"system", "cpu", "cores", "load", "gpus", "versions"}
    assert report["options"] == {
        "rounds": 3,
        "seconds": None,
        "warmup_runs": 1,
        "warmup_seconds": 1.0,
        "threads": 1,
        "cuda_graph": True,
        "seed": 7,
    }
    assert {a["name"]: a["batch"] for a in report["absent"]} == {"eager": None, "compile": None, "ort-cuda": None}
    first, second = report["measurements"]
    assert (first["batch"], second["batch"]) == (1, 8)
    assert (first["name"], first["artifact"], first["precision"], first["device"]) == (
        "ort-cpu",
        "model.onnx",
        "fp32",
        "cpu",
    )
    assert set(first["seconds"]) == {"p50", "p90", "p95", "p99", "mean", "std", "min", "max"}
    assert first["seconds"]["min"] <= first["seconds"]["p50"] <= first["seconds"]["p99"] <= first["seconds"]["max"]
    assert first["images_per_second"] == pytest.approx(1 / first["seconds"]["p50"])
    assert (first["rounds"], first["threads"], first["transfers"], first["cuda_graph"]) == (3, 1, "none", False)
    assert (first["baseline"], first["speedup"]["ratio"]) == ("ort-cpu fp32", 1.0)


@pytest.mark.usefixtures("linear", "slow")
@pytest.mark.parametrize(("required", "code"), [("2:fp32:slow", 0), ("0.5:fp32:ort-cpu", 6), ("2::slow", 0)])
def test_required_speedup(deploycli: Command, required: str, code: int) -> None:
    result = deploycli("bench", "--require-speedup", required, *QUICK)
    assert result.code == code, result.err
    assert f"{'NOT MET' if code else 'met'} {required}" in result.out
    assert "slow fp32: default threads; slowed down" in result.out
    assert ("error: " in result.err) is bool(code)


@pytest.mark.usefixtures("linear", "slow")
def test_every_required_speedup_must_be_met_and_the_figures_are_printed_before(deploycli: Command) -> None:
    required = ("--require-speedup", "2:fp32:slow", "--require-speedup", "1.05:fp16")
    result = deploycli("bench", *required, "--json", *QUICK)
    assert result.code == 6
    (report,) = json.loads(result.out)
    assert [r["met"] for r in report["requirements"]] == [True, False]
    assert set(report["requirements"][0]["speedups"]) == {"1", "8"}
    assert "expected: speedups of 1.05:fp16" in result.err
    assert "no fp16 file gave a speed that counts" in result.err


def test_fp16_on_a_cpu_is_timed_but_meets_no_requirement(
    true_bundle: Bundle, deploycli: Command, tmp_path: Path
) -> None:
    shutil.copytree(true_bundle.path, tmp_path / "artifacts/swin")
    assert deploycli("cast", "swin").code == 0
    result = deploycli("bench", "--only", "ort-cpu", "--require-speedup", "0.01:fp16", "--batches", "1", *QUICK)
    assert result.code == 6
    assert "(fp16)" in result.out
    assert "ort-cpu fp16: default threads; ONNX Runtime's CPU provider computes FP16 in FP32" in result.out
    assert "computes FP16 in FP32" in result.err


def test_wrong_file_is_not_timed(linear: Bundle, deploycli: Command) -> None:
    model = onnx.load(linear.path / "model.onnx")
    weight = next(i for i in model.graph.initializer if i.name == "weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, ::-1].copy(), "weight"))
    onnx.save(model, linear.path / "model.onnx")
    record_again(linear)
    result = deploycli("bench", "--only", "ort-cpu", "--require-speedup", "1.05", *QUICK)
    assert result.code == 5
    assert "NOT TIMED, its outputs are wrong: ort-cpu fp32 at batch 1" in result.out
    assert "p50" not in result.out
    assert "model.onnx in ort-cpu, batch 8: output 'logits'" in result.err


def test_changed_file_is_refused(linear: Bundle, deploycli: Command) -> None:
    with (linear.path / "model.onnx").open("ab") as stream:
        stream.write(b"\0")
    assert_refused(deploycli("bench"), 8, "has changed")


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--only", "eagle"], 2, "eager or compile or ort-cpu or ort-cuda"),
        (["--only", "eager,,ort-cpu"], 2, "write names as eager,ort-cpu"),
        (["--baseline", "eagle"], 2, "no candidate 'eagle' to compare with"),
        (["--only", "ort-cpu", "--require-speedup", "2:fp32:eager"], 2, "no candidate 'eager' to compare with"),
        (["--require-speedup", "1.05:fp17"], 2, "RATIO[:PRECISION[:BASELINE]]"),
        (["--require-speedup", "fast"], 2, "RATIO[:PRECISION[:BASELINE]]"),
        (["--batches", "1,0"], 2, "write batch sizes as"),
        (["--rounds", "3", "--seconds", "1"], 2, "exclude each other"),
        (["--rounds", "0"], 2, "--rounds"),
        (["--seconds", "nan"], 2, "seconds"),
        (["--threads", "0"], 2, "--threads"),
        (["nowhere"], 2, "no bundle"),
        (["--only", "eager"], 7, "weights are not at hand"),
        (["--only", "ort-cpu,ort-cuda"], 7, "no CUDAExecutionProvider"),
        (["--checkpoint", "absent.pth"], 7, "weights are not at hand"),
    ],
)
def test_what_cannot_be_done_is_said(deploycli: Command, arguments: list[object], code: int, part: str) -> None:
    result = deploycli("bench", *arguments)
    assert_refused(result, code, part)


def test_interruption_leaves_nothing_changed(
    linear: Bundle, deploycli: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    threads = torch.get_num_threads()

    def provider(bundle: Bundle, options: BenchOptions) -> Iterator[Candidate]:
        candidate = next(iter(ort_candidates(bundle, options)))
        runs: list[int] = []

        @contextmanager
        def opened() -> Iterator[Prepare]:
            with candidate.open() as prepare:

                def prepare_interrupted(inputs: Any) -> Prepared:
                    def run() -> None:
                        runs.append(torch.get_num_threads())
                        if len(runs) == 5:
                            signal.raise_signal(signal.SIGINT)

                    return replace(prepare(inputs), run=run)

                yield prepare_interrupted

        yield replace(candidate, open=opened)
        assert not runs

    monkeypatch.setattr(bench_module, "PROVIDERS", (provider,))
    result = deploycli("bench", "--threads", threads + 1, *QUICK)
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines()[-1] == "interrupted: nothing was written"
    assert "Traceback" not in result.err
    assert torch.get_num_threads() == threads
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert linear.path.is_dir()
