"""A function in a process of its own: its result, its error, or how that process ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploycli.exporters.runtime.isolated import Died, begun, isolated
from deploycli.models.errors import NumericsError
from tests.exporters.runtime import isolated_functions as functions

ROOT = Path(__file__).parents[3]


def test_a_result_and_progress(capfd: pytest.CaptureFixture[str]) -> None:
    steps: list[str] = []
    assert isolated(functions.add, 2, b=3, progress=steps.append) == 5
    assert steps == ["adding"]
    assert capfd.readouterr() == ("", "")


def test_the_child_imports_what_it_needs_from_where_this_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("models", "exporters", "pickle"):  # of the user's own
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')")
    monkeypatch.chdir(tmp_path)
    assert isolated(functions.imported) == []


def test_an_error_comes_back_as_it_was_raised() -> None:
    with pytest.raises(NumericsError) as caught:
        isolated(functions.refuse)
    assert (caught.value.found, caught.value.expected, caught.value.hint) == ("found", "expected", "hint")


@pytest.mark.parametrize(
    ("function", "arguments", "reason", "step", "shortage"),
    [
        (functions.fail, (), "failed: KeyError: 'a bug'", "", None),
        (functions.die, (signal.SIGSEGV,), "was killed by SIGSEGV: it crashed", "dying", None),
        (functions.die, (signal.SIGKILL,), "was killed by SIGKILL: most likely by the kernel", "dying", None),
        (functions.leave, (), "ended with exit code 3, without a word", "", None),
        (functions.abort_for_memory, (), "was killed by SIGABRT: it gave up", "", ""),
    ],
)
def test_how_a_child_died(
    function: object, arguments: tuple[object, ...], reason: str, step: str, shortage: str | None
) -> None:
    with pytest.raises(Died) as caught:
        isolated(function, *arguments)  # type: ignore[arg-type]  # of many kinds
    assert caught.value.reason.startswith(reason)
    assert (caught.value.step, caught.value.shortage) == (step, shortage)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere address space is not limited")
def test_memory_is_limited() -> None:
    assert isolated(functions.take, 2**20, memory=2**30) == 2**20
    with pytest.raises(Died) as caught:
        isolated(functions.take, 2**31, memory=2**30)
    assert caught.value.shortage is not None


def test_time_is_limited(tmp_path: Path) -> None:
    assert isolated(functions.add, 2, b=3, timeout=60) == 5
    with pytest.raises(Died) as caught:
        isolated(functions.sleep, str(tmp_path / "child"), timeout=1)
    assert caught.value.reason == "was stopped after 1 s"


def test_a_child_works_while_its_parent_does_something_else_and_ends_with_the_block(tmp_path: Path) -> None:
    with begun(functions.add, 2, b=3) as result:
        assert result() == 5
    with begun(functions.sleep, str(tmp_path / "child")):
        _wait(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text() != "")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    code = "import sys; from deploycli.exporters.runtime.isolated import isolated; "
    code += "from tests.exporters.runtime.isolated_functions import sleep; "
    file = tmp_path / "child"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", f"{code} isolated(sleep, sys.argv[1])", file], env=environment
    ) as parent:
        _wait(lambda: file.exists() and file.read_text() != "")
        parent.send_signal(number)
        parent.wait()
    child = int(file.read_text())
    _wait(lambda: not _lives(child))


def _lives(number: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{number}/stat").read_text()
    except FileNotFoundError:
        return False


def _wait(until: object) -> None:
    end = time.monotonic() + 30
    while not until():  # type: ignore[operator]  # a condition
        assert time.monotonic() < end
        time.sleep(0.02)
