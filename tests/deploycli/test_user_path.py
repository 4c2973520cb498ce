"""What a user types, from the export to the verdict."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import onnx
import pytest
import skimage.data
from PIL import Image

from deploycli.exporters.bundle.bundle import Bundle
from tests.deploycli.commands import SCRIPT, assert_refused, files, module, run
from tests.exporters.bundle.bundles import SPEC, make

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

BATCHES = ["batch 1", "batch 3", "batch 8", "batch 8 shuffled"]


def test_export_says_what_it_did_and_what_comes_next(exported: Path) -> None:
    out, err = (exported / "first.out").read_text(), (exported / "first.err").read_text()
    assert sum("weights: random, seed 0." in line for line in err.splitlines()) == 1
    assert "artifacts/swin_t/model.onnx" in out
    assert out.splitlines()[-1] == "next: deploycli verify swin_t"
    assert "tracing" in err.splitlines()
    written = set(files(exported / "artifacts")) - {"swin_t/reports/verify.json"}  # of another test
    assert written == {f"swin_t/{n}" for n in ("golden.npz", "manifest.json", "model.onnx")}


def test_exported_json_is_the_manifest(exported: Path) -> None:
    printed = json.loads((exported / "second.out").read_text())
    assert printed == json.loads((exported / "twin/swin_t/manifest.json").read_text()) | {
        "path": "twin/swin_t",
        "gone": [],
    }
    assert printed["weights"]["source"] == "random"
    assert printed["weights"]["seed"] == 0
    assert "tracing" in (exported / "second.err").read_text().splitlines()


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_two_processes_write_the_same_bytes(exported: Path, name: str) -> None:
    first, second = (hashlib.sha256((exported / root / "swin_t" / name).read_bytes()) for root in ("artifacts", "twin"))
    assert first.hexdigest() == second.hexdigest()


def test_exported_graph_has_the_promised_interface(exported: Path) -> None:
    model = onnx.load(exported / "artifacts/swin_t/model.onnx")
    onnx.checker.check_model(model)
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == ["batch", 3, 64, 64]
    assert logits.type.tensor_type.shape.dim[0].dim_param
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    named = [node.name for node in model.graph.node if "layers.2.blocks.1.attn" in node.name]
    assert len(named) > 10
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)


def test_verify_without_arguments(exported: Path) -> None:
    result = run("verify", cwd=exported)
    assert result.code == 0, result.err
    assert "artifacts/swin_t (random, seed 0; reference: eager)" in result.out
    assert result.out.splitlines()[-1] == "passed 4 checks"
    assert [line.partition(" (")[0] for line in result.err.splitlines()] == [f"model.onnx, {c}" for c in BATCHES]


def test_export_without_pytorch_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this machine has no PyTorch')\n")
    result = run("export", "swin_t", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.code == 7
    assert "this machine has no PyTorch" in result.err
    assert "pip install torch" in result.err
    assert "Traceback" not in result.err


def test_verify_without_pytorch_compares_with_golden(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this machine has no PyTorch')\n")
    bare = {"cwd": exported, "PYTHONPATH": str(tmp_path)}
    result = run("verify", "--reference", "golden", **bare)  # type: ignore[arg-type]
    assert result.code == 0, result.err
    assert "reference: golden" in result.out
    (report,) = run("verify", "--json", **bare).json()  # type: ignore[arg-type]
    assert report["reference"] == "golden"
    assert "this machine has no PyTorch" in report["reference_note"]
    assert [stage["check"] for stage in report["stages"]] == BATCHES
    assert_refused(run("verify", "--reference", "eager", **bare), 7, "PyTorch cannot be imported")  # type: ignore[arg-type]


def test_module_runs_as_the_script_does(exported: Path) -> None:
    by_script = run("inspect", "swin_t", cwd=exported)
    assert by_script.code == 0, by_script.err
    assert run("inspect", "swin_t", cwd=exported, program=module()) == by_script


PICTURES = {
    "astronaut.png": "RGB",
    "chelsea.jpg": "RGB",
    "rocket.webp": "RGB",
    "logo.png": "RGBA",
    "coins.png": "L",
    "deeper/camera.jpg": "L",
}


def test_verify_on_real_pictures(exported: Path, deploycli: Command, tmp_path: Path) -> None:
    for name, mode in PICTURES.items():
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(getattr(skimage.data, path.stem)())
        assert picture.mode == mode
        picture.save(path)
    arguments = ("verify", "swin_t", "-o", exported / "artifacts", "--batches", "1,4", "--images", "pictures")
    result = deploycli(*arguments, "--json")
    (report,) = result.json()
    stage = report["stages"][-1]
    assert (stage["check"], stage["samples"], stage["passed"]) == ("images", len(PICTURES), True)
    (comparison,) = stage["comparisons"]
    assert comparison["max_rel_error"] < 1e-5
    assert comparison["top1"]["samples"] == len(PICTURES)
    assert "images (1/6)" in result.err.splitlines()
    limited = deploycli(*arguments, "--limit", 2)
    assert limited.code == 0
    assert re.search(r"model\.onnx +2 images +logits", limited.out)


def test_verify_by_path_by_name_and_of_all(deploycli: Command, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make(tmp_path / "artifacts", name)
    for arguments, expected in {
        (): ["artifacts/one", "artifacts/two"],
        ("two",): ["artifacts/two"],
        ("artifacts/one", "two"): ["artifacts/one", "artifacts/two"],
        (tmp_path / "artifacts/one",): [str(tmp_path / "artifacts/one")],
    }.items():
        reports = deploycli("verify", *arguments, "--json").json()
        assert [report["bundle"] for report in reports] == expected
        assert all(report["passed"] and report["reference"] == "golden" for report in reports)
    assert deploycli("verify").out.count("passed 4 checks") == 2


def test_one_failing_bundle_fails_them_all(deploycli: Command, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make(tmp_path / "artifacts", name)
    result = deploycli("verify", "--rtol", "features:1e-12")
    assert result.code == 5
    assert "output 'features'" in result.out
    assert "output 'logits'" not in result.out


def test_inspect_reads_bundles_and_files(exported: Path, deploycli: Command) -> None:
    bundle, file = exported / "artifacts/swin_t", exported / "artifacts/swin_t/model.onnx"
    recorded = json.loads((bundle / "manifest.json").read_text())
    result = deploycli("inspect", bundle, "--json")
    shown = result.json()
    assert shown.pop("verified").keys() == {"model.onnx"}
    assert shown == recorded | {"path": str(bundle), "engines": []}
    printed = deploycli("inspect", "swin_t", "-o", exported / "artifacts").out
    assert recorded["artifacts"][0]["file"]["sha256"] in printed
    assert re.search(r"input +images float32 \[batch, 3, 64, 64\]", printed)
    (artifact,) = recorded["artifacts"]
    before, after = (sum(artifact[ops].values()) for ops in ("ops_before", "ops_after"))
    assert re.search(rf"all +{before} +{after} *\n", printed)
    summary = deploycli("inspect", file, "--json").json()
    assert summary["ops"] == artifact["ops_after"]
    assert summary["size"] == file.stat().st_size
    assert re.search(r"input +images float32 \[batch, 3, 64, 64\]", deploycli("inspect", file).out)


def test_list(deploycli: Command) -> None:
    everything = [model["name"] for model in deploycli("list", "--json").json()]
    assert everything[0] == "swin_t"
    assert len(everything) >= 12
    at_384 = deploycli("list", "swin_*_384", "--json").json()
    assert [model["name"] for model in at_384] == ["swin_b_384", "swin_l_384"]
    assert all(model["spec"]["inputs"][0]["shape"] == [3, 384, 384] for model in at_384)
    table = deploycli("list", "384").out
    assert "swin_base_patch4_window12_384" in table
    assert "224x224" not in table


def test_version(tmp_path: Path) -> None:
    for program in ((SCRIPT,), module()):
        result = run("--version", cwd=tmp_path, program=program)
        assert (result.code, result.out) == (0, f"deploycli {version('deploycli')}\n")


def test_options_of_the_export_reach_the_bundle(smallest: str, deploycli: Command, tmp_path: Path) -> None:
    options = ["--batch", 3, "--opset", 18, "--seed", 7, "--num-classes", 9, "--external-data", "always"]
    result = deploycli("export", smallest, "-o", "a folder", "--name", "mine-1", *options, "-v")
    assert result.code == 0, result.err
    assert "weights: random, seed 7." in result.err
    manifest = Bundle.open(tmp_path / "a folder/mine-1").manifest
    (artifact,) = manifest.artifacts
    assert (manifest.name, manifest.weights.seed) == ("mine-1", 7)
    assert (artifact.batch, artifact.opset) == (3, 18)
    assert [record.path for record in artifact.external] == ["model.onnx.data"]
    assert all(step.name in result.out for step in artifact.steps)
    refusals = [refusal for step in artifact.steps for refusal in step.refusals]
    assert all(f"{refusal.node}: {refusal.reason}" in result.out for refusal in refusals)
    assert f"; {len(refusals)} refusals" in result.out
    following = shlex.split(result.out.splitlines()[-1].removeprefix("next: "))
    assert following[:2] == ["deploycli", "verify"]
    verified = deploycli(*following[1:])
    assert verified.code == 0
    assert "batch 3 shuffled" in verified.out


def test_export_replaces_a_bundle_whole(smallest: str, deploycli: Command, tmp_path: Path) -> None:
    old = make(tmp_path / "artifacts", smallest, spec=replace(SPEC, name=smallest, family="swin"))
    (old.path / "reports").mkdir()
    (old.path / "reports/old.json").touch()
    make(tmp_path / "artifacts", "other")
    other = files(tmp_path / "artifacts/other")
    assert deploycli("export", smallest, "--no-rewrite").code == 0
    assert sorted(files(old.path)) == ["golden.npz", "manifest.json", "model.onnx"]
    assert sorted(path.name for path in (tmp_path / "artifacts").iterdir()) == ["other", smallest]
    assert files(tmp_path / "artifacts/other") == other
    (artifact,) = Bundle.open(old.path).manifest.artifacts
    kept = ("MatMul", "Transpose", "Softmax", "Slice", "Concat")  # only what makes operands constants is folded
    assert [artifact.ops_after.get(op) for op in kept] == [artifact.ops_before.get(op) for op in kept]
    assert [step.name for step in artifact.steps] == ["trace"]


def test_refusals_are_shown_with_their_reasons(deploycli: Command, tmp_path: Path) -> None:
    make(tmp_path / "artifacts")
    assert "trace left node: reason" in deploycli("inspect", "linear", "-v").out
    assert "trace left node: reason" not in deploycli("inspect", "linear").out
