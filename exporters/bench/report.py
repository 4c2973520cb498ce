"""What a benchmark of a bundle found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploycli.models.errors import NumericsError, RequirementError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycli.exporters.bench.candidate import BenchOptions
    from deploycli.exporters.bench.host import Host
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
