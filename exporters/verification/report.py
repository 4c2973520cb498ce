"""What a verification found: one stage for each thing that was checked, and the verdict over all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploycli.exporters.verification.compare import Comparison
    from deploycli.exporters.verification.evaluate import Evaluation


@dataclass(frozen=True)
class Stage:
    """One artifact, run in one way and compared with the reference.

    Attributes:
        artifact: the file's path inside the bundle.
        precision: whose budget applied.
        runtime: what ran it.
        check: what was tried: ``batch 3``, ``batch 8 shuffled``, ``images``.
        samples: how many inputs it saw.
        comparisons: one an output.
        faults: why the stage fails whatever its comparisons are.
    """

    artifact: str
    precision: str
    runtime: str
    check: str
    samples: int
    comparisons: tuple[Comparison, ...]
    faults: tuple[str, ...] = ()

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
        artifact: the plan's path inside the bundle.
        reason: why.
        onnx: the ONNX file of the bundle that it was compiled from.
        onnx_sha256: that file's hash, as it was then.
        same: whether the bundle still holds that very file.
    """

    artifact: str
    reason: str
    onnx: str = ""
    onnx_sha256: str = ""
    same: bool = False


@dataclass(frozen=True)
class Report:
    """The verdict on a bundle.

    Attributes:
        bundle: the folder.
        weights: where the weights came from, in words.
        reference: ``eager`` or ``golden``.
        reference_note: why that reference, and what it left out; empty where there is nothing to say.
        stages: in the order of the chain, so the first that failed is the guilty one.
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
    def guilty(self) -> Stage | None:
        """The first stage that failed."""
        return next((stage for stage in self.stages if not stage.passed), None)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for every output that failed in any stage."""
        return tuple(line for stage in self.stages for line in stage.failures)

    def origin(self, engine: NotJudged) -> str:
        """Say of an engine that was not run what is known of the graph that it was compiled from."""
        stages = [stage for stage in self.stages if stage.artifact == engine.onnx]
        if not engine.same:
            known = "which is not the file that the bundle holds now"
        elif not stages:
            known = "which was not judged either"
        elif all(stage.passed for stage in stages):
            known = f"which passed {len(stages)} check{'s' * (len(stages) > 1)}"
        else:
            known = "which FAILED"
        return f"compiled from {engine.onnx} (sha256 {engine.onnx_sha256[:12]}), {known}"

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
            "not_judged": [{**asdict(engine), "origin": self.origin(engine)} for engine in self.not_judged],
            "notes": list(self.notes),
        }
