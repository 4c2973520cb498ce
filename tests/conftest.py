"""What holds in every process of a test run."""

import os
import signal
import sys
import tempfile
from copy import copy
from functools import cache
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # two tests at a time on two cores: what computes takes one thread in each
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is imported

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests of Ctrl-C need one, and so do their children

_state = tempfile.TemporaryDirectory(prefix="deploycli-state-")  # not the user's own key
os.environ["DEPLOYCLI_STATE"] = _state.name


def pytest_runtest_setup() -> None:
    """Let a process read the source of PyTorch's 500 translations once: where an export needs them all, that is half
    of the time of a small one.
    """
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    if registration is None or hasattr(registration.ONNXRegistry, "read_once"):
        return
    read_once = cache(registration.ONNXRegistry.from_torchlib)

    def from_torchlib(*version: int, **opset_version: int) -> Any:
        registry = copy(read_once(*version, **opset_version))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    registration.ONNXRegistry.read_once = read_once
    registration.ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
