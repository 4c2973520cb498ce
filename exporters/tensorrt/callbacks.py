"""What TensorRT calls back: a logger and a progress monitor.

This module imports TensorRT, for one inherits only from classes that are there: import it after `library.require`.
Both are called from threads of TensorRT's, and an exception that escapes into C++ ends the process: none does.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import tensorrt as trt

from deploycli.exporters.tensorrt.job import Progress
from deploycli.exporters.tensorrt.messages import Messages

if TYPE_CHECKING:
    from collections.abc import Callable

_PAUSE_S = 0.05


class Log(Messages, trt.ILogger):
    """A logger of the one product that this process serves."""


class Monitor(trt.IProgressMonitor):
    """Reports the phases of a build, from any thread.

    Args:
        progress: is told; it takes no more than a step in `_PAUSE_S` of each phase, which may have tens of thousands.
    """

    def __init__(self, progress: Callable[[Progress], None]) -> None:
        trt.IProgressMonitor.__init__(self)
        self._progress = progress
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[Progress, float]] = {}  # name -> its beginning, when last reported

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Report that a phase begins."""
        begun = Progress(phase_name, 0, num_steps, parent_phase or "")
        with self._lock:
            self._phases[phase_name] = begun, 0.0
            self._progress(begun)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Report a step, counted from zero; True goes on."""
        now = time.monotonic()
        with self._lock:
            begun, last = self._phases.get(phase_name, (None, 0.0))
            if begun is not None and (now - last >= _PAUSE_S or step + 1 >= begun.total):
                self._phases[phase_name] = begun, now
                self._progress(replace(begun, step=min(step + 1, begun.total)))
        return True

    def phase_finish(self, phase_name: str) -> None:
        """Report that a phase has ended, complete or not."""
        with self._lock:
            begun, _ = self._phases.pop(phase_name, (None, 0.0))
            if begun is not None:
                self._progress(replace(begun, step=begun.total))
