"""The rewriting pipeline: a list of passes, with a reason beside each."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from onnx_ir.passes import common

from deploycli.exporters.graph.analysis import Analysis, unknowns
from deploycli.exporters.graph.attention import is_read_in_place
from deploycli.exporters.graph.cost import graph_cost
from deploycli.exporters.graph.kernels import predict
from deploycli.exporters.graph.steps import Step
from deploycli.exporters.passes.add_class_token import AddClassToken
from deploycli.exporters.passes.common.tidy import LiftConstants, Sort, Sweep, sweep
from deploycli.exporters.passes.commute_permutations import CommutePermutations
from deploycli.exporters.passes.drop_expand import DropExpand
from deploycli.exporters.passes.drop_no_ops import DropNoOps
from deploycli.exporters.passes.drop_softmax_guards import DropSoftmaxGuards
from deploycli.exporters.passes.emit_attention import EmitAttention
from deploycli.exporters.passes.fold_bias import FoldBias
from deploycli.exporters.passes.fold_constants import FoldConstants
from deploycli.exporters.passes.fold_movement import FoldMovement
from deploycli.exporters.passes.fold_scale import FoldScale
from deploycli.exporters.passes.fuse_gelu import FuseGelu
from deploycli.exporters.passes.fuse_normalization import FuseNormalization
from deploycli.exporters.passes.hoist_selections import HoistSelections
from deploycli.exporters.passes.merge_projections import MergeProjections
from deploycli.exporters.passes.norms_into_scores import NormsIntoScores
from deploycli.exporters.passes.shape_rows import ShapeRows
from deploycli.exporters.passes.sum_additive_constants import SumAdditiveConstants
from deploycli.exporters.passes.tokens_first import TokensFirst
from deploycli.exporters.passes.unrepeat_constants import UnrepeatConstants
from deploycli.exporters.passes.windows_into_heads import WindowsIntoHeads
from deploycli.models.memory import collector_paused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import onnx_ir as ir

    from deploycli.exporters.graph.steps import Remark
    from deploycli.exporters.passes.graph_pass import GraphPass

# It warns of every initializer that is a graph output, which is legal and no business of the user.
logging.getLogger(common.initializer_deduplication.__name__).setLevel(logging.ERROR)

OLDEST_OPSET = 13
"""From here on Split, Squeeze and Unsqueeze take operands, as the passes write them."""

_TIDY: tuple[Callable[[], ir.passes.PassBase], ...] = (
    common.InlinePass,  # functions hide the movement that is in them
    Sort,  # runtimes take files that are not sorted; every pass below reads in order
    LiftConstants,  # one kind of constant
    Sweep,  # what nothing reads looks shared
    common.RemoveUnusedNodesPass,  # optional outputs that nothing reads
)

_REWRITE: tuple[tuple[str, type[GraphPass]], ...] = (
    ("drop-no-ops", DropNoOps),  # a Dropout or a Cast would end a region of movement
    ("fold-constants", FoldConstants),  # first: shapes and indices must be known before movement can be read
    ("fuse-normalization", FuseNormalization),  # before scales, which would go into half of an operator
    ("fuse-gelu", FuseGelu),
    ("drop-expand", DropExpand),  # before additive constants: a mask that is spelled out for a batch is no constant
    ("unrepeat-constants", UnrepeatConstants),  # the same for masks that were spelled out and then computed with
    ("drop-softmax-guards", DropSoftmaxGuards),  # after masks are constants: it asks whether they are finite
    ("hoist-selections", HoistSelections),  # before projections are merged: the query of a few rows is one for itself
    ("merge-projections", MergeProjections),  # before movement: query, key and value are then one region
    ("norms-into-scores", NormsIntoScores),  # after scales of older exporters are read as what they are
    ("fold-scale", FoldScale),  # after merged projections, whose columns it scales; a scale would end a region
    ("fold-movement", FoldMovement),  # needs constant operands; brings the additions of a block together
    ("add-class-token", AddClassToken),  # before the sum, which gives it the position embedding
    ("sum-additive-constants", SumAdditiveConstants),  # bias and mask meet across one Reshape
    ("windows-into-heads", WindowsIntoHeads),  # after the sum: the one constant that is left moves to four dimensions
    ("commute-permutations", CommutePermutations),  # after movement is folded: each permutation is one by then
    ("shape-rows", ShapeRows),  # after permutations: what is left between operators on rows are views
    ("fold-movement-again", FoldMovement),  # the views of windows-into-heads meet the splitting of query, key and value
)

_IN_PLACE: tuple[tuple[str, type[GraphPass]], ...] = (
    ("fold-bias", FoldBias),  # a projection with a bias is copied
    ("tokens-first", TokensFirst),  # last of the layouts: what stands tokens first is no row of a sample any more
    ("fold-movement-again", FoldMovement),  # into the layout and out of it, with what moves there anyway
)

_OF_ROWS = frozenset({"commute-permutations", "shape-rows"})
"""They take what stands tokens first for rows of one sample, if the batch is static: it keeps its layout."""

_ON_REQUEST: tuple[tuple[str, type[GraphPass]], ...] = (
    ("emit-attention", EmitAttention),  # last: it takes what the others made canonical
)

Attention = Literal["4d", "5d", "onnx"]
"""Of how many dimensions the scores are; or the operator."""

_LATE = 1 + [name for name, _ in _REWRITE].index("fold-scale")
"""From here on passes move data; where what stands before them finds work once more, they run once more."""

_MORE_ROUNDS = 3

_AGAIN = "-again"

PASSES = tuple(dict.fromkeys(name.removesuffix(_AGAIN) for name, _ in (*_REWRITE, *_IN_PLACE)))
"""Names of the passes that may be left out."""

_CLEAN: tuple[Callable[[], ir.passes.PassBase], ...] = (
    Sweep,
    common.RemoveUnusedNodesPass,  # optional outputs that nothing reads
    common.DeduplicateInitializersPass,  # equal shapes and masks are stored once
    common.RemoveUnusedOpsetsPass,
)


def for_attention(form: Attention) -> tuple[frozenset[str], frozenset[str]]:
    """Return the passes to leave out, and those to run that are off by default, for a form of attention."""
    # What the operator reads is copied, if the batch is dynamic, wherever its tokens stand.
    without = {"5d": {"windows-into-heads"}, "onnx": {"tokens-first"}}.get(form, set[str]())
    also = {"emit-attention"} if form == "onnx" else set[str]()
    return frozenset(without), frozenset(also)


@collector_paused()
def rewrite(
    model: ir.Model, *, without: frozenset[str] = frozenset(), also: frozenset[str] = frozenset()
) -> list[Step]:
    """Rewrite a model in place.

    Args:
        model: the model.
        without: names of passes to leave out.
        also: names of passes to run that are off by default: ``emit-attention``.

    Returns:
        One step a pass, with what it refused.
    """
    start = time.perf_counter()
    _run(model, _TIDY)
    steps = [_step("tidy", model, start)]
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        reason = f"the graph is of opset {opset}, the passes write {OLDEST_OPSET} and above: it is only tidied"
        return [*steps, replace(_step("rewrite", model, time.perf_counter()), remark=reason)]
    start = time.perf_counter()
    analysis = Analysis(model.graph)
    steps.append(replace(_step("infer", model, start, analysis=analysis), remark=unknowns(model.graph, analysis)))
    if any(is_read_in_place(node, analysis) for node in model.graph):
        without |= _OF_ROWS
    early, late = (
        [(name, make) for name, make in part if name.removesuffix(_AGAIN) not in without]
        for part in (_REWRITE[:_LATE], _REWRITE[_LATE:])
    )
    _apply((*early, *late), model, analysis, steps)
    for _ in range(_MORE_ROUNDS):  # a view or a permutation that is gone may have stood between two projections
        if not _apply(early, model, analysis, steps, again=True):
            break
        _apply(late, model, analysis, steps, again=True)
    analysis = _read_in_place(model, analysis, steps, without)
    _apply([(name, make) for name, make in _ON_REQUEST if name in also], model, analysis, steps)
    start = time.perf_counter()
    _run(model, _CLEAN)
    return [*steps, _step("clean", model, start, analysis=analysis)]


def _read_in_place(model: ir.Model, analysis: Analysis, steps: list[Step], without: frozenset[str]) -> Analysis:
    """Run the passes that let attentions read in place, and take them back where more kernels or bytes are predicted.

    Returns:
        What is known of the graph that the model has now.
    """
    passes = [(name, make) for name, make in _IN_PLACE if name.removesuffix(_AGAIN) not in without]
    start = time.perf_counter()
    before, kept, count = predict(model.graph, analysis).figures, model.clone(), len(steps)
    if not _apply(passes, model, analysis, steps):
        return analysis
    after = predict(model.graph, analysis).figures
    if (after.launches, after.moved_bytes) <= (before.launches, before.moved_bytes):
        return analysis
    model.graph = kept.graph
    del steps[count:]
    analysis = Analysis(model.graph)
    names = " and ".join(dict.fromkeys(name for name, _ in passes if not name.endswith(_AGAIN)))
    remark = f"{names} would make more of it than {before}, as is predicted for TensorRT: {after}"
    steps.append(replace(_step("in-place", model, start, analysis=analysis), remark=remark))
    return analysis


def _apply(
    passes: Iterable[tuple[str, type[GraphPass]]],
    model: ir.Model,
    analysis: Analysis,
    steps: list[Step],
    *,
    again: bool = False,
) -> bool:
    """Run passes and note a step for each; a pass that runs again is noted where it changes something."""
    any_modified = False
    for name, make in passes:
        start = time.perf_counter()
        graph_pass = make(analysis)
        modified = graph_pass(model).modified
        any_modified |= modified
        modified |= sweep(model.graph)  # what nothing reads any more would look shared to the next pass
        step = _step(name, model, start, graph_pass.remarks, analysis if modified else None)
        if modified or not again:  # counting takes longer than most passes
            steps.append(step if modified else replace(step, cost=steps[-1].cost))
    return any_modified


def tidy(model: ir.Model) -> None:
    """Only what every graph needs: constants as initializers, nothing of training, nothing unused, sorted."""
    _run(model, (*_TIDY, DropNoOps, *_CLEAN))


def _run(model: ir.Model, passes: tuple[Callable[[], ir.passes.PassBase], ...]) -> None:
    for make in passes:
        make()(model)


def _step(
    name: str, model: ir.Model, start: float, remarks: Iterable[Remark] = (), analysis: Analysis | None = None
) -> Step:
    seconds = time.perf_counter() - start
    cost = None if analysis is None else graph_cost(model.graph, analysis)
    return Step(name, model.graph.num_nodes(), seconds, tuple(remarks), cost)
