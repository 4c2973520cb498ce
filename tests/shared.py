"""What is made once for all processes of a test run."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def shared(name: str, make: Callable[[], bytes]) -> bytes:
    """Return what the first process that asks for this name makes; the others wait for it.

    Args:
        name: a file's name.
        make: gives the same in every process.
    """
    file = Path(os.environ["DEPLOYCLI_TESTS"], name)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            file.write_bytes(make())
        return file.read_bytes()
