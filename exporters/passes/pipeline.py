"""The rewriting pipeline: a list of passes, with a reason beside each."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from onnx_ir.passes import common

from deploycli.exporters.graph.analysis import Analysis, unknowns
from deploycli.exporters.graph.attention import is_read_in_place
from deploycli.exporters.graph.cost import graph_cost
from deploycli.exporters.graph.kernels import predict, run_cost
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
from deploycli.exporters.passes.multiply_from_left import MultiplyFromLeft
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

    from deploycli.exporters.graph.steps import KernelFigures, Remark
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
    ("multiply-from-left", MultiplyFromLeft),  # before movement: its Transposes would be part of regions
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

_HOIST = "hoist-selections"
"""What stands before it makes of any exporter's graph the plain one, that the result is compared with."""

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
    analysis = _rewrite(_Passes.but(without), model, analysis, steps)
    _apply([(name, make) for name, make in _ON_REQUEST if name in also], model, analysis, steps)
    start = time.perf_counter()
    _run(model, _CLEAN)
    return [*steps, _step("clean", model, start, analysis=analysis)]


_Named: TypeAlias = "list[tuple[str, type[GraphPass]]]"


@dataclass(frozen=True)
class _Passes:
    """The passes of a run: those that fold, the choices among them, and the others."""

    fold: _Named
    hoist: _Named
    early: _Named
    late: _Named
    in_place: _Named

    @classmethod
    def but(cls, without: frozenset[str]) -> _Passes:
        """Return all but some."""
        hoist = [name for name, _ in _REWRITE].index(_HOIST)
        parts = _REWRITE[:hoist], _REWRITE[hoist : hoist + 1], _REWRITE[hoist + 1 : _LATE], _REWRITE[_LATE:], _IN_PLACE
        return cls(*([(n, make) for n, make in part if n.removesuffix(_AGAIN) not in without] for part in parts))


@dataclass(frozen=True)
class _Kept:
    """A graph to go back to, and what TensorRT is predicted to make of it.

    Attributes:
        graph: a copy of the graph.
        figures: the kernels that are predicted.
        multiply_adds: of one sample; None where they are not known.
        is_known: whether all shapes are known; a value of unknown shape counts nothing among the bytes.
        steps: how many steps led to it.
    """

    graph: ir.Graph
    figures: KernelFigures
    multiply_adds: int | None
    is_known: bool
    steps: int

    @classmethod
    def of(cls, model: ir.Model, analysis: Analysis, steps: list[Step]) -> _Kept:
        """Keep the graph of a model; its constants are not copied."""
        figures, products = predict(model.graph, analysis).figures, graph_cost(model.graph, analysis).multiply_adds
        outputs = (output for node in model.graph for output in node.outputs if output.name)
        is_known = all(analysis.dims(output) is not None for output in outputs)
        return cls(model.graph.clone(), figures, products, is_known, len(steps))

    def put_back(self, model: ir.Model, steps: list[Step]) -> Analysis:
        """Give the model this graph again, and return what is known of it."""
        model.graph = self.graph.clone()
        del steps[self.steps :]
        return Analysis(model.graph)


def _rewrite(passes: _Passes, model: ir.Model, analysis: Analysis, steps: list[Step]) -> Analysis:
    """Run the passes, but for those that are predicted not to pay.

    Returns:
        What is known of the graph that the model has then.
    """
    _apply(passes.fold, model, analysis, steps)
    plain = _Kept.of(model, analysis, steps)
    analysis = _choose(passes.hoist, plain, model, analysis, steps)
    analysis = _apply_all(passes, model, analysis, steps)
    return _no_worse(passes, plain, model, analysis, steps)


def _apply_all(passes: _Passes, model: ir.Model, analysis: Analysis, steps: list[Step]) -> Analysis:
    """Run what stands behind the selections until it changes nothing any more, and then what may not pay."""
    _apply((*passes.early, *passes.late), model, analysis, steps)
    for _ in range(_MORE_ROUNDS):  # a view or a permutation that is gone may have stood between two projections
        if not _apply((*passes.fold, *passes.early), model, analysis, steps, again=True):
            break
        _apply(passes.late, model, analysis, steps, again=True)
    if not passes.in_place:
        return analysis
    return _choose(passes.in_place, _Kept.of(model, analysis, steps), model, analysis, steps)


def _choose(passes: _Named, kept: _Kept, model: ir.Model, analysis: Analysis, steps: list[Step]) -> Analysis:
    """Run passes that do not always pay, and take them back where TensorRT is predicted to take longer."""
    start = time.perf_counter()
    if not _apply(passes, model, analysis, steps):
        return analysis
    after, products = predict(model.graph, analysis).figures, graph_cost(model.graph, analysis).multiply_adds
    if run_cost(after, products) <= run_cost(kept.figures, kept.multiply_adds):
        return analysis
    analysis = kept.put_back(model, steps)
    names = " and ".join(dict.fromkeys(name for name, _ in passes if not name.endswith(_AGAIN)))
    remark = f"{names} would make more of it than {kept.figures}, as is predicted for TensorRT: {after}"
    steps.append(replace(_step(passes[0][0], model, start, analysis=analysis), remark=remark))
    return analysis


def _no_worse(passes: _Passes, plain: _Kept, model: ir.Model, analysis: Analysis, steps: list[Step]) -> Analysis:
    """Fall back to fewer passes where more kernels or bytes are predicted than of the plain graph.

    First to those without selections, in the end to none. That the one may be worth the other is no excuse
    here: whoever has a graph rewritten expects neither to grow.
    """
    start, prediction = time.perf_counter(), predict(model.graph, analysis)
    figures = refused = prediction.figures
    has_products = any(kernel.kind != "generated" for kernel in prediction.kernels)
    if not has_products or not plain.is_known:
        return analysis
    fewer = [passes, replace(passes, late=[], in_place=[]), replace(passes, early=[], late=[], in_place=[])]
    while figures.launches > plain.figures.launches or figures.moved_bytes > plain.figures.moved_bytes:
        analysis = plain.put_back(model, steps)
        if not fewer:
            break
        analysis = _apply_all(fewer.pop(0), model, analysis, steps)
        figures = predict(model.graph, analysis).figures
    if figures is not refused:
        remark = f"all passes would make more of it than {plain.figures}, as is predicted for TensorRT: {refused}"
        steps.append(replace(_step("fewer", model, start, analysis=analysis), remark=remark))
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
