"""Builds in a process where TensorRT for RTX is ``tensorrt``, for `tests.tensorrt_api.child.call`: a real library."""

from __future__ import annotations

import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.engine import GpuRecord
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.settings import BuildSettings, ShapeRange
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.job import Job
from deploycli.models.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Iterator

PROFILE = {"image": ShapeRange((1, 3), (2, 3), (4, 3))}
VERSION = "11.4.0.106"


def configured(settings: dict[str, Any]) -> dict[str, Any]:
    """Configure a build for TensorRT, and return what the library's own configuration then says.

    Args:
        settings: of `BuildSettings`; a timing cache that is True gets a folder.
    """
    _tensorrt_on_rtx()
    import tensorrt as trt

    from deploycli.exporters.tensorrt.build_engine import make_builder
    from deploycli.exporters.tensorrt.callbacks import Log, Monitor
    from deploycli.exporters.tensorrt.compilers.tensorrt import TensorRt, _config_facts

    with tempfile.TemporaryDirectory() as folder:
        if settings.get("timing_cache"):
            settings["timing_cache"] = f"{folder}/timings"
        log = Log()
        compiler = TensorRt(Job(Path("model.onnx"), BuildSettings(PROFILE, **settings), Path(folder)), log)
        compiler.start()
        builder, monitor = make_builder(log, "TensorRT"), Monitor(lambda _: None)
        config = compiler.configure(builder, monitor)
        compiler.keep()
        return {
            "flags": _config_facts(config)["builder_flags"],
            "workspace": config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
            "level": config.builder_optimization_level,
            "streams": config.max_aux_streams,
            "verbosity": config.profiling_verbosity.name,
            "monitored": config.progress_monitor is monitor,
            "cache": [path.name for path in Path(folder).glob("timings/*")],
        }


def _tensorrt_on_rtx() -> None:
    """Let TensorRT for RTX be TensorRT, on a machine that has a GPU."""
    warnings.simplefilter("ignore", DeprecationWarning)  # of timing caches, which TensorRT for RTX has no use for
    library.use(RTX)
    library.gpu = lambda: GpuRecord("NVIDIA L4", (8, 9))
    library.version = lambda *_: VERSION


def refused_by_tensorrt() -> dict[str, str]:
    """What becomes of plugins that are not registered, and of a setting that is not taken."""
    found = {}
    for target, result in (("init_libnvinfer_plugins", False), ("IBuilderConfig.set_flag", ValueError("no such flag"))):
        _tensorrt_on_rtx()
        with _failing(target, result):
            try:
                found[target] = str(configured({"tf32": True}))
            except DeployError as error:
                found[target] = f"{type(error).__name__}: {error.found}"
    return found


FAILURES = {
    "start": "Builder.__init__",
    "network": "Builder.create_network",
    "configuration": "Builder.create_builder_config",
    "target": "IBuilderConfig.set_compute_capability",
    "profile": "Builder.create_optimization_profile",
    "shapes": "IOptimizationProfile.set_shape",
    "empty profile": "IOptimizationProfile.__bool__",
    "index": "IBuilderConfig.add_optimization_profile",
    "engine": "Builder.build_serialized_network",
}
"""What fails in the real library, in turn."""

_FAILS: dict[str, Any] = {
    "start": TypeError("pybind11::init(): factory function returned nullptr"),
    "shapes": ValueError("inconsistent"),
    "target": False,
    "empty profile": False,
    "index": -1,
}


def failures(onnx: str) -> dict[str, str]:
    """What becomes of each failure: the class of the error and what it says."""
    library.use(RTX)
    from deploycli.exporters.tensorrt.build_engine import build
    from deploycli.exporters.tensorrt.callbacks import Log

    found = {}
    for name in FAILURES:
        with tempfile.TemporaryDirectory() as folder, _failing(FAILURES[name], _FAILS.get(name)):
            job = Job(Path(onnx), BuildSettings(PROFILE), Path(folder), False, "rtx", ((8, 6),))
            try:
                build(job, lambda _: None, Log())
                found[name] = "built"
            except DeployError as error:
                found[name] = f"{type(error).__name__}: {error.found}"
    return found


@contextmanager
def _failing(target: str, result: Any) -> Iterator[None]:
    """Let a method of the library answer as it does where it fails."""
    import tensorrt as trt

    def fail(*_: object) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    cls, _, method = target.rpartition(".")
    holder = getattr(trt, cls) if cls else trt
    before = getattr(holder, method)
    setattr(holder, method, fail)
    try:
        yield
    finally:
        setattr(holder, method, before)
