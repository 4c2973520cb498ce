"""What the stand-in does instead of building."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

WANTED = os.environ.get("FAKE_TENSORRT", "succeed")
_STEPS = 3


def device(version: str) -> list[str]:
    return [version, os.environ.get("FAKE_GPU", "NVIDIA L4|8|9")]


def measure(key: str) -> int:
    """The fastest kernel, which differs from build to build, as ``FAKE_FASTEST`` does."""
    return int(key[-8:], 16) + int(os.environ.get("FAKE_FASTEST", "1"))


def act(monitor: Any, say: Callable[..., None]) -> bool:
    """Report progress, then do what is wanted; return whether a plan shall come of it."""
    say("building")
    monitor.phase_start("Building", None, _STEPS)
    for step in range(_STEPS):
        if not monitor.step_complete("Building", step):
            return False
    result = _ACTS.get(WANTED, lambda monitor, say: None)(monitor, say)
    monitor.phase_finish("Building")
    return result is None


def spoil(plan: bytes) -> bytes:
    return {"truncate": plan[: len(plan) // 2], "no plan": b"<html>"}.get(WANTED, plan)


def _flood(monitor: Any, say: Any) -> None:
    for descriptor in (1, 2):
        for _ in range(160):
            os.write(descriptor, b"x" * (1 << 16))


def _leave_a_child(monitor: Any, say: Any) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    say(f"left the process {process.pid} behind")


def _crawl(monitor: Any, say: Any) -> bool:
    monitor.phase_start("Crawling", "Building", 100_000)
    say("crawling")
    for step in range(100_000):
        time.sleep(0.01)
        if not monitor.step_complete("Crawling", step):
            say("cancelled by the monitor")
            return False
    return True


def _nothing(monitor: Any, say: Any) -> bool:
    say("could not find any implementation for node {ForeignNode[...]}", 1)
    return False


def _memory(monitor: Any, say: Any) -> None:
    raise MemoryError


def _fail(monitor: Any, say: Any) -> None:
    raise RuntimeError("not foreseen")


_ACTS = {
    "SIGSEGV": lambda monitor, say: os.kill(os.getpid(), signal.SIGSEGV),
    "137": lambda monitor, say: os._exit(137),
    "hang": lambda monitor, say: time.sleep(600),
    "nothing": _nothing,
    "MemoryError": _memory,
    "RuntimeError": _fail,
    "flood": _flood,
    "leave a child": _leave_a_child,
    "crawl": _crawl,
    "exit": lambda monitor, say: os._exit(0),
}
