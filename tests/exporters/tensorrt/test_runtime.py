"""Engines run by a stand-in; those of TensorRT for RTX also given to the real library, which wants a GPU."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycli.exporters.bench.candidate import BenchOptions
from deploycli.exporters.bench.run import bench
from deploycli.exporters.bundle.engine import GpuRecord, Sidecar
from deploycli.exporters.target.product import RTX
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.runtime import Device, InMemory, OnDisk, RtxRuntime, TensorRtRuntime, open_engine
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.errors import EnvironmentUnsuitable, ExportError, IntegrityError, UsageError
from tests.exporters.bundle import bundles
from tests.exporters.lint.rtx import WHY
from tests.exporters.tensorrt.running_engines import installed, rewritten, samples, write_engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


WEIGHT = np.random.default_rng(1).standard_normal((12, 5)).astype(np.float32)


def save(path: Path, dtype: int = TensorProto.FLOAT, weight: np.ndarray = WEIGHT) -> None:
    """``logits = images @ weight``; the input, too, is of the type."""
    body = [
        helper.make_node("Cast", ["images"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["wide", "weight"], ["raw"]),
        helper.make_node("Cast", ["raw"], ["logits"], to=dtype),
    ]
    graph = helper.make_graph(
        body,
        "linear",
        [helper.make_tensor_value_info("images", dtype, ["batch", 12])],
        [helper.make_tensor_value_info("logits", dtype, ["batch", 5])],
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@pytest.fixture
def cuda() -> Iterator[Any]:
    with installed() as module:
        yield module
        gc.collect()
        assert module.LIVE == {}, "memory of the GPU was not freed"
        assert module.STREAMS == {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "model.onnx")
    return tmp_path


def test_runs_and_reads_outputs_after_synchronisation(cuda: Any, folder: Path) -> None:
    sidecar = write_engine(folder, "model.onnx", (1, 2, 8))
    images = samples(3)
    with TensorRtRuntime(folder / "engines", sidecar) as runtime:
        assert runtime.name == "TensorRT 10.13.3.9"
        outputs = runtime.run({"images": images})
    assert outputs["logits"].dtype == np.float32
    np.testing.assert_allclose(outputs["logits"], images @ WEIGHT, rtol=1e-5, atol=1e-6)


def test_sizes_that_alternate_leak_nothing(cuda: Any, folder: Path) -> None:
    sidecar = write_engine(folder, "model.onnx", (1, 2, 8))
    with TensorRtRuntime(folder / "engines", sidecar) as runtime:
        for size in (1, 8, 1, 3, 8, 2) * 5:
            images = samples(size, seed=size)
            np.testing.assert_allclose(runtime.run({"images": images})["logits"], images @ WEIGHT, rtol=1e-4, atol=1e-5)
            assert len(cuda.LIVE) == 2  # one input, one output
    assert len(cuda.ALLOCATED) == 4  # at 1, and again at 8


def test_strided_and_read_only_arrays_are_taken(cuda: Any, folder: Path) -> None:
    sidecar = write_engine(folder, "model.onnx", (1, 2, 8))
    wide = samples(4, 24)
    images = np.broadcast_to(wide[:1, ::2], (4, 12))
    with TensorRtRuntime(folder / "engines", sidecar) as runtime:
        np.testing.assert_allclose(runtime.run({"images": images})["logits"], images @ WEIGHT, rtol=1e-4, atol=1e-5)


def test_half_inputs_are_rounded_and_half_outputs_stay(cuda: Any, tmp_path: Path) -> None:
    save(tmp_path / "model.onnx", TensorProto.FLOAT16)
    sidecar = write_engine(tmp_path, "model.onnx", (1, 2, 8))
    images = samples(2)
    images[0, 0] = 1e6  # infinite in FP16, without a warning
    with TensorRtRuntime(tmp_path / "engines", sidecar) as runtime:
        found = runtime.run({"images": images})["logits"]
    assert found.dtype == np.float16
    assert not np.isfinite(found[0]).any()
    np.testing.assert_allclose(found[1], (images[1].astype(np.float16) @ WEIGHT).astype(np.float16), rtol=2e-3)


def test_bfloat16_outputs_become_float32(cuda: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt as trt

    sidecar = write_engine(folder, "model.onnx", (1, 2, 8))
    with TensorRtRuntime(folder / "engines", sidecar) as runtime:
        images = samples(2)
        expected = (images.astype(ml_dtypes.bfloat16).astype(np.float32) @ WEIGHT).astype(ml_dtypes.bfloat16)
        bf16 = type("BF16", (), {"name": "BF16"})
        monkeypatch.setattr(trt.ICudaEngine, "get_tensor_dtype", lambda *_: bf16)
        context: Any = runtime._context
        session = context._session
        context._session = type(
            "Session",
            (),
            {
                "get_outputs": lambda _: session.get_outputs(),
                "run": lambda _, names, feed: session.run(
                    names, {name: array.astype(np.float32) for name, array in feed.items()}
                ),
            },
        )()
        runtime._types = dict.fromkeys(runtime._types, ml_dtypes.bfloat16)
        found = runtime.run({"images": images})["logits"]
    assert found.dtype == np.float32
    assert (found == expected.astype(np.float32)).all()


def test_a_recorded_graph_gives_what_a_run_gives(cuda: Any, folder: Path) -> None:
    sidecar = write_engine(folder, "model.onnx", (1, 2, 8))
    images = samples(4)
    with TensorRtRuntime(folder / "engines", sidecar) as runtime:
        runtime.prepare({"images": images})
        replay = runtime.capture()
        cuda.LIVE[runtime._buffers["logits"][0]][:] = [0] * len(cuda.LIVE[runtime._buffers["logits"][0]])
        replay()
        np.testing.assert_allclose(runtime.outputs()["logits"], images @ WEIGHT, rtol=1e-4, atol=1e-5)


def test_shapes_outside_the_profile(cuda: Any, folder: Path) -> None:
    sidecar = write_engine(folder, "model.onnx", (2, 2, 4))
    with TensorRtRuntime(folder / "engines", sidecar) as runtime:
        for size in (1, 5):
            with pytest.raises(ExportError, match=rf"no profile of the engine takes images {size}x12") as caught:
                runtime.run({"images": samples(size)})
            assert caught.value.expected == "images 2x12 to 4x12"
        assert runtime.run({"images": samples(3)})["logits"].shape == (3, 5)
        with pytest.raises(UsageError, match="was given the inputs none"):
            runtime.run({})


@pytest.mark.parametrize(
    ("does", "error", "words"),
    [
        ("refuse", EnvironmentUnsuitable, "cannot load .*: the engine plan file is not compatible"),
        ("no context", EnvironmentUnsuitable, "no execution context .*: out of memory"),
        ("fail", ExportError, "refuses to run: an illegal memory access"),
    ],
)
def test_what_fails_says_why_in_tensorrts_words(
    does: str, error: type[Exception], words: str, folder: Path, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar = write_engine(folder, "model.onnx", (1, 2, 8))
    monkeypatch.setenv("FAKE_ENGINE", does)
    with pytest.raises(error, match=words), TensorRtRuntime(folder / "engines", sidecar) as runtime:
        runtime.run({"images": samples(1)})


def test_no_memory_is_said_and_frees_what_there_was(cuda: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = write_engine(folder, "model.onnx", (1, 2, 8))
    with TensorRtRuntime(folder / "engines", sidecar) as runtime:
        runtime.run({"images": samples(1)})
        monkeypatch.setenv("FAKE_MEMORY", "64")
        with pytest.raises(EnvironmentUnsuitable, match="CUDA failed: out of memory"):
            runtime.run({"images": samples(8)})
        monkeypatch.delenv("FAKE_MEMORY")
        assert runtime.run({"images": samples(8)})["logits"].shape == (8, 5)


class TestStripped:
    def test_it_gets_the_weights_of_the_recorded_file(self, cuda: Any, folder: Path) -> None:
        sidecar = write_engine(folder, "model.onnx", (1, 2, 8), strip_weights=True)
        with TensorRtRuntime(folder / "engines", sidecar) as runtime:
            images = samples(2)
            np.testing.assert_allclose(runtime.run({"images": images})["logits"], images @ WEIGHT, rtol=1e-4, atol=1e-5)

    def test_another_file_is_refused_before_it_is_read(
        self, cuda: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sidecar = write_engine(folder, "model.onnx", (1, 2, 8), strip_weights=True)
        monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
        save(folder / "model.onnx", weight=2 * WEIGHT)
        with pytest.raises(IntegrityError, match="not the file that the stripped engine was built from"):
            TensorRtRuntime(folder / "engines", sidecar)
        (folder / "model.onnx").unlink()
        with pytest.raises(IntegrityError, match="is missing"):
            TensorRtRuntime(folder / "engines", sidecar)
        assert "refit" not in (tmp_path / "calls").read_text()

    def test_external_data_outside_of_the_folder_is_refused(
        self, cuda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "bundle"
        folder.mkdir()
        save(folder / "model.onnx")
        sidecar = write_engine(folder, "model.onnx", (1, 2, 8), strip_weights=True)
        model = onnx.load(folder / "model.onnx")
        onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
        (folder / "model.data").rename(tmp_path / "model.data")
        (folder / "model.data").symlink_to(tmp_path / "model.data")
        monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
        with pytest.raises(IntegrityError, match="leaves the folder of the model"):
            TensorRtRuntime(folder / "engines", sidecar)
        assert "refit" not in (tmp_path / "calls").read_text()

    def test_a_refit_that_fails_is_said(self, cuda: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sidecar = write_engine(folder, "model.onnx", (1, 2, 8), strip_weights=True)
        monkeypatch.setenv("FAKE_ENGINE", "no refit")
        with pytest.raises(EnvironmentUnsuitable, match="cannot put the weights"):
            TensorRtRuntime(folder / "engines", sidecar)


def test_host_code_runs_only_where_it_is_allowed(
    cuda: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar = write_engine(folder, "model.onnx", (1, 2, 8), version_compatible=True)
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    with pytest.raises(EnvironmentUnsuitable, match="lean runtime") as caught:
        TensorRtRuntime(folder / "engines", sidecar)
    assert caught.value.hint == "--allow-engine-host-code"
    assert not (tmp_path / "calls").exists()
    with TensorRtRuntime(folder / "engines", sidecar, allow_host_code=True) as runtime:
        assert runtime.run({"images": samples(1)})["logits"].shape == (1, 5)


@pytest.mark.parametrize(
    ("changes", "gpu", "version", "words"),
    [
        ({"sha256": "0" * 64}, "NVIDIA L4|8|9", "10.13.3.9", "has changed"),
        ({"tensorrt": "10.13.3.8"}, "NVIDIA L4|8|9", "10.13.3.9", "as its header says"),
        ({}, "NVIDIA L4|8|9", "10.13.2.6", "was built by TensorRT 10.13.3.9, here is 10.13.2.6"),
        ({}, "NVIDIA L4|8|9", "11.4.0.106", "here is 11.4.0.106"),
        ({}, "NVIDIA A10|8|6", "10.13.3.9", r"was built on NVIDIA L4 \(compute capability 8.9\), here is NVIDIA A10"),
        ({}, "none", "10.13.3.9", "there is no GPU"),
    ],
)
def test_what_does_not_fit_is_never_shown_to_tensorrt(
    changes: dict[str, Any], gpu: str, version: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed():
        sidecar = rewritten(folder, write_engine(folder, "model.onnx", (1, 2, 8)), **changes)
    calls = folder / "calls"
    expected = IntegrityError if changes else EnvironmentUnsuitable
    with installed(FAKE_GPU=gpu, FAKE_TENSORRT_VERSION=version, FAKE_CALLS=str(calls)):
        with pytest.raises(expected, match=words):
            TensorRtRuntime(folder / "engines", sidecar)
        assert not calls.exists()


def test_memory_and_stream_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine's CPU: what PyTorch allocates as ``cuda`` is in host memory."""
    import torch

    class Stream:
        cuda_stream = 77

        def synchronize(self) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    real = torch.empty

    def empty(size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        assert device == "cuda"
        if size > 100:
            raise RuntimeError("CUDA out of memory. Tried to allocate 400 bytes")
        return real(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    device = Device()
    assert device.stream == 77
    address = device.allocate(64)
    given = np.broadcast_to(np.float32(3), (4,)).astype(ml_dtypes.bfloat16)
    given.flags.writeable = False
    device.upload(address, given)
    found = np.zeros(4, ml_dtypes.bfloat16)
    device.download(address, found)
    device.synchronize()
    assert (found == given).all()
    with pytest.raises(EnvironmentUnsuitable, match="CUDA failed: CUDA out of memory"):
        device.allocate(400)
    device.free(address)
    with pytest.raises(KeyError):
        device.download(address, found)
    device.close()


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
        monkeypatch.setattr("deploycli.exporters.tensorrt.runtime.MOST_KERNEL_BYTES", len(good) - 1)
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
    from deploycli.exporters.build_trt import EngineOptions, build_all
    from deploycli.exporters.bundle.bundle import Bundle

    bundle = bundles.make(tmp_path)
    (built,) = build_all([Bundle.open(bundle.path)], EngineOptions(("fp32",), product=RTX), progress=lambda *_: None)
    monkeypatch.setattr(library, "has_driver", lambda: True)
    monkeypatch.setattr(library, "gpu", lambda: GpuRecord("NVIDIA L4", (8, 9), "550.54.14"))
    with pytest.raises(EnvironmentUnsuitable, match=r"TensorRT for RTX [\d.]+ cannot load .*cudaError 35"):
        open_engine(built.engine.path.parent, built.engine.sidecar)
