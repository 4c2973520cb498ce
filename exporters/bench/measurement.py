"""What was measured of one candidate at one batch size, or why nothing was; and how two of them compare."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from deploycli.exporters.bench.candidate import Candidate, FirstLoad, Prepared

CONFIDENCE = 0.95
_RESAMPLES = 1000
_DRAWN_AT_ONCE = 1 << 20  # rounds: there may be a hundred thousand, and memory is the models'


@dataclass(frozen=True, eq=False)
class Measurement:
    """One candidate at one batch size.

    Attributes:
        candidate: what ran.
        batch: samples in a run.
        seconds: of each timed run, [rounds]; the same round of other measurements of this batch size is its pair.
        open_seconds: loading the model took so long.
        prepare_seconds: so long passed from the first sight of this batch size until the first outputs: compilation,
            capture, first allocations.
        transfers: see `Prepared`.
        cuda_graph: see `Prepared`.
        threads: see `Prepared`.
        notes: see `Prepared`.
        first_load: of an engine whose kernels are finished when it is loaded.
    """

    candidate: Candidate
    batch: int
    seconds: npt.NDArray[np.float64] = field(repr=False)
    open_seconds: float
    prepare_seconds: float
    transfers: str
    cuda_graph: bool
    threads: int | None
    notes: tuple[str, ...]
    first_load: FirstLoad | None = None

    @classmethod
    def of(
        cls,
        candidate: Candidate,
        prepared: Prepared,
        seconds: npt.NDArray[np.float64],
        *,
        open_seconds: float,
        prepare_seconds: float,
        batch: int,
        first_load: FirstLoad | None = None,
    ) -> Measurement:
        """Put together what ran, and what was measured."""
        return cls(
            candidate,
            batch,
            seconds,
            open_seconds,
            prepare_seconds,
            prepared.transfers,
            prepared.cuda_graph,
            prepared.threads,
            prepared.notes,
            first_load,
        )

    @property
    def rounds(self) -> int:
        """How often it was timed."""
        return len(self.seconds)

    def percentile(self, share: float) -> float:
        """Return the time in seconds within which this share of the runs, 0 to 1, ended; the median for 0.5.

        It is one of the measured times (nearest rank), the median apart: with few rounds the high ones are the slowest.
        """
        if share == 0.5:
            return float(np.median(self.seconds))
        # 0.95 * 20 is a little more than 19: the rank must not depend on it.
        rank = math.ceil(round(share * self.rounds, 9))
        return float(np.sort(self.seconds)[max(rank, 1) - 1])

    @property
    def median(self) -> float:
        """Seconds."""
        return self.percentile(0.5)

    @property
    def images_per_second(self) -> float:
        """Samples a second at the median latency, one batch after the other."""
        return self.batch / self.median

    def conditions(self) -> str:
        """Say what is included in the figures, and under which conditions they hold."""
        parts = [
            "" if self.transfers == "none" else f"transfers {self.transfers}",
            "CUDA graph" if self.cuda_graph else "no CUDA graph" if self.candidate.device == "cuda" else "",
            _threads(self.threads) if self.candidate.device == "cpu" else "",
            *self.notes,
            "" if self.first_load is None else str(self.first_load),
            self.candidate.emulated,
        ]
        return "; ".join(filter(None, parts))

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        total = float(self.seconds.sum())
        return {
            **self.candidate.to_json(),
            "batch": self.batch,
            "rounds": self.rounds,
            "seconds": {
                "p50": self.median,
                "p90": self.percentile(0.9),
                "p95": self.percentile(0.95),
                "p99": self.percentile(0.99),
                "mean": float(self.seconds.mean()),
                "std": float(self.seconds.std()),
                "min": float(self.seconds.min()),
                "max": float(self.seconds.max()),
            },
            "images_per_second": self.images_per_second,
            "images_per_second_overall": self.batch * self.rounds / total,
            "open_seconds": self.open_seconds,
            "prepare_seconds": self.prepare_seconds,
            "transfers": self.transfers,
            "cuda_graph": self.cuda_graph,
            "threads": self.threads,
            "notes": list(self.notes),
            "first_load": None if self.first_load is None else self.first_load.to_json(),
        }


@dataclass(frozen=True)
class Absence:
    """A candidate that gave no figures.

    Attributes:
        candidate: which.
        reason: why, in one line.
        batch: the batch size at which; None is all.
        wrong: it ran, and its outputs are outside the budget.
    """

    candidate: Candidate
    reason: str
    batch: int | None = None
    wrong: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**self.candidate.to_json(), "batch": self.batch, "reason": self.reason, "wrong": self.wrong}


def _threads(count: int | None) -> str:
    return "default threads" if count is None else "1 thread" if count == 1 else f"{count} threads"


@dataclass(frozen=True)
class Speedup:
    """How many times faster one is than another, by median latency.

    Attributes:
        ratio: of the medians.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"ratio": self.ratio, "low": self.low, "high": self.high}


def speedup(contender: Measurement, baseline: Measurement, seed: int = 0) -> Speedup:
    """Compare two measurements of the same rounds.

    The interval is a bootstrap over rounds: whole rounds are drawn, so that what slowed both runs of a round down
    cancels.

    Args:
        contender: the faster one, where the ratio exceeds 1.
        baseline: what it is compared with, at the same batch size and in the same rounds.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    rounds = contender.rounds
    ratios = []
    at_once = max(1, _DRAWN_AT_ONCE // rounds)
    for begin in range(0, _RESAMPLES, at_once):
        drawn = rng.integers(0, rounds, (min(at_once, _RESAMPLES - begin), rounds))
        ratios.append(np.median(baseline.seconds[drawn], axis=1) / np.median(contender.seconds[drawn], axis=1))
    low, high = np.quantile(np.concatenate(ratios), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Speedup(baseline.median / contender.median, float(low), float(high))
