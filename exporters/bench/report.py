"""What a benchmark of a bundle found, and the machine that it ran on: without it the figures say nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.manifest import version_of
from deploycli.models.errors import NumericsError, RequirementError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploycli.exporters.bench.candidate import BenchOptions
    from deploycli.exporters.bench.measurement import Absence, Measurement, Speedup
    from deploycli.exporters.bench.requirement import Verdict
    from deploycli.models.errors import DeployError


SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Row:
    """A measurement beside what it is compared with.

    Attributes:
        measurement: the figures.
        baseline: label of the candidate that it is compared with at its batch size; empty where there is none.
        speedup: how many times faster than the baseline.
    """

    measurement: Measurement
    baseline: str
    speedup: Speedup | None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            **self.measurement.to_json(),
            "baseline": self.baseline,
            "speedup": None if self.speedup is None else self.speedup.to_json(),
        }


@dataclass(frozen=True)
class BenchReport:
    """The figures of a bundle.

    Attributes:
        bundle: the folder.
        weights: where the weights came from, in words.
        host: the machine.
        options: how it was measured.
        rows: by batch size, in the order of the candidates.
        absences: what could not be measured, and why.
        verdicts: one a requirement.
        unreleasable: artifacts that must not be shipped however fast they are, and why.
    """

    bundle: str
    weights: str
    host: Host
    options: BenchOptions
    rows: tuple[Row, ...]
    absences: tuple[Absence, ...]
    verdicts: tuple[Verdict, ...] = ()
    unreleasable: tuple[str, ...] = ()

    @property
    def wrong(self) -> tuple[str, ...]:
        """One line for every file of the bundle whose outputs are outside the budget."""
        found = (a for a in self.absences if a.wrong and a.candidate.artifact)
        return tuple(f"{a.candidate.artifact} in {a.candidate.name}, batch {a.batch}: {a.reason}" for a in found)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; all times are in seconds."""
        return {
            "schema_version": SCHEMA_VERSION,
            "bundle": self.bundle,
            "weights": self.weights,
            "host": self.host.to_json(),
            "options": self.options.to_json(),
            "measurements": [row.to_json() for row in self.rows],
            "absent": [absence.to_json() for absence in self.absences],
            "requirements": [verdict.to_json() for verdict in self.verdicts],
            "unreleasable": list(self.unreleasable),
        }


def failure_of(reports: Sequence[BenchReport]) -> DeployError | None:
    """Return what is wrong with these reports, the worst first: outputs outside the budget, a broken promise."""
    wrong = [f"{report.bundle}, {line}" for report in reports for line in report.wrong]
    if wrong:
        return NumericsError(
            f"not timed, because the outputs are wrong: {'; '.join(wrong)}",
            expected="what the eager model answered at export, within the budget of the precision",
            hint="deploycli verify",
        )
    broken = [(report.bundle, verdict) for report in reports for verdict in report.verdicts if not verdict.met]
    if broken:
        return RequirementError(
            "; ".join(f"{bundle}, {verdict.reason}" for bundle, verdict in broken),
            expected="speedups of " + ", ".join(dict.fromkeys(str(verdict.requirement) for _, verdict in broken)),
        )
    return None


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
