"""Model files under verification, artifacts and engines: run on a batch, or on all samples of some data, and judged by
their budgets; with labels the accuracy of each, and of the eager model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deploycli.exporters.verification.accuracy import AccuracyMeter, Evaluation
from deploycli.exporters.verification.compare import BUDGETS, Budget, Judge
from deploycli.exporters.verification.report import Stage
from deploycli.models.errors import DeployError, UsageError
from deploycli.models.memory import shortage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from deploycli.exporters.bundle.bundle import ModelFile
    from deploycli.exporters.data.samples import Samples
    from deploycli.exporters.runtime.runtimes import Runtime
    from deploycli.models.spec import ModelSpec

    Arrays = Mapping[str, npt.NDArray[Any]]
    Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LoadedFile:
    """A model file, loaded, with the budgets it is judged by.

    Attributes:
        file: the file.
        runtime: what runs it.
        budget: of every output that has none of its own.
        overrides: output name -> its own budget.
    """

    file: ModelFile
    runtime: Runtime
    budget: Budget
    overrides: Mapping[str, Budget]

    def judge(self) -> Judge:
        """Return a judge that has seen nothing yet."""
        return Judge(self.budget, self.overrides)

    def stage(self, check: str, samples: int, judge: Judge, faults: tuple[str, ...] = ()) -> Stage:
        """Return the verdict on one check."""
        return Stage(self.file, self.runtime.name, check, samples, judge.verdict(), faults)

    def sizes(self, batches: Sequence[int]) -> list[int]:
        """Return the batch sizes to sweep: those of ``batches`` that it takes, or else the smallest that it takes."""
        low, high = self.file.batches or (1, max(batches))
        return sorted({size for size in batches if low <= size <= high}) or [low]

    def portions(self, held: int) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
        """Divide samples into batches that it takes.

        Args:
            held: number of samples.

        Yields:
            The samples that are judged, and what is run: these, and as many copies of the last one as fill the batch.
        """
        low, high = self.file.batches or (1, held)
        for first in range(0, held, high):
            count = min(high, held - first)
            yield np.arange(first, first + count), np.minimum(np.arange(first, first + max(count, low)), held - 1)

    def run(self, judge: Judge, inputs: Arrays, truth: Arrays) -> Arrays:
        """Run one batch and judge it; where it is longer than its truth, the outputs of the filling are dropped.

        Returns:
            The outputs, name -> [B, ...]; none where the artifact failed.

        Raises:
            DeployError: memory ended, which is not the artifact's fault.
        """
        try:
            outputs: Arrays = self.runtime.run(inputs)
        except DeployError as error:
            if shortage(error) is not None:  # says nothing of the artifact
                raise
            judge.fail(truth, f"was not computed: {error.found}")
            return {}
        given, wanted = (len(next(iter(arrays.values()))) for arrays in (inputs, truth))
        if given > wanted:
            outputs = {
                name: array[:wanted] if array.shape[:1] == (given,) else array for name, array in outputs.items()
            }
        outputs = dense(self.file.bundle.manifest.spec, outputs)
        judge.add(truth, outputs)
        return outputs


def take(arrays: Arrays, order: npt.NDArray[np.intp]) -> Arrays:
    """Return these samples, in this order."""
    return {name: array[order] for name, array in arrays.items()}


def budgets(precision: str, rtol: Mapping[str, float]) -> tuple[Budget, dict[str, Budget]]:
    """Return the budget of all outputs, and those of the outputs that have their own.

    Args:
        precision: the artifact's.
        rtol: output name -> largest relative error, in place of the budget's; ``""`` stands for all outputs.

    Raises:
        UsageError: an unknown precision.
    """
    if precision not in BUDGETS:
        raise UsageError(
            f"the bundle holds an artifact of precision {precision!r}",
            expected=", ".join(BUDGETS),
            hint="verify it with the deploycli that wrote it",
        )
    budget = BUDGETS[precision]
    if "" in rtol:
        budget = replace(budget, max_rel_error=rtol[""])
    return budget, {name: replace(budget, max_rel_error=bound) for name, bound in rtol.items() if name}


class ClassOutput(NamedTuple):
    """The output that names the class: its name, and how many classes it has."""

    name: str
    classes: int


class Findings(NamedTuple):
    """What a run over samples found: one stage an artifact; accuracies, if there are labels; what was skipped."""

    stages: tuple[Stage, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    skipped: tuple[str, ...] = ()


def dense(spec: ModelSpec, outputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return outputs that can be compared: of the best k classes the share of each class, at most that of the k-th.

    Two classes whose shares are nearly equal may change places, or the k-th and the one after it; then numbers that are
    nearly equal are compared, and not the numbers of classes.

    Args:
        spec: of the model.
        outputs: name -> [B, ...], as it answered.

    Returns:
        name -> [B, ...]; ``scores`` is [B, classes] where the graph ends in the best k.
    """
    ending = spec.ending
    found = dict(outputs)
    if ending is None or ending.kind != "topk" or not set(ending.outputs) <= found.keys():
        return found
    scores, classes = (found.pop(name) for name in ending.outputs)  # [B, k] each
    fits = scores.shape == classes.shape and scores.ndim == 2 and classes.dtype.kind in "iu"
    if not fits or (classes.size and not 0 <= classes.min() <= classes.max() < ending.classes):
        return dict(outputs)  # a shape or a class that there is not fails by itself
    least = scores[:, -1:] if ending.k > 1 else np.zeros_like(scores)  # [B, 1]
    shares = np.repeat(least, ending.classes, axis=1)  # [B, 1] -> [B, classes]
    np.put_along_axis(shares, classes.astype(np.int64), scores, axis=1)  # [B, k] -> [B, classes]
    return {**found, ending.outputs[0]: shares}


def class_output(outputs: Mapping[str, npt.NDArray[Any]]) -> ClassOutput | None:
    """Return the first output [B, classes] of more than one class, or None."""
    found = (ClassOutput(name, array.shape[1]) for name, array in outputs.items() if array.ndim == 2)
    return next((output for output in found if output.classes > 1), None)


def verify_samples(
    loaded: Sequence[LoadedFile],
    eager: Runtime,
    spec: ModelSpec,
    samples: Samples,
    logits: ClassOutput | None,
    size: int,
    progress: Progress | None,
) -> Findings:
    """Run every batch through the eager model and then through every artifact; one batch is in memory.

    Args:
        loaded: the model files.
        eager: the reference.
        spec: of the model.
        samples: what to run them on.
        logits: what accuracy is counted by, where the samples have labels.
        size: how many samples at a time.
        progress: see `deploycli.exporters.verify.verify`.

    Raises:
        UsageError: samples cannot be read, or have labels while no output names a class.
    """
    name, classes = ("", 0) if logits is None else logits
    judges = [one.judge() for one in loaded]
    of_eager, meters = AccuracyMeter(classes), [AccuracyMeter(classes) for _ in loaded]
    skipped: list[str] = []
    count = done = 0
    for batch in samples.batches(size):
        if progress is not None:
            progress("images", done, len(samples.names))
        done = batch.stop
        skipped += batch.skipped
        held, labels = len(next(iter(batch.inputs.values()))), batch.labels
        if not held:
            continue
        if labels is not None and not classes:
            raise no_class_output()
        count += held
        truth = dense(spec, eager.run(batch.inputs))
        if labels is not None:
            of_eager.add(truth[name], labels)
        for one, judge, meter in zip(loaded, judges, meters, strict=True):
            for wanted, filled in one.portions(held):
                outputs = one.run(judge, take(batch.inputs, filled), take(truth, wanted))
                if labels is not None:
                    meter.add(outputs.get(name), labels[wanted])
    evaluations = _evaluations(loaded, eager, of_eager, meters)
    breaches = [evaluation.reasons for evaluation in evaluations[1:]] or [()] * len(loaded)
    stages = (c.stage("images", count, j, faults) for c, j, faults in zip(loaded, judges, breaches, strict=True))
    return Findings(tuple(stages), evaluations, tuple(skipped))


def no_class_output() -> UsageError:
    """Return the error that labels are of no use."""
    return UsageError(
        "the data has labels, and the model has no output [batch, classes] to compare them with",
        hint="verify without labels",
    )


def _evaluations(
    loaded: Sequence[LoadedFile], eager: Runtime, of_eager: AccuracyMeter, meters: Sequence[AccuracyMeter]
) -> tuple[Evaluation, ...]:
    """Return the eager model's accuracy and then each artifact's; nothing where there were no labels."""
    truth = of_eager.accuracy()
    if truth is None:
        return ()
    evaluations = [Evaluation(None, "fp32", eager.name, truth)]
    for one, meter in zip(loaded, meters, strict=True):
        accuracy = meter.accuracy()
        assert accuracy is not None  # it saw every sample that the eager model saw
        lost, allowed = truth.top1 - accuracy.top1, one.budget.max_top1_drop
        evaluations.append(Evaluation(one.file.name, one.file.precision, one.runtime.name, accuracy, lost, allowed))
    return tuple(evaluations)
