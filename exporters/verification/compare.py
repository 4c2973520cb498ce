"""The judge: two sets of named arrays in, figures and a verdict out.

All arithmetic is float64. What cannot be measured is a fault, and a fault fails: NaN, Inf, a constant output, a missing
or an extra one, another shape or kind of element, an empty one. Nothing passes because nothing was compared, and a
reference that proves nothing (all zero, constant, not finite) fails as loudly as a wrong candidate.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Array = npt.NDArray[Any]

NO_OUTPUTS = "(none)"  # the name under which it is reported that nothing was compared
_NUMERIC_KINDS = "fiub"  # floating, signed, unsigned, bool


@dataclass(frozen=True)
class Budget:
    """What one output may lose.

    Attributes:
        max_rel_error: largest absolute error over the largest reference magnitude.
        min_cosine: lowest cosine similarity of any sample, or None where it is not judged.
        min_top1_agreement: share of the decided samples whose top-1 class agrees, 0 to 1.
        tie_margin: a reference margin at or below it, relative to the largest reference magnitude, decides nothing;
            None means ``max_rel_error``.
        max_top1_drop: how much of the eager model's top-1 accuracy may be lost on labelled data, as a share of the
            samples (0.005 is half a percentage point), or None where it is not judged.
    """

    max_rel_error: float
    min_cosine: float | None
    min_top1_agreement: float
    tie_margin: float | None = None
    max_top1_drop: float | None = None


BUDGETS: Mapping[str, Budget] = {
    "fp32": Budget(1e-4, None, 1.0),
    "fp16": Budget(1e-2, 0.9999, 0.995),
    "bf16": Budget(5e-2, 0.999, 0.98),  # eight bits of significand where FP16 has eleven
    # Quantisation is judged by direction and decision. Cosine and top-1 are blind to scale, so a loose bound on the
    # error stands beside them; as a margin it would leave no sample decided.
    # FP8's three bits of significand move the logits of Swin, ViT and CrossFormer by 5 to 7 % of the largest.
    "fp8": Budget(0.5, 0.99, 0.95, tie_margin=0.05, max_top1_drop=0.005),
    "int8": Budget(0.5, 0.99, 0.95, tie_margin=0.02, max_top1_drop=0.005),
}


@dataclass(frozen=True)
class Top1:
    """Agreement on the largest class.

    Attributes:
        samples: samples seen.
        decided: those whose reference margin exceeds the tie margin: a near-tie is not a disagreement.
        agreed: decided samples on which both choose the same class.
    """

    samples: int
    decided: int
    agreed: int


@dataclass(frozen=True)
class Comparison:
    """The verdict on one output.

    Attributes:
        name: name of the output.
        reference_shape: shape of the reference, all samples together; None where it has no such output.
        candidate_shape: the same of the candidate.
        max_abs_error: largest absolute error; None, like the other figures, where a fault made it meaningless.
        max_rel_error: largest absolute error over the largest reference magnitude of the whole output.
        cosine: lowest cosine similarity over the samples.
        top1: for outputs [B, classes] with more than one class.
        budget: what was allowed.
        faults: why the output fails whatever its figures are.
    """

    name: str
    reference_shape: tuple[int, ...] | None
    candidate_shape: tuple[int, ...] | None
    max_abs_error: float | None
    max_rel_error: float | None
    cosine: float | None
    top1: Top1 | None
    budget: Budget
    faults: tuple[str, ...] = ()

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the output fails: its faults, or the figures that are outside the budget."""
        if self.faults:
            return self.faults
        budget, top1, breaches = self.budget, self.top1, []
        error = math.nan if self.max_rel_error is None else self.max_rel_error
        cosine = math.nan if self.cosine is None else self.cosine
        # "not <=" and "not >=": a figure that is missing or NaN must never pass.
        if not error <= budget.max_rel_error:
            breaches.append(f"relative error {error:.3g} exceeds {budget.max_rel_error:.3g}")
        if budget.min_cosine is not None and not cosine >= budget.min_cosine:
            breaches.append(f"cosine {cosine:.6f} is below {budget.min_cosine}")
        if top1 is not None and not top1.agreed >= budget.min_top1_agreement * top1.decided:
            breaches.append(
                f"top-1 agrees on {top1.agreed} of {top1.decided} decided samples, fewer than "
                f"{budget.min_top1_agreement:.1%}"
            )
        return tuple(breaches)

    @property
    def passed(self) -> bool:
        """Whether the output is within its budget and has no fault."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {**asdict(self), "reasons": list(self.reasons), "passed": self.passed}


def compare(
    reference: Mapping[str, Array],
    candidate: Mapping[str, Array],
    budget: Budget,
    overrides: Mapping[str, Budget] | None = None,
) -> tuple[Comparison, ...]:
    """Judge every output of ``candidate``.

    Args:
        reference: name -> [B, ...], the truth.
        candidate: name -> [B, ...].
        budget: what an output may lose.
        overrides: output name -> a budget of its own.

    Returns:
        One comparison an output, in the reference's order, extra outputs last; never an empty tuple.
    """
    judge = Judge(budget, overrides)
    judge.add(reference, candidate)
    return judge.verdict()


class Judge:
    """Compares batch after batch and gives one verdict over all of them, in memory of a few numbers a sample.

    Args:
        budget: what an output may lose.
        overrides: output name -> a budget of its own.
    """

    def __init__(self, budget: Budget, overrides: Mapping[str, Budget] | None = None) -> None:
        self._budget = budget
        self._overrides = overrides or {}
        self._evidence: dict[str, _Evidence] = {}

    def add(self, reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> None:
        """Compare one batch, as `compare` does."""
        for name in dict.fromkeys((*reference, *candidate)):
            evidence = self._evidence.setdefault(name, _Evidence(name))
            evidence.add(reference.get(name), candidate.get(name))

    def fail(self, reference: Mapping[str, Array], why: str) -> None:
        """Record that a batch gave no candidate outputs at all."""
        for name in reference:
            self._evidence.setdefault(name, _Evidence(name)).fault(why)

    def verdict(self) -> tuple[Comparison, ...]:
        """Return one comparison an output, never an empty tuple."""
        if not self._evidence:
            nothing = _Evidence(NO_OUTPUTS)
            nothing.fault("the reference has no outputs: nothing was compared")
            return (nothing.verdict(self._budget),)
        return tuple(e.verdict(self._overrides.get(name, self._budget)) for name, e in self._evidence.items())


class _Evidence:
    """What is kept of one output: its shapes, its faults, and a few figures of each sample."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reference = _Side("the reference")
        self.candidate = _Side("the output")
        self.faults: dict[str, None] = {}  # in order, each once
        self.abs_error = 0.0
        self.cosine = 1.0
        self.margins: list[npt.NDArray[np.float64]] = []  # of the reference, [B] a batch
        self.agreed: list[npt.NDArray[np.bool_]] = []

    def fault(self, why: str) -> None:
        self.faults[why] = None

    def add(self, reference: Array | None, candidate: Array | None) -> None:
        if reference is None:
            self.fault("is extra: the reference has no such output")
        if candidate is None:
            self.fault("is missing")
        left = None if reference is None else self.reference.read(reference, self.fault)
        right = None if candidate is None else self.candidate.read(candidate, self.fault)
        if reference is None or candidate is None:
            return
        if reference.shape != candidate.shape:
            self.fault(f"has shape {list(candidate.shape)}, expected {list(reference.shape)}")
        elif reference.dtype.kind != candidate.dtype.kind:
            self.fault(f"has element type {candidate.dtype}, expected {reference.dtype}")
        elif left is not None and right is not None:
            self._measure(left, right)
            if reference.ndim == 2 and reference.shape[1] > 1:
                self._rank(left, right)

    def _measure(self, reference: npt.NDArray[np.float64], candidate: npt.NDArray[np.float64]) -> None:
        """Add one batch of flattened rows, [B, elements], finite."""
        with np.errstate(over="ignore"):  # an infinite error is a fault of its own
            self.abs_error = max(self.abs_error, float(np.abs(reference - candidate).max()))
        # Each row is scaled by its largest magnitude first, so that no square leaves the range of float64.
        # A zero row has no direction: its cosine with anything is 0, never 0/0.
        # Two zero rows are equal: where a mask hides a whole sample, 0 is the answer.
        left, right = _unit(reference), _unit(candidate)
        zero = ~(left.any(axis=1) | right.any(axis=1))
        self.cosine = min(self.cosine, float(np.where(zero, 1.0, (left * right).sum(axis=1)).min()))
        if (_constant_rows(candidate) & ~_constant_rows(reference)).any():
            self.fault("is constant over a whole sample, the reference is not")

    def _rank(self, reference: npt.NDArray[np.float64], candidate: npt.NDArray[np.float64]) -> None:
        top_two = np.partition(reference, -2, axis=1)[:, -2:]
        with np.errstate(over="ignore"):  # an infinite margin is decided
            self.margins.append(top_two[:, 1] - top_two[:, 0])
        self.agreed.append(reference.argmax(axis=1) == candidate.argmax(axis=1))

    def verdict(self, budget: Budget) -> Comparison:
        scale = self.reference.magnitude
        if scale == 0:
            self.fault("the reference is all zero: agreement with it proves nothing")
        if self.reference.is_constant:
            self.fault("the reference is constant over every sample: agreement with it proves little")
        if self.candidate.same_rows and not self.reference.same_rows:
            self.fault("gives every sample the same values, the reference does not")
        rel_error = self.abs_error / scale if scale else math.nan
        if scale and not math.isfinite(rel_error):
            self.fault("differs from the reference by more than float64 can hold")
        measured = not self.faults
        return Comparison(
            self.name,
            self.reference.shape,
            self.candidate.shape,
            self.abs_error if measured else None,
            rel_error if measured else None,
            self.cosine if measured else None,
            self._top1(budget, scale) if measured and scale else None,
            budget,
            tuple(self.faults),
        )

    def _top1(self, budget: Budget, scale: float) -> Top1 | None:
        if not self.margins:
            return None
        tie = budget.max_rel_error if budget.tie_margin is None else budget.tie_margin
        decided = np.concatenate(self.margins) > tie * scale
        agreed = np.concatenate(self.agreed) & decided
        return Top1(len(decided), int(decided.sum()), int(agreed.sum()))


class _Side:
    """One side of a comparison: is every value finite, does every sample vary, do the samples differ."""

    def __init__(self, who: str) -> None:
        self.who = who
        self.samples = 0
        self.row_shape: tuple[int, ...] | None = None
        self.magnitude: float | None = None  # of all values that could be read
        self._readable = 0  # samples
        self._constant = 0  # samples that vary nowhere
        self._first: npt.NDArray[np.float64] | None = None
        self._differ = False

    @property
    def shape(self) -> tuple[int, ...] | None:
        """All samples together."""
        return None if self.row_shape is None else (self.samples, *self.row_shape)

    @property
    def same_rows(self) -> bool:
        """Whether there are two samples or more, all alike."""
        return self._readable > 1 and not self._differ

    @property
    def is_constant(self) -> bool:
        """Whether no sample varies."""
        return self._readable > 0 and self._constant == self._readable

    def read(self, array: Array, fault: Callable[[str], None]) -> npt.NDArray[np.float64] | None:
        """Return the batch as float64 rows [B, elements], or report why it cannot be judged."""
        if array.ndim == 0:
            fault(f"{self.who} has no batch axis")
            return None
        self.samples += array.shape[0]
        self.row_shape = array.shape[1:]
        if array.dtype.kind not in _NUMERIC_KINDS:
            fault(f"{self.who} has element type {array.dtype}, which is no number")
            return None
        if array.size == 0:
            fault(f"{self.who} is empty, shape {list(array.shape)}")
            return None
        rows: npt.NDArray[np.float64] = array.reshape(array.shape[0], -1).astype(np.float64)
        if not np.isfinite(rows).all():
            nan, infinite = int(np.isnan(rows).sum()), int(np.isinf(rows).sum())
            fault(f"{self.who} has NaN or Inf: {nan} NaN and {infinite} Inf of {rows.size} values")
            return None
        self._constant += int(_constant_rows(rows).sum())
        self._readable += len(rows)
        self.magnitude = max(self.magnitude or 0.0, float(np.abs(rows).max()))
        if self._first is None:
            self._first = rows[0].copy()
        self._differ = self._differ or self._first.shape != rows[0].shape or bool((rows != self._first).any())
        return rows


def _constant_rows(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Say which rows [B, elements] of more than one element hold one value."""
    constant: npt.NDArray[np.bool_] = (rows == rows[:, :1]).all(axis=1) & (rows.shape[1] > 1)
    return constant


def _unit(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return rows [B, elements] scaled to length 1; zero rows stay zero."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scaled = rows / np.where(largest == 0, 1, largest)
    unit: npt.NDArray[np.float64] = scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1)
    return unit
