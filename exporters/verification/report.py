"""What a verification found: one stage for each thing that was checked, and the verdict over all of them."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.bundle.manifest import version_of
from deploycli.exporters.bundle.verification import SCHEMA_VERSION, Judged, report_path
from deploycli.exporters.verification.compare import BUDGETS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deploycli.exporters.bundle.bundle import Bundle, Engine, ModelFile
    from deploycli.exporters.verification.accuracy import Evaluation
    from deploycli.exporters.verification.compare import Comparison

_PACKAGES = ("numpy", "onnxruntime", "tensorrt", "torch")


@dataclass(frozen=True)
class Stage:
    """One model file, run in one way and compared with the reference.

    Attributes:
        file: the very file that ran.
        runtime: what ran it.
        check: what was tried: ``batch 3``, ``batch 8 shuffled``, ``images``.
        samples: how many inputs it saw.
        comparisons: one an output.
        faults: why the stage fails whatever its comparisons are.
    """

    file: ModelFile
    runtime: str
    check: str
    samples: int
    comparisons: tuple[Comparison, ...]
    faults: tuple[str, ...] = ()

    @property
    def artifact(self) -> str:
        """The file's path inside the bundle."""
        return self.file.name

    @property
    def precision(self) -> str:
        """Whose budget applied."""
        return self.file.precision

    @property
    def passed(self) -> bool:
        """Whether there was something to compare, all of it is within budget, and there is no fault."""
        return bool(self.comparisons) and all(c.passed for c in self.comparisons) and not self.faults

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for every output that failed, the stage, the output, the reasons; and one for every fault."""
        where = f"{self.artifact} in {self.runtime}, {self.check}"
        outputs = (f"{where}: output {c.name!r} {'; '.join(c.reasons)}" for c in self.comparisons if not c.passed)
        return (*outputs, *(f"{where}: {fault}" for fault in self.faults))

    def to_json(self) -> dict[str, Any]:
        """Return the stage as JSON values."""
        return {
            "artifact": self.artifact,
            "precision": self.precision,
            "runtime": self.runtime,
            "check": self.check,
            "samples": self.samples,
            "passed": self.passed,
            "comparisons": [c.to_json() for c in self.comparisons],
            "faults": list(self.faults),
        }


@dataclass(frozen=True)
class NotJudged:
    """An engine that this machine could not run: nothing is known of what it computes.

    Attributes:
        engine: which.
        reason: why.
    """

    engine: Engine
    reason: str

    @property
    def artifact(self) -> str:
        """The plan's path inside the bundle."""
        return self.engine.name

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, with the ONNX file that it was compiled from, and whether the bundle holds it."""
        made_from = self.engine.sidecar
        return {
            "artifact": self.artifact,
            "reason": self.reason,
            "onnx": made_from.onnx,
            "onnx_sha256": made_from.onnx_sha256,
            "same": not self.engine.stale,
        }


@dataclass(frozen=True)
class Report:
    """The verdict on a bundle.

    Attributes:
        bundle: the folder.
        weights: where the weights came from, in words.
        reference: ``eager`` or ``golden``.
        reference_note: why that reference, and what it left out; empty where there is nothing to say.
        stages: in the order of the chain, so the first that failed is where the fault is.
        evaluations: accuracies on labelled data, the eager model's first; empty without labels.
        skipped: names of the samples of the data that could not be read.
        unreleasable: artifacts that must not be shipped whatever their numbers are, and why.
        not_judged: engines that were left out, and why.
        notes: what else a reader must know, such as batches that an engine does not take.
    """

    bundle: str
    weights: str
    reference: str
    reference_note: str
    stages: tuple[Stage, ...]
    evaluations: tuple[Evaluation, ...] = ()
    skipped: tuple[str, ...] = ()
    unreleasable: tuple[str, ...] = ()
    not_judged: tuple[NotJudged, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there were stages, and all of them passed; an engine that was not judged is for `not_judged`."""
        return bool(self.stages) and all(stage.passed for stage in self.stages)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for every output that failed in any stage."""
        return tuple(line for stage in self.stages for line in stage.failures)

    def origin(self, engine: Engine) -> str:
        """Say of an engine that was not run what is known of the graph that it was compiled from."""
        onnx, sha256 = engine.sidecar.onnx, engine.sidecar.onnx_sha256
        stages = [stage for stage in self.stages if stage.artifact == onnx]
        if engine.stale:
            known = "which is not the file that the bundle holds now"
        elif not stages:
            known = "which was not judged either"
        elif all(stage.passed for stage in stages):
            known = f"which passed {len(stages)} check{'s' * (len(stages) > 1)}"
        else:
            known = "which FAILED"
        return f"compiled from {onnx} (sha256 {sha256[:12]}), {known}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "bundle": self.bundle,
            "weights": self.weights,
            "reference": self.reference,
            "reference_note": self.reference_note,
            "passed": self.passed,
            "failures": list(self.failures),
            "stages": [stage.to_json() for stage in self.stages],
            "evaluations": [evaluation.to_json() for evaluation in self.evaluations],
            "skipped": list(self.skipped),
            "unreleasable": list(self.unreleasable),
            "not_judged": [{**left.to_json(), "origin": self.origin(left.engine)} for left in self.not_judged],
            "notes": list(self.notes),
        }


def keep(bundle: Bundle, report: Report) -> Path:
    """Write a report into the bundle it judges, whole or not at all; an earlier one is replaced.

    Args:
        bundle: as it was verified.
        report: what `deploycli.exporters.verify.verify` returned for it.

    Returns:
        The file.

    Raises:
        EnvironmentUnsuitable: the bundle cannot be written.
    """
    stages: dict[str, list[Stage]] = {}
    for stage in report.stages:
        stages.setdefault(stage.artifact, []).append(stage)
    data = report.to_json() | {
        "schema_version": SCHEMA_VERSION,
        "tool_version": version_of("deploycli", ""),
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "host": {"name": platform.node(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {name: found for name in _PACKAGES if (found := version_of(name, ""))},
        "judged": [asdict(_judged(found)) for found in stages.values()],
    }
    path = report_path(bundle.path)
    with bundle.held():
        write_whole(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())
    return path


def _judged(stages: Sequence[Stage]) -> Judged:
    """Put together what was found of one file, which was run as it is recorded: nothing is hashed again."""
    file = stages[0].file
    tolerances = {
        c.name: c.budget.max_rel_error
        for stage in stages
        for c in stage.comparisons
        if c.budget.max_rel_error > BUDGETS[stage.precision].max_rel_error
    }
    return Judged(
        (file.record, *file.external),
        all(stage.passed for stage in stages),
        tuple(line for stage in stages for line in stage.failures),
        tuple(stage.check for stage in stages),
        tuple(dict.fromkeys(stage.runtime for stage in stages)),
        tolerances,
    )
