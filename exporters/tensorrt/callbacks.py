"""What TensorRT calls back: a logger and a progress monitor.

This module imports TensorRT, for one inherits only from classes that are there: import it after `library.require`.
Both are called from threads of TensorRT's, and an exception that escapes into C++ ends the process: none does.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, TextIO

import tensorrt as trt

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable

    from exporters.tensorrt.progress import Reporter

_KEPT = 20
"""Lines that are kept in memory."""

_LETTERS = {"INTERNAL_ERROR": "F", "ERROR": "E", "WARNING": "W", "INFO": "I", "VERBOSE": "V"}
"""As trtexec writes them."""


class Log(trt.ILogger):
    """TensorRT's messages, line by line.

    Args:
        stream: also written there, flushed after every line: the process may crash after any.
        verbose: keep verbose messages, of which a build makes hundreds of megabytes.

    Attributes:
        dropped: what messages are noise, or None.
    """

    def __init__(self, stream: TextIO | None = None, *, verbose: bool = False) -> None:
        trt.ILogger.__init__(self)  # pybind11 wants it by name
        self._stream = stream
        self._verbose = verbose
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._errors: deque[str] = deque(maxlen=_KEPT)
        self._listener: Callable[[str], None] = lambda _message: None
        self.dropped: re.Pattern[str] | None = None

    def listen(self, listener: Callable[[str], None]) -> None:
        """Let a function have every message, verbose ones too; it must not raise."""
        self._listener = listener

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Keep a message; called by TensorRT."""
        letter = _LETTERS.get(severity.name, "?")
        self._listener(msg)
        if self.dropped is not None and self.dropped.search(msg):
            return
        if letter == "V" and not self._verbose:
            return
        lines = str(msg).splitlines() or [""]
        with self._lock:
            self._lines.extend(lines)
            if letter in "FE":
                self._errors.extend(lines)
            self._write(f"[{letter}] {line}\n" for line in lines)

    def write(self, text: str) -> None:
        """Add a line of our own to the stream."""
        with self._lock:
            self._write([f"deploycli: {text}\n"])

    def last(self, count: int = 3) -> str:
        """Return TensorRT's last lines that tell of errors, or its last ones; empty where it said nothing."""
        with self._lock:
            lines = list(self._errors or self._lines)
        return "\n".join(lines[-count:])

    def _write(self, lines: Iterable[str]) -> None:
        try:
            if self._stream is not None:
                self._stream.writelines(lines)
                self._stream.flush()
        except (OSError, ValueError):  # a full disk, a closed file: not a reason to lose the build
            self._stream = None


class Monitor(trt.IProgressMonitor):
    """Reports the phases of a build, and stops it when that was asked for.

    Args:
        reporter: is told.
    """

    def __init__(self, reporter: Reporter) -> None:
        trt.IProgressMonitor.__init__(self)
        self._reporter = reporter

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Report that a phase begins."""
        self._reporter.start(phase_name, num_steps, parent_phase)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Report a step, counted from zero; False stops the build."""
        return self._reporter.step(phase_name, step)

    def phase_finish(self, phase_name: str) -> None:
        """Report that a phase has ended, complete or not."""
        self._reporter.finish(phase_name)
