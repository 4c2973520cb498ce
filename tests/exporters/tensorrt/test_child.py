"""The child process that builds: whatever becomes of it, the parent tells, and nothing half-written is left.

What a real library can be brought to do, such as to hang, to be killed or to lack memory, is in test_rtx.py.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deploycli.exporters.tensorrt import child
from deploycli.exporters.tensorrt.job import Progress
from deploycli.models.errors import BuildError, EnvironmentUnsuitable, UsageError
from tests.exporters.tensorrt.fakes import FOLDER, GPU, Bench, bench

__all__ = ["bench"]

KEPT = {"job.json", "builder.log"}
ROOT = Path(__file__).parents[3]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet waited for does not."""
    try:
        return not re.search(r"^State:\s+[ZX]", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_engine_is_built(bench: Bench) -> None:
    seen: list[Progress] = []
    result = bench.build(progress=seen.append)
    assert bench.files() == KEPT | {"model.plan", "layers.json"}
    assert result.plan.read_bytes()[:4] == b"ftrt"
    assert result.size == result.plan.stat().st_size
    assert set(result.seconds) == {"parse", "build", "inspect"}
    assert Progress("Building", 3, 3) in seen
    assert seen[-1] == Progress("deploycli: inspect", 1, 1)
    assert "[I] building" in bench.log
    assert "a verbose message" not in bench.log


@pytest.mark.parametrize(
    ("does", "what"),
    [
        ("SIGSEGV", "killed by SIGSEGV"),
        ("137", "killed by SIGKILL"),
        ("nothing", "TensorRT built no engine: could not find any implementation"),
        ("MemoryError", "ran out of memory"),
        ("RuntimeError", "RuntimeError: not foreseen"),
        ("truncate", "cannot load the plan that it has just built: the plan is damaged"),
        ("no plan", "does not begin as a plan does"),
        ("exit", "the engine builder ended with exit code 0, without a word"),
    ],
)
def test_a_failure_is_told(bench: Bench, does: str, what: str) -> None:
    with pytest.raises(BuildError, match=re.escape(what)) as caught:
        bench.build(does)
    assert caught.value.exit_code == 4
    assert bench.files() == KEPT
    message = str(caught.value)
    assert "[I] building" in message
    assert str(bench.work / "builder.log") in message
    assert message.endswith(
        shlex.join([sys.executable, "-m", "deploycli.exporters.tensorrt.child", f"{bench.work}/job.json"])
    )


def test_the_command_in_the_message_builds_again(bench: Bench) -> None:
    with pytest.raises(BuildError) as caught:
        bench.build("nothing")
    command = str(caught.value).rpartition("again, alone: ")[2]
    again = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 4
    assert "error: TensorRT built no engine" in again.stderr
    bench.set(FAKE_TENSORRT="succeed")
    again = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "Building: 3 of 3" in again.stdout
    assert bench.files() >= {"model.plan", "layers.json"}


def test_floods_are_read(bench: Bench) -> None:
    seen: list[Progress] = []
    bench.build("flood", progress=seen.append)
    assert (bench.work / "builder.log").stat().st_size > 20 << 20
    assert all(p.phase == "Building" or p.phase.startswith("deploycli: ") for p in seen)


def test_processes_that_it_leaves_behind_are_killed(bench: Bench) -> None:
    bench.build("leave a child")
    found = re.search(r"left the process (\d+) behind", bench.log)
    assert found
    wait_until(lambda: not is_alive(int(found[1])))


def test_a_plan_that_is_not_whole_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = child._run

    def spoil(job: Any, *rest: Any) -> Any:
        result = real(job, *rest)
        plan = job.file("model.plan")
        plan.write_bytes(plan.read_bytes()[:100])
        return result

    monkeypatch.setattr(child, "_run", spoil)
    with pytest.raises(BuildError, match=r"left a plan of \d+ bytes that is not the one it built"):
        bench.build()
    assert bench.files() == KEPT


def test_what_an_earlier_build_left_is_not_taken_for_this_ones(bench: Bench) -> None:
    bench.build()
    with pytest.raises(BuildError, match="ended with exit code 0"):
        bench.build("exit")
    assert bench.files() == KEPT


def test_other_errors_keep_their_class(bench: Bench) -> None:
    bench.set(FAKE_GPU="none")
    with pytest.raises(EnvironmentUnsuitable, match="there is no GPU: PyTorch sees none"):
        bench.build()
    assert bench.files() == KEPT


def test_without_tensorrt(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in (str(FOLDER), str(GPU))])
    if subprocess.run([sys.executable, "-c", "import tensorrt"], capture_output=True, check=False).returncode == 0:
        pytest.skip("TensorRT is installed")
    with pytest.raises(EnvironmentUnsuitable, match="TensorRT is not installed"):
        bench.build()


def test_nonsense_is_refused_before_anything_is_started(bench: Bench) -> None:
    with pytest.raises(UsageError, match="0 s"):
        bench.build(timeout=0)
    bench.onnx.unlink()
    with pytest.raises(UsageError, match="there is no file"):
        bench.build()
    assert not bench.work.exists()


def test_relative_paths_and_another_locale(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LC_ALL", "C")
    (tmp_path / "models").mkdir()  # a folder of the user's is not taken for a package
    bench.onnx = bench.onnx.rename(tmp_path / "modèle 模型.onnx").relative_to(tmp_path)
    bench.work = Path("wörk")
    result = bench.build(timing_cache="cache")
    assert result.timing_cache_sha256
    assert len(list((tmp_path / "cache").iterdir())) == 1


SCRIPT = """
import sys
from pathlib import Path
from deploycli.interruption import Interrupted, interruptible
from deploycli.exporters.tensorrt.child import run_build
from deploycli.exporters.target.settings import BuildSettings
from tests.exporters.tensorrt.fakes import PROFILE
try:
    with interruptible():
        run_build(Path(sys.argv[1]), BuildSettings(PROFILE), Path(sys.argv[2]))
except Interrupted as interrupted:
    sys.exit(interrupted.exit_code)
"""


def begin(bench: Bench, does: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a parent of its own; return it, and the number of the child when it builds."""
    bench.set(FAKE_TENSORRT=does)
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT, str(bench.onnx), str(bench.work)], cwd=ROOT)
    wait_until(lambda: (bench.work / "builder.log").exists() and "building" in bench.log)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    return parent, int(children[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_child_first(bench: Bench, number: signal.Signals) -> None:
    parent, pid = begin(bench, "crawl")
    assert os.getsid(pid) == pid  # it does not hold the terminal
    parent.send_signal(number)
    assert parent.wait(timeout=20) == 128 + number
    assert not is_alive(pid)
    assert bench.files() == KEPT


def test_the_child_dies_with_its_parent(bench: Bench) -> None:
    parent, pid = begin(bench, "hang")
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(pid))
