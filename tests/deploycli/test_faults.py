"""What can be wrong with a command, a checkpoint, a folder or a bundle: one message, its exit code, nothing written."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import stat
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from tests.deploycli.commands import SMALL, assert_refused, files, module, run
from tests.exporters.bundle.bundles import SPEC, make
from tests.models.swins import golden_state, tiny_swin

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.bundle.bundle import Bundle
    from tests.deploycli.conftest import Command


def assert_nothing_written(folder: Path) -> None:
    assert not (folder / "artifacts").exists() or files(folder / "artifacts") == {}


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["swim_t"], 2, ["unknown model 'swim_t'", "try: swin_t"]),
        ([], 2, ["Missing argument 'MODEL'"]),
        (["swin_t", "--img-size", "0"], 2, ["'0' is no image size", "256x192"]),
        (["swin_t", "--img-size", "64x64x64"], 2, ["'64x64x64' is no image size"]),
        (["swin_t", "--img-size", "70"], 2, ["images of 70x70 do not fit a window of 7", "--img-size 224"]),
        (["swin_t", "--batch", "some"], 2, ["'some' is no batch", "dynamic"]),
        (["swin_t", "--batch", "-1"], 2, ["'-1' is no batch"]),
        (["swin_t", "--opset", "new"], 2, ["--opset"]),
        (["swin_t", "--seed", "-1"], 2, ["--seed"]),
        (["swin_t", "--seed", "99999999999999999999"], 2, ["--seed"]),
        (["swin_t", "--name", "../swin_t"], 2, ["'../swin_t' cannot name a bundle"]),
        (["swin_t", "--fmt", "plan"], 2, ["'plan'"]),
        (["swin_t", "--checkpoint", "absent.pth"], 2, ["no checkpoint at absent.pth"]),
        (["swin_t", "--checkpoint", "absent.pth", "--pretrained"], 2, ["both --checkpoint and --pretrained"]),
        (["swin_t", "--pretrained-from", "nowhere"], 2, ["'nowhere' names no hub repository"]),
    ],
)
def test_export_refuses(deploycli: Command, tmp_path: Path, arguments: list[str], code: int, parts: list[str]) -> None:
    assert_refused(deploycli("export", *arguments), code, *parts)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("opset", [17, 24])
def test_opset_that_tensorrt_cannot_parse(smallest: str, deploycli: Command, tmp_path: Path, opset: int) -> None:
    old = make(tmp_path / "artifacts", smallest)
    before = files(old.path)
    assert_refused(deploycli("export", smallest, "--opset", opset), 3, f"opset {opset}", "18 to 23")
    assert files(tmp_path / "artifacts") == {f"{smallest}/{name}": content for name, content in before.items()}


@pytest.mark.parametrize("arguments", [["--rtol", "tight"], ["--rtol", "nan"], ["--rtol", "features:-1"]])
def test_verify_refuses_tolerances(deploycli: Command, tmp_path: Path, arguments: list[str]) -> None:
    make(tmp_path / "artifacts")
    assert_refused(deploycli("verify", *arguments), 2, "tolerance")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--rtol", "boxes:1"], "no output 'boxes'"),
        (["--batches", "1,0"], "write batch sizes as 1,3,8"),
        (["--batches", ""], "write batch sizes as 1,3,8"),
        (["--seed", "-1"], "--seed"),
        (["--limit", "0"], "--limit"),
        (["absent"], "absent is no bundle"),
        (["--images", "pictures"], "pictures cannot be compared with the golden file"),
    ],
)
def test_verify_refuses(deploycli: Command, tmp_path: Path, arguments: list[str], part: str) -> None:
    make(tmp_path / "artifacts")
    assert_refused(deploycli("verify", *arguments), 2, part)


def test_verify_where_there_is_no_bundle(deploycli: Command, tmp_path: Path) -> None:
    assert_refused(deploycli("verify"), 2, "no bundle in artifacts", "deploycli export")
    (tmp_path / "artifacts").mkdir()
    assert_refused(deploycli("verify"), 2, "no bundle in artifacts", "deploycli export")


def test_names_that_are_nothing(deploycli: Command, tmp_path: Path) -> None:
    assert_refused(deploycli("inspect", "absent"), 2, "absent is no bundle")
    assert_refused(deploycli("inspect", "absent.onnx"), 2, "no file absent.onnx")
    assert_refused(deploycli("list", "yolo"), 2, "no model matches 'yolo'")
    assert_refused(deploycli("quantise"), 2, "No such command 'quantise'")
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    assert_refused(deploycli("inspect", "garbage.onnx"), 2, "garbage.onnx is no ONNX file")


# --- checkpoints


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_checkpoint_with_code_is_refused_and_does_not_run(smallest: str, deploycli: Command, tmp_path: Path) -> None:
    folder = tmp_path / "made-by-the-checkpoint"
    torch.save({"model": Code(folder)}, tmp_path / "code.pth")
    assert_refused(deploycli("export", smallest, "--checkpoint", "code.pth"), 2, "pickled code", "mkdir")
    assert not folder.exists()
    assert_nothing_written(tmp_path)
    torch.load(tmp_path / "code.pth", weights_only=False)
    assert folder.exists(), "the code is harmless, so refusing it shows nothing"


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_truncated_checkpoint(smallest: str, checkpoint: Path, deploycli: Command, tmp_path: Path, kept: float) -> None:
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    result = deploycli("export", smallest, "--checkpoint", checkpoint)
    assert_refused(result, 2, "smallest.pth cannot be read as a checkpoint")
    assert_nothing_written(tmp_path)


def test_head_of_another_size(smallest: str, checkpoint: Path, deploycli: Command, tmp_path: Path) -> None:
    result = deploycli("export", smallest, "--checkpoint", checkpoint, "--num-classes", 7)
    assert_refused(result, 2, "head has 5 classes", "expected: 7", "try: --num-classes 5")
    assert_nothing_written(tmp_path)


def test_checkpoint_for_another_window(smallest: str, checkpoint: Path, deploycli: Command, tmp_path: Path) -> None:
    result = deploycli("export", smallest, "--checkpoint", checkpoint, "--window-size", 2)
    assert_refused(result, 2, "--window-size 4")
    assert_nothing_written(tmp_path)
    assert deploycli("export", smallest, "--checkpoint", checkpoint, "--window-size", 4).code == 0


def test_checkpoint_of_another_model(smallest: str, deploycli: Command, tmp_path: Path) -> None:
    torch.save(
        golden_state(tiny_swin(depths=[2], num_heads=[2], window_size=4)) | {"extra": torch.ones(1)}, "other.pth"
    )
    result = deploycli("export", smallest, "--checkpoint", "other.pth")
    assert_refused(result, 2, "does not belong to this model", "extra")
    assert_nothing_written(tmp_path)


def test_changed_checkpoint_is_not_the_reference(
    smallest: str, checkpoint: Path, deploycli: Command, tmp_path: Path
) -> None:
    assert deploycli("export", smallest, "--checkpoint", checkpoint).code == 0
    checkpoint.write_bytes(checkpoint.read_bytes() + b"\0")
    assert_refused(deploycli("verify"), 8, "smallest.pth is not the checkpoint")


# --- folders


def test_output_that_is_a_file(deploycli: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    assert_refused(deploycli("export", "swin_t", "-o", "file"), 2, "'file' is a file")
    assert_refused(deploycli("export", "swin_t", "-o", "file/below"), 7, "cannot write the bundle file/below/swin_t")
    assert_refused(deploycli("verify", "-o", "file"), 2, "'file' is a file")
    assert files(tmp_path) == {"file": b"kept"}


def test_bundle_does_not_replace_what_is_no_bundle(deploycli: Command, tmp_path: Path) -> None:
    (tmp_path / "artifacts/swin_t").mkdir(parents=True)
    (tmp_path / "artifacts/swin_t/thesis.tex").write_text("kept")
    assert_refused(deploycli("export", "swin_t"), 2, "a folder that is no bundle")
    assert files(tmp_path) == {"artifacts/swin_t/thesis.tex": b"kept"}


def without_the_right_to_ignore_permissions() -> None:
    """Give up CAP_DAC_OVERRIDE, which lets root write anywhere; other users do not have it to give up."""
    ctypes.CDLL(None).prctl(24, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="permissions of root are dropped by a call of Linux")
def test_unwritable_folder(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    result = run("export", "swin_t", *SMALL, cwd=tmp_path, preexec=without_the_right_to_ignore_permissions)
    assert_refused(result, 7, "cannot write the bundle artifacts/swin_t", "--output")
    assert files(tmp_path) == {"artifacts": b""}


@pytest.mark.parametrize(
    ("limit", "last_steps"),
    [(10_000, {"running it in PyTorch"}), (30_000, {"writing", "rewriting"})],  # where NVIDIA's parser gets the graph
)
def test_full_disk(smallest: str, deploycli: Command, tmp_path: Path, limit: int, last_steps: set[str]) -> None:
    """The kernel refuses to let a file grow, as on a full disk: golden.npz has 25 kB, model.onnx 40."""
    before = files(make(tmp_path / "artifacts", smallest, spec=replace(SPEC, name=smallest, family="swin")).path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        result = deploycli("export", smallest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(result, 7, f"cannot write the bundle artifacts/{smallest}", "free some space")
    assert [line for line in result.err.splitlines() if not line.startswith((" ", "error"))][-1] in last_steps
    assert files(tmp_path / "artifacts") == {f"{smallest}/{name}": content for name, content in before.items()}


def test_folder_that_has_packages_of_our_folders_names(tmp_path: Path) -> None:
    for package in ("models", "exporters"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong package ran')")
    assert run("list", cwd=tmp_path, program=module()).code == 0
    assert run("list", cwd=tmp_path).code == 0


# --- bundles


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path / "artifacts")


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_changed_or_missing_file(deploycli: Command, bundle: Bundle, command: str, name: str) -> None:
    assert deploycli(command, "linear").code == 0
    file = bundle.path / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert_refused(deploycli(command, "linear"), 8, f"artifacts/linear/{name} has changed")
    file.unlink()
    assert_refused(deploycli(command, "linear"), 8, f"artifacts/linear/{name} is missing")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_manifest_that_is_garbage(deploycli: Command, bundle: Bundle, command: str) -> None:
    path = bundle.path / "manifest.json"
    manifest = json.loads(path.read_text())
    outside = manifest | {"golden": manifest["golden"] | {"path": "../golden.npz"}}
    for text in (
        b"",
        b"\xff\xfe",
        b"[]",
        b"{",
        json.dumps(manifest | {"spec": 1}).encode(),
        json.dumps(outside).encode(),
    ):
        path.write_bytes(text)
        assert_refused(deploycli(command, "linear"), 8, "manifest.json")
    path.write_text(json.dumps(manifest | {"schema_version": 99}))
    assert_refused(deploycli(command, "linear"), 2, "schema version 99")


def test_pictures_that_are_none(smallest: str, deploycli: Command, tmp_path: Path) -> None:
    assert deploycli("export", smallest).code == 0
    assert_refused(deploycli("verify", "--images", "pictures"), 2, "pictures")
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    assert_refused(deploycli("verify", "--images", "pictures"), 2, "no image in pictures")
    (folder / "picture.png").write_text("no picture either")
    assert_refused(deploycli("verify", "--images", "pictures"), 2, "pictures/picture.png cannot be decoded")
