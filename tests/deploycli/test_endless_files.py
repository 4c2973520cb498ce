"""Texts that a user gives may be devices and pipes: read as far as they may reasonably be, and no further."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploycli.exporters.data import pictures
from deploycli.models.errors import UsageError
from deploycli.models.files import LONGEST_TEXT, text_of
from tests.deploycli.commands import assert_refused
from tests.exporters.bundle.bundles import make

if TYPE_CHECKING:
    from tests.deploycli.conftest import Command

ENDLESS = pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a device of Unix")


@ENDLESS
@pytest.mark.parametrize(
    "line",
    [
        "cast --keep-fp32-file /dev/zero",
        "quantize --allow-random-calibration --exclude-file /dev/zero",
        "package --triton models --force --labels /dev/zero",
        "quantize --cache /dev/zero",
    ],
)
def test_a_device_that_never_ends(deploycli: Command, tmp_path: Path, line: str) -> None:
    make(tmp_path / "artifacts")
    assert_refused(deploycli(*line.split()), 2)


@ENDLESS
def test_labels_that_never_end() -> None:
    with pytest.raises(UsageError, match="cannot be read as labels"):
        list(pictures._rows(Path("/dev/zero")))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
def test_a_pipe_that_ends_is_a_text(deploycli: Command, tmp_path: Path) -> None:
    make(tmp_path / "artifacts")
    os.mkfifo(tmp_path / "names")
    writer = threading.Thread(target=(tmp_path / "names").write_text, args=("# of the shell\nMatMul\n",))
    writer.start()
    assert deploycli("cast", "--keep-fp32-file", "names").code == 0
    writer.join()


def test_a_text_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffé\r\nb\n".encode())
    assert text_of(path, "utf-8-sig") == "é\nb\n"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="utf-8"):
        text_of(path)
    path.write_bytes(bytes(LONGEST_TEXT))
    assert len(text_of(path)) == LONGEST_TEXT
    path.write_bytes(bytes(LONGEST_TEXT + 1))
    with pytest.raises(ValueError, match="longer than"):
        text_of(path)
