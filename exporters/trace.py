"""nn.Module -> onnx_ir.Model, through torch.export and the ONNX exporter that PyTorch ships.

PyTorch's exporter first decomposes the traced program, with every shape symbolic; for a Swin that takes two thirds of
the whole export. Where each traced operator has a translation of its own, nothing needs decomposing, and the program
is translated as it was traced. Otherwise the public ``torch.onnx.export`` does all of it.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import warnings
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.builder import Builder
from deploycli.exporters.graph.unique import MODULE_KEY as MODULE_KEY  # also for those who name the nodes
from deploycli.exporters.graph.unique import PARAMETER
from deploycli.exporters.lint.structure import constant_positions
from deploycli.exporters.passes.common.tidy import sweep
from deploycli.exporters.passes.pipeline import tidy
from deploycli.exporters.traced_program import prepare
from deploycli.exporters.untraceable import ModuleTracker, explain
from deploycli.models.errors import DeployError, ExportError
from deploycli.models.factory import contained
from deploycli.models.outputs import example, flatten

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn
    from torch.export import ExportedProgram

    from deploycli.models.spec import TensorSpec

TRACE_BATCH = 2
"""Batch size of the example: at 1 a tracer takes the axis for a constant."""

OPSETS = range(18, 24)
"""Opsets that the exporter writes and that TensorRT parses."""

BATCH_NAME = "batch"


def trace(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    *,
    opset: int = 20,
    batch: int | None = None,
) -> ir.Model:
    """Trace a module in evaluation mode into a plain ONNX graph.

    Args:
        module: the model; it shares its weights with the result.
        inputs: names and shapes (without the batch axis) of its arguments, in order.
        outputs: names of its outputs, in order.
        opset: version of the ONNX operator set, one of :data:`OPSETS`.
        batch: a fixed batch size, or None for a symbolic one.

    Raises:
        ExportError: the model cannot be traced, an operator has no translation, or the batch axis did not survive.
    """
    check_opset(opset)
    size = TRACE_BATCH if batch is None else batch
    arguments = tuple(example(inputs, size))
    dynamic = None if batch is not None else tuple({0: torch.export.Dim(BATCH_NAME)} for _ in inputs)
    tracker = ModuleTracker(module)
    program = None
    with _quiet(), torch.no_grad():
        try:
            with tracker.watching(), contained():
                flat = _Flat(module).eval()
                program = torch.export.export(flat, arguments, dynamic_shapes=dynamic and (dynamic,), strict=False)
            model = _translate(program, opset)
        except DeployError:
            raise
        except Exception as error:  # the tracer raises many types; each ends the export with its own message
            raise explain(error, tracker, program, f"{_Flat.PREFIX}.") from error
    _rename(model.graph, inputs, outputs)
    if batch is None:
        _name_batch(model.graph)
    for function in model.functions.values():  # translations of opset 18, which mean the same in all of OPSETS
        function.opset_imports[""] = opset
    tidy(model)
    _keep_module_paths(model)
    return model


def store_operands(model: ir.Model) -> None:
    """Store what TensorRT's parser must know while it builds, such as the axes of a ReduceMean; nothing else changes.

    PyTorch's exporter writes a Reshape between a constant and its reader, and a CastLike before a Range, whose length
    follows from its operands.
    """
    analysis = Analysis(model.graph)
    builder = Builder(model.graph, analysis)
    for node in model.graph:
        for position in range(3) if node.op_type == "Range" else constant_positions(node):
            value = node.inputs[position] if position < len(node.inputs) else None
            known = None if value is None or value.producer() is None else analysis.constant(value)
            if known is not None:
                node.replace_input_with(position, builder.constant(known))
    sweep(model.graph)


def check_opset(opset: int) -> None:
    """Refuse an opset outside of :data:`OPSETS`.

    Raises:
        ExportError: it is outside.
    """
    if opset not in OPSETS:
        raise ExportError(
            f"opset {opset} cannot be exported",
            expected=f"{OPSETS.start} to {OPSETS.stop - 1}: what PyTorch's exporter writes and TensorRT parses",
            hint="--opset 20",
        )


class _Flat(torch.nn.Module):
    """The model with its outputs as a tuple of tensors, whatever it returns; its path prefixes every module's."""

    PREFIX = "module"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the model."""
        return tuple(flatten(self.module(*inputs)).values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporter warns of its own deprecations and logs tables; neither is for the user of this tool.

    Nor does anybody read where in its own code each node was made, which it takes a seventh of a trace to find out.
    """
    before = logging.root.manager.disable
    stacks = getattr(torch.fx.config, "do_not_emit_stack_traces", None)  # newer than the oldest PyTorch here
    logging.disable(logging.ERROR)
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        # A failing trace prints its whole graph.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if stacks is not None:
            torch.fx.config.do_not_emit_stack_traces = stacks


def _translate(program: ExportedProgram, opset: int) -> ir.Model:
    prepare(program, opset)
    model = _translate_as_traced(program, opset)
    if model is not None:
        return model
    onnx_program = torch.onnx.export(program, (), dynamo=True, opset_version=opset, optimize=False, verbose=False)
    assert onnx_program is not None
    return onnx_program.model


def _translate_as_traced(program: ExportedProgram, opset: int) -> ir.Model | None:
    """Translate without decomposing, or return None where the program or this PyTorch does not allow it."""
    try:
        from torch.onnx._internal.exporter import _core

        registry = _translations_of(program.graph.nodes, opset)
        if not all(_translates_directly(node, registry) for node in program.graph.nodes):
            return None
        if sum(1 for _ in program.graph_module.modules()) > 1:  # control flow has subgraphs
            return None
        model: ir.Model = _core._exported_program_to_onnx_program(program, registry=registry).model
    except (ImportError, AttributeError, TypeError):
        return None  # internals of another PyTorch; the public path does the same, slower
    model.opset_imports[""] = opset
    return model


def _translations_of(nodes: Iterable[torch.fx.Node], opset: int) -> Any:
    """Return the exporter's registry with the translations of these nodes.

    ``ONNXRegistry.from_torchlib`` reads the source of all translations, some six hundred; a model needs thirty. A test
    compares the two.
    """
    from onnxscript.function_libs.torch_lib import ops, registration  # importing ops fills the registry
    from torch.onnx._internal.exporter import _registration
    from torch.onnx._internal.exporter._torchlib import _torchlib_registry

    assert ops is not None
    wanted = {node.target for node in nodes if node.op == "call_function"}
    names = {target.name() for target in wanted if isinstance(target, torch._ops.OpOverload)}  # type: ignore[no-untyped-call]
    registry = _registration.ONNXRegistry()
    registry._opset_version = opset
    for meta in _torchlib_registry.get_torchlib_ops():  # PyTorch's own come first
        registry._register(meta.fx_target, meta)
    for name, functions in registration.default_registry.items():
        is_python = name.startswith(("_operator::", "math::"))  # these have several names
        target = _registration._get_overload(name) if is_python or name in names else None
        if target is not None and (name in names or target in wanted):
            for is_complex, overloads in ((False, functions.overloads), (True, functions.complex)):
                for function in overloads:
                    registry._register(
                        target,
                        _registration.OnnxDecompMeta(function, target, signature=None, is_complex=is_complex),
                    )
    registry._cleanup_registry_based_on_opset_version()
    return registry


def _translates_directly(node: torch.fx.Node, registry: Any) -> bool:
    """Say whether a traced operator needs neither decomposition, functionalisation nor type promotion."""
    if node.op != "call_function":
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return not isinstance(node.target, torch._ops.HigherOrderOperator)
    if node.target._schema.is_mutable or not registry.is_registered(node.target):
        return False
    if node.target.overloadpacket in (torch.ops.aten.index, torch.ops.aten.embedding):
        return True  # of two types by nature: values and indices
    result = node.meta.get("val")
    types = {arg.meta["val"].dtype for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), torch.Tensor)}
    if not types or not isinstance(result, torch.Tensor):
        return len(types) <= 1
    # PyTorch computes with integers and booleans in whatever type the result needs; ONNX does not.
    compares = result.dtype == torch.bool and torch.bool not in types
    return len(types) == 1 and (compares or types == {result.dtype} != {torch.bool})


def _rename(graph: ir.Graph, inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> None:
    """Name inputs, outputs and parameters as their owner does."""
    if len(graph.outputs) != len(outputs):
        raise ExportError(
            f"the model has {len(graph.outputs)} outputs", expected=f"{len(outputs)}: {', '.join(outputs)}"
        )
    for i, value in enumerate(graph.outputs):
        if value.producer() is None or value in graph.outputs[:i]:  # it has another name already
            identity = ir.node("Identity", [value])
            identity.outputs[0].shape, identity.outputs[0].type = value.shape, value.type
            graph.append(identity)
            graph.outputs[i] = identity.outputs[0]
    for value, spec in zip(graph.inputs, inputs, strict=True):
        value.name = spec.name
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    taken = {*outputs, *(spec.name for spec in inputs)}
    for value in list(graph.initializers.values()):
        if value.name and value.name.startswith(f"{_Flat.PREFIX}."):
            value.meta[PARAMETER] = True
            name = value.name.removeprefix(f"{_Flat.PREFIX}.")
            if name not in taken:
                value.name = name  # the graph's table of initializers follows


def _name_batch(graph: ir.Graph) -> None:
    """Give the batch axis its name everywhere.

    Raises:
        ExportError: the exporter took the axis for a constant, which it may do without a word.
    """
    symbols = set[str]()
    for value in graph.inputs:
        first = None if value.shape is None or not len(value.shape) else value.shape[0]
        if isinstance(first, int):
            raise ExportError(
                f"the batch axis of {value.name} became {first}",
                expected="a symbolic axis",
                hint=f"--batch {first}, or a forward pass that does not read the batch size as a number",
            )
        if first is not None and first.value:
            symbols.add(re.escape(first.value))
    pattern = re.compile(rf"\b({'|'.join(sorted(symbols))})\b")
    for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            dims = [d if isinstance(d, int) else pattern.sub(BATCH_NAME, d.value or "") or None for d in value.shape]
            value.shape = ir.Shape(dims)


def _keep_module_paths(model: ir.Model) -> None:
    """Keep one readable line of the exporter's metadata: stack traces name the build machine's folders."""
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        names = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        path = names[-2] if len(names) > 1 else ""
        node.metadata_props.clear()
        # Nodes that belong to no module stand under a name of the exporter's own.
        if path.startswith(f"{_Flat.PREFIX}."):
            node.metadata_props[MODULE_KEY] = path.removeprefix(f"{_Flat.PREFIX}.")
    for value in (
        *graph.inputs,
        *graph.initializers.values(),
        *(v for node in graph.all_nodes() for v in node.outputs),
    ):
        value.metadata_props.clear()
