"""``--require-speedup 1.05:fp16``: a promise about speed, and whether the figures keep it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bench.measurement import Absence, Measurement, Speedup, speedup
from deploycli.exporters.bundle.manifest import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploycli.exporters.bench.candidate import Candidate


@dataclass(frozen=True)
class Requirement:
    """One file of the bundle must be so much faster than the baseline, at every batch size that was measured.

    Attributes:
        ratio: the baseline's median latency over the file's.
        precision: the file's; empty means any.
        baseline: name of an FP32 candidate, such as ``eager``; empty means the fastest other FP32 file of the bundle on
            the same device: the FP32 engine, or the FP32 graph in ONNX Runtime.
    """

    ratio: float
    precision: str = ""
    baseline: str = ""

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Read ``RATIO[:PRECISION[:BASELINE]]``.

        Raises:
            ValueError: another form, a ratio that is no positive number, an unknown precision.
        """
        ratio, _, rest = text.partition(":")
        precision, _, baseline = rest.partition(":")
        value = float(ratio)
        if not 0 < value < math.inf:
            raise ValueError(f"{ratio} is no ratio")
        if precision and precision not in PRECISIONS:
            raise ValueError(f"{precision!r} is none of {', '.join(PRECISIONS)}")
        return cls(value, precision, baseline)

    def __str__(self) -> str:
        return f"{self.ratio:g}:{self.precision}:{self.baseline}".rstrip(":")


@dataclass(frozen=True)
class Verdict:
    """Whether a requirement is met.

    Attributes:
        requirement: what was required.
        met: whether it is.
        reason: how, or why not, in one line.
        speedups: batch -> the speedup of the file that came nearest; empty where there was none.
    """

    requirement: Requirement
    met: bool
    reason: str
    speedups: Mapping[int, Speedup]

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return {
            "requirement": str(self.requirement),
            "met": self.met,
            "reason": self.reason,
            "speedups": {str(batch): found.to_json() for batch, found in self.speedups.items()},
        }


@dataclass(frozen=True)
class _Trial:
    """What one file achieved, over what; its fault says why it cannot be judged at every batch size."""

    candidate: Candidate
    speedups: Mapping[int, Speedup]
    baselines: Mapping[int, str]
    fault: str = ""

    @property
    def ratio(self) -> float:
        """At the batch size where it gains least; 0 where it was not judged everywhere."""
        return 0.0 if self.fault else min(found.ratio for found in self.speedups.values())

    def __str__(self) -> str:
        where = f"{self.candidate.artifact} in {self.candidate.name}"
        if self.fault:
            return f"{where}: {self.fault}"
        found = self.speedups.items()
        text = ", ".join(f"{speedup} over {self.baselines[batch]} at batch {batch}" for batch, speedup in found)
        return f"{where}: {text}"


def judge(
    requirement: Requirement, measurements: Sequence[Measurement], absences: Sequence[Absence], seed: int = 0
) -> Verdict:
    """Decide whether one and the same file of a bundle keeps the promise at every batch size.

    Args:
        requirement: the promise.
        measurements: all of the bundle.
        absences: what could not be measured, for the reason.
        seed: of the intervals.
    """
    batches = sorted({m.batch for m in measurements})
    contenders = [c for c in dict.fromkeys(m.candidate for m in measurements) if _counts(c, requirement)]
    trials = [_try(requirement, c, batches, measurements, seed) for c in contenders]
    if not trials:
        return Verdict(requirement, False, _why_nothing(requirement, measurements, absences), {})
    best = max(trials, key=lambda trial: trial.ratio)
    return Verdict(requirement, best.ratio >= requirement.ratio, str(best), best.speedups)


def _counts(candidate: Candidate, requirement: Requirement) -> bool:
    """Only a file ships, and only in its own arithmetic does its speed say something about its precision."""
    wanted = requirement.precision in ("", candidate.precision)
    itself = candidate.name == requirement.baseline and candidate.precision == "fp32"
    return bool(candidate.artifact) and wanted and not candidate.emulated and not itself


def _try(
    requirement: Requirement,
    candidate: Candidate,
    batches: Sequence[int],
    measurements: Sequence[Measurement],
    seed: int,
) -> _Trial:
    speedups, baselines = {}, {}
    for batch in batches:
        here = [m for m in measurements if m.batch == batch]
        own = next((m for m in here if m.candidate == candidate), None)
        if own is None:
            return _Trial(candidate, {}, {}, f"was not measured at batch {batch}")
        others = [m for m in here if _is_baseline(m.candidate, candidate, requirement.baseline)]
        if not others:
            what = requirement.baseline or f"other FP32 file on {candidate.device}"
            return _Trial(candidate, {}, {}, f"no {what} was measured at batch {batch} to compare it with")
        fastest = min(others, key=lambda m: m.median)
        speedups[batch], baselines[batch] = speedup(own, fastest, seed), fastest.candidate.label
    return _Trial(candidate, speedups, baselines)


def _is_baseline(baseline: Candidate, contender: Candidate, name: str) -> bool:
    if baseline == contender or baseline.precision != "fp32" or baseline.emulated:
        return False
    return baseline.name == name if name else bool(baseline.artifact) and baseline.device == contender.device


def _why_nothing(requirement: Requirement, measurements: Sequence[Measurement], absences: Sequence[Absence]) -> str:
    what = requirement.precision or "other"
    emulated = {m.candidate.label: m.candidate.emulated for m in measurements if m.candidate.emulated}
    absent = {a.candidate.label: a.reason for a in absences if a.candidate.artifact}
    reasons = [f"{label}: {why}" for label, why in (absent | emulated).items() if label.endswith(f" {what}")]
    return f"no {what} file gave a speed that counts ({'; '.join(reasons) or 'there is none to time'})"
