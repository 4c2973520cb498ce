"""How far a build is: one JSON object a line, from the child that builds to the parent that shows it.

{"event": "start", "phase": "Building", "parent": null, "steps": 4}
{"event": "step", "phase": "Building", "step": 1}
{"event": "finish", "phase": "Building"}
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAUSE_S = 0.05
"""At most one step of a phase is reported in this time, seconds: a phase may have tens of thousands."""

_LINE_LIMIT = 1 << 16
"""No line of ours is as long, bytes; what is longer is something else's and is dropped."""


@dataclass(frozen=True)
class Progress:
    """Where a build is.

    Attributes:
        phase: TensorRT's name of it, in English; the names change between versions.
        step: steps of the phase that are done.
        total: steps of the phase.
        parent: the phase that this one is part of, or empty.
    """

    phase: str
    step: int
    total: int
    parent: str = ""


class Reporter:
    """Writes progress, from any thread.

    Args:
        descriptor: of the pipe.

    Attributes:
        cancelled: set when the build shall stop; also set when nobody reads any more.
    """

    def __init__(self, descriptor: int) -> None:
        self.cancelled = threading.Event()
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[int, float]] = {}  # name -> steps, when last reported

    def start(self, phase: str, steps: int, parent: str | None = None) -> None:
        """Report that a phase begins."""
        with self._lock:
            self._phases[phase] = steps, 0.0
            self._write(event="start", phase=phase, parent=parent, steps=steps)

    def step(self, phase: str, step: int) -> bool:
        """Report that a step, counted from zero, is done; return whether to go on."""
        with self._lock:
            steps, last = self._phases.get(phase, (0, 0.0))
            if (now := time.monotonic()) - last >= _PAUSE_S or step + 1 >= steps:
                self._phases[phase] = steps, now
                self._write(event="step", phase=phase, step=step)
        return not self.cancelled.is_set()

    def finish(self, phase: str) -> None:
        """Report that a phase has ended."""
        with self._lock:
            self._phases.pop(phase, None)
            self._write(event="finish", phase=phase)

    def _write(self, **event: str | int | None) -> None:
        line = json.dumps(event).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:  # the parent is gone
            self.cancelled.set()


class Reader:
    """Makes progress of the bytes that come through the pipe."""

    def __init__(self) -> None:
        self._rest = b""
        self._phases: dict[str, tuple[int, str]] = {}  # name -> steps, parent

    def feed(self, data: bytes) -> Iterator[Progress]:
        """Yield what the bytes tell; what is no progress is skipped, for a library may print anything."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest if len(self._rest) < _LINE_LIMIT else b""
        for line in lines:
            if (progress := self._read(line)) is not None:
                yield progress

    def _read(self, line: bytes) -> Progress | None:
        try:
            event = json.loads(line)
            kind, phase = event["event"], str(event["phase"])
            if kind == "start":
                self._phases[phase] = int(event["steps"]), str(event["parent"] or "")
            steps, parent = self._phases[phase]
            done = {"start": 0, "step": int(event.get("step", 0)) + 1, "finish": steps}[kind]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if kind == "finish":
            del self._phases[phase]
        return Progress(phase, min(done, steps), steps, parent)
