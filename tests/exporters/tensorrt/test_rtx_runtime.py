"""Engines of TensorRT for RTX: run by a stand-in, and given to the real library, which wants a GPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploycli.exporters.bench.candidate import BenchOptions
from deploycli.exporters.bench.run import bench
from deploycli.exporters.bundle.engine import GpuRecord
from deploycli.exporters.target.product import RTX
from deploycli.exporters.tensorrt import library, rtx_runtime
from deploycli.exporters.tensorrt.open_engine import open_engine
from deploycli.exporters.tensorrt.rtx_runtime import InMemory, OnDisk, RtxRuntime
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.errors import EnvironmentUnsuitable, ExportError
from tests.exporters.bundle import bundles
from tests.exporters.lint.rtx import WHY
from tests.exporters.tensorrt.running_engines import installed, samples, write_engine
from tests.exporters.tensorrt.test_runtime import WEIGHT, save

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deploycli.exporters.bundle.engine import Sidecar

KERNELS = "fp16-rtx1.7.1.116.sm89-nvidia-l4.kernels"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the stand-in was asked for, a line each."""
    monkeypatch.setattr(library, "has_driver", lambda: True)
    with installed(FAKE_CALLS=str(tmp_path / "calls")) as cuda:
        yield tmp_path / "calls"
        assert cuda.LIVE == {}, "memory of the GPU was not freed"


@pytest.fixture
def engine(tmp_path: Path, calls: Path) -> Sidecar:
    save(tmp_path / "model.onnx")
    return write_engine(tmp_path, "model.onnx", (1, 2, 8), product=RTX)


def run(folder: Path, sidecar: Sidecar, size: int = 2) -> None:
    images = samples(size)
    with open_engine(folder / "engines", sidecar) as runtime:
        assert runtime.name == "TensorRT for RTX 1.7.1.116"
        np.testing.assert_allclose(runtime.run({"images": images})["logits"], images @ WEIGHT, rtol=1e-4, atol=1e-5)


def compiled(calls: Path) -> int:
    """How often kernels were finished since it was last asked."""
    count = calls.read_text().split("\n").count("compile") if calls.exists() else 0
    calls.unlink(missing_ok=True)
    return count


def test_kernels_are_kept_beside_the_engine_and_used_again(tmp_path: Path, engine: Sidecar, calls: Path) -> None:
    run(tmp_path, engine)
    assert calls.read_text().splitlines()[:3] == ["deserialize", "EAGER DISABLED", "compile"]
    assert compiled(calls) == 1
    assert {path.name for path in (tmp_path / "engines").iterdir()} == {
        engine.plan,
        engine.plan.replace(".plan", ".json"),
        KERNELS,
    }
    run(tmp_path, engine)
    assert compiled(calls) == 0
    before = (tmp_path / "engines" / KERNELS).stat().st_ino
    run(tmp_path, engine, size=3)
    assert compiled(calls) == 1
    assert (tmp_path / "engines" / KERNELS).stat().st_ino != before
    run(tmp_path, engine, size=2)
    run(tmp_path, engine, size=3)
    assert compiled(calls) == 0


@pytest.mark.parametrize("spoiled", ["a byte", "cut", "empty", "another engine", "another driver", "too large"])
def test_kernels_that_do_not_fit_are_thrown_away(
    spoiled: str, tmp_path: Path, engine: Sidecar, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, engine)
    assert compiled(calls) == 1
    file = tmp_path / "engines" / KERNELS
    good = file.read_bytes()
    if spoiled == "another driver":
        monkeypatch.setenv("FAKE_DRIVER", "570.86.15")
    elif spoiled == "too large":
        monkeypatch.setattr(rtx_runtime, "SIZE_LIMIT", len(good) - 1)
    elif spoiled == "another engine":
        OnDisk(file, "another engine's key").write(good[32:])
    else:
        file.write_bytes({"a byte": good[:-1] + b"?", "cut": good[:20], "empty": b""}[spoiled])
    run(tmp_path, engine)
    assert compiled(calls) == 1
    if spoiled != "too large":  # a good one took its place
        run(tmp_path, engine)
        assert compiled(calls) == 0


@pytest.mark.parametrize("there", ["a link", "a broken link", "a pipe", "a folder"])
def test_what_is_no_file_is_neither_read_nor_replaced(there: str, tmp_path: Path, engine: Sidecar, calls: Path) -> None:
    file, elsewhere = tmp_path / "engines" / KERNELS, tmp_path / "mine"
    if there == "a pipe":
        os.mkfifo(file)
    elif there == "a folder":
        file.mkdir()
    else:
        file.symlink_to(elsewhere)
        if there == "a link":
            elsewhere.write_text("mine")
    run(tmp_path, engine)
    run(tmp_path, engine)
    assert compiled(calls) == 2
    assert not file.is_file() or elsewhere.read_text() == "mine"
    assert elsewhere.exists() == (there == "a link")


def test_kernels_that_cannot_be_written_are_no_error(tmp_path: Path, engine: Sidecar, calls: Path) -> None:
    taken = OnDisk(tmp_path / "engines" / engine.plan / KERNELS, "")  # a folder that is a file
    taken.write(b"kernels")
    assert taken.read() == b""


def test_kernels_of_a_failed_run_are_not_kept(tmp_path: Path, engine: Sidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "fail")
    with (
        pytest.raises(ExportError, match=r"TensorRT for RTX [\d.]+ refuses to run: an illegal memory access"),
        open_engine(tmp_path / "engines", engine) as runtime,
    ):
        runtime.run({"images": samples(1)})
    assert not (tmp_path / "engines" / KERNELS).exists()


def test_the_librarys_own_graphs_are_asked_for_when_it_is_loaded(tmp_path: Path, engine: Sidecar, calls: Path) -> None:
    with open_engine(tmp_path / "engines", engine, cuda_graph=True) as runtime:
        runtime.prepare({"images": samples(2)})
        runtime.capture()()
        assert runtime.outputs()["logits"].shape == (2, 5)
    assert "EAGER WHOLE_GRAPH_CAPTURE" in calls.read_text()
    with (
        RtxRuntime(tmp_path / "engines", engine, cache=InMemory()) as plain,
        pytest.raises(ExportError, match="was loaded without CUDA graphs"),
    ):
        plain.capture()


@pytest.mark.parametrize(
    ("gpu", "version", "words"),
    [
        ("NVIDIA A10|8|6", "1.7.1.116", "is for compute capability 7.5 and 8.9, here is NVIDIA A10 (8.6)"),
        ("NVIDIA L4|8|9", "1.6.1.120", "is installed"),
        ("NVIDIA L4|8|9", "1.7.2.4", "was built by TensorRT for RTX 1.7.1.116, here is 1.7.2.4"),
        ("none", "1.7.1.116", "there is no GPU"),
    ],
)
def test_what_does_not_fit_is_never_shown_to_the_library(
    gpu: str, version: str, words: str, tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "model.onnx")
    sidecar = write_engine(tmp_path, "model.onnx", (1, 2, 8), product=RTX, targets=((7, 5), (8, 9)))
    monkeypatch.setenv("FAKE_GPU", gpu)
    monkeypatch.setattr(library.require(sidecar.product), "__version__", version)
    with pytest.raises(EnvironmentUnsuitable) as caught:
        open_engine(tmp_path / "engines", sidecar)
    assert words in str(caught.value)
    assert not calls.exists()


def test_verify_judges_it_and_bench_times_it_and_its_loading(tmp_path: Path, calls: Path) -> None:
    from onnx import TensorProto, helper

    model = bundles.graph()
    for output in model.graph.output:
        output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, ["batch", bundles.CLASSES]))
    bundle = bundles.make(tmp_path, model=model)
    write_engine(bundle.path, "model.onnx", (1, 2, 8), product=RTX)
    write_engine(bundle.path, "model.onnx", (1, 2, 8))  # one process runs engines of both products
    report = verify(bundle, VerifyOptions(reference="golden", engines="all"))
    assert report.passed
    assert {stage.runtime for stage in report.stages if "engines/" in stage.artifact} == {
        "TensorRT for RTX 1.7.1.116",
        "TensorRT 10.13.3.9",
    }
    kept = (bundle.path / "engines" / KERNELS).read_bytes()
    compiled(calls)
    timed = bench(bundle, BenchOptions(batches=(1, 8), only=("trt", "rtx"), rounds=2, warmup_runs=1))
    assert (bundle.path / "engines" / KERNELS).read_bytes() == kept
    assert compiled(calls) == 2  # for each batch once, where no kernels were at hand
    rows = {(row["name"], row["batch"]): row for row in timed.to_json()["measurements"]}
    assert set(rows) == {(name, batch) for name in ("trt", "rtx") for batch in (1, 8)}
    for (name, _), row in rows.items():
        assert row["cuda_graph"]
        loads = row["first_load"]
        assert (loads is None) == (name == "trt")
        assert loads is None or min(loads["compiling_seconds"], loads["cached_seconds"]) > 0
    conditions = {row.measurement.candidate.name: row.measurement.conditions() for row in timed.rows}
    assert "with kernels cached" in conditions["rtx"]
    assert "kernels cached" not in conditions["trt"]


def test_the_real_library_is_given_the_plan_and_says_that_it_wants_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason=WHY)
    if library.has_driver():
        pytest.skip("there is a driver: pytest -m gpu runs engines")
    from deploycli.exporters.build import EngineOptions, build_all
    from deploycli.exporters.bundle.bundle import Bundle

    bundle = bundles.make(tmp_path)
    (built,) = build_all([Bundle.open(bundle.path)], EngineOptions(("fp32",), product=RTX), progress=lambda *_: None)
    monkeypatch.setattr(library, "has_driver", lambda: True)
    monkeypatch.setattr(library, "gpu", lambda: GpuRecord("NVIDIA L4", (8, 9), "550.54.14"))
    with pytest.raises(EnvironmentUnsuitable, match=r"TensorRT for RTX [\d.]+ cannot load .*cudaError 35"):
        open_engine(built.engine.path.parent, built.engine.sidecar)
