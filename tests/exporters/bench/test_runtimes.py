"""PyTorch and ONNX Runtime as candidates; of a GPU what a CPU can show."""

from __future__ import annotations

import shutil
import warnings
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from deploycli.exporters.bench import ort as ort_module
from deploycli.exporters.bench import pytorch
from deploycli.exporters.bench.candidate import BenchOptions
from deploycli.exporters.bench.ort import ort_candidates
from deploycli.exporters.bench.pytorch import pytorch_candidates, torch_threads
from deploycli.exporters.bench.run import bench
from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.bundle.golden import load_golden
from deploycli.exporters.cast import cast_bundle
from deploycli.exporters.export import ExportOptions, export
from deploycli.exporters.precision.options import CastOptions
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.models.errors import EnvironmentUnsuitable, ExportError, IntegrityError, UsageError
from deploycli.models.spec import Weights
from tests.deploycli.conftest import registered, save_checkpoint
from tests.exporters.bundle.bundles import SPEC, make, truth

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from deploycli.exporters.bench.candidate import Candidate

OPTIONS = BenchOptions()
QUICK = BenchOptions(batches=(2,), rounds=3, warmup_runs=1)
IMAGES = np.random.default_rng(0).standard_normal((3, *SPEC.inputs[0].shape)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    """Import it before a test does, for which the warnings of PyTorch's own imports would be errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._dynamo
        import torch._inductor.compile_fx  # noqa: F401


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The smallest Swin in FP32 and FP16; its weights are in a file beside it."""
    folder = tmp_path_factory.mktemp("swin")
    with registered() as name:
        bundle = export(ExportOptions(name, folder, checkpoint=save_checkpoint(folder)))
    return cast_bundle(bundle, CastOptions()).bundle


@pytest.fixture
def linear(tmp_path: Path) -> Bundle:
    return make(tmp_path)


def pick(candidates: Iterable[Candidate], name: str, precision: str = "fp32") -> Candidate:
    (found,) = (c for c in candidates if (c.name, c.precision) == (name, precision))
    return found


# --- PyTorch ---


def test_eager_is_timed_and_its_outputs_are_the_golden_ones(swin: Bundle) -> None:
    inputs, expected = load_golden(swin.golden)
    eager = pick(pytorch_candidates(swin, OPTIONS), "eager")
    assert (eager.device, eager.artifact, eager.emulated) == ("cpu", "", "")
    with eager.open() as prepare:
        prepared = prepare(inputs)
        prepared.run()
        outputs = prepared.outputs()
    np.testing.assert_allclose(outputs["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
    assert (prepared.threads, prepared.transfers, prepared.cuda_graph) == (torch.get_num_threads(), "none", False)


def test_half_precision_converts_before_it_is_timed(swin: Bundle) -> None:
    """What a GPU does, here on the CPU, which no provider offers."""
    inputs, expected = load_golden(swin.golden)
    models = pytorch._Models(swin, OPTIONS, "cpu")
    with pytorch._open(models, "fp16", OPTIONS, compiled=False) as prepare:
        prepared = prepare(inputs)
        assert {p.dtype for p in models._built["fp16"].module.parameters()} == {torch.float16}
        outputs = prepared.outputs()
    assert outputs["logits"].dtype == np.float32
    np.testing.assert_allclose(outputs["logits"], expected["logits"], atol=0.02 * np.abs(expected["logits"]).max())
    assert not models._built


def test_gpu_offers_half_precision_too(swin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = [(c.name, c.precision, c.device) for c in pytorch_candidates(swin, OPTIONS)]
    assert found == [(n, p, "cuda") for p in ("fp32", "fp16") for n in ("eager", "compile")]


@pytest.mark.parametrize(("wanted", "mode"), [(True, "reduce-overhead"), (False, None)])
def test_gpu_is_waited_for_and_graphs_are_replayed(
    swin: Bundle, monkeypatch: pytest.MonkeyPatch, wanted: bool, mode: str | None
) -> None:
    """Everything but the device itself: its calls are counted, and the tensors stay on the CPU."""
    waits: list[None] = []
    modes: list[str | None] = []

    def compiled(module: torch.nn.Module, *, dynamic: bool, mode: str | None) -> torch.nn.Module:
        modes.append(mode)
        assert not dynamic
        return module

    convert = torch.tensor
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch, "tensor", lambda array, device: convert(array))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, _device: self)
    options = replace(OPTIONS, cuda_graph=wanted)
    inputs, _ = load_golden(swin.golden)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with pytorch._open(pytorch._Models(swin, options, "cuda"), "fp32", options, compiled=True) as prepare:
        assert not torch.backends.cudnn.allow_tf32
        prepared = prepare(inputs)
        prepared.run()
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert len(waits) == 2
    assert modes == [mode]
    assert (prepared.transfers, prepared.cuda_graph, prepared.notes) == ("excluded", wanted, ("TF32 off",))


def test_compiled_module_runs_as_it_was_traced(swin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo for real, at two batch sizes; Inductor, which needs half a minute, is left out."""
    compile_, graphs = torch.compile, []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda module, dynamic, mode: compile_(module, dynamic=dynamic, backend=backend)
    )
    report = bench(swin, replace(QUICK, only=("eager", "compile"), batches=(2, 3)))
    assert [(r.measurement.candidate.name, r.measurement.batch) for r in report.rows] == [
        ("eager", 2),
        ("compile", 2),
        ("eager", 3),
        ("compile", 3),
    ]
    assert len(graphs) == 2
    assert not report.absences or {a.candidate.name for a in report.absences} == {"ort-cuda"}


def test_no_cpp_compiler_is_a_reason(swin: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before is found
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setattr(inductor, "compile_threads", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own
        report = bench(swin, QUICK)
    assert {row.measurement.candidate.label for row in report.rows} == {"eager fp32", "ort-cpu fp32", "ort-cpu fp16"}
    (reason,) = (a.reason for a in report.absences if a.candidate.name == "compile")
    assert "compiler" in reason
    assert "\n" not in reason


def test_another_checkpoint_is_refused(swin: Bundle, tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"other weights")
    with pytest.raises(IntegrityError, match="is not the checkpoint"):
        bench(swin, replace(QUICK, checkpoint=tmp_path / "other.pth"))


def test_checkpoint_of_a_random_model_is_refused(swin: Bundle, tmp_path: Path) -> None:
    bundle = replace(swin, manifest=replace(swin.manifest, weights=Weights("random", seed=0)))
    with pytest.raises(UsageError, match="a bundle of random weights"):
        bench(bundle, replace(QUICK, checkpoint=tmp_path / "any.pth"))


def test_module_is_built_once_for_all_that_run_it(swin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = pytorch.reference_model
    monkeypatch.setattr(
        pytorch, "reference_model", lambda *args, **kwargs: built.append(1) or original(*args, **kwargs)
    )
    candidates = list(pytorch_candidates(swin, OPTIONS))
    with ExitStack() as stack:
        for candidate in candidates:
            stack.enter_context(candidate.open())
    assert len(built) == 1
    with candidates[0].open():
        assert len(built) == 2  # it was not kept in memory


def test_module_that_fails_says_why(swin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploycli.models.swin import SwinTransformer

    def forward(*_: object) -> None:
        raise RuntimeError("out of memory\nand a long story")

    monkeypatch.setattr(SwinTransformer, "forward", forward)
    with (
        pick(pytorch_candidates(swin, OPTIONS), "eager").open() as prepare,
        pytest.raises(EnvironmentUnsuitable, match=r"^PyTorch failed: out of memory$"),
    ):
        prepare(load_golden(swin.golden)[0])


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_threads_of_pytorch_come_back(threads: int | None) -> None:
    before = torch.get_num_threads()
    with torch_threads(threads):
        assert torch.get_num_threads() == (threads or before)
    assert torch.get_num_threads() == before


# --- ONNX Runtime ---


def test_emulated_precision_is_marked(swin: Bundle) -> None:
    found = list(ort_candidates(swin, OPTIONS))
    assert pick(found, "ort-cpu").emulated == ""
    assert pick(found, "ort-cpu", "fp16").emulated == "ONNX Runtime's CPU provider computes FP16 in FP32"
    assert pick(found, "ort-cuda", "fp16").emulated == ""


def test_quantized_graph_is_int8_on_a_cpu_and_not_on_a_gpu(tmp_path: Path) -> None:
    found = list(ort_candidates(make(tmp_path, precision="int8"), OPTIONS))
    assert pick(found, "ort-cpu", "int8").emulated == ""
    assert "dequantizes" in pick(found, "ort-cuda", "int8").emulated


def test_fp16_inputs_are_converted_before_they_are_timed(swin: Bundle, tmp_path: Path) -> None:
    copy = Bundle.open(shutil.copytree(swin.path, tmp_path / "copy"))
    bundle = cast_bundle(copy, CastOptions(reduce_io=True)).bundle
    report = bench(bundle, replace(QUICK, only=("ort-cpu",)))
    assert [row.measurement.candidate.precision for row in report.rows] == ["fp32", "fp16"]


@pytest.mark.parametrize("how", [ort_module._host_run, ort_module._bound_run])
def test_outputs_are_of_the_last_run(linear: Bundle, how: Any) -> None:
    """Bound memory too, which is meant for a GPU, can lie on the host."""
    with OrtRuntime(linear.path / "model.onnx") as runtime:
        run, outputs = how(runtime, "cpu", {"images": IMAGES})
        for _ in range(3):
            run()
        assert set(outputs()) == set(SPEC.outputs)
        for name, expected in truth(IMAGES).items():
            np.testing.assert_allclose(outputs()[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("threads", "expected"), [(None, 0), (3, 3)])
def test_session_gets_the_threads_and_does_not_spin_on(
    linear: Bundle, monkeypatch: pytest.MonkeyPatch, threads: int | None, expected: int
) -> None:
    seen = []
    original = ort.InferenceSession

    def session(path: Path, settings: ort.SessionOptions, **options: object) -> object:
        spinning = settings.get_session_config_entry("session.force_spinning_stop")
        seen.append((settings.intra_op_num_threads, spinning))
        return original(path, settings, **options)

    monkeypatch.setattr(ort, "InferenceSession", session)
    with pick(ort_candidates(linear, replace(OPTIONS, threads=threads)), "ort-cpu").open() as prepare:
        assert prepare({"images": IMAGES}).threads == threads
    assert seen == [(expected, "1")]


def test_no_cuda_provider_is_a_reason(linear: Bundle) -> None:
    with pytest.raises(EnvironmentUnsuitable, match="no CUDAExecutionProvider"):
        pick(ort_candidates(linear, OPTIONS), "ort-cuda").open().__enter__()


def test_silent_fall_back_on_the_cpu_is_refused(linear: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def session(_path: Path, _settings: object, *, providers: list[tuple[str, dict[str, str]]]) -> object:
        asked.extend(providers)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", session)
    with pytest.raises(EnvironmentUnsuitable, match="could not start its CUDAExecutionProvider"):
        pick(ort_candidates(linear, OPTIONS), "ort-cuda").open().__enter__()
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"})]


def test_file_that_does_not_load_or_run_is_a_reason(linear: Bundle) -> None:
    with pick(ort_candidates(linear, OPTIONS), "ort-cpu").open() as prepare, pytest.raises(ExportError, match="failed"):
        prepare({"images": IMAGES[:, :5]})
    (linear.path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UsageError, match=r"model\.onnx is no ONNX file"):
        pick(ort_candidates(linear, OPTIONS), "ort-cpu").open().__enter__()
