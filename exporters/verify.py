"""Prove a bundle: run every artifact and every engine, and compare each output with the eager model's.

The sweep runs the first b samples as one batch for each size b, and the largest batch once more in another order, which
must only reorder the outputs: a batch axis that was frozen, padded or mixed fails. The reference is computed once, at
the largest size. Pictures and other data are streamed: see `deploycli.exporters.verification.on_samples`.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deploycli.exporters.bundle.golden import load_golden, synthetic_inputs
from deploycli.exporters.bundle.reference import choose_reference, reference_model
from deploycli.exporters.data.samples import open_samples
from deploycli.exporters.precision.simulate import open_runtime
from deploycli.exporters.runtime.runtimes import EagerRuntime
from deploycli.exporters.verification.candidate import Subject, budgets, take
from deploycli.exporters.verification.on_samples import Findings, class_output, no_class_output, verify_samples
from deploycli.exporters.verification.report import Report
from deploycli.exporters.verify_engines import Engines, open_engines
from deploycli.models.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.bundle.manifest import Manifest
    from deploycli.exporters.data.samples import Samples
    from deploycli.exporters.runtime.runtimes import Runtime
    from deploycli.exporters.verification.on_samples import ClassOutput
    from deploycli.exporters.verification.report import Stage
    from deploycli.exporters.verify_engines import EngineChoice

    Arrays = Mapping[str, npt.NDArray[Any]]
    Progress = Callable[[str, int, int], None]


def verify(
    bundle: Bundle,
    *,
    batches: Sequence[int] = (1, 3, 8),
    reference: str = "auto",
    images: str | Path | Iterable[Any] | None = None,
    labels: Path | Literal["folders"] | None = None,
    limit: int | None = None,
    rtol: Mapping[str, float] | None = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    engines: EngineChoice = "auto",
    allow_engine_host_code: bool = False,
    trust_factory: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compare every artifact of a bundle, and every engine, with the eager model.

    Args:
        bundle: an opened bundle; its hashes were checked by `Bundle.open`.
        batches: sizes of the batch sweep; an artifact with a fixed batch is swept at that one.
        reference: ``eager``, ``golden``, or ``auto``: eager where PyTorch and the weights are at hand.
        images: data to compare on, besides the synthetic sweep: a folder of pictures, or what else
            `deploycli.exporters.data.samples.open_samples` takes; needs the eager reference.
        labels: the classes of the pictures, see there; with labels, accuracy is counted and judged.
        limit: at most so many samples of that data.
        rtol: output name -> largest relative error, in place of the budget's; the name ``""`` stands for all outputs.
        checkpoint: where the bundle's checkpoint is now, if not where the manifest says.
        seed: seed of the synthetic inputs.
        engines: ``auto`` judges those that this machine can run and reports the others, ``all`` makes that an error,
            ``none`` leaves out all.
        allow_engine_host_code: run version compatible engines, which hold code for the CPU.
        trust_factory: run the function that the manifest names, whoever wrote it.
        progress: called with what is running, how many steps are done, and how many there are.

    Raises:
        UsageError: an argument that does not fit the bundle.
        IntegrityError: the checkpoint, the golden file or an engine is not the recorded one, or data changed while it
            was read.
        EnvironmentUnsuitable: ONNX Runtime is missing, or PyTorch where the eager reference is asked for, or an engine
            that was asked for cannot run.
        ExportError: an artifact cannot be loaded.
    """
    manifest = bundle.manifest
    _check_arguments(manifest, batches, limit, rtol or {})
    if labels is not None and images is None:
        raise UsageError("labels were given without pictures", hint="--images DIR")
    source, note = choose_reference(manifest, reference, checkpoint, trust_factory=trust_factory)
    if images is not None and source != "eager":
        raise UsageError(
            f"pictures cannot be compared with the golden file{f' ({note})' if note else ''}",
            expected="the eager model as the reference",
            hint="--reference eager, with --checkpoint where the weights are elsewhere",
        )
    with ExitStack() as stack:

        def loaded(path: Path) -> Runtime:
            runtime: Runtime = open_runtime(path)
            return stack.enter_context(runtime)

        subjects = [
            Subject(
                a.file.path,
                a.precision,
                None if a.batch is None else (a.batch, a.batch),
                loaded(bundle.path / a.file.path),
                *budgets(a.precision, rtol or {}),
            )
            for a in manifest.artifacts
        ]

        def shipped(held: int | None) -> Engines:
            return open_engines(
                bundle,
                engines,
                batches,
                stack,
                rtol=rtol or {},
                allow_host_code=allow_engine_host_code,
                held=held,
            )

        found = Findings()
        if source == "golden":
            inputs, truth = load_golden(bundle.golden)
            held = len(next(iter(inputs.values())))
            batches, omitted = _within(batches, held)
            note = "; ".join(filter(None, (note, omitted)))
            _check_golden(bundle, inputs, held)
            plans = shipped(held)
            subjects += plans.subjects
            stages = _sweep(subjects, batches, inputs, truth, progress)
        else:
            model = reference_model(manifest, checkpoint, trust_factory=trust_factory)
            names = [i.name for i in manifest.spec.inputs]
            eager = stack.enter_context(EagerRuntime(model, names, manifest.spec.outputs))
            plans = shipped(None)
            subjects += plans.subjects
            largest = max(chain(batches, (subject.sizes(batches)[-1] for subject in subjects)))
            inputs = synthetic_inputs(manifest.spec, largest, seed)
            truth = eager.run(inputs)
            logits = class_output(truth)
            # Opened before the sweep, so that what is wrong with the data is said at once.
            samples = None if images is None else _open(manifest, images, labels, limit, logits)
            stages = _sweep(subjects, batches, inputs, truth, progress)
            if samples is not None:
                found = verify_samples(subjects, eager, samples, logits, max(batches), progress)
    stages += found.stages
    return Report(
        bundle=str(bundle.path),
        weights=manifest.weights.describe(),
        reference=source,
        reference_note=note,
        stages=tuple(stages),
        evaluations=found.evaluations,
        skipped=found.skipped,
        unreleasable=(
            *(f"{a.file.path}: {a.unreleasable}" for a in manifest.artifacts if a.unreleasable),
            *plans.unreleasable,
        ),
        not_judged=plans.not_judged,
        notes=plans.notes,
    )


def _open(
    manifest: Manifest,
    images: str | Path | Iterable[Any],
    labels: Path | Literal["folders"] | None,
    limit: int | None,
    logits: ClassOutput | None,
) -> Samples:
    if labels is not None and logits is None:
        raise no_class_output()
    classes = None if logits is None else logits.classes
    return open_samples(
        images, manifest.spec.inputs, manifest.preprocessing, limit=limit, labels=labels, classes=classes
    )


def _sweep(
    subjects: Sequence[Subject], batches: Sequence[int], inputs: Arrays, truth: Arrays, progress: Progress | None
) -> list[Stage]:
    stages = []
    for subject in subjects:
        sizes = subject.sizes(batches)
        held = len(next(iter(inputs.values())))
        if sizes[-1] > held:
            raise UsageError(
                f"{subject.path} has batch {sizes[-1]}, the golden file holds {held} samples",
                hint="--reference eager",
            )
        checks = [(f"batch {size}", np.arange(size)) for size in sizes]
        if sizes[-1] > 1:  # every sample moves to another place
            checks.append((f"batch {sizes[-1]} shuffled", np.roll(np.arange(sizes[-1]), 1)))
        for done, (check, order) in enumerate(checks):
            if progress is not None:
                progress(f"{subject.path}, {check}", done, len(checks))
            judge = subject.judge()
            subject.run(judge, take(inputs, order), take(truth, order))
            stages.append(subject.stage(check, len(order), judge))
    return stages


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
