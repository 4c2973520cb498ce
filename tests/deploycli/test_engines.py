"""Real engines on a machine that has a GPU for them, through the real command line: all but what the GPU computes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploycli.exporters.build_trt import EngineOptions, build_all
from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.bundle.engine import GpuRecord
from deploycli.exporters.export import ExportOptions, export
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.settings import BuildSettings, ShapeOptions, ShapeRange
from deploycli.exporters.tensorrt import library
from tests.deploycli.commands import assert_refused, files
from tests.deploycli.conftest import SMALLEST, registered
from tests.exporters import engines as others
from tests.exporters.lint.rtx import WHY
from tests.exporters.tensorrt.double import Engine

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.commands import Result
    from tests.deploycli.conftest import Command

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)

L4 = GpuRecord("NVIDIA L4", (8, 9), "550.54.14")


def compiled(path: Path, *precisions: str, batch: tuple[int, int, int] = (1, 2, 8)) -> Path:
    request = EngineOptions(precisions, ShapeOptions(batch), product=RTX)
    list(build_all([Bundle.open(path)], request, progress=lambda *_: None))
    return path


@pytest.fixture(scope="module")
def made(true_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(shutil.copytree(true_bundle.path, tmp_path_factory.mktemp("made") / "smallest"), "fp32", "fp16")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An L4, and what runs engines on it."""
    monkeypatch.setattr(library, "has_driver", lambda: True)
    monkeypatch.setattr(library, "gpu", lambda: L4)
    monkeypatch.setattr(Engine, "opened", [], raising=False)
    monkeypatch.setattr(Engine, "wrong", False, raising=False)
    for place in ("verify.open_engine", "bench.engines.open_engine", "tensorrt.runtime.RtxRuntime"):
        monkeypatch.setattr(f"deploycli.exporters.{place}", Engine)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of it where the commands look for one."""
    return shutil.copytree(made, tmp_path / "artifacts" / "smallest")


@pytest.fixture
def plans(bundle: Path) -> dict[str, Path]:
    return {precision: next(bundle.glob(f"engines/{precision}-*.plan")) for precision in ("fp32", "fp16")}


def report(result: Result) -> dict[str, Any]:
    (found,) = json.loads(result.out)
    assert isinstance(found, dict)
    return found


def test_the_very_plans_are_judged_on_the_same_sweep(plans: dict[str, Path], deploycli: Command) -> None:
    for reference in ("eager", "golden"):
        found = report(deploycli("verify", "--json", "--engines", "all", "--reference", reference))
        assert (found["passed"], found["reference"], found["not_judged"], found["notes"]) == (True, reference, [], [])
        names = [f"engines/{plans[precision].name}" for precision in ("fp16", "fp32")]
        order = list(dict.fromkeys(stage["artifact"] for stage in found["stages"]))
        assert order == ["model.onnx", "model.fp16.onnx", *names]
        checks = {path: [s["check"] for s in found["stages"] if s["artifact"] == path] for path in order}
        assert {tuple(each) for each in checks.values()} == {("batch 1", "batch 3", "batch 8", "batch 8 shuffled")}
        runtimes = {stage["runtime"] for stage in found["stages"] if stage["artifact"] in names}
        assert runtimes == {f"TensorRT for RTX {library.version(RTX)}"}
    shown = deploycli("verify")
    assert shown.out.count(names[0]) == 4
    assert "NOT JUDGED" not in shown.out


def test_they_are_timed(bundle: Path, deploycli: Command) -> None:
    rows = report(deploycli("bench", "--only", "rtx", "--rounds", "2", "--warmup", "1", "--json"))["measurements"]
    assert {(row["name"], row["precision"], row["batch"]) for row in rows} == {
        ("rtx", precision, batch) for precision in ("fp32", "fp16") for batch in (1, 8)
    }
    assert all(row["first_load"]["compiling_seconds"] > 0 for row in rows)
    Engine.wrong = True
    refused = deploycli("bench", "--only", "rtx", "--rounds", "1", "--batches", "8", "--warmup", "1")
    assert_refused_with_figures(refused, 5, "not timed, because the outputs are wrong")


def assert_refused_with_figures(result: Result, code: int, words: str) -> None:
    assert result.code == code
    assert words in result.err


def test_zeros_at_larger_batches_name_the_engine(plans: dict[str, Path], deploycli: Command) -> None:
    Engine.wrong = True
    result = deploycli("verify")
    assert result.code == 5
    assert f"FAILED engines/{plans['fp16'].name} in TensorRT for RTX {library.version(RTX)}, batch 3" in result.out
    assert "FAILED model" not in result.out


def test_another_gpu(plans: dict[str, Path], deploycli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "gpu", lambda: GpuRecord("NVIDIA H100", (9, 0)))
    result = deploycli("verify")
    assert result.code == 0
    name = plans["fp16"].name
    reason = "is for compute capability 8.0, 8.6, 8.9, 12.0 and 12.1, here is NVIDIA H100 (9.0)"
    assert f"NOT JUDGED engines/{name}: {name} {reason}" in result.out
    assert_refused(deploycli("verify", "--engines", "all"), 7, "NVIDIA H100", "--compiler tensorrt, on this machine")
    assert Engine.opened == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("content", "has changed"),
        ("no plan", "is missing, its sidecar is there"),
        ("no sidecar", "has no sidecar"),
        ("link", "is a link that leaves the bundle"),
        ("folder", "is a link that leaves the bundle"),
        ("sidecar", "is no JSON"),
        ("header", "as its header says"),
    ],
)
def test_what_was_tampered_with_is_never_opened(
    spoil: str, words: str, plans: dict[str, Path], deploycli: Command, tmp_path: Path
) -> None:
    plan = plans["fp16"]
    sidecar = plan.with_suffix(".json")
    if spoil == "content":
        plan.write_bytes(plan.read_bytes()[:-1] + b"\0")
    elif spoil == "no plan":
        plan.unlink()
    elif spoil == "no sidecar":
        sidecar.unlink()
    elif spoil == "link":
        plan.rename(tmp_path / "elsewhere.plan")
        plan.symlink_to(tmp_path / "elsewhere.plan")
    elif spoil == "folder":
        plan.parent.rename(tmp_path / "elsewhere")
        plan.parent.symlink_to(tmp_path / "elsewhere")
    elif spoil == "sidecar":
        sidecar.write_text(sidecar.read_text()[:-20])
    else:
        content = plan.read_bytes()[:24] + bytes((1, 6, 1, 120)) + plan.read_bytes()[28:]
        plan.write_bytes(content)
        data = json.loads(sidecar.read_text())
        sidecar.write_text(json.dumps({**data, "sha256": hashlib.sha256(content).hexdigest()}))
    for command in (("verify",), ("bench", "--only", "rtx", "--rounds", "1")):
        assert_refused(deploycli(*command), 8, words)
    assert plan.name not in Engine.opened


def test_another_graph_is_said_and_engines_outlive_a_cast(
    bundle: Path, plans: dict[str, Path], deploycli: Command
) -> None:
    before = files(bundle / "engines")
    assert deploycli("cast", "smallest", "--keep-fp32", "fc1").code == 0
    assert files(bundle / "engines") == before
    result = deploycli("verify", "--batches", "1")
    assert result.code == 0
    assert f"{plans['fp16'].name} was built from another model.fp16.onnx than the bundle holds now" in result.out


def test_exporting_again_keeps_them_and_another_graph_drops_them(
    bundle: Path, plans: dict[str, Path], deploycli: Command, smallest: str, checkpoint: Path
) -> None:
    options = ("--name", "smallest", "--checkpoint", checkpoint)
    built = files(bundle / "engines")
    again = deploycli("export", smallest, *options)
    assert again.code == 0
    assert "gone with it" not in again.err
    assert files(bundle / "engines") == built
    other = deploycli("export", smallest, *options, "--batch", 4, "--json")
    gone = sorted(f"engines/{plan.name}" for plan in plans.values())
    assert other.json()["gone"] == [*gone, "model.fp16.onnx", "reports/"]
    assert "held another model.onnx; gone with it: engines/" in other.err
    assert not (bundle / "engines").exists()


def test_batches_outside_of_the_profile_are_left_out(true_bundle: Bundle, tmp_path: Path, deploycli: Command) -> None:
    compiled(shutil.copytree(true_bundle.path, tmp_path / "artifacts/smallest"), "fp32", batch=(2, 4, 6))
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((9, 3, 16, 16), np.float32))
    assert "takes batches 2 to 6: batch 1, 8 left out" in deploycli("verify").out
    found = report(deploycli("verify", "--json", "--batches", "1,8", "--images", tmp_path / "data.npy"))
    stages = [stage for stage in found["stages"] if stage["artifact"].startswith("engines/")]
    assert [stage["check"] for stage in stages] == ["batch 2", "batch 2 shuffled", "images"]
    assert (stages[-1]["samples"], stages[-1]["passed"]) == (9, True)


def test_an_engine_with_host_code_needs_a_word_of_trust(
    bundle: Path, deploycli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is TensorRT's alone."""
    shape = ShapeRange((1, 3, 16, 16), (2, 3, 16, 16), (8, 3, 16, 16))
    opened = Bundle.open(bundle)
    settings = BuildSettings({"images": shape}, version_compatible=True)
    io = others.io((1, 2, 8), "float32")
    images = others.IoTensor("images", "input", "float32", (-1, 3, 16, 16), (shape.min, shape.opt, shape.max))
    made = others.build(opened, "fp32", settings=settings, io=(images, *io[1:]))
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=others.TENSORRT))
    result = deploycli("verify", "--batches", "1")
    assert f"NOT JUDGED engines/{made.plan}: " in result.out
    assert "lean runtime" in result.out
    assert made.plan not in Engine.opened
    assert "NOT JUDGED" not in deploycli("verify", "--batches", "1", "--allow-engine-host-code", "--engines", "all").out


def test_int8_comes_with_fp16(tmp_path: Path, deploycli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SMALLEST, "embed_dim", 32)  # large enough for INT8
    with registered() as name:
        wider = export(ExportOptions(name, tmp_path / "artifacts", name="wider")).path
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((8, 3, 16, 16), np.float32))
    options = ("build-trt", "--compiler", "rtx", "--precision", "int8", "--gpu", "ada")
    built = deploycli(*options, "--calibrate", tmp_path / "data.npy", "--json").json()
    assert [engine["precision"] for engine in built] == ["fp16", "int8"]
    assert built[1]["sidecar"]["assertions"] == ["int8>=8%"]  # half of 2 in 12: query, key and value are one kernel
    assert built[1]["sidecar"]["layers"]["products_per_type"]["int8"] == 2
    assert sorted(path.suffix for path in (wider / "engines").iterdir()) == [*2 * [".json"], *2 * [".plan"]]
    result = deploycli(*options, "--allow-random-calibration", "--samples", "4")
    assert result.code == 0, result.err
    assert "NOT FOR RELEASE: calibrated on random data" in result.out
    assert "NOT FOR RELEASE engines/int8" in deploycli("verify", "--batches", "1").out


def test_the_wrong_precision_is_not_kept(bundle: Path, deploycli: Command) -> None:
    before = files(bundle / "engines")
    options = ("--compiler", "rtx", "--gpu", "ada", "--keep-fp32", "fc", "--assert-precision", "fp16>=95%")
    refused = deploycli("build-trt", *options)
    assert_refused(refused, 6, "of 14 products are fp16 (", "expected fp16>=95%", "--assert-precision")
    assert files(bundle / "engines") == before
    assert (bundle / "reports/build-fp16/layers.json").is_file()


def test_what_cannot_be_written(true_bundle: Bundle, tmp_path: Path, deploycli: Command) -> None:
    bundle = shutil.copytree(true_bundle.path, tmp_path / "artifacts/smallest")
    build = ("build-trt", "--compiler", "rtx", "--precision", "fp32", "--gpu", "ada")
    (bundle / "engines").write_text("a file")
    assert_refused(deploycli(*build), 7, "cannot write")
    assert not list(bundle.rglob("*.plan"))
    (bundle / "engines").unlink()
    shutil.rmtree(bundle / "reports")
    (bundle / "reports").write_text("a file")
    assert_refused(deploycli(*build), 7, "cannot write")
