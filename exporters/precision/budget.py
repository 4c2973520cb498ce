"""An accuracy budget: take out of INT8 what hurts most, until the top-1 that is lost fits.

The groups are ranked by a cheap proxy: how far the logits move, on a few samples, when one group alone is in INT8. The
fewest of the worst groups that must go are then found by evaluating all samples with the very graph that would be
written: 1, 2, 4, ... until the drop fits, and halves from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.evaluate import Accuracy, AccuracyMeter
from models.errors import NumericsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import numpy.typing as npt

    from exporters.precision.gated import GatedRuntime
    from exporters.runtimes import Runtime
    from exporters.samples import Samples

    Progress = Callable[[str, int, int], None]

PROXY_SAMPLES = 32
"""Samples on which the groups are ranked."""

BATCH = 8


@dataclass(frozen=True)
class Search:
    """What an accuracy budget led to.

    Attributes:
        fp32: accuracy of the FP32 graph.
        quantized: accuracy with everything in INT8.
        result: accuracy with ``kept`` in INT8.
        kept: groups that stay in INT8, in the order of the graph.
        reverted: groups that do not, the most harmful first.
        harm: group -> mean square of the movement of the logits over their mean square, when it alone is in INT8;
            empty where nothing had to be reverted.
    """

    fp32: Accuracy
    quantized: Accuracy
    result: Accuracy
    kept: tuple[str, ...]
    reverted: tuple[str, ...]
    harm: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the search as JSON values."""
        return {
            "fp32": self.fp32.to_json(),
            "quantized": self.quantized.to_json(),
            "result": self.result.to_json(),
            "kept": list(self.kept),
            "reverted": list(self.reverted),
            "harm": dict(self.harm),
        }


def fit(
    groups: Sequence[str],
    max_drop: float,
    *,
    evaluate: Callable[[Collection[str]], Accuracy],
    harm: Callable[[], Mapping[str, float]],
) -> Search:
    """Find the fewest of the most harmful groups without which the drop fits.

    Args:
        groups: all groups, in the order of the graph.
        max_drop: largest loss of top-1, as a share.
        evaluate: accuracy with these groups in INT8; with none of them it is the FP32 graph's.
        harm: ranks the groups; called only where something must be reverted.

    Raises:
        NumericsError: no group can be in INT8.
    """
    fp32, quantized = evaluate(()), evaluate(groups)
    if _lost(fp32, quantized) <= max_drop:
        return Search(fp32, quantized, quantized, tuple(groups), (), {})
    ranks = harm()
    worst = sorted(groups, key=lambda group: -ranks[group])
    found: dict[int, Accuracy] = {len(worst): fp32}  # how many are reverted -> the accuracy, where the drop fits

    def fits(count: int) -> bool:
        accuracy = found.get(count) or evaluate([group for group in groups if group not in worst[:count]])
        if _lost(fp32, accuracy) > max_drop:
            return False
        found[count] = accuracy
        return True

    few, many = 0, 1
    while not fits(many):
        few, many = many, min(2 * many, len(worst))
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if fits(middle) else (middle, many)
    if many == len(worst):
        raise NumericsError(
            f"any of the {len(groups)} groups alone in INT8 loses more than {max_drop:.2%} of top-1 ({fp32.top1:.2%})",
            expected="a part of the network that bears INT8",
            hint="a larger --max-drop, more calibration data, or another --method",
        )
    reverted = tuple(worst[:many])
    return Search(fp32, quantized, found[many], tuple(g for g in groups if g not in reverted), reverted, ranks)


def _lost(before: Accuracy, after: Accuracy) -> float:
    """Top-1 lost, as a share of the samples."""
    return (before.top1_correct - after.top1_correct) / before.samples


def accuracy_of(runtime: Runtime, samples: Samples, output: str, *, label: str, progress: Progress) -> Accuracy:
    """Count how often a model is right.

    Args:
        runtime: runs it.
        samples: labelled data.
        output: name of the logits, [B, classes].
        label: what progress says.
        progress: called with a label, what is done and how much there is.

    Raises:
        UsageError: the data has no labels, or none of it can be read.
    """
    meter: AccuracyMeter | None = None
    for batch in samples.batches(BATCH):
        progress(label, batch.stop, len(samples.names))
        if batch.labels is None:
            raise UsageError(
                "an accuracy budget needs labelled data", expected="labels", hint="--labels folders, or a CSV file"
            )
        if len(batch.labels):
            logits = runtime.run(batch.inputs)[output]
            meter = meter or AccuracyMeter(logits.shape[1])
            meter.add(logits, batch.labels)
    accuracy = None if meter is None else meter.accuracy()
    if accuracy is None:
        raise UsageError("none of the labelled samples can be read", expected="pictures with labels")
    return accuracy


def harm_of(runtime: GatedRuntime, groups: Sequence[str], samples: Samples, *, progress: Progress) -> dict[str, float]:
    """Return how far the logits move when one group alone is in INT8: mean square over the logits' mean square."""
    moved = dict.fromkeys(groups, 0.0)
    power, seen = 0.0, 0
    for batch in samples.batches(BATCH):
        if seen >= PROXY_SAMPLES:
            break
        if not len(next(iter(batch.inputs.values()))):
            continue
        exact = runtime.logits(batch.inputs, ()).astype(np.float64)
        power += _squares(exact)
        seen += len(exact)
        for i, group in enumerate(groups):
            progress("ranking groups", i, len(groups))
            moved[group] += _squares(runtime.logits(batch.inputs, (group,)) - exact)
    return {group: value / power for group, value in moved.items()}


def _squares(values: npt.NDArray[Any]) -> float:
    return float((values.astype(np.float64) ** 2).sum())
