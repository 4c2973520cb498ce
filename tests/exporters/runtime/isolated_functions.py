"""What a child is asked to do; it imports this module, so there is nothing heavy here."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deploycli.models.errors import NumericsError

if TYPE_CHECKING:
    from collections.abc import Callable


def add(a: int, b: int, *, progress: Callable[[str], None]) -> int:
    progress("adding")
    print("what libraries print")
    return a + b


def imported(*, progress: Callable[[str], None]) -> list[str]:
    return [name for name in ("torch", "onnx", "onnx_ir", "rich") if name in sys.modules]


def refuse(*, progress: Callable[[str], None]) -> None:
    raise NumericsError("found", expected="expected", hint="hint")


def fail(*, progress: Callable[[str], None]) -> None:
    raise KeyError("a bug")


def die(number: int, *, progress: Callable[[str], None]) -> None:
    progress("dying")
    os.kill(os.getpid(), number)
    time.sleep(60)


def leave(*, progress: Callable[[str], None]) -> None:
    os._exit(3)


def abort_for_memory(*, progress: Callable[[str], None]) -> None:
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
    os.kill(os.getpid(), signal.SIGABRT)


def take(amount: int, *, progress: Callable[[str], None]) -> int:
    return len(bytearray(amount))


def sleep(file: str, *, progress: Callable[[str], None]) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)
