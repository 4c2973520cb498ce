"""An artifact under verification: run on a batch, and judged by its budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from exporters.compare import BUDGETS, Budget, Judge
from exporters.report import Stage
from models.errors import DeployError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    from exporters.artifact import Artifact
    from exporters.runtimes import Runtime

    Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Subject:
    """An artifact, loaded, with the budgets it is judged by.

    Attributes:
        artifact: what the manifest says of it.
        runtime: what runs it.
        budget: of every output that has none of its own.
        overrides: output name -> its own budget.
    """

    artifact: Artifact
    runtime: Runtime
    budget: Budget
    overrides: Mapping[str, Budget]

    def judge(self) -> Judge:
        """Return a judge that has seen nothing yet."""
        return Judge(self.budget, self.overrides)

    def stage(self, check: str, samples: int, judge: Judge, faults: tuple[str, ...] = ()) -> Stage:
        """Return the verdict on one check."""
        file, precision = self.artifact.file.path, self.artifact.precision
        return Stage(file, precision, self.runtime.name, check, samples, judge.verdict(), faults)

    def run(self, judge: Judge, inputs: Arrays, truth: Arrays) -> Arrays:
        """Run one batch and judge it; where it is longer than its truth, the outputs of the filling are dropped.

        Returns:
            The outputs, name -> [B, ...]; none where the artifact failed.
        """
        try:
            outputs: Arrays = self.runtime.run(inputs)
        except DeployError as error:
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
