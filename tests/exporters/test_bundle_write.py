from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from exporters.artifact import MANIFEST_NAME
from exporters.bundle import Bundle, find_bundles, write_bundle
from exporters.golden import load_golden
from models.errors import EnvironmentUnsuitable, IntegrityError, UsageError
from tests.exporters.bundles import filler, make

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exporters.manifest import Manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path)


def hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))


def state(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_replacing_leaves_nothing_of_the_old_bundle(bundle: Bundle) -> None:
    (bundle.path / "reports").mkdir()
    (bundle.path / "reports" / "old.json").touch()
    make(bundle.path.parent, samples=3)
    assert not (bundle.path / "reports").exists()
    assert len(load_golden(Bundle.open(bundle.path).golden)[0]["images"]) == 3
    assert hidden(bundle.path.parent) == []


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
from tests.exporters.bundles import make
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
    root = Path(__file__).parents[2]
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
from exporters.bundle import write_bundle
from tests.exporters.bundles import filler
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
    for root in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
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
