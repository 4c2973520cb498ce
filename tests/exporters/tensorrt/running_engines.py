"""The stand-in for TensorRT whose plans run, in ``running/``: installed in this process, or for a command's."""

from __future__ import annotations

import hashlib
import importlib
import struct
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from exporters.precision.observed import model_sha256
from exporters.tensorrt.product import RTX
from exporters.tensorrt.settings import BuildSettings, ShapeRange
from exporters.tensorrt.sidecar import GpuRecord, IoTensor, Sidecar, engine_name
from exporters.tensorrt.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exporters.tensorrt.targets import Capability

FOLDER = Path(__file__).parent / "running"
ENVIRONMENT = {"PYTHONPATH": str(FOLDER), "FAKE_GPU": "NVIDIA L4|8|9"}
"""Of a process that has it."""

VERSION = "10.13.3.9"

_MODULES = ("tensorrt", "tensorrt_rtx", "cuda")
_DEPENDENT = ("exporters.tensorrt.callbacks",)  # its classes inherit from TensorRT's


@contextmanager
def installed(**environment: str) -> Iterator[Any]:
    """Let this process, and its children, import the stand-in for a while; yields its CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if _concerned(name)]:
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(str(FOLDER))
        for name, value in (ENVIRONMENT | environment).items():
            patch.setenv(name, value)
        try:
            yield importlib.import_module("cuda.bindings.runtime")
        finally:
            for name in [name for name in sys.modules if _concerned(name)]:
                del sys.modules[name]


def _concerned(name: str) -> bool:
    return name.partition(".")[0] in _MODULES or name in _DEPENDENT


class _Monitor:
    def phase_start(self, *_: object) -> None: ...

    def step_complete(self, *_: object) -> bool:
        return True

    def phase_finish(self, *_: object) -> None: ...


def write_engine(folder: Path, onnx: str, batch: tuple[int, int, int], **changes: Any) -> Sidecar:
    """Build an engine of ``folder/onnx`` in this process, where the stand-in is installed; return its sidecar.

    Args:
        folder: of a bundle.
        onnx: name of the file.
        batch: smallest, best and largest.
        **changes: of the settings.
    """
    import tensorrt as trt

    from exporters.tensorrt.callbacks import Log

    log = Log()
    builder: Any = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, log).parse_from_file(str(folder / onnx))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.progress_monitor, config.profiling_verbosity = _Monitor(), trt.ProfilingVerbosity.DETAILED
    settings = BuildSettings(
        {t.name: ShapeRange(*((size, *t.shape[1:]) for size in batch)) for t in network._inputs}, **changes
    )
    for name, shapes in settings.profile.items():
        profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
    config.add_optimization_profile(profile)
    for wanted, flag in ((settings.strip_weights, "STRIP_PLAN"), (settings.version_compatible, "VERSION_COMPATIBLE")):
        if wanted:
            config.set_flag(trt.BuilderFlag[flag])
    plan = bytes(builder.build_serialized_network(network, config))
    name = engine_name("fp16", (8, 9), version=VERSION)
    (folder / "engines").mkdir(exist_ok=True)
    (folder / "engines" / name).write_bytes(plan)
    sidecar = Sidecar(
        plan=name,
        sha256=hashlib.sha256(plan).hexdigest(),
        size=len(plan),
        precision="fp16",
        onnx=onnx,
        onnx_sha256=model_sha256(folder / onnx),
        tensorrt=VERSION,
        gpu=GpuRecord("NVIDIA L4", (8, 9)),
        settings=settings,
        io=(
            *(
                IoTensor(t.name, "input", "float32", t.shape, (s.min, s.opt, s.max))
                for t in network._inputs
                for s in [settings.profile[t.name]]
            ),
            *(IoTensor(t.name, "output", "float32", t.shape) for t in network._outputs),
        ),
        layers={},
        assertions=(),
        facts={},
        timing_cache_sha256="",
        seconds=1.0,
        tool_version="0.1.0",
        built_at="2026-01-01T00:00:00+00:00",
    )
    sidecar.save(folder / "engines")
    return sidecar


def rewritten(folder: Path, sidecar: Sidecar, **changes: Any) -> Sidecar:
    """Save the sidecar with other contents."""
    changed = replace(sidecar, **changes)
    changed.save(folder / "engines")
    return changed


def samples(count: int, features: int = 12, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((count, features)).astype(np.float32)


def as_rtx(folder: Path, sidecar: Sidecar, targets: tuple[Capability, ...] = TARGETS) -> Sidecar:
    """Make an engine one of TensorRT for RTX; return its sidecar."""
    engines = folder / "engines"
    described = (engines / sidecar.plan).read_bytes()[28:-32]
    mask = sum(1 << TARGETS.index(target) for target in targets)
    plan = struct.pack("<4sIQQ4BII", RTX.tag, 0, 0, 0, 1, 7, 1, 116, 0, mask) + described
    plan += hashlib.sha256(plan).digest()
    for old in (engines / sidecar.plan, engines / sidecar.plan.replace(".plan", ".json")):
        old.unlink()
    name = engine_name("fp16", *targets, version="1.7.1.116", product=RTX)
    (engines / name).write_bytes(plan)
    changes = {"gpu": None, "tensorrt": "1.7.1.116", "compiler": "rtx", "targets": targets}
    digest = hashlib.sha256(plan).hexdigest()
    return rewritten(folder, sidecar, plan=name, sha256=digest, size=len(plan), **changes)
