"""Verification on data: agreement with the eager model, and with labels the accuracy of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from deploycli.exporters.verification.accuracy import AccuracyMeter, Evaluation
from deploycli.exporters.verification.loaded import take
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from deploycli.exporters.data.samples import Samples
    from deploycli.exporters.runtime.runtimes import Runtime
    from deploycli.exporters.verification.loaded import LoadedFile
    from deploycli.exporters.verification.report import Stage

    Progress = Callable[[str, int, int], None]


class ClassOutput(NamedTuple):
    """The output that names the class: its name, and how many classes it has."""

    name: str
    classes: int


class Findings(NamedTuple):
    """What a run over samples found: one stage an artifact; accuracies, if there are labels; what was skipped."""

    stages: tuple[Stage, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    skipped: tuple[str, ...] = ()


def class_output(outputs: Mapping[str, npt.NDArray[Any]]) -> ClassOutput | None:
    """Return the first output [B, classes] of more than one class, or None."""
    found = (ClassOutput(name, array.shape[1]) for name, array in outputs.items() if array.ndim == 2)
    return next((output for output in found if output.classes > 1), None)


def verify_samples(
    loaded: Sequence[LoadedFile],
    eager: Runtime,
    samples: Samples,
    logits: ClassOutput | None,
    size: int,
    progress: Progress | None,
) -> Findings:
    """Run every batch through the eager model and then through every artifact; one batch is in memory.

    Args:
        loaded: the model files.
        eager: the reference.
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
        truth = eager.run(batch.inputs)
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
