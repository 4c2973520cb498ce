"""The rewriting pipeline: a list of passes, with a reason beside each."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from onnx_ir.passes import common

from exporters.rewrite.additive import SumAdditiveConstants
from exporters.rewrite.broadcast import DropExpand
from exporters.rewrite.constants import FoldConstants
from exporters.rewrite.facts import Facts
from exporters.rewrite.inference import DropInferenceNoOps
from exporters.rewrite.movement import FoldMovement
from exporters.rewrite.projections import MergeProjections
from exporters.rewrite.windows import WindowsIntoHeads
from exporters.steps import Refusal, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import onnx_ir as ir

    from exporters.rewrite.graph_pass import GraphPass

# It warns of every initializer that is a graph output, which is legal and no business of the user.
logging.getLogger(common.initializer_deduplication.__name__).setLevel(logging.ERROR)

OLDEST_OPSET = 13
"""From here on Split, Squeeze and Unsqueeze take operands, as the passes write them."""

_TIDY: tuple[Callable[[], ir.passes.PassBase], ...] = (
    common.InlinePass,  # functions hide the movement that is in them
    common.TopologicalSortPass,  # runtimes take files that are not sorted; every pass below reads in order
    lambda: common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),  # one kind of constant
    common.RemoveUnusedNodesPass,  # what nothing reads looks shared
)

_REWRITE: tuple[tuple[str, type[GraphPass]], ...] = (
    ("drop-no-ops", DropInferenceNoOps),  # a Dropout or a Cast would end a region of movement
    ("fold-constants", FoldConstants),  # first: shapes and indices must be known before movement can be read
    ("drop-expand", DropExpand),  # before additive constants: a mask that is spelled out for a batch is no constant
    ("merge-projections", MergeProjections),  # before movement: query, key and value are then one region
    ("fold-movement", FoldMovement),  # needs constant operands; brings the additions of a block together
    ("sum-additive-constants", SumAdditiveConstants),  # bias and mask meet across one Reshape
    ("windows-into-heads", WindowsIntoHeads),  # after the sum: the one constant that is left moves to four dimensions
)

_CLEAN: tuple[Callable[[], ir.passes.PassBase], ...] = (
    common.RemoveUnusedNodesPass,  # and the initializers that only they read
    common.DeduplicateInitializersPass,  # equal shapes and masks are stored once
    common.RemoveUnusedOpsetsPass,
)


def rewrite(model: ir.Model, *, without: frozenset[str] = frozenset()) -> list[Step]:
    """Rewrite a model in place.

    Args:
        model: the model.
        without: names of passes to leave out.

    Returns:
        One step a pass, with what it refused.
    """
    start = time.perf_counter()
    _run(model, _TIDY)
    steps = [_step("tidy", model, start)]
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        reason = f"the graph is of opset {opset}, the passes write {OLDEST_OPSET} and above"
        return [*steps, _step("rewrite", model, time.perf_counter(), [Refusal(model.graph.name or "", reason)])]
    start = time.perf_counter()
    facts = Facts(model.graph)
    steps.append(_step("infer", model, start))
    for name, make in _REWRITE:
        if name in without:
            continue
        start = time.perf_counter()
        graph_pass = make(facts)
        graph_pass(model)
        common.RemoveUnusedNodesPass()(model)  # what nothing reads any more would look shared to the next pass
        steps.append(_step(name, model, start, graph_pass.refusals))
    start = time.perf_counter()
    _run(model, _CLEAN)
    return [*steps, _step("clean", model, start)]


def tidy(model: ir.Model) -> None:
    """Only what every graph needs: constants as initializers, nothing of training, nothing unused, sorted."""
    _run(model, (*_TIDY, DropInferenceNoOps, *_CLEAN))


def _run(model: ir.Model, passes: tuple[Callable[[], ir.passes.PassBase], ...]) -> None:
    for make in passes:
        make()(model)


def _step(name: str, model: ir.Model, start: float, refusals: Iterable[Refusal] = ()) -> Step:
    return Step(name, model.graph.num_nodes(), time.perf_counter() - start, tuple(refusals))
