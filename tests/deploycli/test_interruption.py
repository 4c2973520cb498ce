"""Ctrl-C, SIGTERM, and a reader that leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from deploycli import interruption
from deploycli.console import Progress
from deploycli.interruption import Interrupted, check, interruptible
from tests.deploycli.commands import ENVIRONMENT, SCRIPT, SMALL, files, start
from tests.exporters.bundle.bundles import SPEC, make

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def test_interrupted_export_leaves_the_old_bundle(tmp_path: Path) -> None:
    before = files(make(tmp_path / "artifacts", "swin_t", spec=replace(SPEC, name="swin_t", family="swin")).path)
    exports = {number: start("export", "swin_t", *SMALL, cwd=tmp_path) for number in SIGNALS}
    for number, process in exports.items():
        assert process.stderr is not None
        assert any(line == "tracing\n" for line in process.stderr)
        assert len(list((tmp_path / "artifacts").glob(".swin_t.tmp-*"))) >= 1
        process.send_signal(number)
    for number, process in exports.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert (out, err.splitlines()[-1]) == ("", "interrupted: nothing was written")
        assert "Traceback" not in err
    assert files(tmp_path / "artifacts") == {f"swin_t/{name}": content for name, content in before.items()}


@pytest.mark.parametrize("number", SIGNALS)
def test_interruption_that_was_dropped_ends_the_command_at_its_next_step(number: signal.Signals) -> None:
    with interruptible(), Progress() as progress:
        progress("tracing")
        with suppress(Interrupted):  # as PyTorch's compiled code does where it called back into Python
            signal.raise_signal(number)
        with pytest.raises(Interrupted) as caught:
            progress("rewriting")
        assert caught.value.exit_code == 128 + number
    with interruptible():
        check()


def test_interruption_that_became_an_error_is_still_one(
    smallest: str, deploycli: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from deploycli.models.swin import SwinTransformer

    def forward(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except Interrupted:
            raise RuntimeError("what compiled code makes of it") from None

    monkeypatch.setattr(SwinTransformer, "forward", forward)
    result = deploycli("export", smallest)
    assert (result.code, result.err.splitlines()[-1]) == (130, "interrupted: nothing was written")
    assert "Traceback" not in result.err
    assert files(tmp_path) == {}


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        term = signal.getsignal(signal.SIGTERM)
        with interruptible():
            signal.raise_signal(signal.SIGINT)
            check()
            assert signal.getsignal(signal.SIGTERM) != term
        assert signal.getsignal(signal.SIGTERM) == term
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("list", 0),
        ("list --json", 0),
        ("inspect linear", 0),
        ("verify --reference golden", 0),
        ("verify --reference golden --rtol 1e-12 --json", 5),
    ],
)
def test_closed_pipe_does_not_change_the_exit_code(tmp_path: Path, line: str, code: int) -> None:
    make(tmp_path / "artifacts")
    reading, writing = os.pipe()
    os.close(reading)  # as after `| head -0`
    command = [SCRIPT, *line.split()]
    process = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert process.returncode == code
    assert b"Traceback" not in process.stderr
    assert b"BrokenPipe" not in process.stderr


def test_export_goes_on_where_nobody_reads_its_progress(
    smallest: str, deploycli: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert deploycli("export", smallest).code == 0
    assert (tmp_path / "artifacts" / smallest / "manifest.json").is_file()


@pytest.mark.parametrize("ends", [True, False])
def test_where_the_process_ends_with_the_command_a_second_signal_finds_it_ending(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent to a process group arrives twice: from the sender, and passed on by the process that watches."""
    monkeypatch.setattr(interruption, "_process_is_the_command", [])
    if ends:
        interruption.process_is_the_command()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(Interrupted), interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
        after = {number: signal.getsignal(number) for number in before}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert after == (dict.fromkeys(before, signal.SIG_IGN) if ends else before)
