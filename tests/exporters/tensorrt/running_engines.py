"""The stand-ins for TensorRT: installed in this process; and plans for the one that runs them, in ``running/``."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import struct
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import load

from deploycli.exporters.bundle.engine import GpuRecord, IoTensor, Sidecar, engine_name
from deploycli.exporters.graph.onnx_file import model_sha256
from deploycli.exporters.target.product import RTX, TENSORRT
from deploycli.exporters.target.settings import BuildSettings, ShapeRange
from deploycli.exporters.target.targets import DEFAULT_TARGETS, TARGETS
from deploycli.exporters.tensorrt import library, runtime

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from deploycli.exporters.target.product import Product
    from deploycli.exporters.target.targets import Capability

FOLDER, GPU = (Path(__file__).parent / name for name in ("running", "gpu"))
VERSION = "10.13.3.9"

_MODULES = ("tensorrt", "tensorrt_rtx", "host_gpu")
_TYPES = {1: "FLOAT", 10: "HALF", 7: "INT64", 16: "BF16"}


@contextmanager
def installed(folder: Path = FOLDER, **environment: str) -> Iterator[Any]:
    """Let this process, and its children, import a stand-in for a while; yields its GPU, the module ``host_gpu``."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if _concerned(name)]:
            patch.delitem(sys.modules, name)
        for path in (GPU, folder):
            patch.syspath_prepend(str(path))
        for name, value in {
            "PYTHONPATH": os.pathsep.join(map(str, (folder, GPU))),
            "FAKE_GPU": "NVIDIA L4|8|9",
            **environment,
        }.items():
            patch.setenv(name, value)
        try:
            host_gpu = importlib.import_module("host_gpu")
            patch.setattr(library, "gpu", host_gpu.gpu)
            patch.setattr(runtime, "Device", host_gpu.HostDevice)
            yield host_gpu
        finally:
            for name in [name for name in sys.modules if _concerned(name)]:
                del sys.modules[name]


def _concerned(name: str) -> bool:
    return name.partition(".")[0] in _MODULES


_HEADERS: Mapping[str, bytes] = {
    "tensorrt": struct.pack("<II16x4B", 0x74727466, 0, 10, 13, 3, 9),
    "rtx": struct.pack("<4sI16x4B4xI", RTX.tag, 0, 1, 7, 1, 116, 0b111111),
}
_RTX_VERSION = "1.7.1.116"


def write_engine(
    folder: Path,
    onnx: str,
    batch: tuple[int, int, int],
    *,
    product: Product = TENSORRT,
    targets: tuple[Capability, ...] = DEFAULT_TARGETS,
    **changes: Any,
) -> Sidecar:
    """Write a plan of ``folder/onnx`` that the stand-in runs; return its sidecar.

    Args:
        folder: of a bundle.
        onnx: name of the file.
        batch: smallest, best and largest.
        product: what the plan is of.
        targets: GPUs that it is for, of TensorRT for RTX.
        **changes: of the settings.
    """
    model = load(folder / onnx)
    shapes = {
        value.name: tuple(-1 if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*model.graph.input, *model.graph.output)
    }
    inputs = [value.name for value in model.graph.input]
    profile = {name: ShapeRange(*((size, *shapes[name][1:]) for size in batch)) for name in inputs}
    settings = BuildSettings(profile, **changes)
    types = {v.name: _TYPES[v.type.tensor_type.elem_type] for v in (*model.graph.input, *model.graph.output)}
    described = {
        "io": [
            [name, "INPUT" if name in inputs else "OUTPUT", types[name], shape]
            + ([[r.min, r.opt, r.max] for r in [profile[name]]] if name in inputs else [])
            for name, shape in shapes.items()
        ],
        "host code": settings.version_compatible,
        "model": "" if settings.strip_weights else base64.b64encode(model.SerializeToString()).decode(),
    }
    header = _HEADERS[product.key]
    if product is RTX:
        header = header[:32] + struct.pack("<I", sum(1 << TARGETS.index(target) for target in targets))
    plan = header + json.dumps(described).encode()
    gpus = targets if product is RTX else ((8, 9),)
    version = _RTX_VERSION if product is RTX else VERSION
    name = engine_name("fp16", *gpus, version=version, product=product)
    (folder / "engines").mkdir(exist_ok=True)
    (folder / "engines" / name).write_bytes(plan)
    sidecar = Sidecar(
        plan=name,
        sha256=hashlib.sha256(plan).hexdigest(),
        size=len(plan),
        precision="fp16",
        onnx=onnx,
        onnx_sha256=model_sha256(folder / onnx),
        tensorrt=version,
        gpu=None if product is RTX else GpuRecord("NVIDIA L4", (8, 9)),
        settings=settings,
        io=tuple(
            IoTensor(name, "input", "float32", shape, (r.min, r.opt, r.max))
            if (r := profile.get(name)) is not None
            else IoTensor(name, "output", "float32", shape)
            for name, shape in shapes.items()
        ),
        layers={},
        assertions=(),
        facts={},
        timing_cache_sha256="",
        seconds=1.0,
        tool_version="0.1.0",
        built_at="2026-01-01T00:00:00+00:00",
        compiler=product.key,
        targets=targets if product is RTX else (),
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
