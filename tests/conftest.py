"""What holds in every process of a test run."""

import os
import signal
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:  # two tests at a time on two cores: what computes takes one thread in each
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is imported

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests of Ctrl-C need one, and so do their children

_state = tempfile.TemporaryDirectory(prefix="deploycli-state-")  # not the user's own key
os.environ["DEPLOYCLI_STATE"] = _state.name
