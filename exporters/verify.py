"""Prove a bundle: run every artifact and compare each output with the eager model's.

The sweep runs the first b samples as one batch for each size b, and the largest batch once more in another order, which
must only reorder the outputs: a batch axis that was frozen, padded or mixed fails. The reference is computed once, at
the largest size. Pictures are streamed: each batch goes through the reference and then through every artifact.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.compare import BUDGETS, Judge
from exporters.golden import load_golden, synthetic_inputs
from exporters.reference import choose_reference, reference_model
from exporters.report import Report, Stage
from exporters.runtimes import EagerRuntime, OrtRuntime, Runtime
from models.errors import DeployError, IntegrityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from exporters.bundle import Bundle
    from exporters.compare import Budget
    from exporters.manifest import Artifact, Manifest

    Arrays = Mapping[str, npt.NDArray[Any]]
    Progress = Callable[[str, int, int], None]


def verify(
    bundle: Bundle,
    *,
    batches: Sequence[int] = (1, 3, 8),
    reference: str = "auto",
    images: Path | None = None,
    limit: int | None = None,
    rtol: Mapping[str, float] | None = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Compare every artifact of a bundle with the eager model.

    Args:
        bundle: an opened bundle; its hashes were checked by `Bundle.open`.
        batches: sizes of the batch sweep; an artifact with a fixed batch is swept at that one.
        reference: ``eager``, ``golden``, or ``auto``: eager where PyTorch and the weights are at hand.
        images: a folder of pictures to compare on, besides the synthetic sweep; needs the eager reference.
        limit: at most so many pictures.
        rtol: output name -> largest relative error, in place of the budget's; the name ``""`` stands for all outputs.
        checkpoint: where the bundle's checkpoint is now, if not where the manifest says.
        seed: seed of the synthetic inputs.
        progress: called with what is running, how many steps are done, and how many there are.

    Raises:
        UsageError: an argument that does not fit the bundle.
        IntegrityError: the checkpoint or the golden file is not the recorded one.
        EnvironmentUnsuitable: ONNX Runtime is missing, or PyTorch where the eager reference is asked for.
        ExportError: an artifact cannot be loaded.
    """
    manifest = bundle.manifest
    _check_arguments(manifest, batches, limit, rtol or {})
    source, note = choose_reference(manifest, reference, checkpoint)
    if images is not None and source != "eager":
        raise UsageError(
            f"pictures cannot be compared with the golden file{f' ({note})' if note else ''}",
            expected="the eager model as the reference",
            hint="--reference eager, with --checkpoint where the weights are elsewhere",
        )
    with ExitStack() as stack:
        subjects = [
            _Subject(a, stack.enter_context(OrtRuntime(bundle.path / a.file.path)), *_budgets(a.precision, rtol or {}))
            for a in manifest.artifacts
        ]
        if source == "golden":
            inputs, truth = load_golden(bundle.golden)
            held = len(next(iter(inputs.values())))
            batches, omitted = _within(batches, held)
            note = "; ".join(filter(None, (note, omitted)))
            _check_golden(bundle, inputs, held)
            stages = _sweep(subjects, batches, inputs, truth, progress)
        else:
            model = reference_model(manifest, checkpoint)
            names = [i.name for i in manifest.spec.inputs]
            eager = stack.enter_context(EagerRuntime(model, names, manifest.spec.outputs))
            samples = max(chain(batches, (a.batch or 0 for a in manifest.artifacts)))
            inputs = synthetic_inputs(manifest.spec, samples, seed)
            stages = _sweep(subjects, batches, inputs, eager.run(inputs), progress)
            if images is not None:
                pictures = _pictures(manifest, images, limit, max(batches), progress)
                stages += _stream(subjects, eager, pictures)
    return Report(str(bundle.path), manifest.weights.describe(), source, note, tuple(stages))


@dataclass(frozen=True)
class _Subject:
    """An artifact, loaded, with the budgets it is judged by."""

    artifact: Artifact
    runtime: Runtime
    budget: Budget
    overrides: Mapping[str, Budget]

    def judge(self) -> Judge:
        return Judge(self.budget, self.overrides)

    def stage(self, check: str, samples: int, judge: Judge) -> Stage:
        file, precision = self.artifact.file.path, self.artifact.precision
        return Stage(file, precision, self.runtime.name, check, samples, judge.verdict())


def _sweep(
    subjects: Sequence[_Subject], batches: Sequence[int], inputs: Arrays, truth: Arrays, progress: Progress | None
) -> list[Stage]:
    stages = []
    for subject in subjects:
        sizes = sorted(set(batches)) if subject.artifact.batch is None else [subject.artifact.batch]
        held = len(next(iter(inputs.values())))
        if sizes[-1] > held:
            raise UsageError(
                f"{subject.artifact.file.path} has batch {sizes[-1]}, the golden file holds {held} samples",
                hint="--reference eager",
            )
        checks = [(f"batch {size}", np.arange(size)) for size in sizes]
        if sizes[-1] > 1:  # every sample moves to another place
            checks.append((f"batch {sizes[-1]} shuffled", np.roll(np.arange(sizes[-1]), 1)))
        for done, (check, order) in enumerate(checks):
            if progress is not None:
                progress(f"{subject.artifact.file.path}, {check}", done, len(checks))
            judge = subject.judge()
            _judge_batch(subject, judge, _take(inputs, order), _take(truth, order))
            stages.append(subject.stage(check, len(order), judge))
    return stages


def _stream(subjects: Sequence[_Subject], eager: Runtime, pictures: Iterable[Arrays]) -> list[Stage]:
    judges = [subject.judge() for subject in subjects]
    samples = 0
    for inputs in pictures:
        truth = eager.run(inputs)
        count = len(next(iter(inputs.values())))
        samples += count
        for subject, judge in zip(subjects, judges, strict=True):
            size = subject.artifact.batch or count
            for start in range(0, count, size):
                # A fixed batch that is not full is filled with its last sample, whose copies are not judged.
                wanted = np.arange(start, min(start + size, count))
                filled = np.minimum(np.arange(start, start + size), count - 1)
                _judge_batch(subject, judge, _take(inputs, filled), _take(truth, wanted))
    return [subject.stage("images", samples, judge) for subject, judge in zip(subjects, judges, strict=True)]


def _judge_batch(subject: _Subject, judge: Judge, inputs: Arrays, truth: Arrays) -> None:
    """Run one batch; where it is longer than its truth, the outputs of the filling are dropped."""
    try:
        outputs: Arrays = subject.runtime.run(inputs)
    except DeployError as error:
        judge.fail(truth, f"was not computed: {error.found}")
        return
    given, wanted = (len(next(iter(arrays.values()))) for arrays in (inputs, truth))
    if given > wanted:
        outputs = {name: array[:wanted] if array.shape[:1] == (given,) else array for name, array in outputs.items()}
    judge.add(truth, outputs)


def _take(arrays: Arrays, order: npt.NDArray[np.intp]) -> Arrays:
    return {name: array[order] for name, array in arrays.items()}


def _pictures(
    manifest: Manifest, folder: Path, limit: int | None, size: int, progress: Progress | None
) -> Iterable[Arrays]:
    """Yield the pictures of a folder as batches of at most ``size``, prepared as the manifest says."""
    from models.preprocess import image_files, iter_batches

    recipe, inputs = manifest.preprocessing, manifest.spec.inputs
    if recipe is None or len(inputs) != 1:
        raise UsageError(
            f"{manifest.name} does not say how a picture becomes its input", hint="verify without --images"
        )
    files = image_files(folder)[:limit]
    done = 0
    for batch in iter_batches(files, recipe, size):
        if progress is not None:
            progress("images", done, len(files))
        done += len(batch)
        yield {inputs[0].name: batch}


def _budgets(precision: str, rtol: Mapping[str, float]) -> tuple[Budget, dict[str, Budget]]:
    """Return the budget of all outputs, and those of the outputs that have their own."""
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


def _within(batches: Sequence[int], held: int) -> tuple[list[int], str]:
    """Return the batch sizes that ``held`` samples allow, and a note on those that they do not."""
    fitting = [size for size in batches if size <= held]
    omitted = sorted({size for size in batches if size > held})
    if not omitted:
        return fitting, ""
    return fitting or [held], f"golden holds {held} samples: batch {', '.join(map(str, omitted))} left out"


def _check_golden(bundle: Bundle, inputs: Arrays, held: int) -> None:
    """Samples that are alike would let a frozen batch pass."""
    rows = {b"".join(array[i].tobytes() for array in inputs.values()) for i in range(held)}
    if len(rows) != held:
        raise IntegrityError(
            f"{bundle.golden} holds {held} samples, only {len(rows)} of them distinct",
            expected="distinct samples: equal ones cannot prove the batch axis",
            hint="export the model again",
        )


def _check_arguments(manifest: Manifest, batches: Sequence[int], limit: int | None, rtol: Mapping[str, float]) -> None:
    if not batches or min(batches) < 1:
        raise UsageError(
            f"batch sizes {list(batches)}", expected="one or more sizes of 1 or larger", hint="--batches 1,3,8"
        )
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} pictures", expected="1 or more")
    for name, bound in rtol.items():
        if name and name not in manifest.spec.outputs:
            raise UsageError(f"{manifest.name} has no output {name!r}", expected=", ".join(manifest.spec.outputs))
        if not 0 < bound < float("inf"):
            raise UsageError(f"a relative tolerance of {bound}", expected="a positive number, such as 1e-3")
