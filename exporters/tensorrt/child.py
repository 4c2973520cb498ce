"""Build an engine in a child process, and tell what became of it.

Whatever TensorRT does (it may crash, hang or be killed for memory), the parent lives and ends with a documented exit
code; a build that did not succeed leaves its job and its log, and nothing else. :func:`run_build` is the parent, and
:func:`work` the child; the plan comes back as a file, the result or the error over a pipe. TensorRT's messages go to
``builder.log``; in the child, whatever else is printed goes there as well. Alone, to see a build fail again::

    python -m deploycli.exporters.tensorrt.child .../job.json
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shlex
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploycli.exporters.bundle.engine import header_of_plan
from deploycli.exporters.runtime.isolated import Died, TimedOut, begun
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.job import JOB, LOG, OUTPUTS, Job
from deploycli.models.errors import BuildError, DeployError, EnvironmentUnsuitable, UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploycli.exporters.target.product import CompilerName
    from deploycli.exporters.target.settings import BuildSettings
    from deploycli.exporters.target.targets import Capability
    from deploycli.exporters.tensorrt.job import BuildResult, Progress


_TAIL_BYTES = 1 << 16
_TAIL_LINES = 20


def run_build(
    onnx: Path,
    settings: BuildSettings,
    work_folder: Path,
    *,
    timeout: float | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    verbose: bool = False,
    compiler: CompilerName = "tensorrt",
    targets: tuple[Capability, ...] = (),
) -> BuildResult:
    """Build an engine.

    An interruption, which is an exception that comes while this waits, ends the child first and is then raised on.

    Args:
        onnx: the model.
        settings: how to build it.
        work_folder: gets the plan and everything about it, see `deploycli.exporters.tensorrt.job`; created where it is
            missing.
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
        result = _run(job, timeout, progress)
        _check(job, result)
    except BaseException:
        _clear(job)
        raise
    return result


def _run(job: Job, timeout: float | None, progress: Callable[[Progress], None]) -> BuildResult:
    """Return what the child has built."""
    try:
        with (
            job.file(LOG).open("a+b") as log,  # appending, for the child opens it as well
            begun(work, job, progress=progress, timeout=timeout, words=log) as result,
        ):
            found = result()
    except TimedOut as end:
        raise _failure(job, f"the engine builder {end.reason}", hint="a longer timeout") from end
    except Died as end:
        raise _failure(job, f"the engine builder {end.reason}") from end
    if type(found) is BuildError:
        raise _failure(job, found.found, expected=found.expected, hint=found.hint)
    if isinstance(found, DeployError):
        raise found
    return found


def _check(job: Job, result: BuildResult) -> None:
    """Raise where the plan is not there whole. Its hash, which the child took, is compared by whoever loads it."""
    size = result.plan.stat().st_size if result.plan.is_file() else None
    if size != result.size or header_of_plan(result.plan) is None:
        left = "no plan" if size is None else f"a plan of {size} bytes that is not the one it built"
        raise _failure(job, f"the engine builder left {left}", expected=f"{result.size} bytes")


def _failure(job: Job, what: str, *, expected: str = "", hint: str = "") -> BuildError:
    lines = [what]
    if tail := _tail(job.file(LOG)):
        lines += ["the builder's log ends with:", *(f"  {line}" for line in tail)]
    lines.append(f"log: {job.file(LOG)}")
    again = f"{hint}; or again, alone: " if hint else "again, alone: "
    command = [sys.executable, "-m", work.__module__, str(job.file(JOB))]
    return BuildError("\n  ".join(lines), expected=expected, hint=again + shlex.join(command))


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
    """Return the settings with absolute paths: the job may be run again from anywhere."""
    cache = settings.timing_cache
    return replace(settings, timing_cache=None if cache is None else str(Path(cache).absolute()))


_DROPPED = ("POLYGRAPHY_AUTOINSTALL_DEPS", "POLYGRAPHY_ASK_BEFORE_INSTALL", "POLYGRAPHY_USE_TENSORRT_RTX")
"""A build installs no packages, and Polygraphy configures TensorRT alone."""


def work(job: Job, *, progress: Callable[[Progress], None]) -> BuildResult | DeployError:
    """Run one job; return its result, or what failed where that can be explained."""
    for name in _DROPPED:
        os.environ.pop(name, None)
    faulthandler.enable(all_threads=False)
    try:
        library.use(job.product)
        # They import TensorRT, or take long to import.
        from deploycli.exporters.tensorrt.build_engine import build
        from deploycli.exporters.tensorrt.callbacks import Log

        with job.file(LOG).open("a", encoding="utf-8", errors="backslashreplace") as stream:
            return build(job, progress, Log(stream, verbose=job.verbose))
    except DeployError as error:
        return error
    except MemoryError:
        traceback.print_exc()
        return BuildError("the builder ran out of memory", hint="a machine with more memory")
    except Exception as error:
        traceback.print_exc()
        return BuildError(f"the builder failed: {type(error).__name__}: {first_line(error)}")


def main(path: str) -> int:
    """Run one job while somebody is looking; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait until TensorRT returns
    try:
        found = work(Job.load(Path(path)), progress=lambda now: print(f"{now.phase}: {now.step} of {now.total}"))
    except DeployError as error:
        found = error
    if isinstance(found, DeployError):
        print(f"error: {found}", file=sys.stderr)
        return found.exit_code
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written: a crash of some library's while the interpreter ends would tell nothing
