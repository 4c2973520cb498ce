"""reports/verify.json: what the last verification of a bundle judged, file by file, and whether it passed.

The report is kept beside the manifest, not in it: it is written after the bundle. A file counts as verified only while
its SHA-256, external data included, is the one that was judged, so casting or quantising again makes it stale.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from deploycli.exporters.bundle.atomic import write_whole
from deploycli.exporters.bundle.manifest import FileRecord
from deploycli.exporters.verification.compare import BUDGETS
from deploycli.models.codec import load
from deploycli.models.errors import DeployError, EnvironmentUnsuitable

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.bundle.manifest import Artifact
    from deploycli.exporters.verification.report import Report, Stage

PROOF_NAME = "reports/verify.json"
SCHEMA_VERSION = 1

_PACKAGES = ("numpy", "onnxruntime", "tensorrt", "torch")

Status = Literal["ok", "failed", "not verified", "stale"]


@dataclass(frozen=True)
class Verdict:
    """Whether a file may be trusted to compute what the eager model does.

    Attributes:
        status: ``ok``; ``failed``; ``not verified``, where no report judges it; ``stale``, where one judged another
            content of it.
        reason: why it is not ``ok``, else empty.
    """

    status: Status
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether this very content was verified and is within its budget."""
        return self.status == "ok"


@dataclass(frozen=True)
class Judged:
    """What a verification found of one model file.

    Attributes:
        files: the model file and its external data, as they were judged.
        passed: whether every check passed.
        failures: one line for every output that failed.
        checks: what was tried, such as ``batch 3``.
        runtimes: what ran it.
        tolerances: output -> largest relative error, where the user allowed more than the budget does.
    """

    files: Annotated[tuple[FileRecord, ...], Meta(min_length=1)]
    passed: bool
    failures: tuple[str, ...]
    checks: tuple[str, ...]
    runtimes: tuple[str, ...]
    tolerances: Mapping[str, float]


@dataclass(frozen=True)
class _Kept:
    """What of the report is read back."""

    judged: tuple[Judged, ...]
    reference: str
    time: str
    tool_version: str


@dataclass(frozen=True)
class Proof:
    """The last verification of a bundle, as far as one was kept.

    Attributes:
        judged: path of a model file inside the bundle -> what was found.
        reference: ``eager`` or ``golden``; empty where nothing was kept.
        time: when, UTC.
        tool_version: version of the deploycli that judged.
        obstacle: why there is none, or an empty string.
    """

    judged: Mapping[str, Judged] = field(default_factory=dict)
    reference: str = ""
    time: str = ""
    tool_version: str = ""
    obstacle: str = ""

    @classmethod
    def load(cls, bundle: Bundle) -> Proof:
        """Read what `keep` wrote. A report that is missing or malformed proves nothing, and is no error."""
        path = bundle.path / PROOF_NAME
        try:
            what = "a report of verify"
            kept = load(_inside(bundle, path), _Kept, what=what, hint="", version=SCHEMA_VERSION, partial=True)
        except FileNotFoundError:
            return cls(obstacle="it was never verified")
        except (OSError, DeployError) as error:
            return cls(obstacle=f"{PROOF_NAME} cannot be read ({_reason(error)})")
        return cls({item.files[0].path: item for item in kept.judged}, kept.reference, kept.time, kept.tool_version)

    def passed(self, artifact: Artifact) -> bool:
        """Whether an artifact, as it is now, was verified and is within its budget."""
        return self.verdict(artifact).passed

    def verdict(self, artifact: Artifact) -> Verdict:
        """Return whether an artifact was verified, or why not."""
        return self.verdict_of(artifact.file, *artifact.external)

    def verdict_of(self, file: FileRecord, *external: FileRecord) -> Verdict:
        """Return whether a model file of the bundle was verified, or why not.

        Args:
            file: the model file as it is now: an ONNX file, or an engine.
            external: its external data.
        """
        judged = self.judged.get(file.path)
        if judged is None:
            return Verdict("not verified", self.obstacle or f"the verification of {self.time} did not judge it")
        if {(f.path, f.sha256) for f in judged.files} != {(f.path, f.sha256) for f in (file, *external)}:
            return Verdict("stale", f"it has changed since the verification of {self.time}")
        if not judged.passed:
            return Verdict("failed", judged.failures[0] if judged.failures else "it is outside its budget")
        return Verdict("ok")

    def to_json(self, bundle: Bundle) -> dict[str, Any]:
        """Return the verdict on every artifact of a bundle as JSON values, by its path."""
        return {a.file.path: asdict(self.verdict(a)) for a in bundle.manifest.artifacts}


def keep(bundle: Bundle, report: Report) -> Path:
    """Write a report into the bundle it judges, whole or not at all; an earlier one is replaced.

    Args:
        bundle: as it was verified.
        report: what `deploycli.exporters.verify.verify` returned for it.

    Returns:
        The file.

    Raises:
        EnvironmentUnsuitable: the bundle cannot be written, or a file that was judged is gone.
    """
    stages: dict[str, list[Stage]] = {}
    for stage in report.stages:
        stages.setdefault(stage.artifact, []).append(stage)
    try:
        judged = [asdict(_judged(bundle, path, found)) for path, found in stages.items()]
    except OSError as error:
        raise EnvironmentUnsuitable(f"cannot read {error.filename}: {error.strerror}") from error
    data = report.to_json() | {
        "schema_version": SCHEMA_VERSION,
        "tool_version": _version("deploycli"),
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "host": {"name": platform.node(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "judged": judged,
    }
    path = _inside(bundle, bundle.path / PROOF_NAME)
    with bundle.held():
        write_whole(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())
    return path


def _judged(bundle: Bundle, path: str, stages: list[Stage]) -> Judged:
    artifact = bundle.manifest.artifact(path)
    # What is not in the manifest, such as an engine, is hashed as it lies there.
    files = (FileRecord.of(bundle.path, path),) if artifact is None else (artifact.file, *artifact.external)
    tolerances = {
        c.name: c.budget.max_rel_error
        for stage in stages
        for c in stage.comparisons
        if c.budget.max_rel_error > BUDGETS[stage.precision].max_rel_error
    }
    return Judged(
        files,
        all(stage.passed for stage in stages),
        tuple(line for stage in stages for line in stage.failures),
        tuple(stage.check for stage in stages),
        tuple(dict.fromkeys(stage.runtime for stage in stages)),
        tolerances,
    )


def _inside(bundle: Bundle, path: Path) -> Path:
    """Return ``path``; a folder of reports that is a link elsewhere belongs to somebody else."""
    if not path.resolve().is_relative_to(bundle.path.resolve()):
        raise EnvironmentUnsuitable(f"{path} is a link that leaves the bundle", expected="a file inside the bundle")
    return path


def _reason(error: Exception) -> str:
    return error.found if isinstance(error, DeployError) else f"{type(error).__name__}: {error}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
