"""``deploycli optimize``: the rewriting passes on any ONNX file.

The file is read, rewritten, written under another name, and run beside the original; only then does it take its place.
The same graph always gives the same bytes, however its nodes were sorted, and a second run changes nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from deploycli.exporters.bundle.files import place
from deploycli.exporters.file_target import folder_beside, real_target, write_beside
from deploycli.exporters.gate import require_readable
from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.cost import address_space, constant_bytes, graph_cost, refuse_what_is_too_large
from deploycli.exporters.graph.kernels import predict
from deploycli.exporters.graph.onnx_file import external_files, load_model, map_external
from deploycli.exporters.graph.operators import ATTENTION_OPSET, DRAWN, QDQ
from deploycli.exporters.graph.steps import GraphCost, KernelFigures, Step
from deploycli.exporters.graph_check import BATCHES, RUNNING_CANDIDATE, UNCHECKED, Check, check_graphs
from deploycli.exporters.passes.any_model import optimized
from deploycli.exporters.passes.pipeline import PASSES, Attention, for_attention
from deploycli.exporters.runtime.isolated import Died, isolated
from deploycli.exporters.tune import Form, TuneOptions, Tuning, refuse_other_forms, tune
from deploycli.models.errors import EnvironmentUnsuitable, NumericsError, UsageError
from deploycli.models.memory import free_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from deploycli.exporters.graph.onnx_file import ExternalData


_RANDOM = DRAWN | {"Bernoulli", "Multinomial"}
_QUANTIZED = frozenset({"DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", *QDQ})


@dataclass(frozen=True)
class OptimizeOptions:
    """What to optimize, and how.

    Attributes:
        source: the ONNX file.
        target: where the result goes, which may be the same file; None writes nothing.
        without: names of passes to leave out.
        attention: ``4d``, ``5d`` to leave the scores of masked windows in five dimensions, or ``onnx`` for the operator
            Attention, in a graph of opset 23 or above.
        check: number of random inputs on which both graphs are run and compared; 0 leaves the check out.
        shapes: input name -> its shape in the check, where an axis is symbolic.
        seed: of the inputs of the check.
        inputs: a ``.npz`` file of arrays to run both graphs on, in place of random inputs.
        external: where the weights are stored.
        lint: end where TensorRT could not read the result; otherwise it is written all the same.
        tune: compile forms of the graph and keep the cheapest; None takes the default form.
    """

    source: Path
    target: Path | None
    without: frozenset[str] = frozenset()
    attention: Attention = "4d"
    check: int = 3
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    seed: int = 0
    inputs: Path | None = None
    external: ExternalData = "auto"
    lint: bool = True
    tune: TuneOptions | None = None


@dataclass(frozen=True)
class Side:
    """A graph, before or after.

    Attributes:
        nodes: number of nodes, those of inner graphs too.
        ops: operator type, with its domain where that is not ONNX's -> number of nodes.
        size: bytes on disk, external data included.
        opset: version of ONNX's operators; the passes raise it where a newer operator says what the graph spells out.
        cost: what it costs to run and to keep.
        kernels: what TensorRT is predicted to make of it.
    """

    nodes: int
    ops: Mapping[str, int]
    size: int
    opset: int
    cost: GraphCost
    kernels: KernelFigures


@dataclass(frozen=True)
class Optimized:
    """What became of a file.

    Attributes:
        source: the file that was read.
        files: the files that were written, the model first; none in a dry run.
        before: the graph as it was.
        after: the graph as it is.
        steps: what each pass did and refused.
        check: how the two graphs compare, or None where they were not run.
        unread: data files beside the target that no longer belong to it.
        tuning: the forms that were compiled, or None where none was.
    """

    source: Path
    files: tuple[Path, ...]
    before: Side
    after: Side
    steps: tuple[Step, ...]
    check: Check | None
    unread: tuple[Path, ...] = ()
    tuning: Tuning | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "source": str(self.source),
            "files": [str(path) for path in self.files],
            "before": asdict(self.before),
            "after": asdict(self.after),
            "steps": [step.to_json() for step in self.steps],
            "check": None if self.check is None else self.check.to_json(),
            "unread": [str(path) for path in self.unread],
            "tuning": None if self.tuning is None else asdict(self.tuning),
        }


def optimize(options: OptimizeOptions, *, progress: Callable[[str], None] = lambda _: None) -> Optimized:
    """Optimize an ONNX file.

    Args:
        options: what and how.
        progress: is told what runs.

    Raises:
        UsageError: the file is no ONNX file, an argument does not fit, or the graph cannot be checked as asked.
        ExportError: the graph is invalid, or TensorRT could not read it.
        IntegrityError: its external data are missing, of another length, or outside its folder.
        EnvironmentUnsuitable: ONNX Runtime cannot run the original, or the result cannot be written.
        NumericsError: the two graphs answer differently.
    """
    if unknown := sorted(options.without - set(PASSES)):
        raise UsageError(f"there is no pass {', '.join(unknown)}", expected=f"some of {', '.join(PASSES)}")
    refuse_other_forms(options.tune, options.attention)
    real = None if options.target is None else real_target(options.target)
    progress("reading")
    model = load(options.source)
    data = _data_files(model, options.source)
    size = options.source.stat().st_size + sum(path.stat().st_size for path in data)
    nodes, ops = _count(model)
    stored = constant_bytes(model.graph)
    opset = model.opset_imports.get("", 0)
    if options.attention == "onnx" and opset < ATTENTION_OPSET:
        raise UsageError(
            f"--attention onnx, and the graph is of opset {opset}",
            expected=f"opset {ATTENTION_OPSET} or above",
            hint="--attention 4d",
        )
    tuning = None if options.tune is None else tune(model, options.tune, partial(_in_form, options), progress=progress)
    without, also = for_attention(options.attention) if tuning is None else tuning.form.passes
    progress("rewriting")
    predicted: list[KernelFigures] = []

    def judge(graph: ir.Graph) -> None:
        analysis = Analysis(graph)
        if options.check:
            _weigh(graph, analysis)
        predicted.append(predict(graph, analysis).figures)

    model, steps = optimized(model, without=options.without | without, also=also, judge=judge)
    if options.lint:
        require_readable(model, str(options.source))
    analysis = Analysis(model.graph)
    cost = graph_cost(model.graph, analysis)
    predicted.append(predict(model.graph, analysis).figures)
    first = next((step.cost for step in steps if step.cost is not None), cost)
    stored_too = GraphCost(first.movement_bytes, first.multiply_adds, stored)
    before = Side(nodes, ops, size, opset, stored_too, predicted[0])
    if options.check and (drawn := next((n for n in model.graph.all_nodes() if n.op_type in _RANDOM), None)):
        raise UsageError(
            f"the graph cannot be checked: {drawn.name or drawn.op_type} draws random numbers, other ones every time",
            hint=UNCHECKED,
        )
    budget, (nodes, ops), opset = budget_of(model), _count(model), model.opset_imports.get("", 0)
    with folder_beside(real) as folder:
        name = (options.target or options.source).name
        progress("writing")
        files = write_beside(model, folder / name, options.external)
        after = Side(nodes, ops, sum(path.stat().st_size for path in files), opset, cost, predicted[1])
        del model, analysis
        free_memory()  # graphs are cycles, and hold the weights: the check needs their room
        check = None
        if options.check:
            check = _checked(options, files[0], budget, size + after.size, progress)
        target = options.target
        replaced = data if target is not None and target.exists() and options.source.samefile(target) else ()
        placed = () if target is None else place(files, target)
    left = tuple(path for path in replaced if path.name not in {file.name for file in placed})
    return Optimized(options.source, placed, before, after, tuple(steps), check, left, tuning)


def _in_form(options: OptimizeOptions, model: ir.Model, form: Form) -> ir.Model:
    without, also = form.passes
    return optimized(
        model, without=options.without | without, also=also, judge=lambda graph: _weigh(graph, Analysis(graph))
    )[0]


def _weigh(graph: ir.Graph, analysis: Analysis) -> None:
    refuse_what_is_too_large(graph, analysis, batch=max(BATCHES), hint=UNCHECKED)


def _checked(
    options: OptimizeOptions, written: Path, budget: str, mapped: int, progress: Callable[[str], None]
) -> Check:
    """Run both graphs where a crash of ONNX Runtime's ends no more than the check."""
    try:
        return isolated(
            check_graphs, options.source, written, samples=options.check, budget=budget,
            shapes=dict(options.shapes), seed=options.seed, feeds=options.inputs or (),
            progress=progress, memory=address_space(mapped),
        )  # fmt: skip
    except Died as end:
        what, which = f"ONNX Runtime {end.reason}", end.step or "starting"
        if end.shortage is not None:
            asked = f" for {end.shortage}" if end.shortage else ""
            raise EnvironmentUnsuitable(
                f"there is not enough memory{asked} while {which}", expected="memory for the check", hint=UNCHECKED
            ) from end
        if which == RUNNING_CANDIDATE:
            raise NumericsError(
                f"{what} while {which}, and ran the original",
                expected="equal outputs",
                hint="--without PASS, to find the pass that is at fault; please report it",
            ) from end
        raise EnvironmentUnsuitable(
            f"the graph cannot be checked: {what} while {which}",
            expected="a graph that ONNX Runtime runs",
            hint=UNCHECKED,
        ) from end


def load(path: Path) -> ir.Model:
    """Read an ONNX file from anywhere; external data are read when they are asked for.

    Raises:
        UsageError: there is no such file, it is no ONNX file, or it holds what is not read.
        IntegrityError: external data that are missing, of another length, or outside the file's folder.
        ExportError: a tensor that is not as long as its shape says.
    """
    model = load_model(path, dense=True)
    if "ai.onnx" in model.opset_imports:  # the other name of ""
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    map_external(model)
    return model


# --- what is in a graph ----------------------------------------------------------------------------------------------


def _data_files(model: ir.Model, path: Path) -> tuple[Path, ...]:
    return tuple(path.parent / location for location in external_files(model))


def _count(model: ir.Model) -> tuple[int, dict[str, int]]:
    nodes = list(model.graph.all_nodes())
    named = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes)
    return len(nodes), dict(sorted(named.items(), key=lambda item: (-item[1], item[0])))


def budget_of(model: ir.Model) -> str:
    """Return the budget of the least exact arithmetic in a graph: another order of additions rounds otherwise."""
    nodes = list(model.graph.all_nodes())
    types = {v.dtype for node in nodes for v in (*node.inputs, *node.outputs) if v is not None}
    if ir.DataType.BFLOAT16 in types:
        return "bf16"
    half = ir.DataType.FLOAT16 in types or any(node.op_type in _QUANTIZED for node in nodes)
    return "fp16" if half else "fp32"
