"""How often a model is right: top-1 and top-5 accuracy against labels, with the uncertainty of the sample's size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_Z = 1.959963984540054  # standard deviations on either side of the mean that hold 95 % of a normal distribution
_TOP = 5
_ROUNDING = 1e-9  # a product of a share and a count may miss the whole number that it stands for


@dataclass(frozen=True)
class Accuracy:
    """Counts over labelled samples.

    Attributes:
        samples: how many, 1 or more.
        top1_correct: those whose class has the largest logit.
        top5_correct: those whose class is among the five largest; None where the model has no more than five classes.
    """

    samples: int
    top1_correct: int
    top5_correct: int | None

    @property
    def top1(self) -> float:
        """Share of the samples, 0 to 1."""
        return self.top1_correct / self.samples

    @property
    def top5(self) -> float | None:
        """Share of the samples, 0 to 1."""
        return None if self.top5_correct is None else self.top5_correct / self.samples

    @property
    def top1_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the share, by Wilson's score."""
        return wilson_interval(self.top1_correct, self.samples)

    @property
    def top5_interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the share, by Wilson's score."""
        return None if self.top5_correct is None else wilson_interval(self.top5_correct, self.samples)

    def to_json(self) -> dict[str, Any]:
        """Return counts, shares and intervals as JSON values."""
        return {
            "samples": self.samples,
            "top1_correct": self.top1_correct,
            "top1": self.top1,
            "top1_interval": list(self.top1_interval),
            "top5_correct": self.top5_correct,
            "top5": self.top5,
            "top5_interval": None if self.top5_interval is None else list(self.top5_interval),
        }


class AccuracyMeter:
    """Counts batch after batch.

    Args:
        classes: how many classes the model has.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._samples = 0
        self._top1 = 0
        self._top5 = 0

    def add(self, logits: npt.NDArray[Any] | None, labels: npt.NDArray[np.int64]) -> None:
        """Count one batch.

        A class stands behind those with a larger logit, and behind those with an equal one and a lower index. Of two
        equal logits argmax takes the first, too. A sample with a NaN logit is wrong.

        Args:
            logits: [B, classes]; None, or of another shape, where the model failed: every sample is wrong.
            labels: [B].
        """
        self._samples += len(labels)
        if logits is None or logits.shape != (len(labels), self._classes):
            return
        own = np.take_along_axis(logits, labels[:, None], axis=1)  # [B, 1]
        ahead = (logits > own) | ((logits == own) & (np.arange(self._classes) < labels[:, None]))
        rank = ahead.sum(axis=1)  # [B], 0 for the first
        rank[np.isnan(logits).any(axis=1)] = self._classes
        self._top1 += int((rank < 1).sum())
        self._top5 += int((rank < _TOP).sum())

    def accuracy(self) -> Accuracy | None:
        """Return what was counted, or None where nothing was."""
        if not self._samples:
            return None
        return Accuracy(self._samples, self._top1, self._top5 if self._classes > _TOP else None)


@dataclass(frozen=True)
class Evaluation:
    """The accuracy of the eager model, or of one artifact.

    Attributes:
        artifact: the file's path inside the bundle; None for the eager model.
        precision: the artifact's; ``fp32`` for the eager model.
        runtime: what ran it.
        accuracy: what was counted.
        top1_lost: top-1 share of the eager model less this one's, negative where this one is better; None for the
            eager model.
        max_top1_drop: the budget for it, or None where it is not judged.
    """

    artifact: str | None
    precision: str
    runtime: str
    accuracy: Accuracy
    top1_lost: float | None = None
    max_top1_drop: float | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the accuracy is outside the budget, in words; empty where it is not."""
        lost, allowed = self.top1_lost, self.max_top1_drop
        if lost is None or allowed is None or lost <= allowed + _ROUNDING:
            return ()
        return (
            f"top-1 lost {100 * lost:.2f} points against the eager model: {100 * self.accuracy.top1:.2f} % of "
            f"{self.accuracy.samples} labelled samples are right, more than {100 * allowed:.2f} points fewer",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as JSON values."""
        return {
            "artifact": self.artifact,
            "precision": self.precision,
            "runtime": self.runtime,
            **self.accuracy.to_json(),
            "top1_lost": self.top1_lost,
            "max_top1_drop": self.max_top1_drop,
            "reasons": list(self.reasons),
        }


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score, which holds near 0 and 1 and for few trials.

    Args:
        successes: 0 to ``trials``.
        trials: 1 or more.
    """
    share, z2 = successes / trials, _Z * _Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)
