"""Run the command in a child: what ends that past all exceptions is a sentence here.

Native code may crash on a stranger's graph, the kernel may kill what wants too much memory, and the code of a model may
call ``os._exit``. The child does all the work, is of the same terminal and dies with this process, which waits, passes
on the signals that are sent to it, and ends with the child's exit code. What the child had in hand is removed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deploycli.interruption import process_is_the_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploycli.models.errors import DeployError

_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
_BY_HAND = frozenset({"SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGPIPE"})  # somebody wanted the end
_DONE = b"done"


def guarded(run: Callable[[], NoReturn]) -> None:
    """Call ``run``, which exits, in a child, and exit as it does; return where there can be none.

    Args:
        run: the command.
    """
    if sys.platform != "linux":  # elsewhere a process cannot tell who sent a signal
        return
    from deploycli.exporters.bundle import files
    from deploycli.exporters.runtime.isolated import die_with

    notes = os.memfd_create("deploycli-notes", os.MFD_CLOEXEC)
    files.note_temporaries(notes)
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    try:
        child = os.fork()
    except OSError:  # too many processes
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        die_with(parent)
        process_is_the_command()
        try:
            run()
        finally:
            files.note(_DONE)
    status = _status(child)
    if status >= 0 and _DONE in _notes(notes):
        os._exit(status)
    _remove(_notes(notes))
    os._exit(_explained(status))


def _status(child: int) -> int:
    """Wait for the child, passing on what is sent to this process alone; return how it ended, negative for a signal."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, there is no status
    ignored = [number for number in _PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        told = signal.sigwaitinfo({*_PASSED_ON, signal.SIGCHLD})
        # A terminal's Ctrl-C comes from the kernel, and to the child too; the others come from a process.
        if told.si_signo in _PASSED_ON and told.si_code <= 0 and told.si_signo not in ignored:
            with suppress(ProcessLookupError):
                os.kill(child, told.si_signo)


def _explained(status: int) -> int:
    """Say how the child ended; return the exit code."""
    from deploycli.ending import say
    from deploycli.exporters.runtime.isolated import what_ended
    from deploycli.models.errors import EnvironmentUnsuitable, UsageError

    if status >= 0:
        found = f"the code of the model, or of the data, ended the process: os._exit({status}), or the like"
        return _said(UsageError(found, expected="a result, or an exception"))
    if (name := signal.Signals(-status).name) in _BY_HAND:
        say("interrupted: nothing was written")
        return 128 - status
    hint = (
        "a smaller batch or model, or a machine with more memory"
        if name == "SIGKILL"
        else "deploycli lint FILE, to see what is wrong with a graph; or another version of the library that ran last"
    )
    return _said(
        EnvironmentUnsuitable(
            f"the command {what_ended(status)}",
            expected="libraries that bear the model: native code ran it, of PyTorch or ONNX Runtime",
            hint=hint,
        )
    )


def _said(error: DeployError) -> int:
    from deploycli.ending import say

    say(f"error: {error}")
    return error.exit_code


def _notes(notes: int) -> list[bytes]:
    return os.pread(notes, os.fstat(notes).st_size, 0).split(b"\0")


def _remove(temporaries: list[bytes]) -> None:
    """Delete what the child had for itself; it is locked no more."""
    for path in (Path(os.fsdecode(name)) for name in temporaries):
        if path.is_absolute():
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink()
