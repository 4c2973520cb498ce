"""reports/verify.json: what the last verification of a bundle judged, file by file, and whether it passed.

The report is kept beside the manifest, not in it: it is written after the bundle. A file counts as verified only while
its SHA-256, external data included, is the one that was judged, so casting or quantising again makes it stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from deploycli.exporters.bundle.manifest import FileRecord
from deploycli.models.codec import load
from deploycli.models.errors import DeployError, EnvironmentUnsuitable

if TYPE_CHECKING:
    from pathlib import Path

REPORT_NAME = "reports/verify.json"
SCHEMA_VERSION = 1

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
class Verification:
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
    def load(cls, folder: Path) -> Verification:
        """Read the report in a bundle's folder. One that is missing or malformed proves nothing, and is no error."""
        try:
            what = "a report of verify"
            kept = load(report_path(folder), _Kept, what=what, version=SCHEMA_VERSION, partial=True)
        except FileNotFoundError:
            return cls(obstacle="it was never verified")
        except (OSError, DeployError) as error:
            return cls(obstacle=f"{REPORT_NAME} cannot be read ({_reason(error)})")
        return cls({item.files[0].path: item for item in kept.judged}, kept.reference, kept.time, kept.tool_version)

    def verdict(self, file: FileRecord, *external: FileRecord) -> Verdict:
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


def report_path(folder: Path) -> Path:
    """Return where the report is in a bundle's folder.

    Raises:
        EnvironmentUnsuitable: the folder of reports is a link elsewhere: it belongs to somebody else.
    """
    path = folder / REPORT_NAME
    if not path.resolve().is_relative_to(folder.resolve()):
        raise EnvironmentUnsuitable(f"{path} is a link that leaves the bundle", expected="a file inside the bundle")
    return path


def _reason(error: Exception) -> str:
    return error.found if isinstance(error, DeployError) else f"{type(error).__name__}: {error}"
