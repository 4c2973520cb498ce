"""The machine that a benchmark ran on: without it the figures say nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.manifest import version_of

if TYPE_CHECKING:
    from collections.abc import Mapping

_PACKAGES = (
    "deploycli",
    "numpy",
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
)
_GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit", "temperature.gpu")
_PATIENCE = 10  # seconds for nvidia-smi


@dataclass(frozen=True)
class Host:
    """A machine.

    Attributes:
        system: operating system and architecture.
        cpu: model name.
        cores: logical processors that this process may use.
        load: processes that wanted to run in the last minute, on average, before the benchmark; None where the system
            does not count them.
        gpus: one description a GPU, with its clocks before the benchmark.
        versions: package -> version.
    """

    system: str
    cpu: str
    cores: int
    load: float | None
    gpus: tuple[Mapping[str, str], ...]
    versions: Mapping[str, str]

    @property
    def busy(self) -> str:
        """Why the figures are not to be trusted, or an empty string."""
        if self.load is None or self.load < self.cores / 2:
            return ""
        return f"this machine is busy: load {self.load:.1f} on {self.cores} cores before the benchmark"

    def to_json(self) -> dict[str, Any]:
        """Return the machine as JSON values."""
        return asdict(self)


def describe_host() -> Host:
    """Describe this machine, as it is now."""
    found = {package: number for package in _PACKAGES if (number := version_of(package, ""))}
    affinity = getattr(os, "sched_getaffinity", None)
    return Host(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu(),
        cores=len(affinity(0)) if affinity is not None else os.cpu_count() or 1,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        gpus=_gpus(),
        versions={"python": platform.python_version(), **found},
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _gpus() -> tuple[Mapping[str, str], ...]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = (line.split(", ") for line in done.stdout.splitlines())
    return tuple(dict(zip(_GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(_GPU_FIELDS))
