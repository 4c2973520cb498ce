"""What a verification found: one stage for each thing that was checked, and the verdict over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.compare import Comparison


@dataclass(frozen=True)
class Stage:
    """One artifact, run in one way and compared with the reference.

    Attributes:
        artifact: the file's path inside the bundle.
        precision: whose budget applied.
        runtime: what ran it.
        check: what was tried: ``batch 3``, ``batch 8 shuffled``, ``images``.
        samples: how many inputs it saw.
        comparisons: one an output.
    """

    artifact: str
    precision: str
    runtime: str
    check: str
    samples: int
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether there was something to compare, and all of it is within budget."""
        return bool(self.comparisons) and all(c.passed for c in self.comparisons)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for every output that failed: the stage, the output, the reasons."""
        where = f"{self.artifact} in {self.runtime}, {self.check}"
        return tuple(f"{where}: output {c.name!r} {'; '.join(c.reasons)}" for c in self.comparisons if not c.passed)

    def to_json(self) -> dict[str, Any]:
        """Return the stage as JSON values."""
        return {
            "artifact": self.artifact,
            "precision": self.precision,
            "runtime": self.runtime,
            "check": self.check,
            "samples": self.samples,
            "passed": self.passed,
            "comparisons": [c.to_json() for c in self.comparisons],
        }


@dataclass(frozen=True)
class Report:
    """The verdict on a bundle.

    Attributes:
        bundle: the folder.
        weights: where the weights came from, in words.
        reference: ``eager`` or ``golden``.
        reference_note: why that reference, and what it left out; empty where there is nothing to say.
        stages: in the order of the chain, so the first that failed is the guilty one.
    """

    bundle: str
    weights: str
    reference: str
    reference_note: str
    stages: tuple[Stage, ...]

    @property
    def passed(self) -> bool:
        """Whether there were stages, and all of them passed."""
        return bool(self.stages) and all(stage.passed for stage in self.stages)

    @property
    def guilty(self) -> Stage | None:
        """The first stage that failed."""
        return next((stage for stage in self.stages if not stage.passed), None)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for every output that failed in any stage."""
        return tuple(line for stage in self.stages for line in stage.failures)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "bundle": self.bundle,
            "weights": self.weights,
            "reference": self.reference,
            "reference_note": self.reference_note,
            "passed": self.passed,
            "failures": list(self.failures),
            "stages": [stage.to_json() for stage in self.stages],
        }
