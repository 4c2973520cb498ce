"""Files take their place whole, and only files are replaced."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploycli.exporters.bundle.files import (
    place,
    regular_file,
    replaced_folder,
    scratch_folder,
    temporary_folder,
    write_whole,
)
from deploycli.models.errors import EnvironmentUnsuitable, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Path]:
    """A folder with all that is no file."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "circle").symlink_to("circle")
    before = Path.cwd()
    os.chdir(tmp_path)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        yield tmp_path
    os.chdir(before)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("folder", "is a folder"),
        ("pipe", "is a pipe"),
        ("socket", "is a socket"),
        ("link", "is a pipe"),
        ("/dev/null", "is a device"),
        ("/dev/full", "is a device"),
    ],
)
def test_what_is_no_file_is_not_replaced(odd: Path, name: str, what: str) -> None:
    (odd / "new").write_bytes(b"new")
    for write in (
        lambda: regular_file(odd / name),
        lambda: write_whole(odd / name, b"new"),
        lambda: place([odd / "new"], odd / name),
    ):
        before = (odd / name).stat()
        with pytest.raises(UsageError, match=what):
            write()
        assert (odd / name).stat().st_ino == before.st_ino
    assert (odd / "new").read_bytes() == b"new"


def test_a_circle_of_links(odd: Path) -> None:
    with pytest.raises(EnvironmentUnsuitable, match="symbolic links"):
        write_whole(odd / "circle", b"new")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one(tmp_path: Path, there: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere/real", tmp_path / "link"
    link.symlink_to("elsewhere/real")
    if there:
        real.write_bytes(b"old")
    write_whole(link, b"new")
    assert (link.is_symlink(), real.read_bytes()) == (True, b"new")
    (tmp_path / "newer").write_bytes(b"newer")
    assert place([tmp_path / "newer"], link) == (link,)
    assert (link.is_symlink(), real.read_bytes()) == (True, b"newer")


def test_a_model_is_not_parted_from_its_data_by_a_link(tmp_path: Path) -> None:
    files = [tmp_path / "new/model.onnx", tmp_path / "new/model.onnx.0123.data"]
    (tmp_path / "new").mkdir()
    for file in files:
        file.write_text(file.name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model.onnx").symlink_to("elsewhere/model.onnx")
    with pytest.raises(UsageError, match="refers to others beside it"):
        place(files, tmp_path / "model.onnx")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert place(files, tmp_path / "elsewhere/model.onnx") == (
        tmp_path / "elsewhere/model.onnx",
        tmp_path / "elsewhere/model.onnx.0123.data",
    )


KILLED = """
import os, sys
from pathlib import Path
from deploycli.exporters.bundle.files import place
plain, calls = Path.replace, []
def replace(path, target):
    calls.append(path)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    return plain(path, target)
Path.replace = replace
folder = Path(sys.argv[1])
place([folder / "new/m.onnx", folder / "new/m.onnx.2.data"], folder / "m.onnx")
"""


@pytest.mark.parametrize("number", [1, 2])
def test_killed_at_any_rename_the_model_has_its_own_data(tmp_path: Path, number: int) -> None:
    (tmp_path / "new").mkdir()
    for name, data in (("m.onnx", "m.onnx.1.data"), ("new/m.onnx", "m.onnx.2.data")):
        (tmp_path / name).write_text(data)
        (tmp_path / name).with_name(data).write_text(data)
    run(KILLED, tmp_path, number)
    assert (tmp_path / (tmp_path / "m.onnx").read_text()).read_text() == "m.onnx.1.data"


def run(code: str, *arguments: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", code, *map(str, arguments)]
    assert subprocess.run(line, env=environment, check=False).returncode == -signal.SIGKILL


DIES = """
import os, sys
from pathlib import Path
from deploycli.exporters.bundle.files import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_writer_left_goes_and_what_another_holds_stays(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with scratch_folder(target) as mine:
        run(DIES, target)
        assert len(list(tmp_path.iterdir())) == 2
        with scratch_folder(target) as other:
            assert {path.name for path in tmp_path.iterdir()} == {mine.name, other.name}
    assert list(tmp_path.iterdir()) == []


TEMPORARY = """
import os, sys
from pathlib import Path
from deploycli.exporters.bundle.files import temporary_folder
near = Path(sys.argv[1]) if len(sys.argv) > 1 else None
with temporary_folder(near) as folder:
    (folder / "half").touch()
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("near", [True, False])
def test_temporary_folders_of_the_dead_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: bool) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    place = [tmp_path] if near else []
    run(TEMPORARY, *place)
    (left,) = tmp_path.iterdir()
    with temporary_folder(*place) as held:
        assert set(tmp_path.iterdir()) == {left, held}  # it might be locked in a moment
        for folder in (left, held):
            os.utime(folder, (0, 0))
        with temporary_folder(*place) as other:
            assert set(tmp_path.iterdir()) == {held, other}
    assert list(tmp_path.iterdir()) == []


def test_a_swap_is_undone_where_what_comes_after_it_fails(tmp_path: Path) -> None:
    def late(old: Path) -> None:
        assert [(tmp_path / "it" / "new").exists(), old.exists()] == [True, (tmp_path / "was").exists()]
        raise KeyboardInterrupt

    for replaces in (False, True):
        if replaces:
            (tmp_path / "it").mkdir()
            (tmp_path / "was").touch()
            (tmp_path / "it" / "old").touch()
        with pytest.raises(KeyboardInterrupt), replaced_folder(tmp_path / "it", late=late) as folder:
            (folder / "new").touch()
        found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
        assert found == (["it", "it/old", "was"] if replaces else [])
