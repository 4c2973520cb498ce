"""What ends a process past all exceptions is a sentence, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx import helper

from deploycli.interruption import Interrupted, check, interruptible
from tests.deploycli.commands import ENVIRONMENT, assert_refused, files, module, run
from tests.exporters.bundle import bundles

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the command is the process itself")

FACTORIES = """
import os, signal, time, torch

def leaves(): os._exit(0)
def leaves_with_a_code(): os._exit(3)
def is_killed(): os.kill(os.getpid(), signal.SIGKILL)
def crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def waits():
    print("waiting", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FACTORIES)
    return tmp_path


@pytest.mark.parametrize(
    ("factory", "code", "parts"),
    [
        ("leaves", 2, ["the code of the model", "os._exit(0)"]),
        ("leaves_with_a_code", 2, ["the code of the model", "os._exit(3)"]),
        ("is_killed", 7, ["killed by SIGKILL", "for lack of memory"]),
        ("crashes", 7, ["killed by SIGSEGV: it crashed"]),
    ],
)
def test_how_a_factory_ends_the_process(folder: Path, factory: str, code: int, parts: list[str]) -> None:
    result = run("export", f"mine.py:{factory}", "--input", "x:2x8", cwd=folder, program=module())
    assert_refused(result, code, *parts)
    assert set(files(folder)) - {"artifacts"} == {"mine.py"}


@pytest.mark.parametrize("line", ["verify", "cast --calibrate x.npy --no-lint"])
def test_a_graph_on_which_onnx_runtime_crashes(tmp_path: Path, line: str) -> None:
    graph = bundles.graph()
    graph.graph.node.insert(0, helper.make_node("Split", ["images"], ["half", ""], axis=1, num_outputs=2))
    bundles.make(tmp_path / "artifacts", model=graph)
    np.save(tmp_path / "x.npy", np.ones((8, bundles.FEATURES), np.float32))
    before = files(tmp_path)
    assert_refused(run(*line.split(), cwd=tmp_path, program=module()), 7, "killed by SIGSEGV")
    assert files(tmp_path) == before


@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_signals_reach_the_command_once(folder: Path, number: signal.Signals, group: bool) -> None:
    process = subprocess.Popen(
        [*map(str, module()), "export", "mine.py:waits", "--input", "x:2x8"],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.splitlines()[-1]) == (128 + number, "interrupted: nothing was written")
    assert "Traceback" not in err


def test_the_command_dies_with_what_watches_it(folder: Path) -> None:
    process = subprocess.Popen(
        [*map(str, module()), "export", "mine.py:waits", "--input", "x:2x8"],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.kill()
    start = time.monotonic()
    assert process.stdout.read() == ""  # the child held its other end
    assert time.monotonic() - start < 20
    process.wait()
    process.stdout.close()


def test_a_signal_that_arrives_twice_ends_the_command_once() -> None:
    with interruptible():
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            check()
