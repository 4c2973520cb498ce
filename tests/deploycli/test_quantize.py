"""`deploycli quantize`: every option, what it prints, and which options do not go together."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.graph.onnx_file import load_model
from deploycli.exporters.precision.calibration import CalibrationCache
from deploycli.exporters.runtime.runtimes import OrtRuntime
from tests.deploycli.commands import assert_refused, files
from tests.exporters.precision.networks import assert_valid, normal
from tests.exporters.precision.tiny import GEMMS, labelled, make, pictures

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

INT8, CACHE = "model.int8.onnx", "model.int8.calibration.json"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path / "artifacts")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve inputs, and the classes that the FP32 graph gives them."""
    path, images = tmp_path / "rows.npz", normal(12, 3, 8, 8)
    bundle = make(tmp_path / "elsewhere")
    with OrtRuntime(bundle.path / "model.onnx") as runtime:
        np.savez(path, images=images, labels=runtime.run({"images": images})["logits"].argmax(1))
    return path


def test_fp8(deploycli: Command, bundle: Bundle, rows: Path) -> None:
    result = deploycli("quantize", "tiny", "--precision", "fp8", "--calibrate", rows)
    assert result.code == 0, result.err
    assert re.match(r"artifacts/tiny/model\.fp8\.onnx \d+\.\d MB, fp8, opset 20, batch dynamic\n", result.out)
    assert "  2 products and attentions in FP8\n" in result.out
    assert "  calibrated by max on 12 samples in " in result.out
    artifact = Bundle.open(bundle.path).manifest.artifacts[-1]
    assert (artifact.precision, artifact.quantized) == ("fp8", ("attn.proj/MatMul", "mlp.fc2/MatMul"))
    assert artifact.calibration is not None
    assert artifact.calibration.cache.path == "model.fp8.calibration.json"
    linted = deploycli("lint", bundle.path / "model.fp8.onnx", "--json").json()
    assert not [f for f in linted[0]["findings"] if f["level"] == "error" or f["rule"].startswith("quantization")]
    verified = deploycli("verify", "tiny", "--json")
    assert verified.code == 0, verified.out
    assert "model.fp8.onnx" in verified.out
    assert "model.fp8.onnx 0.0 MB, fp8, opset 20" in deploycli("inspect", "tiny").out
    ada = deploycli("quantize", "tiny", "--precision", "fp8", "--calibrate", rows, "--scheme", "gemm", "--json").json()
    assert len(ada[0]["artifact"]["quantized"]) == 6
    for options, words in (
        (("--gpu", "rtx-3090"), "FP8 was asked for, which compute capability 8.6 does not compute"),
        (("--method", "entropy"), "ranges by the method entropy are for INT8"),
        (("--gpu", "ada", "--scheme", "gemm"), "--gpu does nothing without --scheme auto"),
    ):
        assert_refused(deploycli("quantize", "tiny", "--precision", "fp8", "--calibrate", rows, *options), 2, words)
    deploycli("quantize", "tiny", "--calibrate", rows)
    given = ("--precision", "fp8", "--cache", bundle.path / "model.int8.calibration.json")
    assert_refused(deploycli("quantize", "tiny", *given), 2, "ranges by the method mse are for INT8")


def test_what_it_prints(deploycli: Command, bundle: Bundle, rows: Path) -> None:
    result = deploycli("quantize", "tiny", "--calibrate", rows)
    assert result.code == 0, result.err
    out = result.out
    assert re.match(r"artifacts/tiny/model\.int8\.onnx \d+\.\d MB, int8, opset 20, batch dynamic\n", out)
    assert "  left as it was: 1 patch-embed, 2 scheme, 1 head, " in out
    assert re.search(r"logits: cosine 0\.999\d+, relative error \S+ to eager on 2 golden samples", out)
    assert "  6 products and attentions in INT8\n" in out
    assert re.search(r"  calibrated by mse on 12 samples in \S+rows\.npz \(sha256 [0-9a-f]{12}\)\n", out)
    assert out.endswith("next: deploycli verify tiny\n")
    assert "NOT FOR RELEASE" not in out
    assert "calibration (1/12)\n" in result.err
    assert "calibration (12/12)\n" in result.err
    assert (bundle.path / INT8).is_file()
    verbose = deploycli("quantize", "tiny", "--calibrate", rows, "-v").out
    assert "quantize-gemm left head/Gemm: head: stays in high precision\n" in verbose


def test_json(deploycli: Command, bundle: Bundle, rows: Path) -> None:
    (made,) = deploycli("quantize", "--calibrate", rows, "--json").json()
    assert set(made) == {"path", "artifact", "unreleasable", "runtime", "comparisons", "search", "notes"}
    assert (made["path"], made["unreleasable"], made["search"], [len(made["notes"])]) == (
        "artifacts/tiny",
        "",
        None,
        [1],
    )
    artifact = made["artifact"]
    assert artifact == json.loads((bundle.path / "manifest.json").read_text())["artifacts"][1]
    assert (artifact["precision"], artifact["source"], artifact["quantized"]) == ("int8", "model.onnx", list(GEMMS))
    calibration = artifact["calibration"]
    assert set(calibration) == {"method", "data", "samples", "sha256", "skipped", "random", "cache"}
    assert calibration["samples"] == list(map(str, range(12)))
    assert calibration["cache"]["path"] == CACHE
    assert calibration["sha256"] == CalibrationCache.load(bundle.path / CACHE).data.sha256
    assert made["comparisons"][0]["name"] == "logits"


def test_all_bundles(deploycli: Command, bundle: Bundle, rows: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "artifacts", "other")
    make(tmp_path / "artifacts", "third")
    made = deploycli("quantize", "--calibrate", rows, "--json").json()
    assert [one["path"] for one in made] == [f"artifacts/{name}" for name in ("other", "third", "tiny")]
    made = deploycli("quantize", "tiny", other.path, "--calibrate", rows, "--scheme", "full", "--json").json()
    assert [one["artifact"]["steps"][0]["name"] for one in made] == ["quantize-full"] * 2
    out = deploycli("quantize", "tiny", "other", "--calibrate", rows).out
    assert out.count("products and attentions in INT8") == 2
    made = deploycli("quantize", "tiny", "-o", tmp_path / "elsewhere", "--calibrate", rows, "--json").json()
    assert made[0]["path"] == str(tmp_path / "elsewhere" / "tiny")


FC2 = GEMMS[-1]
OPTIONS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "attention": (("--scheme", "attention"), [*GEMMS[:3], "attn/Softmax", *GEMMS[3:]]),
    "full": (
        ("--scheme", "full"),
        [*GEMMS[:3], "attn/Softmax", GEMMS[3], "Add_attn", *GEMMS[4:], "Add_mlp"],
    ),
    "exclude": (("--exclude", r"fc2", "--exclude", r"attn\.[qk]"), [*GEMMS[2:-1]]),
    "exclude, from a file": (("--exclude-file", "names.txt"), [*GEMMS[3:]]),
    "sensitive": (("--high-precision", "sensitive"), [*GEMMS[:-1]]),
    "fc2": (("--high-precision", "patch-embed,head, mlp.fc2"), [*GEMMS[:-1]]),
    "none": (("--high-precision", "none"), [*GEMMS]),  # of head and patch embedding one side is too small
    "keep FP32": (("--keep-fp32", "fc2"), [*GEMMS[:-1]]),
    "keep FP32, from a file": (("--keep-fp32-file", "names.txt"), [*GEMMS[3:]]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_quantised(deploycli: Command, bundle: Bundle, rows: Path, tmp_path: Path, name: str) -> None:
    arguments, expected = OPTIONS[name]
    (tmp_path / "names.txt").write_text("# what is left alone\n\nattn\\.[qk]\n  attn\\.v  \n")
    (made,) = deploycli("quantize", "--calibrate", rows, *arguments, "--json").json()
    assert made["artifact"]["quantized"] == expected
    assert_valid(load_model(bundle.path / INT8))


@pytest.mark.parametrize(
    ("arguments", "method", "inside"),
    [
        (("--method", "max"), "max", "FLOAT16"),
        (("--method", "entropy"), "entropy", "FLOAT16"),
        (("--method", "percentile"), "percentile (percentile 99.99)", "FLOAT16"),
        (("--method", "percentile", "--percentile", "99"), "percentile (percentile 99)", "FLOAT16"),
        (("--around", "bf16", "--weights", "float"), "mse", "BFLOAT16"),
        (("--around", "fp32"), "mse", "FLOAT"),
        (("--io-types", "fp16", "--allow-fp16", "layer-norm,softmax"), "mse", "FLOAT16"),
    ],
)
def test_how(
    deploycli: Command, bundle: Bundle, rows: Path, arguments: tuple[str, ...], method: str, inside: str
) -> None:
    (made,) = deploycli("quantize", "--calibrate", rows, "--samples", 8, *arguments, "--json").json()
    calibration = made["artifact"]["calibration"]
    assert (calibration["method"], len(calibration["samples"])) == (method, 8)
    model = load_model(bundle.path / INT8)
    assert_valid(model)
    weights = [value for value in model.graph.initializers.values() if value.name and value.name.endswith(".int8")]
    assert len(weights) == (0 if "float" in arguments else 6)
    assert {n.outputs[0].dtype.name for n in model.graph if n.op_type == "Gelu" and n.outputs[0].dtype} == {inside}
    norms = {n.outputs[0].dtype.name for n in model.graph if n.op_type == "LayerNormalization" and n.outputs[0].dtype}
    assert norms == {"FLOAT16" if "--allow-fp16" in arguments else "FLOAT"}
    ends = {value.dtype.name for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype}
    assert ends == {"FLOAT16" if "--io-types" in arguments else "FLOAT"}


def test_random_calibration_is_said_everywhere(deploycli: Command, bundle: Bundle) -> None:
    assert_refused(
        deploycli("quantize"), 2, "there is no data to calibrate with", "--calibrate DIR; or --allow-random-calibration"
    )
    words = "NOT FOR RELEASE: calibrated on random data"
    arguments = ("--allow-random-calibration", "--samples", 4)
    assert words in deploycli("quantize", *arguments).out
    assert words in deploycli("inspect", "tiny").out
    (made,) = deploycli("quantize", *arguments, "--seed", 7, "--json").json()
    assert made["unreleasable"] == "calibrated on random data"
    assert made["artifact"]["calibration"]["data"] == "4 random samples, seed 7"
    assert deploycli("inspect", "tiny", "--json").json()["artifacts"][1]["calibration"]["random"] is True
    verified = deploycli("verify", "--reference", "golden", "--json")
    (report,) = json.loads(verified.out)
    assert report["unreleasable"] == [f"{INT8}: calibrated on random data"]
    assert "calibrated on random data" in deploycli("verify", "--reference", "golden").out


def test_a_cache(deploycli: Command, bundle: Bundle, rows: Path, tmp_path: Path) -> None:
    assert deploycli("quantize", "--calibrate", rows, "--method", "max").code == 0
    cache = (bundle.path / CACHE).rename(tmp_path / "cache.json")
    make(tmp_path / "artifacts")
    expected = CalibrationCache.load(cache)
    for arguments in ((), ("--method", "max"), ("--calibrate", rows)):
        (made,) = deploycli("quantize", "--cache", cache, *arguments, "--json").json()
        assert made["artifact"]["calibration"]["method"] == "max"
        assert CalibrationCache.load(bundle.path / CACHE) == expected
    before = files(tmp_path)
    for arguments, code, found in (
        (("--cache", cache, "--method", "mse"), 8, "the calibration was made with another method"),
        (("--cache", cache, "--scheme", "full"), 8, "the calibration has no range of q, kt, v, o4"),
        (("--cache", cache, "--calibrate", rows, "--samples", 3), 8, "the calibration was made with another data"),
        (("--cache", tmp_path / "none.json"), 2, "there is no calibration"),
        (("--cache", cache, "--allow-random-calibration"), 2, "random calibration was asked for beside data"),
    ):
        assert_refused(deploycli("quantize", *arguments), code, found)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--images", "x"), "--images does nothing without --max-drop"),
        (("--labels", "folders"), "--labels does nothing without --max-drop"),
        (("--limit", "3"), "--limit does nothing without --max-drop"),
        (("--percentile", "99"), "--percentile does nothing without --method percentile"),
        (("--method", "max", "--percentile", "99"), "--percentile does nothing without --method percentile"),
        (("--seed", "1"), "--seed does nothing without --allow-random-calibration"),
        (("--around", "fp32", "--keep-fp32", "x"), "--keep-fp32 does nothing without --around fp16 or bf16"),
        (("--around", "fp32", "--allow-fp16", "softmax"), "--allow-fp16 does nothing without"),
        (("--around", "fp32", "--io-types", "fp16"), "--io-types does nothing without"),
        (("--allow-random-calibration",), "random calibration was asked for beside data"),
        (("--high-precision", "nose"), "no stage is called 'nose'"),
        (("--high-precision", "none,head"), "no stage is called 'none'"),
        (("--high-precision", ""), "no stage is called ''"),
        (("--method", "percentile", "--percentile", "101"), "'101' is no number above 0 and up to 100"),
        (("--exclude", "["), "'[' is no regular expression"),
        (("--exclude", "blokcs"), "no operator has a name that 'blokcs' finds"),
        (("--exclude-file", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--exclude", "."), "nothing is left to quantise"),
        (("--max-drop", "1"), "needs labelled data"),
        (("--max-drop", "101"), "101"),
        (("--scheme", "int4"), "int4"),
        (("--samples", "0"), "0"),
    ],
)
def test_what_does_not_fit(
    deploycli: Command, bundle: Bundle, tmp_path: Path, arguments: tuple[str, ...], found: str
) -> None:
    np.save(tmp_path / "rows.npy", normal(4, 3, 8, 8))
    before = files(tmp_path)
    assert_refused(deploycli("quantize", "--calibrate", "rows.npy", *arguments), 2, found)
    assert files(tmp_path) == before


def test_samples_do_nothing_to_a_cache(deploycli: Command, bundle: Bundle) -> None:
    result = deploycli("quantize", "--cache", "x.json", "--samples", 3)
    assert_refused(result, 2, "--samples does nothing without --calibrate")


def test_an_accuracy_budget(deploycli: Command, tmp_path: Path, rows: Path) -> None:
    b1, w2 = np.zeros(64, np.float32), 3 * normal(64, 32, seed=8)
    b1[7], w2[7] = 3000, 0
    bundle = make(tmp_path / "artifacts", b1=b1, w2=w2)
    images, labels = labelled(bundle, 40)
    np.savez(tmp_path / "labelled.npz", images=images, labels=labels)
    arguments = ("quantize", "--calibrate", "labelled.npz", "--method", "max", "--around", "fp32", "--max-drop", 3)
    (made,) = deploycli(*arguments, "--json").json()
    search = made["search"]
    assert set(search) == {"fp32", "quantized", "result", "kept", "reverted", "harm"}
    assert search["reverted"] == made["artifact"]["reverted"] == [FC2]
    assert search["kept"] == made["artifact"]["quantized"] == [*GEMMS[:-1]]
    assert search["fp32"]["top1"] == 1 >= search["result"]["top1"] >= 0.97 > search["quantized"]["top1"]
    out = deploycli(*arguments, "--images", "labelled.npz", "--limit", 30).out
    assert re.search(r"fp32 +30 +100\.00% +\d+\.\d+% to 100\.00% +- *\n", out)
    assert re.search(r"all in INT8 +30 +\d+\.\d+% +\d+\.\d+% to \d+\.\d+% +\d+\.\d+ points *\n", out)
    assert re.search(r"5 in INT8, 1 reverted +30 +\d+\.\d+% +.* points *\n", out)
    assert re.search(rf"  reverted {re.escape(FC2)}: alone in INT8 it moves the logits by \d+\.\d+%\n", out)
    assert "  5 products and attentions in INT8\n" in out


def test_labelled_folders(deploycli: Command, bundle: Bundle, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 110, broken=1)
    arguments = ("quantize", "--calibrate", folder, "--samples", 105, "--max-drop", 100, "--around", "fp32")
    (made,) = deploycli(*arguments, "--labels", "folders", "--json").json()
    assert made["search"]["fp32"]["samples"] == 109
    assert made["artifact"]["calibration"]["skipped"] == ["class 0/000.png"]
    assert len(made["artifact"]["calibration"]["samples"]) == 105
    out = deploycli(*arguments, "--labels", "folders").out
    assert re.search(r"calibrated by mse on 105 of 110 pictures in \S+, 1 skipped \(sha256 ", out)
    table = tmp_path / "labels.csv"
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    table.write_text("".join(f"{path},{i % 5}\n" for i, path in enumerate(paths)))
    (made,) = deploycli(*arguments, "--labels", table, "--json").json()
    assert made["search"]["fp32"]["samples"] == 109
    table.write_text("".join(f"{path},{i % 6}\n" for i, path in enumerate(paths)))
    assert_refused(deploycli(*arguments, "--labels", table), 2, "label 5 is out of range")


class Interrupts:
    """Rows that send this process a SIGINT when one of them is read for the second time: the first is to hash it."""

    def __init__(self) -> None:
        self.seen = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> object:
        if index == 7 and not SIGNALS["sent"].exists():
            self.seen += 1
            if self.seen == 2:
                SIGNALS["sent"].touch()
                os.kill(os.getpid(), signal.SIGINT)
        return normal(1, 3, 8, 8, seed=index)[0]


SIGNALS: dict[str, Path] = {}  # "sent": a file that says so


def interrupts() -> Interrupts:
    return Interrupts()


def test_ctrl_c(deploycli: Command, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNALS, "sent", tmp_path / "sent")
    before = files(bundle.path)
    arguments = ("quantize", "--calibrate", f"{__name__}:interrupts")
    stopped = deploycli(*arguments)
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err.endswith("interrupted: nothing was written\n")
    assert files(bundle.path) == before
    state = tmp_path / "artifacts" / ".tiny.calibration.npz"
    assert state.is_file()
    assert "tiny" in deploycli("inspect", "tiny").out
    result = deploycli(*arguments)
    assert "artifacts/.tiny.calibration.npz: continued after 7 samples\n" in result.out
    assert "calibration (8/12)" in result.err
    assert "calibration (7/12)" not in result.err
    assert not state.exists()
    resumed = {name: (bundle.path / name).read_bytes() for name in (INT8, CACHE)}
    assert deploycli(*arguments).code == 0
    assert {name: (bundle.path / name).read_bytes() for name in (INT8, CACHE)} == resumed
