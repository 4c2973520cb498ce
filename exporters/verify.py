"""Prove a bundle: run every artifact and every engine, and compare each output with the eager model's.

The sweep runs the first b samples as one batch for each size b, and the largest batch once more in another order, which
must only reorder the outputs: a batch axis that was frozen, padded or mixed fails. The reference is computed once, at
the largest size. Pictures and other data are streamed: see `deploycli.exporters.verification.on_samples`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deploycli.exporters.bundle.bundle import Engine, unreleasable
from deploycli.exporters.bundle.golden import judged_samples, load_golden, synthetic_inputs
from deploycli.exporters.bundle.reference import choose_reference, reference_model
from deploycli.exporters.data.samples import open_samples
from deploycli.exporters.imported import imported_runtime
from deploycli.exporters.precision.simulate import open_runtime
from deploycli.exporters.runtime.runtimes import EagerRuntime
from deploycli.exporters.tensorrt.runtime import check_host, open_engine
from deploycli.exporters.verification.on_samples import (
    Findings,
    LoadedFile,
    budgets,
    class_output,
    dense,
    no_class_output,
    take,
    verify_samples,
)
from deploycli.exporters.verification.report import NotJudged, Report
from deploycli.models.errors import EnvironmentUnsuitable, IntegrityError, UsageError
from deploycli.models.sources import IMPORTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploycli.exporters.bundle.bundle import Bundle, ModelFile
    from deploycli.exporters.bundle.manifest import Manifest
    from deploycli.exporters.data.samples import Samples
    from deploycli.exporters.runtime.runtimes import Runtime
    from deploycli.exporters.verification.on_samples import ClassOutput
    from deploycli.exporters.verification.report import Stage

    Arrays = Mapping[str, npt.NDArray[Any]]
    Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class VerifyOptions:
    """What a user asks of a verification.

    Attributes:
        batches: sizes of the batch sweep; an artifact with a fixed batch is swept at that one.
        reference: ``eager``, ``golden``, or ``auto``: eager where PyTorch and the weights are at hand.
        images: data to compare on, besides the synthetic sweep: a folder of pictures, or what else
            `deploycli.exporters.data.samples.open_samples` takes; needs the eager reference.
        labels: the classes of the pictures, see there; with labels, accuracy is counted and judged.
        limit: at most so many samples of that data.
        rtol: output name -> largest relative error, in place of the budget's; the name ``""`` stands for all outputs.
        checkpoint: where the bundle's checkpoint is now, if not where the manifest says.
        trust_factory: run the function that the manifest names, whoever wrote it.
        seed: of the synthetic inputs.
        engines: ``auto`` judges those that this machine can run and reports the others, ``all`` makes that an error,
            ``none`` leaves out all.
        allow_engine_host_code: run version compatible engines, which hold code for the CPU.

    Raises:
        UsageError: what makes no verification of any bundle.
    """

    batches: tuple[int, ...] = (1, 3, 8)
    reference: str = "auto"
    images: str | Path | Iterable[Any] | None = None
    labels: Path | Literal["folders"] | None = None
    limit: int | None = None
    rtol: Mapping[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    trust_factory: bool = False
    seed: int = 0
    engines: Literal["auto", "all", "none"] = "auto"
    allow_engine_host_code: bool = False

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise UsageError(
                f"batch sizes {list(self.batches)}", expected="one or more sizes of 1 or larger", hint="--batches 1,3,8"
            )
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"a limit of {self.limit} pictures", expected="1 or more")
        for bound in self.rtol.values():
            if not 0 < bound < float("inf"):
                raise UsageError(f"a relative tolerance of {bound}", expected="a positive number, such as 1e-3")
        if self.labels is not None and self.images is None:
            raise UsageError("labels were given without pictures", hint="--images DIR")


def verify(bundle: Bundle, options: VerifyOptions | None = None, *, progress: Progress | None = None) -> Report:
    """Compare every model file of a bundle with the eager model.

    Args:
        bundle: an opened bundle; its hashes were checked by `Bundle.open`.
        options: what is compared, and with what.
        progress: called with what is running, how many steps are done, and how many there are.

    Raises:
        UsageError: an option that does not fit the bundle.
        IntegrityError: the checkpoint, the golden file or an engine is not the recorded one, or data changed while it
            was read.
        EnvironmentUnsuitable: ONNX Runtime is missing, or PyTorch where the eager reference is asked for, or an engine
            that was asked for cannot run.
        ExportError: an artifact cannot be loaded.
    """
    options, manifest = options or VerifyOptions(), bundle.manifest
    _check_outputs(manifest, options.rtol)
    source, note = choose_reference(
        manifest, options.reference, options.checkpoint, trust_factory=options.trust_factory
    )
    if options.images is not None and source == "golden":
        raise UsageError(
            f"pictures cannot be compared with the golden file{f' ({note})' if note else ''}",
            expected="the eager model as the reference",
            hint="--reference eager, with --checkpoint where the weights are elsewhere",
        )
    graphs = list(bundle.onnx_files())
    engines = [] if options.engines == "none" else list(bundle.engines())
    if options.engines == "all" and not engines:
        raise UsageError(
            f"{bundle.path} holds no engine", expected="one to verify", hint="deploycli build-trt, or --engines auto"
        )
    batches, found = options.batches, Findings()
    with ExitStack() as stack:
        loaded = [_loaded(file, open_runtime(file.path), options, stack) for file in graphs]
        if source == "golden":
            inputs, truth = load_golden(bundle.golden)
            truth = dense(manifest.spec, truth)
            held = len(next(iter(inputs.values())))
            batches, omitted = _within(batches, held)
            note = "; ".join(filter(None, (note, omitted)))
            _check_golden(bundle, inputs, held)
            running, not_judged = _run_engines(engines, options, held, stack)
            loaded += running
            stages = _sweep(loaded, batches, inputs, truth, progress)
        else:
            eager = stack.enter_context(_reference(bundle, options))
            recorded = load_golden(bundle.golden)[0] if manifest.recorded_inputs else None
            most = None if recorded is None else len(next(iter(recorded.values())))
            running, not_judged = _run_engines(engines, options, most, stack)
            loaded += running
            if recorded is None:
                largest = max((*batches, *(file.sizes(batches)[-1] for file in loaded)))
                inputs = synthetic_inputs(manifest.spec, largest, options.seed)
            else:
                inputs = recorded
                batches, omitted = _within(batches, len(next(iter(recorded.values()))))
                note = "; ".join(filter(None, (note, omitted)))
            truth = dense(manifest.spec, eager.run(inputs))
            logits = class_output(truth)
            # Opened before the sweep, so that what is wrong with the data is said at once.
            samples = None if options.images is None else _open(options.images, manifest, options, logits)
            stages = _sweep(loaded, batches, inputs, truth, progress)
            if samples is not None:
                found = verify_samples(loaded, eager, manifest.spec, samples, logits, max(batches), progress)
    return Report(
        bundle=str(bundle.path),
        weights=manifest.weights.describe(),
        reference=source,
        reference_note=note,
        stages=(*stages, *found.stages),
        evaluations=found.evaluations,
        skipped=found.skipped,
        unreleasable=unreleasable([*graphs, *engines]),
        not_judged=not_judged,
        notes=tuple(note for engine in running for note in _notes(engine, batches)),
    )


def _reference(bundle: Bundle, options: VerifyOptions) -> Runtime:
    """Load what the bundle is compared with: the eager model, or the ONNX file that was imported."""
    manifest = bundle.manifest
    if manifest.spec.family == IMPORTED:
        return imported_runtime(bundle)
    model = reference_model(manifest, options.checkpoint, trust_factory=options.trust_factory)
    return EagerRuntime(model, [i.name for i in manifest.spec.inputs], manifest.spec.outputs)


def _loaded(file: ModelFile, runtime: Runtime, options: VerifyOptions, stack: ExitStack) -> LoadedFile:
    return LoadedFile(file, stack.enter_context(runtime), *budgets(file.precision, options.rtol))


def _run_engines(
    engines: Sequence[Engine], options: VerifyOptions, held: int | None, stack: ExitStack
) -> tuple[list[LoadedFile], tuple[NotJudged, ...]]:
    """Load the engines; every plan is compared with its sidecar, also where it cannot run.

    Args:
        engines: of the bundle.
        options: the user's.
        held: how many samples there are at most, or None for any number.
        stack: holds what is loaded.

    Returns:
        Those that are loaded, and the others.
    """
    running, not_judged = [], []
    for engine in engines:
        try:
            check_host(engine.sidecar, allow_host_code=options.allow_engine_host_code)
            low, _ = engine.sidecar.batches
            if held is not None and low > held:
                raise EnvironmentUnsuitable(
                    f"it takes batches from {low}, and there are {held} samples", hint="--reference eager"
                )
        except EnvironmentUnsuitable as error:
            engine.check()
            if options.engines == "all":
                raise
            not_judged.append(NotJudged(engine, error.found))
            continue
        # This compares the plan with its sidecar, too.
        runtime = open_engine(engine.path.parent, engine.sidecar, allow_host_code=options.allow_engine_host_code)
        running.append(_loaded(engine, runtime, options, stack))
    return running, tuple(not_judged)


def _notes(loaded: LoadedFile, batches: Sequence[int]) -> Iterator[str]:
    """Say what a reader must know of an engine that ran."""
    engine = loaded.file
    assert isinstance(engine, Engine)
    low, high = engine.sidecar.batches
    if omitted := sorted({size for size in batches if not low <= size <= high}):
        yield f"{engine.name} takes batches {low} to {high}: batch {', '.join(map(str, omitted))} left out"
    if engine.stale:
        yield f"{engine.name} {engine.stale}"


def _open(
    images: str | Path | Iterable[Any], manifest: Manifest, options: VerifyOptions, logits: ClassOutput | None
) -> Samples:
    if options.labels is not None and logits is None:
        raise no_class_output()
    classes = None if logits is None else logits.classes
    return open_samples(
        images,
        manifest.spec.inputs,
        manifest.preprocessing,
        limit=options.limit,
        labels=options.labels,
        classes=classes,
    )


def _sweep(
    loaded: Sequence[LoadedFile],
    batches: Sequence[int],
    inputs: Arrays,
    truth: Arrays,
    progress: Progress | None,
) -> list[Stage]:
    stages = []
    for one in loaded:
        sizes = one.sizes(batches)
        held = len(next(iter(inputs.values())))
        if sizes[-1] > held:
            raise UsageError(
                f"{one.file.name} has batch {sizes[-1]}, the golden file holds {held} samples",
                hint="--reference eager",
            )
        specs, precision = one.file.bundle.manifest.spec.inputs, one.file.precision
        orders = {size: judged_samples(specs, precision, size, held) for size in sizes}
        checks = [(f"batch {size}", order) for size, order in orders.items()]
        if sizes[-1] > 1:  # every sample moves to another place
            checks.append((f"batch {sizes[-1]} shuffled", np.roll(orders[sizes[-1]], 1)))
        for done, (check, order) in enumerate(checks):
            if progress is not None:
                progress(f"{one.file.name}, {check}", done, len(checks))
            judge = one.judge()
            one.run(judge, take(inputs, order), take(truth, order))
            stages.append(one.stage(check, len(order), judge))
    return stages


def _within(batches: Sequence[int], held: int) -> tuple[tuple[int, ...], str]:
    """Return the batch sizes that ``held`` samples allow, and a note on those that they do not."""
    fitting = tuple(size for size in batches if size <= held)
    omitted = sorted({size for size in batches if size > held})
    if not omitted:
        return fitting, ""
    return fitting or (held,), f"golden holds {held} samples: batch {', '.join(map(str, omitted))} left out"


def _check_golden(bundle: Bundle, inputs: Arrays, held: int) -> None:
    """Samples that are alike would let a frozen batch pass."""
    rows = {b"".join(array[i].tobytes() for array in inputs.values()) for i in range(held)}
    if len(rows) != held:
        raise IntegrityError(
            f"{bundle.golden} holds {held} samples, only {len(rows)} of them distinct",
            expected="distinct samples: equal ones cannot prove the batch axis",
            hint="export the model again",
        )


def _check_outputs(manifest: Manifest, rtol: Mapping[str, float]) -> None:
    for name in rtol:
        if name and name not in manifest.spec.outputs:
            raise UsageError(f"{manifest.name} has no output {name!r}", expected=", ".join(manifest.spec.outputs))
