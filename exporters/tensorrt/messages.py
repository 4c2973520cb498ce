"""TensorRT's messages, line by line, without TensorRT: a logger of either product's inherits from this."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable

_KEPT = 20
"""Lines that are kept in memory."""

_LETTERS = {"INTERNAL_ERROR": "F", "ERROR": "E", "WARNING": "W", "INFO": "I", "VERBOSE": "V"}
"""As trtexec writes them."""


class Messages:
    """What a logger does; it is the first base of one, whose other base is the product's ``ILogger``.

    Args:
        stream: also written there, flushed after every line: the process may crash after any.
        verbose: keep verbose messages, of which a build makes hundreds of megabytes.

    Attributes:
        dropped: what messages are noise, or None.
    """

    def __init__(self, stream: TextIO | None = None, *, verbose: bool = False) -> None:
        super().__init__()  # the product's, which pybind11 wants to be called
        self._stream = stream
        self._verbose = verbose
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._errors: deque[str] = deque(maxlen=_KEPT)
        self._listeners: tuple[Callable[[str], None], ...] = ()
        self.dropped: re.Pattern[str] | None = None

    def listen(self, listener: Callable[[str], None]) -> None:
        """Let a function have every message from now on, verbose ones too; it must not raise."""
        self._listeners += (listener,)

    def log(self, severity: Any, msg: str) -> None:
        """Keep a message; called by TensorRT."""
        letter = _LETTERS.get(severity.name, "?")
        for listener in self._listeners:
            listener(msg)
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
