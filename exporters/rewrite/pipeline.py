"""The rewriting pipeline: a list of passes, with a reason beside each."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.rewrite.additive import SumAdditiveConstants
from exporters.rewrite.constants import FoldConstants
from exporters.rewrite.inference import DropInferenceNoOps
from exporters.rewrite.facts import Facts
from exporters.rewrite.movement import FoldMovement
from exporters.steps import Step

if TYPE_CHECKING:
    from collections.abc import Callable

_GraphPass = type[FoldConstants] | type[FoldMovement] | type[SumAdditiveConstants]

_TIDY: tuple[Callable[[], ir.passes.PassBase], ...] = (
    common.InlinePass,  # functions hide the movement that is in them
    lambda: common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),  # one kind of constant
    DropInferenceNoOps,  # after constants: whether a Dropout trains is an operand
    common.IdentityEliminationPass,  # an Identity with unknown shape is not in any region
)

_REWRITE: tuple[tuple[str, _GraphPass], ...] = (
    ("fold-constants", FoldConstants),  # first: shapes and indices must be known before movement can be read
    ("fold-movement", FoldMovement),  # needs constant operands; brings the additions of a block together
    ("sum-additive-constants", SumAdditiveConstants),  # bias and mask meet across one Reshape
)

_CLEAN: tuple[Callable[[], ir.passes.PassBase], ...] = (
    common.RemoveUnusedNodesPass,  # and the initializers that only they read
    common.DeduplicateInitializersPass,  # equal biases of equal windows are stored once
    common.RemoveUnusedOpsetsPass,
    common.TopologicalSortPass,
)


def rewrite(model: ir.Model) -> list[Step]:
    """Rewrite a model in place.

    Returns:
        One step a pass, with what it refused.
    """
    steps = [_timed("tidy", model, lambda: _run(model, _TIDY))]
    start = time.perf_counter()
    facts = Facts(model.graph)
    steps.append(Step("infer", model.graph.num_nodes(), time.perf_counter() - start))
    for name, make in _REWRITE:
        graph_pass = make(facts)
        step = _timed(name, model, lambda graph_pass=graph_pass: graph_pass(model))  # type: ignore[misc]  # a loop variable is bound by default
        steps.append(Step(name, step.nodes, step.seconds, tuple(graph_pass.refusals)))
    steps.append(_timed("clean", model, lambda: _run(model, _CLEAN)))
    return steps


def tidy(model: ir.Model) -> None:
    """Only what every graph needs: constants as initializers, nothing unused, sorted."""
    _run(model, (*_TIDY, *_CLEAN))


def _run(model: ir.Model, passes: tuple[Callable[[], ir.passes.PassBase], ...]) -> None:
    for make in passes:
        make()(model)


def _timed(name: str, model: ir.Model, action: Callable[[], object]) -> Step:
    start = time.perf_counter()
    action()
    return Step(name, model.graph.num_nodes(), time.perf_counter() - start)
