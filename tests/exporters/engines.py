"""Engines that nothing can run: a plan's header, and the sidecar that a build would write."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.engine import GpuRecord, IoTensor, Sidecar, engine_name
from deploycli.exporters.target.settings import BuildSettings
from deploycli.exporters.verification.report import keep
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.files import sha256_of

if TYPE_CHECKING:
    from deploycli.exporters.bundle.bundle import Bundle

TENSORRT = "10.13.3.9"


def io(batch: tuple[int, int, int] | None = (1, 8, 16), dtype: str = "float16") -> tuple[IoTensor, ...]:
    """The interface of the bundles made by hand; ``batch`` is the profile, or None for a batch of 4."""
    leading = 4 if batch is None else -1
    profile = () if batch is None else tuple((size, 12) for size in batch)
    outputs = (IoTensor(name, "output", "float32", (leading, 5)) for name in ("logits", "features"))
    return (IoTensor("images", "input", dtype, (leading, 12), profile), *outputs)


def build(bundle: Bundle, precision: str = "fp16", capability: tuple[int, int] = (8, 9), **changes: Any) -> Sidecar:
    """Write an engine and its sidecar into a bundle."""
    folder = bundle.path / "engines"
    folder.mkdir(exist_ok=True)
    name = engine_name(precision, capability, version=TENSORRT)
    header = struct.pack("<II", 0x74727466, 0) + bytes(16) + bytes((10, 13, 3, 9))
    (folder / name).write_bytes(header + f"{precision} {capability}".encode())
    sidecar = Sidecar(
        plan=name,
        sha256=sha256_of(folder / name),
        size=(folder / name).stat().st_size,
        precision=precision,
        onnx="model.onnx",
        onnx_sha256="0" * 64,
        tensorrt=TENSORRT,
        gpu=GpuRecord("NVIDIA L4", capability),
        settings=BuildSettings({}),
        io=io(),
        layers={},
        assertions=(),
        facts={},
        timing_cache_sha256="",
        seconds=1.0,
        tool_version="0.1.0",
        built_at="2026-01-01T00:00:00Z",
    )
    sidecar = replace(sidecar, **changes)
    sidecar.save(folder)
    return sidecar


def verify_engines(bundle: Bundle, *precisions: str) -> None:
    """Keep a report in which the engines of these precisions passed."""
    report = verify(bundle, VerifyOptions(reference="golden", engines="none"))
    stages = tuple(
        replace(stage, file=engine, runtime="TensorRT")
        for engine in bundle.engines()
        if engine.precision in precisions
        for stage in report.stages
    )
    keep(bundle, replace(report, stages=(*report.stages, *stages)))
