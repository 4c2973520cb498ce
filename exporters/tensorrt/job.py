"""What the child that builds an engine is given, and what it leaves: the files of one folder.

job.json      what to build
builder.log   what TensorRT said, line by line; kept whatever happens
model.plan    the engine
layers.json   what the engine inspector says of it; of TensorRT for RTX, its builder's own list in the same form
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploycli.exporters.bundle.engine import GpuRecord, IoTensor
from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.target.product import PRODUCTS, CompilerName, Product
from deploycli.exporters.target.settings import BuildSettings
from deploycli.exporters.target.targets import Capability
from deploycli.models.codec import load
from deploycli.models.errors import IntegrityError, UsageError

JOB, LOG, PLAN, LAYERS = "job.json", "builder.log", "model.plan", "layers.json"
OUTPUTS = (PLAN, LAYERS)
"""What the child makes, but for its log."""


@dataclass(frozen=True)
class Job:
    """One engine to build.

    Attributes:
        onnx: the model.
        settings: how to build it; their paths are absolute.
        folder: where everything goes.
        verbose: keep TensorRT's verbose messages, too.
        compiler: which of NVIDIA's two compilers builds it.
        targets: compute capabilities to compile for, lowest first; empty for TensorRT, which builds for its GPU.
    """

    onnx: Path
    settings: BuildSettings
    folder: Path
    verbose: bool = False
    compiler: CompilerName = "tensorrt"
    targets: tuple[Capability, ...] = ()

    @property
    def product(self) -> Product:
        """The compiler."""
        return PRODUCTS[self.compiler]

    def file(self, name: str) -> Path:
        """Return where a file of the job is."""
        return self.folder / name

    def save(self) -> None:
        """Write the job.

        Raises:
            EnvironmentUnsuitable: it cannot be written.
        """
        data = {
            "onnx": str(self.onnx),
            "settings": self.settings.to_json(),
            "verbose": self.verbose,
            "compiler": self.compiler,
            "targets": self.targets,
        }
        write_whole(self.file(JOB), json.dumps(data, indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read a job.

        Raises:
            UsageError: it is none.
        """
        try:
            found = load(path, _JobFile, what="a job that deploycli wrote", hint="")
        except OSError as error:
            raise UsageError(f"{path} is no job: {error.strerror or error}") from error
        except IntegrityError as error:
            raise UsageError(error.found, expected=error.expected) from error
        return cls(
            Path(found.onnx),
            found.settings,
            path.absolute().parent,
            found.verbose,
            found.compiler,
            found.targets,
        )


@dataclass(frozen=True)
class _JobFile:
    onnx: str
    settings: BuildSettings
    verbose: bool
    compiler: CompilerName
    targets: tuple[Capability, ...]


@dataclass(frozen=True)
class Progress:
    """Where a build is.

    Attributes:
        phase: TensorRT's name of it, in English; the names change between versions.
        step: steps of the phase that are done.
        total: steps of the phase.
        parent: the phase that this one is part of, or empty.
    """

    phase: str
    step: int
    total: int
    parent: str = ""


@dataclass(frozen=True)
class BuildResult:
    """An engine, and what is known of it. Nothing of it is trusted before the parent has checked the plan.

    Attributes:
        plan: file of the engine, in the folder of the job.
        sha256: its hash.
        size: its bytes.
        layers: file with the engine inspector's JSON, or None where the engine could not be inspected.
        log: file with what TensorRT said.
        tensorrt: version, four parts.
        gpu: where its kernels were measured, or None where none were.
        io: its inputs and outputs.
        facts: read back from the engine and the builder's configuration, enumerations by name, memory in bytes.
        timing_cache_sha256: of the timings for this TensorRT and GPU after the build, or empty.
        seconds: how long parsing, building and inspecting took.
    """

    plan: Path
    sha256: str
    size: int
    layers: Path | None
    log: Path
    tensorrt: str
    gpu: GpuRecord | None
    io: tuple[IoTensor, ...]
    facts: Mapping[str, Any]
    timing_cache_sha256: str
    seconds: Mapping[str, float]
