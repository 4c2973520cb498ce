"""``deploycli verify A.onnx --against B.onnx``: one ONNX file beside another, which is right.

Both run on the same inputs; every output is judged by `deploycli.exporters.verification.compare`, within the budget of
the less exact of the two graphs. Values of FP16 and BF16 are rounded as a typed network rounds them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycli.exporters.bundle.golden import synthetic_inputs
from deploycli.exporters.bundle.manifest import PRECISIONS
from deploycli.exporters.graph.onnx_file import load_model
from deploycli.exporters.graph_check import BATCHES, answers_of
from deploycli.exporters.imported import batch_of, spec_of
from deploycli.exporters.precision.simulate import computed_precision, open_runtime
from deploycli.exporters.verification.compare import Judge
from deploycli.exporters.verification.on_samples import budgets
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploycli.exporters.verification.compare import Comparison
    from deploycli.models.spec import TensorSpec

_RUNS = 3
"""Of random inputs: batch 3, 1 and 3 again."""


@dataclass(frozen=True)
class FeedOptions:
    """What two graphs are run on.

    Attributes:
        samples: a ``.npz`` file of arrays by name, or None for random numbers.
        inputs: inputs whose sizes or values the graph does not tell.
        seed: of random numbers.
    """

    samples: Path | None = None
    inputs: tuple[TensorSpec, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class FileComparison:
    """One file beside another.

    Attributes:
        candidate: the file that is judged.
        reference: the file that is right.
        precision: whose budget applies: the less exact of the two.
        runtime: what ran the candidate.
        runs: the shapes of the inputs of each run.
        comparisons: one an output.
    """

    candidate: str
    reference: str
    precision: str
    runtime: str
    runs: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether every output is within its budget."""
        return all(comparison.passed for comparison in self.comparisons)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for every output that is not."""
        return tuple(f"output {c.name!r} {'; '.join(c.reasons)}" for c in self.comparisons if not c.passed)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return asdict(self) | {
            "passed": self.passed,
            "failures": list(self.failures),
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }


def compare_files(
    candidate: Path,
    reference: Path,
    options: FeedOptions | None = None,
    *,
    rtol: Mapping[str, float] | None = None,
    shown: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> FileComparison:
    """Run two ONNX files on the same inputs; one is in memory at a time.

    Args:
        candidate: the file that is judged.
        reference: the file that is right.
        options: what they are run on.
        rtol: output name -> largest relative error in place of the budget's; the name ``""`` stands for all.
        shown: what the candidate is called, where it is not in its place yet.
        progress: is told what runs.

    Raises:
        UsageError: inputs that the reference does not run on, or other inputs or outputs than it has.
        EnvironmentUnsuitable: ONNX Runtime cannot load the reference.
        ExportError: it cannot load or run the candidate.
    """
    options = options or FeedOptions()
    precision = max((computed_precision(load_model(path)) for path in (candidate, reference)), key=PRECISIONS.index)
    progress(f"running {reference.name}")
    feeds, expected = answers_of(reference, _RUNS, {}, options.seed, _given(reference, options))
    if unknown := sorted({name for name in rtol or {} if name} - set(expected[0])):
        raise UsageError(f"{reference} has no output {unknown[0]!r}", expected=", ".join(expected[0]))
    progress(f"running {(shown or candidate).name}")
    judge, runs = Judge(*budgets(precision, rtol or {})), []
    with open_runtime(candidate) as runtime:
        for feed, truth in zip(feeds(), expected, strict=True):
            runs.append(" ".join(f"{name}:{_shape_text(value)}" for name, value in feed.items()))
            judge.add(_arrays(truth), _arrays(runtime.run(feed)))
    name = runtime.name
    return FileComparison(str(shown or candidate), str(reference), precision, name, tuple(runs), judge.verdict())


def _given(reference: Path, options: FeedOptions) -> Sequence[Any] | Path:
    """Return the inputs of each run, or nothing where random numbers of the graph's own shapes do."""
    if options.samples is not None:
        return options.samples
    if not options.inputs:
        return ()
    graph = load_model(reference).graph
    batch, spec = batch_of(graph, str(reference)), spec_of(graph, reference.stem, options.inputs)
    return [synthetic_inputs(spec, size, options.seed + run) for run, size in enumerate((batch,) if batch else BATCHES)]


def _arrays(outputs: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Return what can be compared: a single number as one sample, the tensors of a sequence each by its place."""
    return dict(_flat(outputs))


def _flat(outputs: Mapping[str, Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for name, value in outputs.items():
        if isinstance(value, list):
            yield from _flat({f"{name}.{place}": one for place, one in enumerate(value)})
        elif value is not None:
            yield name, np.atleast_1d(value)


def _shape_text(value: Any) -> str:
    return "x".join(map(str, value.shape)) if hasattr(value, "shape") else f"{len(value)} tensors"
