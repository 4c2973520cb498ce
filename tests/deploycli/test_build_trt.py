"""TensorRT's engines through the real command line: what is said before a build, and that it is what was asked for.

A stand-in takes TensorRT's place, in the child process that builds. What does not depend on the compiler is tested with
a real one, in test_build_rtx.py and test_engines.py.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from onnx import helper

from deploycli.exporters.bundle.bundle import Bundle
from tests.deploycli.commands import assert_refused, files
from tests.exporters import engines
from tests.exporters.bundle import bundles
from tests.exporters.lint.rtx import WHY
from tests.exporters.tensorrt.fakes import FOLDER
from tests.exporters.tensorrt.running_engines import installed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.deploycli.conftest import Command


@pytest.fixture
def bundle(true_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the smallest model's bundle, where the commands look for one."""
    return shutil.copytree(true_bundle.path, tmp_path / "artifacts" / "smallest")


@pytest.fixture
def tensorrt() -> Iterator[None]:
    """The stand-in that builds, and a GPU."""
    pytest.importorskip("tensorrt_rtx", reason=WHY)
    with installed(FOLDER):
        yield


@pytest.mark.usefixtures("tensorrt")
def test_it_builds_and_says_what_the_engines_compute_in(bundle: Path, deploycli: Command) -> None:
    built = deploycli("build-trt", "--precision", "fp32", "--precision", "fp16", "--batch", "1:2:8")
    assert built.code == 0, built.err
    for words in (
        "engines/fp16-sm89-trt10.13.3.9.plan",
        "14 products: 14 fp16",
        "14 products: 14 fp32",
        "fp16>=80% holds",
        "TensorRT 10.13.3.9, NVIDIA L4",
        "next: deploycli verify smallest",
    ):
        assert words in built.out
    names = [f"{precision}-sm89-trt10.13.3.9{end}" for precision in ("fp16", "fp32") for end in (".json", ".plan")]
    assert sorted(path.name for path in (bundle / "engines").iterdir()) == names
    assert not list(bundle.rglob("model.plan"))


@pytest.mark.usefixtures("tensorrt")
def test_every_option_reaches_the_builder(bundle: Path, deploycli: Command, tmp_path: Path) -> None:
    options = (
        *("--batch", "2:4:6"),
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
        "timing_cache": "timings",
        "error_on_timing_cache_miss": False,
        "tf32": True,
        "more_profiles": [],
    }
    assert sidecar["assertions"] == ["fp16>=70%"]
    assert sidecar["facts"]["builder_flags"] == ["REFIT_IDENTICAL", "STRIP_PLAN", "TF32"]
    assert {tensor["name"]: tensor["dtype"] for tensor in sidecar["io"]} == {
        "images": "float16",
        "logits": "float16",
    }
    assert len(list((tmp_path / "timings").iterdir())) == 1
    assert sidecar["timing_cache_sha256"]
    described = json.loads((bundle / "engines" / sidecar["plan"]).read_bytes()[28:-32])
    assert (described["workspace"], described["level"], described["aux"], described["hardware"]) == (
        *(512 << 20, 4, 2),
        "AMPERE_PLUS",
    )
    missed = deploycli("build-trt", "--timing-cache", "other/", "--error-on-timing-cache-miss")
    assert_refused(missed, 4, "timing cache miss")


def test_an_option_of_casting_casts_again(bundle: Path, deploycli: Command) -> None:
    def kept() -> int:
        (planned,) = deploycli("build-trt", "--compiler", "tensorrt", "--dry-run", "--json").json()
        assert planned["onnx"] == "model.fp16.onnx"
        return (bundle / "model.fp16.onnx").stat().st_ino

    first = kept()
    assert kept() == first
    assert deploycli("build-trt", "--compiler", "tensorrt", "--dry-run", "--keep-fp32", "fc1").code == 0
    assert kept() != first


def test_nothing_is_built_and_it_says_what_would_have_been(bundle: Path, deploycli: Command) -> None:
    before = files(bundle)
    result = deploycli("build-trt", "--compiler", "tensorrt", "--batch", "1:2:8")
    shapes = "images 1x3x16x16 / 2x3x16x16 / 8x3x16x16"
    assert_refused(result, 7, "TensorRT is not installed", "nothing was built: fp16", shapes)
    for words in ("pip install", "nvcr.io/nvidia/tensorrt", "--dry-run"):
        assert words in result.err
    assert files(bundle) == before


def test_a_dry_run_writes_the_graph_and_shows_the_plan(bundle: Path, deploycli: Command) -> None:
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
        (["--batch", "0:1:2"], "is no range of batches"),
        (["--workspace", "lots"], "is no size"),
        (["--error-on-timing-cache-miss"], "--timing-cache DIR"),
        (["--builder-optimization-level", "9"], "'9' is no whole number from 0 to 5"),
        (["--precision", "fp4"], "'fp4' is not one of"),
        (["--precision", "fp8"], "holds no FP8 graph, and there is no data to calibrate one with"),
        (["nowhere"], "nowhere"),
    ],
)
def test_usage_is_said_before_anything_else(options: list[str], words: str, bundle: Path, deploycli: Command) -> None:
    before = files(bundle)
    assert_refused(deploycli("build-trt", "--compiler", "tensorrt", *options), 2, words)
    assert files(bundle) == before


def test_errors_of_the_lint_end_it(tmp_path: Path, deploycli: Command) -> None:
    bad = [helper.make_node("Det", ["raw.logits"], ["features"])]
    made = bundles.make(tmp_path / "artifacts", model=bundles.graph(bad))
    dry = deploycli("build-trt", "--compiler", "tensorrt", "--dry-run", "--precision", "fp32")
    assert_refused(dry, 3, "cannot read ", "rule operator-support: ", "Det")
    assert not (made.path / "reports").exists()


def test_engines_are_listed_as_not_judged(bundle: Path, deploycli: Command) -> None:
    names = [engines.build(Bundle.open(bundle), precision).plan for precision in ("fp16", "fp32")]
    result = deploycli("verify", "--batches", "1")
    assert result.code == 0
    assert f"NOT JUDGED engines/{names[0]}: TensorRT is not installed" in result.out
    assert "2 engines not run here, and so not judged" in result.out
    (found,) = deploycli("verify", "--batches", "1", "--json").json()
    assert [(engine["artifact"], engine["reason"]) for engine in found["not_judged"]] == [
        (f"engines/{name}", "TensorRT is not installed") for name in names
    ]
    assert_refused(deploycli("verify", "--engines", "all"), 7, "TensorRT is not installed")
    assert "engines" not in deploycli("verify", "--engines", "none").out


def test_all_engines_of_none(bundle: Path, deploycli: Command) -> None:
    assert_refused(deploycli("verify", "--engines", "all"), 2, "holds no engine")
