"""Ctrl-C and SIGTERM end a command in good order: what was begun is undone, and the exit code tells.

Either raises an exception wherever the program is. Where that is a callback of PyTorch's compiled code, the exception
may be dropped or become another one, so what was received is remembered, and raised again at the next step.
"""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_received: list[int] = []
_when: list[float] = []
_MOMENT_S = 0.5
_process_is_the_command: list[bool] = []


def process_is_the_command() -> None:
    """From now on this process ends with the command that it runs: a signal that comes twice finds it ending."""
    _process_is_the_command[:] = [True]


class Interrupted(BaseException):
    """The user or the system wants the command to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number  # as shells have it


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn the signals into exceptions; those that the process was started to ignore stay ignored."""
    _received.clear()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heeded = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in heeded:
        signal.signal(number, _receive)
    try:
        yield
    finally:
        ending = bool(_received and _process_is_the_command)
        for number, handler in heeded.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)


def check() -> None:
    """Raise Interrupted if a signal was received, though the exception may have been lost since."""
    if _received:
        raise Interrupted(_received[-1])


def _receive(number: int, _frame: object) -> None:
    again = bool(_received) and time.monotonic() - _when[0] < _MOMENT_S
    _received.append(number)
    _when[:] = [time.monotonic()]
    if not again:  # what is sent to a process and its group arrives twice, and would disturb the tidying up
        raise Interrupted(number)
