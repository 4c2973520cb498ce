"""The engines of a bundle under verification: the very plans that ship."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deploycli.exporters.bundle.engine import sidecars
from deploycli.exporters.tensorrt.runtime import check_host, open_engine
from deploycli.exporters.verification.candidate import Subject, budgets
from deploycli.exporters.verification.report import NotJudged
from deploycli.models.errors import EnvironmentUnsuitable, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import ExitStack

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.bundle.engine import Sidecar

EngineChoice = Literal["auto", "all", "none"]

ENGINES = "engines"


@dataclass(frozen=True)
class Engines:
    """The engines of a bundle, as far as this machine can run them.

    Attributes:
        subjects: loaded.
        not_judged: the others, and why.
        notes: what a reader must know of those that are loaded.
        unreleasable: those that must not be shipped, and why.
    """

    subjects: tuple[Subject, ...] = ()
    not_judged: tuple[NotJudged, ...] = ()
    notes: tuple[str, ...] = ()
    unreleasable: tuple[str, ...] = ()


def open_engines(
    bundle: Bundle,
    choice: EngineChoice,
    batches: Sequence[int],
    stack: ExitStack,
    *,
    rtol: Mapping[str, float],
    allow_host_code: bool = False,
    held: int | None = None,
) -> Engines:
    """Load the engines of a bundle; every plan is compared with its sidecar, also where it cannot run.

    Args:
        bundle: an opened bundle.
        choice: ``auto`` leaves out what this machine cannot run, ``all`` makes that an error, ``none`` leaves out all.
        batches: sizes of the sweep.
        stack: holds what is loaded.
        rtol: see `deploycli.exporters.verify.verify`.
        allow_host_code: run plans that hold code for the CPU, too.
        held: how many samples there are at most, or None for any number.

    Raises:
        IntegrityError: a plan is not what its sidecar records, or one of the two is missing.
        UsageError: ``all``, and there is no engine.
        EnvironmentUnsuitable: ``all``, and one cannot run; or TensorRT refuses one that should run here.
    """
    if choice == "none":
        return Engines()
    folder = bundle.path / ENGINES
    found = list(sidecars(folder))
    if choice == "all" and not found:
        raise UsageError(
            f"{bundle.path} holds no engine", expected="one to verify", hint="deploycli build-trt, or --engines auto"
        )
    subjects: list[Subject] = []
    not_judged: list[NotJudged] = []
    notes: list[str] = []
    for sidecar in found:
        path = f"{ENGINES}/{sidecar.plan}"
        sidecar.check_file(folder)
        low, high = sidecar.batches
        try:
            check_host(sidecar, allow_host_code=allow_host_code)
            if held is not None and low > held:
                raise EnvironmentUnsuitable(
                    f"it takes batches from {low}, and there are {held} samples", hint="--reference eager"
                )
        except EnvironmentUnsuitable as error:
            if choice == "all":
                raise
            same = _stale(bundle, sidecar) is None
            not_judged.append(NotJudged(path, error.found, sidecar.onnx, sidecar.onnx_sha256, same))
            continue
        runtime = stack.enter_context(open_engine(folder, sidecar, allow_host_code=allow_host_code))
        subjects.append(Subject(path, sidecar.precision, (low, high), runtime, *budgets(sidecar.precision, rtol)))
        if omitted := sorted({size for size in batches if not low <= size <= high}):
            notes.append(f"{path} takes batches {low} to {high}: batch {', '.join(map(str, omitted))} left out")
        if (stale := _stale(bundle, sidecar)) is not None:
            notes.append(f"{path} {stale}")
    unreleasable = (f"{ENGINES}/{s.plan}: {s.unreleasable}" for s in found if s.unreleasable)
    return Engines(tuple(subjects), tuple(not_judged), tuple(notes), tuple(unreleasable))


def _stale(bundle: Bundle, sidecar: Sidecar) -> str | None:
    """Say where an engine was built from another graph than the bundle holds now."""
    artifact = bundle.manifest.artifact(sidecar.onnx)
    if artifact is None:
        return f"was built from {sidecar.onnx}, which the bundle does not hold"
    if artifact.sha256 == sidecar.onnx_sha256:
        return None
    return f"was built from another {sidecar.onnx} than the bundle holds now"
