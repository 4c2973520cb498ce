"""How fast is a bundle: everything that this host can run, timed in turn, after its outputs were proven right.

Inputs are those of the golden file, repeated to the batch size. A candidate whose outputs for them are outside the
budget of its precision is not timed: a fast wrong engine is not a result. What this host cannot run is reported with
the reason. `deploycli.exporters.bench.candidate` says what a candidate is, `deploycli.exporters.bench.run` how it
is timed.

Several things are timed fairly: warm, in turn, in another order each round. What drifts (clocks, heat, other people's
processes) then hits all alike, and the runs of one round can be compared in pairs. A turn is one untimed run and one
timed run: the untimed one brings back the caches, and outlasts the threads of the candidate before, which spin for a
while when they have nothing to do.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.bench.candidate import BenchOptions
from deploycli.exporters.bench.engines import engine_candidates
from deploycli.exporters.bench.measurement import Absence, Measurement, speedup
from deploycli.exporters.bench.ort import ort_candidates
from deploycli.exporters.bench.pytorch import pytorch_candidates, torch_threads
from deploycli.exporters.bench.report import BenchReport, Row, describe_host
from deploycli.exporters.bench.requirement import judge
from deploycli.exporters.bundle.bundle import unreleasable
from deploycli.exporters.bundle.golden import judged_samples, load_golden
from deploycli.exporters.bundle.reference import choose_reference
from deploycli.exporters.verification.compare import BUDGETS, compare
from deploycli.exporters.verification.on_samples import dense
from deploycli.models.errors import DeployError, IntegrityError, UsageError
from deploycli.models.memory import collector_paused

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import numpy.typing as npt

    from deploycli.exporters.bench.candidate import Arrays, Candidate, FirstLoad, Prepare, Prepared, Provider
    from deploycli.exporters.bench.requirement import Requirement
    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.models.spec import ModelSpec

    Progress = Callable[[str, int, int], None]
    Clock = Callable[[], float]


DEFAULT_BATCHES = (1, 8)

_LEAST_EXACT = "int8"
"""All candidates run on the same samples: those that any precision is judged on."""

PROVIDERS: tuple[Provider, ...] = (pytorch_candidates, ort_candidates, engine_candidates)
"""Where candidates come from, in the order of the table."""


def collect(
    bundle: Bundle,
    options: BenchOptions,
    requirements: Sequence[Requirement] = (),
    providers: Sequence[Provider] | None = None,
) -> list[Candidate]:
    """Return what is to be timed.

    Args:
        bundle: an opened bundle.
        options: what the user asks for.
        requirements: whose baselines must be among the candidates.
        providers: where candidates come from; None means `PROVIDERS`.

    Raises:
        UsageError: a name that no candidate of this bundle has, or a checkpoint that the bundle has no use for.
        EnvironmentUnsuitable: a checkpoint was given, and PyTorch or the file is missing.
    """
    if options.checkpoint is not None:
        choose_reference(bundle.manifest, "eager", options.checkpoint, trust_factory=options.trust_factory)
    found = [candidate for provider in providers or PROVIDERS for candidate in provider(bundle, options)]
    _check_names(bundle, options.only, found, "")
    chosen = [candidate for candidate in found if not options.only or candidate.name in options.only]
    baselines = (options.baseline, *(requirement.baseline for requirement in requirements))
    _check_names(bundle, [name for name in baselines if name], chosen, " to compare with")
    return chosen


def bench(
    bundle: Bundle,
    options: BenchOptions | None = None,
    *,
    requirements: Sequence[Requirement] = (),
    providers: Sequence[Provider] | None = None,
    progress: Progress = lambda _label, _done, _total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> BenchReport:
    """Time every candidate of a bundle.

    Args:
        bundle: an opened bundle; its hashes were checked by `Bundle.open`.
        options: what, how long, with how many threads.
        requirements: promises to judge; `deploycli.exporters.bench.report.failure_of` turns a broken one into an error.
        providers: where candidates come from; None means `PROVIDERS`.
        progress: called with what is running, how many steps are done, and how many there are.
        clock: seconds.

    Raises:
        UsageError: see `collect`; or no candidate takes any of the batch sizes.
        IntegrityError: the golden file, the checkpoint or an engine is not the recorded one.
        DeployError: a candidate that was asked for by name cannot run in any precision; or none at all can.
    """
    options = options or BenchOptions()
    return _bench(bundle, collect(bundle, options, requirements, providers), options, requirements, progress, clock)


def bench_all(
    bundles: Sequence[Bundle],
    options: BenchOptions,
    *,
    requirements: Sequence[Requirement] = (),
    providers: Sequence[Provider] | None = None,
    progress: Progress = lambda _label, _done, _total: None,
) -> list[BenchReport]:
    """Time one bundle after the other, once the names that the user gave are known to fit all of them; see `bench`."""
    collected = [collect(bundle, options, requirements, providers) for bundle in bundles]
    return [
        _bench(bundle, candidates, options, requirements, progress, time.perf_counter)
        for bundle, candidates in zip(bundles, collected, strict=True)
    ]


def _bench(
    bundle: Bundle,
    candidates: Sequence[Candidate],
    options: BenchOptions,
    requirements: Sequence[Requirement],
    progress: Progress,
    clock: Callable[[], float],
) -> BenchReport:
    options = replace(options, batches=options.batches or _default_batches(bundle))
    inputs, truth = load_golden(bundle.golden)
    host = describe_host()
    with torch_threads(options.threads), ExitStack() as stack:
        session = _Session(options, bundle.manifest.spec, inputs, truth, progress, clock)
        session.demand(session.open(candidates, stack))
        measurements = [m for batch in sorted(set(options.batches)) for m in session.measure(batch)]
        session.demand({m.candidate.name for m in measurements})
    return BenchReport(
        bundle=str(bundle.path),
        weights=bundle.manifest.weights.describe(),
        host=host,
        options=options,
        rows=tuple(_rows(measurements, options)),
        absences=tuple(session.absences),
        verdicts=tuple(judge(r, measurements, session.absences, options.seed) for r in requirements),
        unreleasable=unreleasable(bundle.onnx_files()),
    )


@dataclass(frozen=True)
class _Opened:
    candidate: Candidate
    prepare: Prepare
    seconds: float


class _Session:
    """The candidates of one bundle, loaded."""

    def __init__(
        self,
        options: BenchOptions,
        spec: ModelSpec,
        inputs: Arrays,
        truth: Arrays,
        progress: Progress,
        clock: Callable[[], float],
    ) -> None:
        self.absences: list[Absence] = []
        self._errors: list[tuple[DeployError, str]] = []  # and the candidate's name
        self._options = options
        self._spec = spec
        self._inputs = inputs
        self._truth = truth
        self._progress = progress
        self._clock = clock
        self._opened: list[_Opened] = []

    def open(self, candidates: Sequence[Candidate], stack: ExitStack) -> set[str]:
        """Load them for as long as the stack lasts; return the names of those that this host can load."""
        for done, candidate in enumerate(candidates):
            self._progress(f"loading {candidate.label}", done, len(candidates))
            begin = self._clock()
            try:
                prepare = stack.enter_context(candidate.open())
            except DeployError as error:
                self._miss(candidate, error)
            else:
                self._opened.append(_Opened(candidate, prepare, self._clock() - begin))
        return {opened.candidate.name for opened in self._opened}

    def measure(self, batch: int) -> list[Measurement]:
        """Prove the outputs of all that take this batch size, and time them."""
        order = judged_samples(self._spec.inputs, _LEAST_EXACT, batch, len(next(iter(self._inputs.values()))))
        inputs, truth = ({name: a[order] for name, a in arrays.items()} for arrays in (self._inputs, self._truth))
        ready: list[tuple[_Opened, Prepared, float, FirstLoad | None]] = []
        for done, opened in enumerate(self._opened):
            candidate = opened.candidate
            if refusal := candidate.refuses(batch):
                self.absences.append(Absence(candidate, refusal, batch))
                continue
            self._progress(f"preparing {candidate.label} at batch {batch}", done, len(self._opened))
            begin = self._clock()
            try:
                prepared = opened.prepare(inputs)
                prepared.run()
                seconds = self._clock() - begin
                if faults := _faults(candidate, self._spec, truth, prepared.outputs()):
                    self.absences.append(Absence(candidate, faults, batch, wrong=True))
                    continue
                first_load = None if prepared.first_load is None else prepared.first_load()
                warm_up(prepared.run, self._options, self._clock)
            except DeployError as error:
                self._miss(candidate, error, batch)
            else:
                ready.append((opened, prepared, seconds, first_load))
        if not ready:
            return []
        unit = "seconds" if self._options.rounds is None else "rounds"
        times = interleave(
            [prepared.run for _, prepared, *_ in ready],
            self._options,
            clock=self._clock,
            tick=partial(self._progress, f"timing {len(ready)} candidates at batch {batch}, {unit}"),
        )
        return [
            Measurement.of(
                opened.candidate,
                prepared,
                row,
                open_seconds=opened.seconds,
                prepare_seconds=seconds,
                batch=batch,
                first_load=first_load,
            )
            for (opened, prepared, seconds, first_load), row in zip(ready, times, strict=True)
        ]

    def demand(self, found: Collection[str]) -> None:
        """Raise what kept a candidate that was asked for by name out of ``found``; or all, where none was."""
        missing = [name for name in self._options.only if name not in found]
        if not missing and found:
            return
        concerned = [a for a in self.absences if not missing or a.candidate.name in missing]
        if any(absence.wrong for absence in concerned):
            return  # that has an exit code of its own
        for error, name in self._errors:
            if not missing or name in missing:
                raise error
        if concerned:
            sizes = ", ".join(map(str, self._options.batches))
            refusals = ", ".join(dict.fromkeys(f"{a.candidate.label} {a.reason}" for a in concerned))
            raise UsageError(f"batch {sizes} was asked for; {refusals}", hint="another --batches")

    def _miss(self, candidate: Candidate, error: DeployError, batch: int | None = None) -> None:
        """Go on without a candidate, unless a file is not what it was."""
        if isinstance(error, IntegrityError):
            raise error
        self._errors.append((error, candidate.name))
        self.absences.append(Absence(candidate, " ".join(error.found.split()), batch))


def _faults(candidate: Candidate, spec: ModelSpec, truth: Arrays, outputs: Arrays) -> str:
    """Return why outputs are wrong, or an empty string. Top-1 is left to `verify`: a few samples cannot tell."""
    budget = replace(BUDGETS[candidate.precision], min_top1_agreement=0.0)
    failed = [c for c in compare(dense(spec, truth), dense(spec, outputs), budget) if not c.passed]
    return "; ".join(f"output {c.name!r} {', '.join(c.reasons)}" for c in failed)


def _rows(measurements: Sequence[Measurement], options: BenchOptions) -> list[Row]:
    rows = []
    for own in measurements:
        here = [m for m in measurements if m.batch == own.batch and m.candidate.precision == "fp32"]
        names = (options.baseline,) if options.baseline else ("eager", *(m.candidate.name for m in here))
        baseline = next((m for name in names for m in here if m.candidate.name == name), None)
        label = "" if baseline is None else baseline.candidate.label
        rows.append(Row(own, label, None if baseline is None else speedup(own, baseline, options.seed)))
    return rows


def _default_batches(bundle: Bundle) -> tuple[int, ...]:
    sizes = {file.batches for file in bundle.onnx_files()}
    (size,) = sizes if len(sizes) == 1 else (None,)
    return DEFAULT_BATCHES if size is None else size[:1]


def _check_names(bundle: Bundle, names: Sequence[str], candidates: Sequence[Candidate], use: str) -> None:
    known = list(dict.fromkeys(candidate.name for candidate in candidates))
    for name in names:
        if name not in known:
            raise UsageError(f"{bundle.path} has no candidate {name!r}{use}", expected=" or ".join(known))


MIN_ROUNDS = 5
"""Whatever the time: with fewer there is no spread to speak of."""

_TOLD_EVERY = 2.0  # seconds between two signs of life: a log wants few, and Ctrl-C is looked for at each


def warm_up(run: Callable[[], object], options: BenchOptions, clock: Clock = time.perf_counter) -> int:
    """Run untimed, at least once, until the runs or the seconds are used up; return how often it ran."""
    end = clock() + options.warmup_seconds
    for count in range(1, options.warmup_runs + 1):
        run()
        if clock() >= end:
            return count
    return options.warmup_runs


def interleave(
    runs: Sequence[Callable[[], object]],
    options: BenchOptions,
    *,
    clock: Clock = time.perf_counter,
    tick: Callable[[int, int], None] = lambda _done, _total: None,
) -> npt.NDArray[np.float64]:
    """Time everything in turn, round after round.

    Args:
        runs: what to time; each returns when its work is done.
        options: the number of rounds, or the seconds after which no new round begins, and the seed of the order.
        clock: seconds.
        tick: called now and then, between two rounds, with how many rounds (or seconds) are done, of how many.

    Returns:
        Seconds, [runs, rounds].
    """
    rng = np.random.default_rng(options.seed)
    rounds: list[list[float]] = []
    tick(*_progress(0, 0.0, options))
    with collector_paused():
        begin = told = clock()
        while not _enough(len(rounds), clock() - begin, options):
            row = [0.0] * len(runs)
            for i in rng.permutation(len(runs)):
                run = runs[i]
                run()
                start = clock()
                run()
                row[i] = clock() - start
            rounds.append(row)
            if (now := clock()) - told >= _TOLD_EVERY:
                told = now
                tick(*_progress(len(rounds), now - begin, options))
    seconds: npt.NDArray[np.float64] = np.asarray(rounds, np.float64).reshape(len(rounds), len(runs)).T
    return seconds


def _enough(rounds: int, seconds: float, options: BenchOptions) -> bool:
    if options.rounds is not None:
        return rounds >= options.rounds
    return rounds >= MIN_ROUNDS and seconds >= options.seconds


def _progress(rounds: int, seconds: float, options: BenchOptions) -> tuple[int, int]:
    done, total = (seconds, options.seconds) if options.rounds is None else (rounds, options.rounds)
    return min(int(done), math.ceil(total) - 1), math.ceil(total)
