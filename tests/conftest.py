"""What holds in every process of a test run."""

import gc
import os
import shutil
import signal
import sys
import tempfile
from copy import copy
from functools import cache
from typing import Any

import pytest

gc.set_threshold(50_000, 20, 100)  # an export makes a million objects, and few circles

if "PYTEST_XDIST_WORKER" in os.environ:  # two tests at a time on two cores: what computes takes one thread in each
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is imported

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests of Ctrl-C need one, and so do their children

_state = tempfile.TemporaryDirectory(
    prefix="tests-of-deploycli-"
)  # not the user's own key, nor what the product sweeps
os.environ["DEPLOYCLI_STATE"] = _state.name

if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers have the folder of the process that began the run
    os.environ["DEPLOYCLI_TESTS"] = tempfile.mkdtemp(prefix="tests-of-deploycli-")  # see tests/shared.py


def pytest_unconfigure() -> None:
    """Remove it; a process that a test forks does not come here."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["DEPLOYCLI_TESTS"])


LONGEST = (
    "test_transcripts.py",
    "test_attention_masks.py",
    "test_foreign_export.py",
    "test_user_path.py",
    "test_judging.py",
    "test_repository.py",
    "test_installs.py",
    "test_digits.py",
    "test_roles.py",
    "test_scorecard.py",
    "test_lint.py",
    "test_quantize.py",
    "test_optimize.py",
    "test_growth.py",
    "test_derive.py",
)
"""Files that take the longest, the longest first: at the end of a run no process waits for one of them."""


@pytest.hookimpl(trylast=True)  # after the order was drawn
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take the longest."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_runtest_setup() -> None:
    """Keep what every test pays anew from being looked through by each of them."""
    _read_translations_once()
    _collect_operators_once()
    _compute_on_one_thread()
    _keep_the_parser()
    _set_modules_aside()


def _read_translations_once() -> None:
    """PyTorch's exporter reads the source of its 500 translations for each export that needs decomposing, which is half
    of the time of a small one: let a process read them once.
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


def _collect_operators_once() -> None:
    """An export that needs decomposing asks three times which of PyTorch's 3,000 operators are composed of others, a
    tenth of its time. The answer changes where a library registers more.
    """
    utils = sys.modules.get("torch._export.utils")
    if utils is None or hasattr(utils, "collect_once"):
        return
    collect = utils._collect_all_valid_cia_ops
    utils.collect_once = cache(lambda namespaces, registered: collect())

    def collect_all() -> Any:
        registered = sys.modules["torch"]._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        return utils.collect_once(len(sys.modules["torch"].ops._dir), len(registered))

    for module in (utils, *map(sys.modules.get, ("torch.export.exported_program", "torch.export.decomp_utils"))):
        if module is not None:
            module._collect_all_valid_cia_ops = collect_all


def _compute_on_one_thread() -> None:
    """ONNX Runtime reads no OMP_NUM_THREADS: its threads, one for each core, wait for work by spinning, which takes a
    third of what a small model does from the other process.
    """
    runtime = sys.modules.get("onnxruntime")
    if runtime is None or hasattr(runtime, "on_all_cores") or "PYTEST_XDIST_WORKER" not in os.environ:
        return

    class Session(runtime.InferenceSession):  # type: ignore[misc, name-defined]
        def __init__(self, model: Any, sess_options: Any = None, *arguments: Any, **options: Any) -> None:
            sess_options = sess_options or runtime.SessionOptions()
            sess_options.intra_op_num_threads = sess_options.intra_op_num_threads or 1
            super().__init__(model, sess_options, *arguments, **options)

    runtime.on_all_cores, runtime.InferenceSession = runtime.InferenceSession, Session


def _keep_the_parser() -> None:
    """Let the gate of export, cast, quantize and optimize ask one child of this process for NVIDIA's verdict."""
    gate = sys.modules.get("deploycli.exporters.gate")
    if gate is not None and gate.judging.__module__ != "tests.kept_parser":
        from tests import kept_parser

        gate.judging = kept_parser.judging  # type: ignore[attr-defined]


_looked_through = 0  # modules


def _set_modules_aside() -> None:
    """What PyTorch and others make when they are imported is a million objects that stay. ``gc.collect``, which the
    product calls where memory is wanted back, would look through them each time: half a second.
    """
    global _looked_through
    if len(sys.modules) > _looked_through + 200:
        _looked_through = len(sys.modules)
        gc.unfreeze()
        gc.collect()
        gc.freeze()
