"""What TensorRT calls back: a logger and a progress monitor.

This module imports TensorRT, for one inherits only from classes that are there: import it after `library.require`.
Both are called from threads of TensorRT's, and an exception that escapes into C++ ends the process: none does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorrt as trt

from deploycli.exporters.tensorrt.messages import Messages

if TYPE_CHECKING:
    from deploycli.exporters.tensorrt.progress import Reporter


class Log(Messages, trt.ILogger):
    """A logger of the one product that this process serves."""


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
