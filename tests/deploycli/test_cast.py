"""`deploycli cast`: what it writes and prints, what it refuses, and that an old bundle is never touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploycli.exporters import derive
from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.bundle.manifest import FileRecord
from tests.deploycli.commands import assert_refused, files, run
from tests.deploycli.test_faults import without_the_right_to_ignore_permissions
from tests.exporters.bundle import bundles
from tests.exporters.bundle.bundles import make
from tests.exporters.precision.casts import source
from tests.exporters.precision.test_insert_casts_data import large

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

WIDTH = 384


def wide() -> onnx.ModelProto:
    """Weights dominate its size; its outputs are the truth of the small bundles."""
    into, back = np.eye(12, WIDTH, dtype=np.float32), np.eye(WIDTH, 12, dtype=np.float32)
    text = """g (float[batch, 12] images) => (float[batch, 5] logits, float[batch, 5] features) {
        a = MatMul (images, into) b = MatMul (a, through) c = MatMul (b, back)
        l = MatMul (c, weight) logits = Identity (l) features = Tanh (l)
    }"""
    model = source(text, into=into, through=np.eye(WIDTH), back=back, weight=bundles.WEIGHT)
    for node in model.graph.node:
        node.name = f"layers.{node.name.removeprefix('block.')}"
    return model


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path / "artifacts", model=wide())


def test_what_is_written_and_printed(deploycli: Command, bundle: Bundle) -> None:
    before = files(bundle.path)
    result = deploycli("cast", "linear", "--keep-fp32", r"layers\.3/", "-v")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith("artifacts/linear/model.fp16.onnx 0.3 MB, fp16, opset 20, batch dynamic")
    assert "  from model.onnx: 2 nodes before, 10 after" in lines
    assert "  left as it was: 1 user" in lines
    assert any(
        line.startswith("  logits: cosine 1.00") and line.endswith("golden samples (ONNX Runtime, FP16 simulated)")
        for line in lines
    )
    assert r"  cast-fp16 left layers.3/MatMul: user: matches 'layers\\.3/'" in lines
    assert "next: deploycli verify linear" in lines
    after = files(bundle.path)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    assert set(after) - set(before) == {"model.fp16.onnx"}
    assert 0.5 < len(after["model.fp16.onnx"]) / len(after["model.onnx"]) < 0.53
    model = onnx.load_from_string(after["model.fp16.onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert {t.name: t.data_type for t in model.graph.initializer} == {
        "into": 10,
        "through": 10,
        "back": 10,
        "weight": 1,
    }


def test_a_repair_is_printed(deploycli: Command, tmp_path: Path) -> None:
    make(tmp_path / "artifacts", "large", large(scalable=True))
    np.save(tmp_path / "rows.npy", np.ones((2, 12), np.float32))
    result = deploycli("cast", "large", "--calibrate", tmp_path / "rows.npy", "-v")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert "  1 repairs by powers of two: what is too large is stored smaller" in lines
    assert "  cast-fp16 changed block.*: rescaled: b, up to 6.25e+04, stored as x/8: 2 Mul" in lines
    assert not any("left as it was" in line for line in lines)


def test_the_manifest_records_the_artifact(deploycli: Command, bundle: Bundle) -> None:
    (made,) = deploycli("cast", "linear", "--keep-fp32", "Tanh", "--json").json()
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    assert [artifact["file"]["path"] for artifact in manifest["artifacts"]] == ["model.onnx", "model.fp16.onnx"]
    artifact = manifest["artifacts"][1]
    assert artifact == made["artifact"]
    assert (artifact["precision"], artifact["source"], artifact["opset"]) == ("fp16", "model.onnx", 20)
    (step,) = artifact["steps"]
    assert (step["name"], step["nodes"]) == ("cast-fp16", 9)
    assert step["refusals"] == [{"node": "layers.5/Tanh", "reason": "user: matches 'Tanh'"}]
    assert artifact["ops_after"] == {"MatMul": 4, "Cast": 3, "Identity": 1, "Tanh": 1}
    assert made["path"] == "artifacts/linear"
    assert made["runtime"] == "ONNX Runtime, FP16 simulated"
    assert {comparison["name"]: comparison["passed"] for comparison in made["comparisons"]} == {
        "logits": True,
        "features": True,
    }
    assert Bundle.open(bundle.path).manifest.to_json()["artifacts"][1]["file"] == artifact["file"]


def test_inspect_and_verify_know_it(deploycli: Command, bundle: Bundle) -> None:
    assert deploycli("cast", "linear").code == 0
    shown = deploycli("inspect", "linear", "-v").out
    assert "artifacts/linear/model.fp16.onnx" in shown
    assert "cast-fp16" in shown
    (report,) = deploycli("verify", "linear", "--reference", "golden", "--json").json()
    runtimes = {stage["artifact"]: stage["runtime"] for stage in report["stages"]}
    assert runtimes == {"model.onnx": "ONNX Runtime", "model.fp16.onnx": "ONNX Runtime, FP16 simulated"}
    assert deploycli("inspect", str(bundle.path / "model.fp16.onnx")).code == 0


def test_a_second_cast_replaces_the_first_and_each_precision_has_its_file(deploycli: Command, bundle: Bundle) -> None:
    assert deploycli("cast", "linear").code == 0
    first = (bundle.path / "model.fp16.onnx").read_bytes()
    assert deploycli("cast", "linear", "--precision", "bf16").code == 0
    assert deploycli("cast", "linear").code == 0
    assert (bundle.path / "model.fp16.onnx").read_bytes() == first, "the same again"
    assert deploycli("cast", "linear", "--keep-fp32", "MatMul").code == 0
    assert (bundle.path / "model.fp16.onnx").read_bytes() != first
    manifest = Bundle.open(bundle.path).manifest
    assert sorted(a.precision for a in manifest.artifacts) == ["bf16", "fp16", "fp32"]
    assert set(files(bundle.path)) == {
        "golden.npz",
        "manifest.json",
        "model.onnx",
        "model.fp16.onnx",
        "model.bf16.onnx",
    }


def test_names_of_an_old_bundle_keep_their_bytes(deploycli: Command, bundle: Bundle, tmp_path: Path) -> None:
    """The new bundle's files are links to the old one's: writing through one would change what is no longer there."""
    assert deploycli("cast", "linear").code == 0
    for options in (["--keep-fp32", "Tanh"], ["--precision", "bf16"]):
        old = shutil.copytree(bundle.path, tmp_path / f"old{options[0]}", copy_function=os.link)
        before = files(old)
        assert deploycli("cast", "linear", *options).code == 0
        assert files(old) == before
        assert files(bundle.path) != before


def test_external_data_is_replaced_whole(deploycli: Command, bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load(bundle.path / "model.onnx")
    (bundle.path / "model.onnx").unlink()
    onnx.save(model, bundle.path / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    (artifact,) = bundle.manifest.artifacts
    record, data = (FileRecord.of(bundle.path, name) for name in ("model.onnx", "model.onnx.data"))
    manifest = replace(bundle.manifest, artifacts=(replace(artifact, file=record, external=(data,)),))
    (bundle.path / "manifest.json").write_text(manifest.dumps())
    assert deploycli("cast", "linear", "--keep-fp32", "layers.1/").code == 0
    assert deploycli("verify", "linear", "--reference", "golden").code == 0
    before = files(bundle.path)
    assert set(before) >= {"model.fp16.onnx", "model.fp16.onnx.data"}
    snapshot = shutil.copytree(bundle.path, tmp_path / "snapshot", copy_function=os.link)
    assert_refused(deploycli("cast", "linear"), 8, "cannot be read", "multiple hard links", "without hard links")
    assert files(snapshot) == before
    shutil.rmtree(snapshot)
    assert deploycli("cast", "linear", "--keep-fp32", "layers.[01234]/").code == 0
    weights = onnx.load(bundle.path / "model.fp16.onnx").graph.initializer
    assert {tensor.data_type for tensor in weights} == {1}


def test_all_files_of_what_is_replaced_go(deploycli: Command, bundle: Bundle) -> None:
    assert deploycli("cast", "linear").code == 0
    (bundle.path / "model.fp16.onnx.data").write_bytes(b"of an earlier cast")
    manifest = Bundle.open(bundle.path).manifest
    plain, cast = manifest.artifacts
    cast = replace(cast, external=(FileRecord.of(bundle.path, "model.fp16.onnx.data"),))
    (bundle.path / "manifest.json").write_text(replace(manifest, artifacts=(plain, cast)).dumps())
    assert deploycli("cast", "linear").code == 0
    assert set(files(bundle.path)) == {"golden.npz", "manifest.json", "model.onnx", "model.fp16.onnx"}


def test_every_bundle_at_once(deploycli: Command, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / "artifacts", name, model=wide())
    assert [made["path"] for made in deploycli("cast", "--json").json()] == ["artifacts/a", "artifacts/b"]


def test_ends_of_fp16(deploycli: Command, bundle: Bundle) -> None:
    (made,) = deploycli("cast", "linear", "--io-types", "fp16", "--json").json()
    model = onnx.load(bundle.path / "model.fp16.onnx")
    values = (*model.graph.input, *model.graph.output)
    assert {value.name: value.type.tensor_type.elem_type for value in values} == dict.fromkeys(
        ("images", "logits", "features"), 10
    )
    assert "Cast" not in made["artifact"]["ops_after"]
    assert all(comparison["passed"] for comparison in made["comparisons"])
    assert deploycli("verify", "linear", "--reference", "golden").code == 0


def test_expressions_of_a_file(deploycli: Command, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("# the activation\nTanh\n\n  layers.0/  \n")
    (made,) = deploycli("cast", "--keep-fp32-file", "keep.txt", "--keep-fp32", "3/MatMul", "--json").json()
    refusals = {r["node"]: r["reason"] for r in made["artifact"]["steps"][0]["refusals"]}
    assert refusals == {
        "layers.0/MatMul": "user: matches 'layers.0/'",
        "layers.3/MatMul": "user: matches '3/MatMul'",
        "layers.5/Tanh": "user: matches 'Tanh'",
    }


def scaled(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """Make values between the first and the third product larger, and their sums what they were."""
    for tensor in model.graph.initializer:
        if tensor.name in ("into", "back"):
            array = numpy_helper.to_array(tensor) * np.float32(factor if tensor.name == "into" else 1 / factor)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def test_data(deploycli: Command, tmp_path: Path) -> None:
    bundle = make(tmp_path / "artifacts", model=scaled(wide(), 40000))
    before = files(bundle.path.parent)
    assert_refused(deploycli("cast", "linear"), 5, "the fp16 graph gives no usable numbers", "--calibrate DATA")
    assert files(bundle.path.parent) == before
    images = np.random.default_rng(0).uniform(0.5, 1, (3, 12)).astype(np.float32)
    np.save(tmp_path / "data.npy", images)
    result = deploycli("cast", "linear", "--calibrate", "data.npy", "--json")
    (made,) = result.json()
    said = [f"looking for large values ({i}/3)" for i in (1, 2, 3)]
    assert result.err.splitlines() in (said, [said[0], said[2]])  # between, a line every few seconds
    reasons = [refusal["reason"] for refusal in made["artifact"]["steps"][0]["refusals"]]
    pattern = r"rescaled: ([ab]), up to 3.9\d+e\+04, stored as x/8: 1 MatMul"
    assert [found[1] for reason in reasons if (found := re.fullmatch(pattern, reason))] == ["a", "b"]
    assert len(reasons) == 2
    assert all(comparison["passed"] for comparison in made["comparisons"])
    result = deploycli("cast", "linear", "--calibrate", "data.npy", "--samples", "1", "--allow-fp16", "range")
    assert_refused(result, 5, "no usable numbers")
    images[2, 5] = 1e38
    np.save(tmp_path / "large.npy", images)
    before = files(bundle.path)
    assert_refused(deploycli("cast", "linear", "--calibrate", "large.npy"), 5, "a is NaN or infinite in FP32")
    assert files(bundle.path) == before


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["absent"], 2, ["absent is no bundle"]),
        (["--precision", "fp8"], 2, ["'fp8' is not one of 'fp16', 'bf16'"]),
        (["--allow-fp16", "softmax,layernorm"], 2, ["no rule 'layernorm'", "layer-norm", "softmax"]),
        (["--keep-fp32", "("], 2, ["'(' is no regular expression"]),
        (["--keep-fp32", "head"], 2, ["no operator has a name that 'head' finds", "layers.0/MatMul"]),
        (["--keep-fp32", "."], 2, ["nothing is left to cast to FLOAT16: 6 operators stay FP32"]),
        (["--keep-fp32-file", "absent.txt"], 2, ["absent.txt cannot be read"]),
        (["--keep-fp32-file", "artifacts"], 2, ["artifacts"]),
        (["--io-types", "int8"], 2, ["'int8' is not one of"]),
        (["--io-types", "fp16", "--precision", "bf16"], 2, ["--io-types fp16", "--precision bf16"]),
        (["--calibrate", "absent"], 2, ["absent"]),
        (["--samples", "0"], 2, ["--samples"]),
    ],
)
def test_refused(deploycli: Command, bundle: Bundle, arguments: list[str], code: int, parts: list[str]) -> None:
    before = files(bundle.path.parent)
    assert_refused(deploycli("cast", *arguments), code, *parts)
    assert files(bundle.path.parent) == before


def test_a_changed_bundle(deploycli: Command, bundle: Bundle) -> None:
    path = bundle.path / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    assert_refused(deploycli("cast", "linear"), 8, "model.onnx has changed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["write_model", "_run", "extend_bundle"])
def test_interrupted(
    deploycli: Command, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, where: str, number: signal.Signals
) -> None:
    assert deploycli("cast", "linear").code == 0
    before = files(bundle.path.parent)
    original = getattr(derive, where)

    def interrupted(*arguments: object, **options: object) -> object:
        result = original(*arguments, **options) if where == "write_model" else None
        signal.raise_signal(number)
        return result

    monkeypatch.setattr(derive, where, interrupted)
    result = deploycli("cast", "linear", "--keep-fp32", "Tanh")
    assert (result.code, result.err.splitlines()[-1]) == (128 + number, "interrupted: nothing was written")
    assert files(bundle.path.parent) == before
    Bundle.open(bundle.path)


@pytest.mark.skipif(sys.platform != "linux", reason="permissions of root are dropped by a call of Linux")
def test_folder_that_cannot_be_written(bundle: Bundle, tmp_path: Path) -> None:
    before = files(bundle.path)
    bundle.path.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    result = run("cast", "linear", cwd=tmp_path, preexec=without_the_right_to_ignore_permissions)
    bundle.path.parent.chmod(stat.S_IRWXU)
    assert_refused(result, 7, "cannot write the bundle artifacts/linear")
    assert files(bundle.path) == before


def test_a_transformer(deploycli: Command, true_bundle: Bundle, tmp_path: Path) -> None:
    """Of real operators: LayerNormalization stays, the attention's Softmax does not, and all is within the budget."""
    path = shutil.copytree(true_bundle.path, tmp_path / "artifacts" / "smallest")
    result = deploycli("cast", "smallest")
    assert result.code == 0, result.err
    assert "layer-norm, " in result.out
    assert "softmax" not in result.out
    assert "outside the budget" not in result.out
    model = onnx.load(path / "model.fp16.onnx")
    types = {tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("fc1.weight")}
    assert types <= {10}
    assert deploycli("verify", "smallest", "--reference", "golden").code == 0
