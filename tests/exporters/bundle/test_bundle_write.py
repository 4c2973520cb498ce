from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import helper

from deploycli.exporters.bundle.bundle import Bundle, find_bundles
from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.bundle.golden import load_golden
from deploycli.exporters.bundle.manifest import MANIFEST_NAME, Artifact, FileRecord
from deploycli.models.errors import EnvironmentUnsuitable, IntegrityError, UsageError
from deploycli.models.spec import ModelSpec, TensorSpec, Weights
from tests.exporters.bundle.bundles import SPEC, extend_bundle, filler, graph, make, write_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploycli.exporters.bundle.manifest import Manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path)


def hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))


def state(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


OTHER = graph([helper.make_node("Identity", ["raw.features"], ["features"])])
"""It computes the same, and is another file."""


def derive(bundle: Bundle, name: str = "model.fp16.onnx", content: bytes = b"derived") -> Bundle:
    """Add what stands for a file of another precision."""

    def write(folder: Path) -> Artifact:
        (folder / name).write_bytes(content)
        source = bundle.manifest.artifacts[0]
        return replace(source, file=FileRecord.of(folder, name), precision="fp16", source=source.file.path)

    return extend_bundle(bundle, write)


def all_there_is(bundle: Bundle) -> Bundle:
    """Add a precision, an engine, a report, and a file of the user's."""
    derive(bundle)
    for name in ("engines/fp16.plan", "engines/fp16.json", "reports/verify.json", "notes.txt"):
        (bundle.path / name).parent.mkdir(exist_ok=True)
        (bundle.path / name).write_text(name)
    return Bundle.open(bundle.path)


def test_the_same_graph_again_leaves_all_that_was_made_from_it(bundle: Bundle) -> None:
    old, before = all_there_is(bundle), state(bundle.path)
    new = make(bundle.path.parent, samples=3, weights=Weights("checkpoint", path="/elsewhere.pth", sha256="1" * 64))
    after = state(bundle.path)
    assert {name for name in before if before[name] != after.get(name)} == {"golden.npz", MANIFEST_NAME}
    assert len(load_golden(Bundle.open(bundle.path).golden)[0]["images"]) == 3
    assert new.gone == ()
    assert new.manifest.artifacts == old.manifest.artifacts
    assert new.manifest.weights.path == "/elsewhere.pth"
    assert hidden(bundle.path.parent) == []


def test_another_graph_leaves_nothing_and_names_it(bundle: Bundle) -> None:
    all_there_is(bundle)
    new = make(bundle.path.parent, model=OTHER)
    assert new.gone == ("engines/fp16.plan", "model.fp16.onnx", "notes.txt", "reports/")
    assert set(state(bundle.path)) == {"model.onnx", "golden.npz", MANIFEST_NAME}
    assert hidden(bundle.path.parent) == []


def test_what_is_damaged_is_not_taken_over(bundle: Bundle) -> None:
    all_there_is(bundle)
    derive(bundle, "model.bf16.onnx")
    (bundle.path / "model.fp16.onnx").write_bytes(b"damaged")
    new = make(bundle.path.parent)
    assert new.gone == ("model.fp16.onnx",)
    assert Bundle.open(bundle.path) == new
    assert [a.file.path for a in new.manifest.artifacts] == ["model.onnx", "model.bf16.onnx"]


@pytest.mark.parametrize(
    ("spec", "is_other"),
    [
        (SPEC, False),
        (replace(SPEC, config={"img_size": 64}, inputs=(TensorSpec("images", (24,)),), outputs=("logits",)), False),
        (replace(SPEC, name="swin_t"), True),
        (replace(SPEC, family="vit"), True),
        (replace(SPEC, family="timm", config={"target": "linear"}), True),
    ],
)
def test_another_models_bundle_is_not_replaced_unasked(bundle: Bundle, spec: ModelSpec, is_other: bool) -> None:
    if not is_other:
        write_bundle(bundle.path.parent, "linear", filler(spec=spec), model=spec)
        return
    before = state(bundle.path)
    with pytest.raises(UsageError, match="is a bundle of linear") as caught:
        write_bundle(bundle.path.parent, "linear", pytest.fail, model=spec)
    assert "--replace" in caught.value.hint
    assert state(bundle.path) == before
    write_bundle(bundle.path.parent, "linear", filler(spec=spec), model=None)


@pytest.mark.parametrize(
    ("old", "new", "is_other"),
    [
        ("a.py:net", "./a.py:net", False),
        ("a.py:net", "b.py:net", True),
        ("a.py:net", "a.py:other", True),
        ("org/net@0123", "org/net@4567", False),
        ("org/net@0123", "org/net2@0123", True),
    ],
)
def test_models_from_elsewhere_are_the_same_where_their_place_is(
    tmp_path: Path, old: str, new: str, is_other: bool
) -> None:
    was, now = (replace(SPEC, family="factory", config={"target": target, "kwargs": {}}) for target in (old, new))
    make(tmp_path, spec=was)
    if is_other:
        with pytest.raises(UsageError, match="would be replaced by one of"):
            write_bundle(tmp_path, "linear", filler(spec=now), model=now)
    else:
        write_bundle(tmp_path, "linear", filler(spec=now), model=now)


def test_another_model_that_came_meanwhile_is_not_replaced(bundle: Bundle) -> None:
    other = replace(SPEC, name="other")

    def fill(folder: Path) -> Manifest:
        make(bundle.path.parent, "linear", spec=other)
        return filler()(folder)

    with pytest.raises(UsageError, match="is a bundle of other"):
        write_bundle(bundle.path.parent, "linear", fill, model=SPEC)
    assert Bundle.open(bundle.path).manifest.spec.name == "other"


def test_what_others_add_meanwhile_stays(bundle: Bundle) -> None:
    """Three commands open one bundle, and end one after another."""

    def write(folder: Path) -> Artifact:
        derive(bundle, "model.bf16.onnx")
        (bundle.path / "reports").mkdir()
        (bundle.path / "reports/verify.json").write_text("{}")
        (folder / "model.int8.onnx").write_bytes(b"int8")
        return replace(bundle.manifest.artifacts[0], file=FileRecord.of(folder, "model.int8.onnx"), source="model.onnx")

    derive(bundle)
    new = extend_bundle(bundle, write)
    names = ["model.onnx", "model.fp16.onnx", "model.bf16.onnx", "model.int8.onnx"]
    assert [a.file.path for a in Bundle.open(bundle.path).manifest.artifacts] == names
    assert Bundle.open(bundle.path) == new
    assert (bundle.path / "reports/verify.json").is_file()


def test_what_was_made_of_a_model_that_is_gone_is_not_kept(bundle: Bundle) -> None:
    def write(folder: Path) -> Artifact:
        make(bundle.path.parent, model=OTHER)
        (folder / "model.fp16.onnx").write_bytes(b"fp16")
        return replace(bundle.manifest.artifacts[0], file=FileRecord.of(folder, "model.fp16.onnx"), source="model.onnx")

    with pytest.raises(IntegrityError, match=r"model.onnx was replaced while model.fp16.onnx was made"):
        extend_bundle(bundle, write)
    assert [a.file.path for a in Bundle.open(bundle.path).manifest.artifacts] == ["model.onnx"]
    assert hidden(bundle.path.parent) == []


def test_a_file_that_is_made_again_leaves_no_old_data(bundle: Bundle) -> None:
    def write(data: str) -> Bundle:
        def make_it(folder: Path) -> Artifact:
            for name in ("model.fp16.onnx", data):
                (folder / name).write_text(data)
            record, external = (FileRecord.of(folder, name) for name in ("model.fp16.onnx", data))
            return replace(bundle.manifest.artifacts[0], file=record, external=(external,), source="model.onnx")

        return extend_bundle(bundle, make_it)

    write("first.data")
    new = write("second.data")
    assert set(state(bundle.path)) == {"model.onnx", "golden.npz", MANIFEST_NAME, "model.fp16.onnx", "second.data"}
    assert Bundle.open(bundle.path) == new


def test_writing_a_report_waits_for_a_swap_and_a_swap_for_it(bundle: Bundle) -> None:
    """Where it would not, the report would go into the folder that is deleted."""
    rounds = 20
    (bundle.path / "reports").mkdir()

    def report() -> None:
        for i in range(rounds):
            with bundle.held():
                write_whole(bundle.path / f"reports/{i}.json", b"{}")

    thread = Thread(target=report)
    thread.start()
    for i in range(rounds):
        derive(bundle, content=str(i).encode())
    thread.join()
    assert {path.name for path in (bundle.path / "reports").iterdir()} == {f"{i}.json" for i in range(rounds)}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), ValueError("a bug"), UsageError("not usable")])
def test_any_exception_leaves_the_old_bundle_whole(bundle: Bundle, error: BaseException) -> None:
    def fill(folder: Path) -> Manifest:
        (folder / "model.onnx").write_bytes(b"half")
        raise error

    before = state(bundle.path.parent)
    with pytest.raises(type(error)):
        write_bundle(bundle.path.parent, "linear", fill)
    assert state(bundle.path.parent) == before
    assert hidden(bundle.path.parent) == []
    with pytest.raises(type(error)):
        write_bundle(bundle.path.parent, "fresh", fill)
    assert not (bundle.path.parent / "fresh").exists()


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_failing_rename_leaves_the_old_bundle_whole(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException
) -> None:
    rename, calls = Path.rename, []

    def unreliable(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == failing:
            raise error
        return rename(path, target)

    before = state(bundle.path.parent)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", unreliable)
        expected = EnvironmentUnsuitable if isinstance(error, OSError) else type(error)
        with pytest.raises(expected):
            make(bundle.path.parent, samples=3)
    assert state(bundle.path.parent) == before
    assert hidden(bundle.path.parent) == []


KILLED = """
import os, sys
from pathlib import Path
from tests.exporters.bundle.bundles import make
rename, calls = Path.rename, []
def killed(path, target):
    calls.append(path)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    return rename(path, target)
Path.rename = killed
make(Path(sys.argv[1]), samples=3)
"""


def run(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, text=True, **options)


def kill_at_rename(bundle: Bundle, number: int) -> None:
    assert run(KILLED, str(bundle.path.parent), str(number)).wait() == -signal.SIGKILL


@pytest.mark.parametrize("reader", ["open", "find", "write"])
def test_killed_between_the_renames_the_old_bundle_comes_back(bundle: Bundle, reader: str) -> None:
    root = bundle.path.parent
    kill_at_rename(bundle, 2)
    assert not bundle.path.exists()
    if reader == "open":
        assert Bundle.open(bundle.path) == bundle
    elif reader == "find":
        assert find_bundles(root) == [bundle.path]
    else:
        with pytest.raises(KeyError):
            write_bundle(root, "linear", lambda folder: {}["stopped"])
        assert Bundle.open(bundle.path) == bundle
    make(root)
    assert hidden(root) == []


def test_killed_and_then_failing_the_old_bundle_still_comes_back(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def unreliable(path: Path, target: Path) -> Path:
        if ".tmp-" in path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    kill_at_rename(bundle, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", unreliable)
        with pytest.raises(EnvironmentUnsuitable, match="Input/output error"):
            make(bundle.path.parent, samples=3)
    assert Bundle.open(bundle.path) == bundle


def test_killed_before_the_renames_the_old_bundle_stands(bundle: Bundle) -> None:
    kill_at_rename(bundle, 1)
    assert Bundle.open(bundle.path) == bundle
    assert len(hidden(bundle.path.parent)) == 1
    make(bundle.path.parent)
    assert hidden(bundle.path.parent) == []


def test_left_over_old_bundle_is_removed_by_the_next_write(bundle: Bundle) -> None:
    shutil.copytree(bundle.path, bundle.path.parent / ".linear.replaced")
    assert find_bundles(bundle.path.parent) == [bundle.path]
    assert Bundle.open(bundle.path) == bundle
    make(bundle.path.parent)
    assert hidden(bundle.path.parent) == []


def test_two_writers_at_once_the_later_one_wins_whole(tmp_path: Path) -> None:
    slow = """
import sys
from pathlib import Path
from tests.exporters.bundle.bundles import filler, write_bundle
def fill(folder):
    print("writing", flush=True)
    sys.stdin.readline()
    return filler(samples=3)(folder)
write_bundle(Path(sys.argv[1]), "linear", fill)
"""
    with run(slow, str(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        make(tmp_path)  # finds the other's folder in use, and leaves it
        assert len(hidden(tmp_path)) == 1
        writer.communicate("go on\n")
    assert writer.returncode == 0
    assert len(load_golden(Bundle.open(tmp_path / "linear").golden)[0]["images"]) == 3
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b", "../a", "-a", "a b"])
def test_name_must_be_a_plain_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a bundle"):
        write_bundle(tmp_path, name, filler())


def test_what_is_no_bundle_is_refused_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / MANIFEST_NAME).write_text('{"short_name": "a web page"}')
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = state(tmp_path)
    for name in ("file", "folder", "site", "link", "dangling"):
        with pytest.raises(UsageError, match="exists and is"):
            make(tmp_path, name)
    assert state(tmp_path) == before


def test_empty_folder_and_damaged_bundle_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path, "empty")
    damaged = make(tmp_path, "damaged")
    manifest = damaged.path / MANIFEST_NAME
    manifest.write_text(manifest.read_text("utf-8")[:100], "utf-8")
    make(tmp_path, "damaged")
    assert len(find_bundles(tmp_path)) == 2
    Bundle.open(damaged.path)


def test_manifest_must_record_what_was_written(bundle: Bundle) -> None:
    def fill(folder: Path) -> Manifest:
        manifest = filler()(folder)
        (folder / "model.onnx").unlink()
        return manifest

    with pytest.raises(IntegrityError, match="missing"):
        write_bundle(bundle.path.parent, "linear", fill)
    assert Bundle.open(bundle.path) == bundle


def test_disk_error_in_a_write_is_one_message(bundle: Bundle) -> None:
    def fill(folder: Path) -> Manifest:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(EnvironmentUnsuitable, match="No space left on device") as caught:
        write_bundle(bundle.path.parent, "linear", fill)
    assert caught.value.exit_code == 7
    assert Bundle.open(bundle.path) == bundle


def test_error_of_another_file_is_not_explained_as_the_disk(tmp_path: Path) -> None:
    def fill(folder: Path) -> Manifest:
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/model.pth")

    def download(folder: Path) -> Manifest:
        raise OSError("HTTP 404")

    for reader in (fill, download):
        with pytest.raises(OSError, match=r"elsewhere|404"):
            write_bundle(tmp_path, "linear", reader)
    assert hidden(tmp_path) == []


def test_root_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for root in (tmp_path / "file", tmp_path / "pipe"):
        with pytest.raises(UsageError, match="is no folder"):
            make(root)
    for root in (tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(EnvironmentUnsuitable, match="cannot write"):
            make(root)


def test_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(EnvironmentUnsuitable, match="Permission denied"):
            make(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if command is None or subprocess.run([command, *options], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_really_full_disk(small_disk: Path) -> None:
    before = make(small_disk)
    with pytest.raises(EnvironmentUnsuitable, match="No space left on device"):
        make(small_disk, samples=4096)
    assert Bundle.open(before.path) == before
    assert hidden(small_disk) == []


def test_really_full_disk_by_a_short_array_write(small_disk: Path) -> None:
    def fill(folder: Path) -> Manifest:
        with (folder / "data").open("wb") as file:
            np.zeros(1 << 20, np.uint8).tofile(file)
        raise AssertionError("the disk took it")

    with pytest.raises(EnvironmentUnsuitable, match="cannot write the bundle"):
        write_bundle(small_disk, "linear", fill)
    assert hidden(small_disk) == []
