"""A model file under verification, an artifact or an engine: run on a batch, and judged by its budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycli.exporters.verification.compare import BUDGETS, Budget, Judge
from deploycli.exporters.verification.report import Stage
from deploycli.models.errors import DeployError, UsageError
from deploycli.models.memory import shortage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from deploycli.exporters.bundle.bundle import ModelFile
    from deploycli.exporters.runtime.runtimes import Runtime

    Arrays = Mapping[str, npt.NDArray[Any]]


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
