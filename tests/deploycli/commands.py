"""Run the command line: in a process of its own, as a user does, or in this one, which has PyTorch imported already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deploycli.__main__ import main

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sysconfig.get_path("scripts")) / "deploycli"
SMALL = ("--img-size", "64", "--window-size", "4")  # of a swin_t: two of its stages have shifted windows

# Colours and progress bars of a terminal would follow these where a build machine sets them.
_TERMINAL = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in (*_TERMINAL, "PYTHONPATH")}


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def in_this_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """What runs commands in this process, which has PyTorch imported already."""
    for name in _TERMINAL:
        monkeypatch.delenv(name, raising=False)

    def command(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["deploycli", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, *capfd.readouterr())

    return command


def run(
    *arguments: object,
    cwd: Path,
    program: tuple[object, ...] = (SCRIPT,),
    preexec: Callable[[], object] | None = None,
    **environment: str,
) -> Result:
    """Run a command to its end in a process of its own."""
    done = subprocess.run(
        [str(part) for part in (*program, *arguments)],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        preexec_fn=preexec,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def start(*arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    return subprocess.Popen(
        [str(part) for part in (SCRIPT, *arguments)],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def module(*options: str) -> tuple[object, ...]:
    """The program that ``python -m deploycli`` is."""
    return (sys.executable, *options, "-m", "deploycli")


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, and every empty folder but the top one."""
    found = (path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir()))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in found}


def assert_refused(result: Result, code: int, *parts: str) -> None:
    """One message on stderr, nothing on stdout, and the exit code that is documented."""
    assert "Traceback" not in result.err
    assert result.code == code, result.err
    assert result.out == ""
    lines = result.err.splitlines()
    assert sum(line.lower().startswith("error: ") for line in lines) == 1, result.err
    for part in parts:
        assert part in result.err
