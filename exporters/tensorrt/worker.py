"""The child process that builds one engine: ``python -m deploycli.exporters.tensorrt.worker .../job.json``.

TensorRT may crash, hang or be killed for memory; it then takes this process with it and no other. Progress goes to
stdout as JSON lines, see `deploycli.exporters.tensorrt.progress`; TensorRT's messages go to ``builder.log``. Whatever
else is printed, by any library, goes to stderr, which the parent has tied to the same log.

Exit code 0: ``result.json`` is complete. Else the code of the error in ``error.json``, or 128 plus the number of the
signal that stopped it.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from deploycli.exporters.runtime.isolated import die_with
from deploycli.exporters.tensorrt.job import ERROR, LOG, RESULT, Job, load_error, save_error
from deploycli.exporters.tensorrt.progress import Reporter
from deploycli.models.errors import BuildError, DeployError, first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

GRACE_S = 2.0
"""A build that was asked to stop has this time to do so in good order, seconds."""

_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m deploycli.exporters.tensorrt.worker", description="Build one engine."
    )
    parser.add_argument("job", type=Path, help="job.json, as the parent has written it")
    parser.add_argument("--parent", type=int, help="process to die with")
    options = parser.parse_args(arguments)
    pipe = _take_stdout()
    faulthandler.enable(all_threads=False)
    reporter = Reporter(pipe)
    _listen(reporter)
    if options.parent is not None:
        die_with(options.parent)
    try:
        job = Job.load(options.job)
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    code = _run(job, reporter)
    if options.parent is None and (reason := load_error(job)) is not None:
        print(f"error: {reason}", file=sys.stderr)  # somebody is looking
    return code


def _run(job: Job, reporter: Reporter) -> int:
    from deploycli.exporters.tensorrt import library

    for name in (RESULT, ERROR):
        job.file(name).unlink(missing_ok=True)
    try:
        library.use(job.product)
        # They import TensorRT, or take long to import.
        from deploycli.exporters.tensorrt.builder import Cancelled, build
        from deploycli.exporters.tensorrt.callbacks import Log
    except DeployError as error:
        return _fail(job, error)
    try:
        with job.file(LOG).open("a", encoding="utf-8", errors="backslashreplace") as stream:
            build(job, reporter, Log(stream, verbose=job.verbose)).save(job)
    except Cancelled:
        return 128 + signal.SIGTERM
    except DeployError as error:
        return _fail(job, error)
    except MemoryError:
        traceback.print_exc()
        return _fail(job, BuildError("the builder ran out of memory", hint="a machine with more memory"))
    except Exception as error:
        traceback.print_exc()
        return _fail(job, BuildError(f"the builder failed: {type(error).__name__}: {first_line(error)}"))
    return 0


def _fail(job: Job, error: DeployError) -> int:
    try:
        save_error(job, error)
    except DeployError:  # the disk may be full; the exit code still tells
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _take_stdout() -> int:
    """Keep stdout for progress alone, and let what libraries print go to stderr; return the descriptor."""
    sys.stdout.flush()
    pipe = os.dup(1)  # not inherited by processes that TensorRT may start
    os.dup2(2, 1)
    return pipe


def _listen(reporter: Reporter) -> None:
    """Let a thread wait for signals: Python's own handlers would wait until TensorRT returns."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # before any other thread is there, so that all inherit it

    def wait() -> None:
        number = signal.sigwait(_SIGNALS)
        reporter.cancelled.set()
        time.sleep(GRACE_S)
        os._exit(128 + number)

    threading.Thread(target=wait, daemon=True, name="signals").start()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written: a crash of some library's while the interpreter ends would tell nothing
