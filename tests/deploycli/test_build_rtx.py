"""From a bundle to a real engine and its verification on a machine without a GPU, through the real command line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.deploycli.commands import assert_refused, files
from tests.exporters.lint.rtx import WHY
from tests.exporters.precision.tiny import make

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.bundle.bundle import Bundle
    from tests.deploycli.conftest import Command

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)

PRECISIONS = ("fp32", "fp16", "bf16")


@pytest.fixture(autouse=True)
def _no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploycli.exporters.tensorrt.library.has_driver", lambda: False)


@pytest.fixture(scope="module")
def made(true_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines of every precision that needs no data."""
    from deploycli.exporters.build_trt import EngineOptions, build_all
    from deploycli.exporters.bundle.bundle import Bundle as Opened
    from deploycli.exporters.target.product import RTX

    path = shutil.copytree(true_bundle.path, tmp_path_factory.mktemp("made") / "smallest")
    built = list(build_all([Opened.open(path)], EngineOptions(PRECISIONS, product=RTX), progress=lambda *_: None))
    assert not any(engine.kept for engine in built)
    return path


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of it where the commands look for one."""
    return shutil.copytree(made, tmp_path / "artifacts" / "smallest")


@pytest.fixture
def plans(bundle: Path) -> dict[str, Path]:
    return {precision: next(bundle.glob(f"engines/{precision}-*.plan")) for precision in PRECISIONS}


def sidecar(plan: Path) -> dict[str, Any]:
    found = json.loads(plan.with_suffix(".json").read_text())
    assert isinstance(found, dict)
    return found


def test_fp8_for_a_target(tmp_path: Path, deploycli: Command) -> None:
    """Calibrated, built with FP16 beside it, proven, and refused for GPUs that have no FP8."""
    bundle = make(tmp_path / "artifacts").path
    given = ("tiny", "--precision", "fp8", "--allow-random-calibration", "--samples", "4")
    built = deploycli("build-trt", "--gpu", "ada", *given)
    assert built.code == 0, built.err
    (plan,) = bundle.glob("engines/fp8-*.plan")
    assert len(list(bundle.glob("engines/fp16-*.plan"))) == 1
    found = sidecar(plan)
    assert found["layers"]["products_per_type"]["fp8"] == 2  # the attention's projection, and the MLP's second layer
    assert [*found["assertions"]] == ["fp8>=12%"]
    assert_refused(deploycli("build-trt", "--gpu", "ampere", *given), 2, "FP8 was asked for")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_proven_over_all_products(plans: dict[str, Path], precision: str) -> None:
    found = sidecar(plans[precision])
    layers = found["layers"]
    # A convolution, in each of two blocks four products and two of the attention, a head. Heads of four channels are
    # not fused, and multiplied by generated kernels; the convolution is FP32 in a BF16 engine.
    products = {"bf16": 13, "fp32": 1} if precision == "bf16" else {precision: 14}
    assert layers["products_per_type"] == layers["products"] == products
    assert (layers["products_not_found"], layers["moved_unknown"], layers["fused_attention"]) == (0, 0, 0)
    assert found["assertions"] == [f"{precision}>={90 if precision == 'fp32' else 80}%"]
    assert (found["compiler"], found["gpu"]) == ("rtx", None)
    assert found["targets"] == [[8, 0], [8, 6], [8, 9], [12, 0], [12, 1]]  # Turing only where it is named
    modules = {kernel["module"] for kernel in found["kernels"]}
    assert {"layers.0.blocks.0.attn", "layers.0.blocks.1.mlp.fc1", "head"} <= modules


def test_nothing_changed_is_nothing_done(bundle: Path, plans: dict[str, Path], deploycli: Command) -> None:
    before = files(bundle)
    result = deploycli("build-trt")
    assert result.code == 0, result.err
    assert "nothing was done" in result.out
    assert files(bundle) == before
    (built,) = deploycli("build-trt", "--json").json()
    assert built["kept"] is True


def test_what_was_changed_is_built_again_to_the_same_bytes(
    bundle: Path, plans: dict[str, Path], deploycli: Command
) -> None:
    plan = plans["fp16"]
    content = plan.read_bytes()
    plan.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_refused(deploycli("verify"), 8, "has changed")
    (built,) = deploycli("build-trt", "--json").json()
    assert built["kept"] is False
    assert plan.read_bytes() == content
    (other,) = deploycli("build-trt", "--batch", "1:2:4", "--json").json()
    assert other["kept"] is False


def test_targets_by_name(bundle: Path, deploycli: Command) -> None:
    result = deploycli("build-trt", "--gpu", "ada", "--gpu", "rtx-3090", "--verbose")
    assert result.code == 0, result.err
    assert "\n[V] " in (bundle / "reports/build-fp16/builder.log").read_text()
    assert "compute capability 8.6 and 8.9" in result.out
    assert next(bundle.glob("engines/fp16-sm86-sm89-rtx*.plan")).is_file()
    planned = deploycli("build-trt", "--dry-run", "--precision", "bf16")
    assert "by TensorRT for RTX" in planned.out
    assert "for compute capability 8.0, 8.6, 8.9, 12.0 and 12.1" in planned.out


def test_every_profile_has_kernels_of_its_own(bundle: Path, deploycli: Command) -> None:
    (built,) = deploycli("build-trt", "--batch", "1", "--batch", "2:4:8", "--json").json()
    found = built["sidecar"]
    kernels = {place: [k for k in found["kernels"] if k["profile"] == place] for place in (0, 1)}
    assert sum(map(len, kernels.values())) == len(found["kernels"])
    for group in kernels.values():
        assert sum(kernel["product"] for kernel in group) >= 14
        assert all(kernel["moved"] for kernel in group)
    assert found["layers"]["launches"] == len(kernels[0])
    assert deploycli("build-trt", "--batch", "1", "--batch", "2:4:8", "--json").json()[0]["kept"] is True
    shown = deploycli("inspect", built["plan"])
    assert "or         images 2x3x16x16 / 4x3x16x16 / 8x3x16x16 " in shown.out
    assert f"\nimages 2x3x16x16 / 4x3x16x16 / 8x3x16x16 {len(kernels[1])} launches move" in shown.out
    assert shown.out.count("\nmodule ") == 2
    assert_refused(deploycli("build-trt", "--batch", "1", "--batch", "4:8:8"), 2, "no profile takes batch 2 to 3")


def test_verify_says_what_is_known_of_engines_that_did_not_run(
    bundle: Path, plans: dict[str, Path], deploycli: Command
) -> None:
    result = deploycli("verify", "--batches", "1")
    assert result.code == 0, result.err
    digest = sidecar(plans["fp16"])["onnx_sha256"]
    assert f"NOT JUDGED engines/{plans['fp16'].name}: it was not run here" in result.out
    assert f"compiled from model.fp16.onnx (sha256 {digest[:12]}), which passed 1 check" in result.out
    assert "3 engines not run here, and so not judged" in result.out
    refused = deploycli("verify", "--engines", "all")
    assert_refused(refused, 7, "it was not run here", "no NVIDIA driver", "--engines auto")
    assert deploycli("cast", "smallest", "--keep-fp32", "fc1").code == 0
    (report,) = deploycli("verify", "--batches", "1", "--json").json()
    origins = {engine["onnx"]: engine["origin"] for engine in report["not_judged"]}
    assert origins["model.fp16.onnx"].endswith("which is not the file that the bundle holds now")
    assert report["passed"]


def test_inspect_shows_kernels_by_module(bundle: Path, plans: dict[str, Path], deploycli: Command) -> None:
    fp16, fp32 = plans["fp16"], plans["fp32"]
    shown = deploycli("inspect", fp16)
    assert shown.code == 0, shown.err
    totals = sidecar(fp16)["layers"]
    assert f"{totals['launches']} launches move" in shown.out
    assert "layers.0.blocks.0" in shown.out
    assert "layers.0.blocks.0.attn.qkv/MatMul" in deploycli("inspect", fp16, "-v").out
    both = deploycli("inspect", fp16, "--against", fp32)
    assert f"{totals['launches']}" in both.out.splitlines()[-1]
    data = deploycli("inspect", fp16, "--json").json()
    assert sum(module["launches"] for module in data["modules"].values()) == totals["launches"]
    assert sum(module["moved"] for module in data["modules"].values()) == totals["moved"]
    whole = deploycli("inspect", "smallest").out
    assert all(f"engines/{plan.name}" in whole for plan in plans.values())
    assert whole.count("launches move") == 3
    assert "another than the bundle holds now" not in whole
    files_ = [bundle / "model.onnx", bundle / "model.fp16.onnx"]
    assert "all nodes" in deploycli("inspect", files_[0], "--against", files_[1]).out
    assert_refused(deploycli("inspect", fp16, "--against", files_[0]), 2, "cannot be shown against")
    assert_refused(deploycli("inspect", bundle / "engines/none.plan"), 2, "there is no engine")
    fp16.with_suffix(".json").unlink()
    assert_refused(deploycli("inspect", fp16), 8, "has no sidecar")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workspace", "1G"], "--workspace was given"),
        (["--builder-optimization-level", "3"], "--builder-optimization-level was given"),
        (["--hardware-compatibility", "ampere+"], "--gpu names"),
        (["--version-compatible"], "--version-compatible was given"),
        (["--strip-weights"], "without a GPU"),
        (["--max-aux-streams", "0"], "--max-aux-streams was given"),
        (["--timing-cache", "timings/"], "measures no kernels"),
        (["--tf32"], "--tf32 was given"),
        (["--gpu", "h100"], "compute capability 9.0, for which TensorRT for RTX does not compile"),
        (["--gpu", "abacus"], "names no GPU that is known"),
        (["--precision", "bf16", "--gpu", "turing"], "has BF16, which TensorRT for RTX does not compile for"),
        (["--precision", "fp32", "--gpu", "7.5"], "has FP32 products, which"),
        (["--compiler", "tensorrt", "--gpu", "ada"], "TensorRT builds for the GPU of this machine"),
    ],
)
def test_what_it_lacks_is_refused_by_name(options: list[str], words: str, bundle: Path, deploycli: Command) -> None:
    before = files(bundle)
    assert_refused(deploycli("build-trt", *options), 2, words)
    assert files(bundle) == before


def test_lint_for_gpus(bundle: Path, deploycli: Command) -> None:
    assert deploycli("lint", bundle / "model.bf16.onnx", "--gpu", "ada").code == 0
    result = deploycli("lint", bundle / "model.bf16.onnx", "--gpu", "t4")
    assert result.code == 3
    assert "TensorRT for RTX compiles no BF16 for compute capability 7.5" in result.out


def test_triton_cannot_serve_it_and_onnx_runtime_its_graph(
    bundle: Path, plans: dict[str, Path], deploycli: Command
) -> None:
    assert deploycli("verify", "--batches", "1").code == 0
    refused = deploycli("package", "--triton", "models", "--flavour", "tensorrt")
    assert_refused(refused, 2, "holds no TensorRT engine but of TensorRT for RTX", "--ort-rtx DIR", "--flavour onnx")
    written = deploycli("package", "--ort-rtx", "served")
    assert written.code == 0, written.err
    assert f"1x3x16x16 / images:8x3x16x16 / images:32x3x16x16, those of {plans['fp16'].name}" in written.out
    assert written.out.splitlines()[-1] == "next: python served/smallest/load.py"
    (found,) = deploycli("package", "--ort-rtx", "served", "--engine", plans["bf16"].name, "--json").json()
    assert (found["precision"], found["engine"], found["verified"]) == ("bf16", plans["bf16"].name, "ok")
    assert (
        json.loads((bundle.parents[1] / "served/smallest/onnxruntime.json").read_text())["deploycli"]["proof"] == "ok"
    )
    assert_refused(deploycli("package", "--ort-rtx", "served", "--max-batch", "4"), 2, "--max-batch is of --triton")
    assert_refused(deploycli("package", "--ort-rtx", "a", "--triton", "b"), 2, "one of them")
    assert_refused(deploycli("package"), 2, "--triton DIR or --ort-rtx DIR")
