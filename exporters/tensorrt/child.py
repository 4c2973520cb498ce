"""Build an engine in a child process, and tell what became of it.

Whatever TensorRT does, the parent lives and ends with a documented exit code; a build that did not succeed leaves its
job and its log, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploycli.exporters.bundle.engine import header_of_plan
from deploycli.exporters.runtime.isolated import what_ended
from deploycli.exporters.tensorrt.job import JOB, LOG, OUTPUTS, BuildResult, Job, load_error
from deploycli.exporters.tensorrt.progress import Reader
from deploycli.models.errors import BuildError, EnvironmentUnsuitable, UsageError
from deploycli.models.files import sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deploycli.exporters.target.product import CompilerName
    from deploycli.exporters.target.settings import BuildSettings
    from deploycli.exporters.target.targets import Capability
    from deploycli.exporters.tensorrt.progress import Progress

GRACE_S = 4.0
"""Between SIGTERM and SIGKILL, seconds: a little more than the child gives TensorRT."""

_POLL_S = 0.1
_TAIL_BYTES = 1 << 16
_TAIL_LINES = 20

_DROPPED = ("POLYGRAPHY_AUTOINSTALL_DEPS", "POLYGRAPHY_ASK_BEFORE_INSTALL", "POLYGRAPHY_USE_TENSORRT_RTX")
"""A build installs no packages, and Polygraphy configures TensorRT alone."""


def run_build(
    onnx: Path,
    settings: BuildSettings,
    work_folder: Path,
    *,
    timeout: float | None = None,
    progress: Callable[[Progress], None] | None = None,
    verbose: bool = False,
    compiler: CompilerName = "tensorrt",
    targets: tuple[Capability, ...] = (),
) -> BuildResult:
    """Build an engine.

    An interruption, which is an exception that comes while this waits, ends the child first and is then raised on.

    Args:
        onnx: the model.
        settings: how to build it.
        work_folder: gets the plan and everything about it, see `deploycli.exporters.tensorrt.job`; created where it
            is missing.
        timeout: seconds that the child may take in all, or None.
        progress: is called with each step.
        verbose: keep TensorRT's verbose messages in the log.
        compiler: which of NVIDIA's two builds it.
        targets: compute capabilities to compile for, of TensorRT for RTX.

    Raises:
        BuildError: TensorRT refused or crashed, was killed, took too long, or left no complete plan. The message has
            the last lines of its log, the log's path and a command that does it again.
        UsageError: there is no such model, or the shapes are not for it.
        IntegrityError: the model or the timing cache is not what it should be.
        EnvironmentUnsuitable: no TensorRT, no GPU, no space.
    """
    if timeout is not None and timeout <= 0:
        raise UsageError(f"a build cannot take {timeout} s", expected="a positive number of seconds")
    from deploycli.exporters.graph.onnx_file import external_files, load_model  # slow to import

    external_files(load_model(onnx))  # none is read that is outside of the model's folder
    job = Job(onnx.absolute(), _absolute(settings), work_folder.absolute(), verbose, compiler, targets)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        job.file(LOG).unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentUnsuitable(f"cannot write {job.folder}: {error.strerror or error}") from error
    _clear(job)
    job.save()
    try:
        status = _run(job, timeout, progress)
        return _judge(job, status)
    except BaseException:
        _clear(job)
        raise


def _run(job: Job, timeout: float | None, progress: Callable[[Progress], None] | None) -> int:
    """Start the child and wait for its end; return its status, negative for a signal."""
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        with _started(job) as child:
            for step in _output(child, deadline):
                if progress is not None:
                    progress(step)
    except _TimedOut as error:
        raise _failure(job, f"the engine builder was stopped after {timeout:g} s", hint="a longer timeout") from error
    return int(child.returncode)


class _TimedOut(Exception):  # noqa: N818 - it tells of the child
    """The child has taken too long."""


@contextlib.contextmanager
def _started(job: Job) -> Iterator[subprocess.Popen[bytes]]:
    """Yield the child; at the end of the block it is dead, and so are all that it has started."""
    # No exception of a signal's may come between the child's start and the moment it is known here.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    child = None
    try:
        try:
            with job.file(LOG).open("ab") as log:  # appending, for the child opens it as well
                child = subprocess.Popen(
                    [*_command(job), "--parent", str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=job.folder,  # no folder of the user's is mistaken for a package, and a core file may lie here
                    env=_environment(),
                    start_new_session=True,  # not of this terminal: Ctrl-C is for the parent, which ends the child
                )
        except OSError as error:
            raise EnvironmentUnsuitable(f"cannot start the engine builder: {error}") from error
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield child
    finally:
        if child is not None:
            _end(child)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _output(child: subprocess.Popen[bytes], deadline: float | None) -> Iterator[Progress]:
    """Yield progress until the child ends."""
    assert child.stdout is not None
    pipe, reader = child.stdout.fileno(), Reader()
    while True:
        ended = _has_ended(child)  # looked at before the pipe, so that nothing it wrote is missed
        if ended:
            _signal(child, signal.SIGKILL)  # what it has left behind must not hold the pipe
        data = _read(pipe, 0.0 if ended else _POLL_S)
        if data:
            yield from reader.feed(data)
        elif ended:
            return
        elif data == b"":  # closed, though it lives
            time.sleep(_POLL_S)
        if deadline is not None and time.monotonic() > deadline:
            raise _TimedOut


def _read(pipe: int, wait: float) -> bytes | None:
    """Return what is in the pipe, nothing where its end was reached, or None where nothing came in ``wait`` seconds."""
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(pipe, select.POLLIN)
    return os.read(pipe, 1 << 16) if poll.poll(wait * 1000) else None


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Return whether the child is dead, without burying it: its number stays its own, and its group's."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(child: subprocess.Popen[bytes]) -> None:
    """Leave no process of the child's group: ask it, wait a little, kill."""
    try:
        if not _has_ended(child):
            _signal(child, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
            while not _has_ended(child) and time.monotonic() < deadline:
                time.sleep(_POLL_S / 2)
    finally:  # also where a second interruption cuts the waiting short
        _signal(child, signal.SIGKILL)
        if child.stdout is not None:
            child.stdout.close()
        child.wait()


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _judge(job: Job, status: int) -> BuildResult:
    """Return the result of a child that has ended, or raise why there is none."""
    if status == 0:
        try:
            result = BuildResult.load(job)
        except BuildError as error:
            raise _failure(job, error.found) from error
        size = result.plan.stat().st_size if result.plan.is_file() else None
        if size != result.size or sha256_of(result.plan) != result.sha256 or header_of_plan(result.plan) is None:
            left = "no plan" if size is None else f"a plan of {size} bytes that is not the one it built"
            raise _failure(job, f"the engine builder left {left}", expected=f"{result.size} bytes")
        return result
    reason = load_error(job)
    if type(reason) is BuildError:
        raise _failure(job, reason.found, expected=reason.expected, hint=reason.hint)
    if reason is not None:
        raise reason
    raise _failure(job, f"the engine builder {what_ended(status)}")


def _failure(job: Job, what: str, *, expected: str = "", hint: str = "") -> BuildError:
    lines = [what]
    if tail := _tail(job.file(LOG)):
        lines += ["the builder's log ends with:", *(f"  {line}" for line in tail)]
    lines.append(f"log: {job.file(LOG)}")
    again = f"{hint}; or again, alone: " if hint else "again, alone: "
    return BuildError("\n  ".join(lines), expected=expected, hint=again + shlex.join(_command(job)))


def _command(job: Job) -> list[str]:
    return [sys.executable, "-m", "deploycli.exporters.tensorrt.worker", str(job.file(JOB))]


def _tail(path: Path) -> list[str]:
    """Return the last lines of a log, without what could confuse a terminal."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rstrip()[:300] for line in text.splitlines() if line.strip()][-_TAIL_LINES:]
    return ["".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line) for line in lines]


def _clear(job: Job) -> None:
    """Remove what a build has made, complete or not, but for its log."""
    for name in OUTPUTS:
        for path in (job.file(name), *job.folder.glob(f".{name}.tmp-*")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _absolute(settings: BuildSettings) -> BuildSettings:
    """Return the settings with absolute paths: the child has another current folder."""
    cache = settings.timing_cache
    return replace(settings, timing_cache=None if cache is None else str(Path(cache).absolute()))


def _environment() -> dict[str, str]:
    """Return this process's environment, fit for another current folder."""
    environment = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    paths = [str(Path(path).absolute()) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment
