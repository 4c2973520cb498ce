"""From a bundle to a proven engine through the real command line, with a stand-in for TensorRT whose plans run."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from onnx import helper

from exporters.export import ExportRequest, export
from tests.deploycli.commands import assert_refused, files, run, start
from tests.deploycli.conftest import SMALLEST, registered
from tests.exporters import bundles
from tests.exporters.tensorrt.running_engines import ENVIRONMENT, installed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from exporters.bundle import Bundle
    from tests.deploycli.commands import Result
    from tests.deploycli.conftest import Command

PLANS = [f"{precision}-sm89-trt10.13.3.9.plan" for precision in ("fp32", "fp16")]
ENGINE = f"engines/{PLANS[1]}"


class Chain(NamedTuple):
    """The commands of a release, one after another, each in a process of its own."""

    folder: Path
    built: Result
    verified: Result
    timed: Result
    packaged: Result


@pytest.fixture(scope="module")
def chain(true_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    shutil.copytree(true_bundle.path, folder / "artifacts" / "smallest")
    builds = ("build-trt", "--precision", "fp32", "--precision", "fp16", "--batch", "1:2:8")
    commands = (
        (*builds,),
        ("verify", "--json"),
        ("bench", "--only", "trt", "--rounds", "2", "--warmup", "1", "--json"),
        ("package", "--triton", "models", "--flavour", "tensorrt", "--json"),
    )
    return Chain(folder, *(run(*command, cwd=folder, **ENVIRONMENT) for command in commands))


@pytest.fixture
def bundle(true_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the smallest model's bundle, where the commands look for one."""
    return shutil.copytree(true_bundle.path, tmp_path / "artifacts" / "smallest")


@pytest.fixture
def wider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose products are large enough for INT8."""
    monkeypatch.setitem(SMALLEST, "embed_dim", 32)
    with registered() as name:
        return export(ExportRequest(name, tmp_path / "artifacts", name="wider")).path


@pytest.fixture
def engines(chain: Chain, tmp_path: Path) -> Path:
    """A copy of the bundle that has its engines; returns their folder."""
    return shutil.copytree(chain.folder / "artifacts" / "smallest", tmp_path / "artifacts" / "smallest") / "engines"


@pytest.fixture
def gpu() -> Iterator[Any]:
    with installed() as cuda:
        yield cuda


def report(result: Result) -> dict[str, Any]:
    (found,) = json.loads(result.out)
    assert isinstance(found, dict)
    return found


class TestTheWholeChain:
    def test_it_builds_and_says_what_the_engines_compute_in(self, chain: Chain) -> None:
        assert chain.built.code == 0, chain.built.err
        for words in (
            "engines/fp16-sm89-trt10.13.3.9.plan",
            "14 products: 14 fp16",
            "14 products: 14 fp32",
            "fp16>=80% holds",
            "TensorRT 10.13.3.9, NVIDIA L4",
            "next: deploycli verify smallest",
        ):
            assert words in chain.built.out
        folder = chain.folder / "artifacts" / "smallest" / "engines"
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            [*PLANS, *(name.replace(".plan", ".json") for name in PLANS)]
        )
        assert not list((chain.folder / "artifacts").rglob("model.plan"))

    def test_the_very_plans_are_judged_on_the_same_sweep(self, chain: Chain) -> None:
        found = report(chain.verified)
        assert (found["passed"], found["reference"], found["not_judged"], found["notes"]) == (True, "eager", [], [])
        order = list(dict.fromkeys(stage["artifact"] for stage in found["stages"]))
        assert order == ["model.onnx", "model.fp16.onnx", ENGINE, f"engines/{PLANS[0]}"]
        checks = {
            path: [stage["check"] for stage in found["stages"] if stage["artifact"] == path]
            for path in ("model.onnx", ENGINE)
        }
        assert checks[ENGINE] == checks["model.onnx"] == ["batch 1", "batch 3", "batch 8", "batch 8 shuffled"]
        assert {stage["runtime"] for stage in found["stages"] if stage["artifact"] == ENGINE} == {"TensorRT 10.13.3.9"}

    def test_they_are_timed(self, chain: Chain) -> None:
        rows = report(chain.timed)["measurements"]
        assert {(row["name"], row["precision"], row["batch"]) for row in rows} == {
            ("trt", precision, batch) for precision in ("fp32", "fp16") for batch in (1, 8)
        }
        assert {(row["transfers"], row["cuda_graph"]) for row in rows} == {("excluded", True)}

    def test_what_is_packaged_is_the_plan_that_was_judged(self, chain: Chain) -> None:
        assert chain.packaged.code == 0, chain.packaged.err
        (plan,) = (chain.folder / "models").rglob("model.plan")
        assert plan.read_bytes() == (chain.folder / "artifacts" / "smallest" / ENGINE).read_bytes()

    def test_verify_prints_them(self, engines: Path, gpu: Any, deploycli: Command) -> None:
        result = deploycli("verify")
        assert result.code == 0
        assert result.out.count(ENGINE) == 4
        assert "NOT JUDGED" not in result.out

    def test_the_golden_file_serves_as_well(self, engines: Path, gpu: Any, deploycli: Command) -> None:
        found = report(deploycli("verify", "--reference", "golden", "--json", "--engines", "all"))
        assert found["passed"]
        assert sum(stage["artifact"] == ENGINE for stage in found["stages"]) == 4


class TestBuilding:
    def test_the_wrong_precision_is_not_kept(
        self, bundle: Path, gpu: Any, deploycli: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FAKE_ENGINE", "wide")
        result = deploycli("build-trt")
        assert_refused(result, 6, "0.0% of 14 products are fp16 (14 fp32), expected fp16>=80%", "--assert-precision")
        assert not list(bundle.rglob("*.plan"))
        assert (bundle / "reports/build-fp16/layers.json").is_file()

    @pytest.mark.parametrize(
        ("does", "options", "words"),
        [("SIGSEGV", (), "SIGSEGV"), ("hang", ("--timeout", "3"), "after 3 s"), ("nothing", (), "could not find any")],
    )
    def test_a_builder_that_fails(
        self,
        does: str,
        options: tuple[str, ...],
        words: str,
        bundle: Path,
        gpu: Any,
        deploycli: Command,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("FAKE_TENSORRT", does)
        assert_refused(deploycli("build-trt", "--precision", "fp32", *options), 4, words)
        assert not list(bundle.rglob("*.plan"))

    def test_int8_comes_with_fp16(self, wider: Path, gpu: Any, deploycli: Command, tmp_path: Path) -> None:
        np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((8, 3, 16, 16), np.float32))
        result = deploycli("build-trt", "--precision", "int8", "--calibrate", tmp_path / "data.npy", "--json")
        built = result.json()
        assert [engine["precision"] for engine in built] == ["fp16", "int8"]
        assert built[1]["sidecar"]["assertions"] == ["int8>=50%"]
        assert built[1]["sidecar"]["layers"]["products_per_type"]["int8"] > 7
        assert sorted(path.suffix for path in (wider / "engines").iterdir()) == [*2 * [".json"], *2 * [".plan"]]
        result = deploycli("build-trt", "--precision", "int8", "--allow-random-calibration", "--samples", "4")
        assert result.code == 0, result.err
        assert "NOT FOR RELEASE: calibrated on random data" in result.out
        verified = deploycli("verify")
        assert "NOT FOR RELEASE engines/int8" in verified.out

    def test_every_option_reaches_the_builder(self, bundle: Path, gpu: Any, deploycli: Command, tmp_path: Path) -> None:
        options = (
            *(
                "--min-shapes",
                "images:2x3x16x16",
                "--opt-shapes",
                "images:4x3x16x16",
                "--max-shapes",
                "images:6x3x16x16",
            ),
            *("--workspace", "512M", "--builder-optimization-level", "4", "--hardware-compatibility", "ampere+"),
            *("--max-aux-streams", "2", "--tf32", "--strip-weights", "--timing-cache", "timings/", "--timeout", "60"),
            *("--assert-precision", "fp16>=70%", "--io-types", "fp16", "--keep-fp32", "head"),
        )
        (built,) = deploycli("build-trt", *options, "--json").json()
        sidecar = built["sidecar"]
        shapes = {which: [size, 3, 16, 16] for which, size in (("min", 2), ("opt", 4), ("max", 6))}
        assert sidecar["settings"] == {
            "profile": {"images": shapes},
            "workspace": 512 << 20,
            "optimization_level": 4,
            "hardware_compatibility": "ampere+",
            "version_compatible": False,
            "strip_weights": True,
            "max_aux_streams": 2,
            "timing_cache": "timings/",
            "error_on_timing_cache_miss": False,
            "locked": None,
            "tf32": True,
            "more_profiles": [],
        }
        assert sidecar["assertions"] == ["fp16>=70%"]
        assert sidecar["facts"]["builder_flags"] == ["REFIT_IDENTICAL", "STRIP_PLAN", "TF32"]
        assert {tensor["name"]: tensor["dtype"] for tensor in sidecar["io"]} == {
            "images": "float16",
            "logits": "float16",
        }
        assert len(list((tmp_path / "timings").glob("[!.]*"))) >= 1
        assert sidecar["timing_cache_sha256"]
        described = json.loads((bundle / "engines" / sidecar["plan"]).read_bytes()[28:-32])
        assert (described["workspace"], described["level"], described["aux"], described["hardware"]) == (
            *(512 << 20, 4, 2),
            "AMPERE_PLUS",
        )
        missed = deploycli("build-trt", "--timing-cache", "other/", "--error-on-timing-cache-miss")
        assert_refused(missed, 4, "timing cache miss")
        assert deploycli("build-trt", "--locked", "tactics.json").code == 0
        assert (tmp_path / "tactics.json").is_file()

    def test_an_option_of_casting_casts_again(self, bundle: Path, gpu: Any, deploycli: Command) -> None:
        def kept() -> int:
            (planned,) = deploycli("build-trt", "--dry-run", "--json").json()
            assert planned["onnx"] == "model.fp16.onnx"
            return (bundle / "model.fp16.onnx").stat().st_ino

        first = kept()
        assert kept() == first
        assert deploycli("build-trt", "--dry-run", "--keep-fp32", "fc1").code == 0
        assert kept() != first

    def test_what_cannot_be_written(self, bundle: Path, gpu: Any, deploycli: Command) -> None:
        (bundle / "engines").write_text("a file")
        assert_refused(deploycli("build-trt", "--precision", "fp32"), 7, "cannot write")
        assert not list(bundle.rglob("*.plan"))
        (bundle / "engines").unlink()
        shutil.rmtree(bundle / "reports")
        (bundle / "reports").write_text("a file")
        assert_refused(deploycli("build-trt", "--precision", "fp32"), 7, "cannot write")

    def test_an_interruption_leaves_nothing(self, bundle: Path, tmp_path: Path) -> None:
        process = start("build-trt", "--precision", "fp32", cwd=tmp_path, **ENVIRONMENT, FAKE_TENSORRT="hang")
        log, end = bundle / "reports/build-fp32/builder.log", time.monotonic() + 60
        while not (log.is_file() and "building" in log.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, ""), err
        assert not (bundle / "engines").exists()
        assert {name for name in files(bundle / "reports") if "build" in name} == {
            "build-fp32/builder.log",
            "build-fp32/job.json",
        }


class TestWithoutTensorRt:
    def test_nothing_is_built_and_it_says_what_would_have_been(self, bundle: Path, deploycli: Command) -> None:
        before = files(bundle)
        result = deploycli("build-trt", "--compiler", "tensorrt", "--batch", "1:2:8")
        shapes = "images 1x3x16x16 / 2x3x16x16 / 8x3x16x16"
        assert_refused(result, 7, "TensorRT is not installed", "nothing was built: fp16", shapes)
        for words in ("pip install", "nvcr.io/nvidia/tensorrt", "--dry-run"):
            assert words in result.err
        assert files(bundle) == before

    def test_a_dry_run_writes_the_graph_and_shows_the_plan(self, bundle: Path, deploycli: Command) -> None:
        result = deploycli("build-trt", "--compiler", "tensorrt", "--dry-run", "--batch", "4")
        assert result.code == 0, result.err
        assert (
            "would build fp16 from artifacts/smallest/model.fp16.onnx by TensorRT, images 4x3x16x16 / 4x3x16x16"
            in result.out
        )
        assert "TensorRT 11.4" in result.out
        assert (bundle / "model.fp16.onnx").is_file()
        assert not (bundle / "engines").exists()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--precision", "int8"], "no data to calibrate one with"),
            (["--calibrate", "photos"], "what is built is fp16"),
            (["--assert-precision", "fp16>80"], "no assertion on precision"),
            (["--assert-precision", "int8>=50%"], "no such engine is built"),
            (["--assert-precision", "fp16>=50%", "--version-compatible"], "holds host code"),
            (["--batch", "8:2:1"], "are no range"),
            (["--opt-shapes", "images:64x3x16x16"], "are no range"),
            (["--min-shapes", "pixels:1x3x16x16"], "no input 'pixels'"),
            (["--max-shapes", "images:8x3x32x32"], "cannot have the shape 8x3x32x32"),
            (["--max-shapes", "images"], "is no shape"),
            (["--batch", "0:1:2"], "is no range of batches"),
            (["--workspace", "lots"], "is no size"),
            (["--error-on-timing-cache-miss"], "--timing-cache FILE"),
            (["--timing-cache", "a", "--locked", "b"], "one of them"),
            (["--builder-optimization-level", "9"], "'9' is no whole number from 0 to 5"),
            (["--precision", "fp8"], "'fp8' is not one of"),
            (["nowhere"], "nowhere"),
        ],
    )
    def test_usage_is_said_before_anything_else(
        self, options: list[str], words: str, bundle: Path, deploycli: Command
    ) -> None:
        before = files(bundle)
        assert_refused(deploycli("build-trt", "--compiler", "tensorrt", *options), 2, words)
        assert files(bundle) == before

    def test_errors_of_the_lint_end_it(self, tmp_path: Path, deploycli: Command, gpu: Any) -> None:
        bad = [helper.make_node("Det", ["raw.logits"], ["features"])]
        made = bundles.make(tmp_path / "artifacts", model=bundles.graph(bad))
        assert_refused(deploycli("build-trt", "--precision", "fp32"), 3, "cannot read ", "rule 2: ", "Det")
        assert not (made.path / "reports").exists()

    def test_engines_are_listed_as_not_judged(self, engines: Path, deploycli: Command) -> None:
        result = deploycli("verify")
        assert result.code == 0
        assert f"NOT JUDGED {ENGINE}: TensorRT is not installed" in result.out
        assert "2 engines not run here, and so not judged" in result.out
        found = report(deploycli("verify", "--json"))
        assert {(engine["artifact"], engine["reason"]) for engine in found["not_judged"]} >= {
            (ENGINE, "TensorRT is not installed")
        }
        assert_refused(deploycli("verify", "--engines", "all"), 7, "TensorRT is not installed")
        assert "engines" not in deploycli("verify", "--engines", "none").out

    def test_all_engines_of_none(self, bundle: Path, deploycli: Command) -> None:
        assert_refused(deploycli("verify", "--engines", "all"), 2, "holds no engine")


class TestVerifying:
    def test_zeros_at_larger_batches_name_the_engine(
        self, engines: Path, gpu: Any, deploycli: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FAKE_ENGINE", "zeros")
        result = deploycli("verify")
        assert result.code == 5
        assert f"FAILED {ENGINE} in TensorRT 10.13.3.9, batch 3" in result.out
        assert "FAILED model" not in result.out
        refused = deploycli("package", "--triton", "models", "--flavour", "tensorrt", "--precision", "fp16")
        assert refused.code == 5

    def test_another_gpu(self, engines: Path, gpu: Any, deploycli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FAKE_GPU", "NVIDIA A10|8|6")
        result = deploycli("verify")
        assert result.code == 0
        reason = "was built on NVIDIA L4 (compute capability 8.9), here is NVIDIA A10 (8.6)"
        assert f"NOT JUDGED {ENGINE}: {PLANS[1]} {reason}" in result.out
        assert_refused(deploycli("verify", "--engines", "all"), 7, "NVIDIA A10")

    def test_an_engine_that_tensorrt_refuses_is_an_error(
        self, engines: Path, gpu: Any, deploycli: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FAKE_ENGINE", "refuse")
        assert_refused(deploycli("verify"), 7, "cannot load", "the engine plan file is not compatible")

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
        self,
        spoil: str,
        words: str,
        engines: Path,
        gpu: Any,
        deploycli: Command,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        plan = engines / PLANS[1]
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
            engines.rename(tmp_path / "elsewhere")
            engines.symlink_to(tmp_path / "elsewhere")
        elif spoil == "sidecar":
            sidecar.write_text(sidecar.read_text()[:-20])
        else:
            import hashlib

            content = plan.read_bytes()[:24] + struct.pack("4B", 10, 13, 3, 8) + plan.read_bytes()[28:]
            plan.write_bytes(content)
            data = json.loads(sidecar.read_text())
            sidecar.write_text(json.dumps({**data, "sha256": hashlib.sha256(content).hexdigest()}))
        monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
        for command in (("verify",), ("bench", "--only", "trt", "--rounds", "1")):
            assert_refused(deploycli(*command), 8, words)
        assert not (tmp_path / "calls").exists()

    def test_another_graph_is_said_and_engines_outlive_a_cast(
        self, engines: Path, gpu: Any, deploycli: Command
    ) -> None:
        before = files(engines)
        assert deploycli("cast", "smallest", "--keep-fp32", "fc1").code == 0
        assert files(engines) == before
        result = deploycli("verify")
        assert result.code == 0
        assert f"{ENGINE} was built from another model.fp16.onnx than the bundle holds now" in result.out

    def test_batches_outside_of_the_profile_are_left_out(self, bundle: Path, gpu: Any, deploycli: Command) -> None:
        assert deploycli("build-trt", "--batch", "2:4:6").code == 0
        result = deploycli("verify")
        assert f"{ENGINE} takes batches 2 to 6: batch 1, 8 left out" in result.out
        found = report(deploycli("verify", "--json", "--batches", "1,8"))
        checks = [stage["check"] for stage in found["stages"] if stage["artifact"] == ENGINE]
        assert checks == ["batch 2", "batch 2 shuffled"]

    def test_pictures_are_run_in_batches_that_the_engine_takes(
        self, bundle: Path, gpu: Any, deploycli: Command, tmp_path: Path
    ) -> None:
        np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((9, 3, 16, 16), np.float32))
        assert deploycli("build-trt", "--batch", "2:4:4").code == 0
        found = report(deploycli("verify", "--json", "--images", tmp_path / "data.npy"))
        (stage,) = (s for s in found["stages"] if s["artifact"] == ENGINE and s["check"] == "images")
        assert (stage["samples"], stage["passed"]) == (9, True)

    def test_a_version_compatible_engine_needs_a_word_of_trust(
        self, bundle: Path, gpu: Any, deploycli: Command
    ) -> None:
        built = deploycli("build-trt", "--version-compatible")
        assert built.code == 0, built.err
        assert "not opened, for it holds host code" in built.out
        result = deploycli("verify")
        assert f"NOT JUDGED {ENGINE}: " in result.out
        assert "lean runtime" in result.out
        assert "NOT JUDGED" not in deploycli("verify", "--allow-engine-host-code", "--engines", "all").out

    def test_exporting_again_keeps_them_and_another_graph_drops_them(
        self, engines: Path, gpu: Any, deploycli: Command, smallest: str, checkpoint: Path
    ) -> None:
        options = ("--name", "smallest", "--checkpoint", checkpoint)
        built = files(engines)
        again = deploycli("export", smallest, *options)
        assert again.code == 0
        assert "gone with it" not in again.err
        assert files(engines) == built
        assert "stale" not in deploycli("verify").out
        other = deploycli("export", smallest, *options, "--batch", 4, "--json")
        assert other.json()["gone"] == [*(f"engines/{name}" for name in sorted(PLANS)), "model.fp16.onnx", "reports/"]
        assert "held another model.onnx; gone with it: engines/" in other.err
        assert not engines.exists()
