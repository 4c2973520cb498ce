"""How a command ends: whatever stopped it becomes one message and a documented exit code, or is a bug."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import traceback
from contextlib import suppress
from typing import IO, TYPE_CHECKING, TextIO

import click

from deploycli.escaping import escaped_lines, escaped_message
from deploycli.models.errors import BuildError, DeployError, EnvironmentUnsuitable, UsageError, first_line
from deploycli.models.memory import shortage

if TYPE_CHECKING:
    from types import TracebackType

_running: list[str] = []
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def note_step(step: str) -> None:
    """Remember what runs now, for a message on memory that ended."""
    _running[:] = [step]


def explain(error: BaseException) -> DeployError | None:
    """Return what a user should read of an exception that ended a command; None where it is a bug."""
    if isinstance(error, click.Abort) and error.__cause__ is not None:  # what click makes of a KeyboardInterrupt
        error = error.__cause__
    cause = error.__cause__ if isinstance(error, DeployError) else error
    if isinstance(cause, OSError) and cause.errno == errno.ENAMETOOLONG:
        return _too_long(cause)
    if isinstance(error, EnvironmentUnsuitable | BuildError):  # a builder's memory is another process's, and it says so
        return error
    if (asked := shortage(error)) is not None:
        return _too_large(asked, error)
    if isinstance(error, DeployError):
        return error
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, SystemExit | KeyboardInterrupt | EOFError):  # Ctrl-C is an Interrupted
        what = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else type(error).__name__
        return UsageError(
            f"the code of the model, or of the data, ended the process: {what}", expected="a result, or an exception"
        )
    return None


def _too_large(asked: str, error: BaseException) -> EnvironmentUnsuitable:
    where = f" while {_running[0]}" if _running else ""
    found = f": {error.found}" if isinstance(error, DeployError) else ""
    return EnvironmentUnsuitable(
        f"there is not enough memory{f' for {asked}' if asked else ''}{where}{found}",
        expected="memory for what was asked for",
        hint="a smaller batch, smaller inputs or a smaller model, or a machine with more memory",
    )


def _too_long(error: OSError) -> UsageError:
    name = str(error.filename2 or error.filename or "what was given")
    return UsageError(
        f"{name[:60]}{'...' if len(name) > 60 else ''} is too long a name ({len(os.fsencode(name))} bytes)",
        expected="at most 255 bytes between two slashes",
    )


def _of_system(error: OSError) -> DeployError:
    """The file system, the network or a stream refused: that is the machine's."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    reason = error.strerror or first_line(error)
    if not names and error.errno in _FULL:  # files have names
        return _unprinted(reason)
    return EnvironmentUnsuitable(
        f"{', '.join(names)}: {reason}" if names else reason,
        hint="check that it is there, the permissions and the space",
    )


def _unprinted(reason: str) -> EnvironmentUnsuitable:
    return EnvironmentUnsuitable(
        f"the result could not be written to stdout: {reason}",
        expected="a terminal, a pipe, or a file on a disk with some space",
    )


def say(message: str, *, escaped_already: bool = False) -> None:
    """Print to stderr, if anybody reads it; further lines of the message are indented."""
    with suppress(OSError, ValueError):  # ValueError: it is closed
        print(message if escaped_already else escaped_message(message), file=sys.stderr, flush=True)


def say_usage(error: click.ClickException) -> None:
    """Print what click has to say, in which the user's words are, and names of files."""
    told = io.StringIO()
    error.show(file=told)
    say(escaped_lines(told.getvalue().rstrip("\n")), escaped_already=True)


def say_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what ends a command and should not; for ``sys.excepthook``."""
    lines = traceback.format_exception(kind, error, trace)
    say(escaped_lines("".join(lines).rstrip("\n")), escaped_already=True)


def tolerate_encodings() -> None:
    """Let a terminal show what its encoding has no letters for as \\xNN or \\uNNNN, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # no stream, or another object in its place
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def finish_output() -> DeployError | None:
    """Write what is left for stdout; return what went wrong. What cannot be written is dropped.

    A reader that has left, as head does, is no fault.
    """
    _flush(sys.stderr)
    error = _flush(sys.stdout)
    if error is None or isinstance(error, BrokenPipeError):
        return None
    return _unprinted(error.strerror or str(error))


def reader_left() -> bool:
    """Say whether stdout is a pipe that nobody reads any more."""
    if sys.platform == "win32" or sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))  # what is wrong with a stream is told unasked


def _flush(stream: TextIO | None) -> OSError | None:
    try:
        if stream is not None:  # as under pythonw
            stream.flush()
    except OSError as error:
        assert stream is not None
        to_nowhere(stream)
        return error
    except ValueError:  # it is closed
        pass
    return None


def to_nowhere(stream: IO[str]) -> None:
    """Let what is still written to a stream, such as the interpreter's own last flush, succeed."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
