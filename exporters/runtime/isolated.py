"""Run a function in a process of its own: native code that crashes on a stranger's file takes that process only.

The child imports what the function needs and nothing else, from the very places that this process imports from. It dies
with its parent, and so does all that it has started; it asks for no more memory than it is given. Progress, the result
and errors come back as pickles through a pipe; what libraries print goes nowhere, but for their last words.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from deploycli.models.errors import DeployError, EnvironmentUnsuitable, first_line
from deploycli.models.memory import shortage

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO

T = TypeVar("T")

_START = "import sys; sys.path[:] = sys.argv[1:]; from deploycli.exporters.runtime.isolated import _serve; _serve()"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAST_WORDS = 2000  # bytes

_MEANING = {
    "SIGKILL": "most likely by the kernel, for lack of memory",
    "SIGSEGV": "it crashed",
    "SIGABRT": "it gave up",
    "SIGBUS": "it crashed",
    "SIGILL": "this CPU lacks an instruction",
    "SIGFPE": "it crashed",
}


class Died(Exception):  # noqa: N818 - it tells what became of the child
    """The child ended without a result.

    Attributes:
        reason: how, such as ``was killed by SIGSEGV: it crashed``.
        step: what it said last that it was doing; empty where it said nothing.
        shortage: the memory that it asked for in vain; None where that was not the reason.
    """

    def __init__(self, reason: str, step: Any, shortage: str | None) -> None:
        super().__init__(reason, step, shortage)
        self.reason = reason
        self.step = step
        self.shortage = shortage


class TimedOut(Died):
    """The child has taken too long."""


def isolated(
    function: Callable[..., T],
    *arguments: Any,
    progress: Callable[[Any], None] = lambda _: None,
    memory: int | None = None,
    timeout: float | None = None,
    **keywords: Any,
) -> T:
    """Call ``function(*arguments, progress=..., **keywords)`` in a child and return what it returns.

    An interruption ends the child first and is then raised on.

    Args:
        function: of a module; it, its arguments and its result can be pickled.
        arguments: its arguments.
        progress: is called with what it says that it is doing, which can be pickled.
        memory: bytes of address space that the child may take; None for any.
        timeout: seconds that it may take; None for any.
        keywords: its further arguments.

    Raises:
        DeployError: what the function raised.
        Died: the child crashed, was killed, ran out of memory or time, or raised another exception.
        EnvironmentUnsuitable: no process can be started.
    """
    with begun(function, *arguments, progress=progress, memory=memory, timeout=timeout, **keywords) as result:
        return result()


@contextmanager
def begun(
    function: Callable[..., T],
    *arguments: Any,
    progress: Callable[[Any], None] = lambda _: None,
    memory: int | None = None,
    timeout: float | None = None,
    words: IO[bytes] | None = None,
    **keywords: Any,
) -> Iterator[Callable[[], T]]:
    """Begin to call a function as `isolated` does, and yield what waits for its result; at the end the child is dead.

    The arguments and errors are those of `isolated`, and ``words``, a file that gets what libraries print.
    """
    with ExitStack() as stack:
        words = stack.enter_context(tempfile.TemporaryFile()) if words is None else words
        child = stack.enter_context(_started(words))
        ended_here = stack.enter_context(_limited(child, timeout))
        assert child.stdin is not None
        with suppress(BrokenPipeError):  # it has died; it is asked why below
            pickle.dump((os.getpid(), memory, function, arguments, keywords), child.stdin)
            child.stdin.close()
        yield lambda: _result(child, words, progress, ended_here)


def what_ended(status: int) -> str:
    """Say in words how a process ended, from its status: negative for a signal, as `subprocess` has it."""
    number = -status if status < 0 else status - 128  # a shell or a container says 128 and the signal
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"ended with exit code {status}, without a word"
    return f"was killed by {name}" + (f": {_MEANING[name]}" if name in _MEANING else "")


def die_with(parent: int) -> None:
    """Be killed when the parent dies, however it does: nobody would wait for the result."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(128 + signal.SIGTERM)


class _started:  # noqa: N801 - a context manager
    """The child; at the end of the block it is dead."""

    def __init__(self, words: IO[bytes]) -> None:
        self._words = words

    def __enter__(self) -> subprocess.Popen[bytes]:
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _START, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                start_new_session=True,  # not of this terminal: Ctrl-C is for the parent, which ends the child
            )
        except OSError as error:
            raise EnvironmentUnsuitable(f"no process can be started: {error.strerror or error}") from error
        return self._child

    def __exit__(self, *_: object) -> None:
        _kill(self._child)
        for pipe in (self._child.stdin, self._child.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._child.wait()


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Leave no process of the child's group, unless the child was waited for: then the number may be another's."""
    if child.returncode is not None:
        return
    if sys.platform == "win32":
        child.kill()
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _status(child: subprocess.Popen[bytes]) -> int:
    """Wait for the child's own end, then end what it has left behind."""
    if sys.platform != "win32":
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        _kill(child)
    return child.wait()


@contextmanager
def _limited(child: subprocess.Popen[bytes], timeout: float | None) -> Iterator[Callable[[], str]]:
    """Kill the child when its time is up; yield what says so, or nothing as long as that was not the reason."""
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        _kill(child)

    timer = None if timeout is None else threading.Timer(timeout, end)
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield lambda: f"was stopped after {timeout:g} s" if is_late.is_set() else ""
    finally:
        if timer is not None:
            timer.cancel()


def _result(
    child: subprocess.Popen[bytes], words: IO[bytes], progress: Callable[[Any], None], ended_here: Callable[[], str]
) -> Any:
    """Return what the child sends as its result, or raise why there is none."""
    step: Any = ""
    assert child.stdout is not None
    while (message := _read(child.stdout)) is not None:
        kind, *content = message
        if kind == "progress":
            (step,) = content
            progress(step)
        elif kind == "result":
            return content[0]
        elif kind == "error":
            raise content[0]
        else:
            raise Died(content[0], step, content[1])
    status = _status(child)
    if reason := ended_here():
        raise TimedOut(reason, step, None)
    raise Died(what_ended(status), step, shortage(RuntimeError(_last_words(words))))


def _read(pipe: IO[bytes]) -> tuple[Any, ...] | None:
    """Return the next message; None where the child has ended, whatever half of one it left."""
    try:
        message: tuple[Any, ...] = pickle.load(pipe)
    except (EOFError, pickle.UnpicklingError, OSError):
        return None
    return message


def _last_words(words: IO[bytes]) -> str:
    words.seek(max(0, words.seek(0, os.SEEK_END) - _LAST_WORDS))
    return words.read().decode("utf-8", "replace")


def _serve() -> None:
    """Be the child."""
    parent, memory, function, arguments, keywords = pickle.load(sys.stdin.buffer)
    die_with(parent)
    with os.fdopen(os.dup(1), "wb") as pipe:
        os.dup2(2, 1)  # what libraries print
        lock = threading.Lock()

        def send(*message: object) -> None:
            with lock:  # progress may come from any thread
                pipe.write(pickle.dumps(message))
                pipe.flush()

        if memory is not None and sys.platform != "win32":
            _, most = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (memory if most < 0 else min(memory, most), most))
        try:
            send("result", function(*arguments, progress=lambda step: send("progress", step), **keywords))
        except DeployError as error:
            if (asked := shortage(error)) is not None:
                send("died", "ran out of memory", asked)
            else:
                send("error", error)
        except Exception as error:
            send("died", f"failed: {type(error).__name__}: {first_line(error)}", shortage(error))
    os._exit(0)  # all is sent: a crash of some library's while the interpreter ends would tell nothing
