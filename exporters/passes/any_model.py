"""The passes on a graph from anywhere: checked first, in one order, until nothing changes any more."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.onnx_file import GRAPHS, root_of, without_initializers
from deploycli.exporters.passes.common.names import known_names, name_what_is_new, put_in_order
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.models.errors import ExportError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploycli.exporters.graph.steps import Step

_ROUNDS = 4
"""The passes run again until they change nothing, so that a second call finds nothing to do; but no more often."""


def optimized(
    model: ir.Model,
    *,
    without: frozenset[str] = frozenset(),
    also: frozenset[str] = frozenset(),
    judge: Callable[[ir.Graph], None] = lambda _: None,
) -> tuple[ir.Model, list[Step]]:
    """Run the passes on a graph from anywhere.

    Args:
        model: the model; it is used up.
        without: names of passes to leave out.
        also: names of passes to run that are off by default.
        judge: is given the graph as it is, in order and with its functions inlined, and may refuse it.

    Returns:
        The result, with the inputs, outputs and names of the model, and what each pass did.

    Raises:
        ExportError: the graph is invalid.
    """
    _refuse_nameless(model.graph)
    model = _ordered(model)
    _take_in_inner_data(model)
    _give_constants_a_place(model)
    validate(model)
    judge(model.graph)
    outputs = [(v.name, v.type, v.shape, v.doc_string, dict(v.metadata_props)) for v in model.graph.outputs]
    steps: list[Step] = []
    structure = without_initializers(model)
    for number in range(1, _ROUNDS + 1):
        known = known_names(model.graph)
        more = rewrite(model, without=without, also=also)
        put_in_order(model.graph)
        name_what_is_new(model.graph, known, Analysis(model.graph))
        for value, (name, kind, shape, doc, metadata) in zip(model.graph.outputs, outputs, strict=True):
            assert value.name == name, "passes keep the names of outputs"
            if value.is_graph_input():  # declared twice in the file, once here
                continue
            value.type, value.shape, value.doc_string = kind, shape, doc
            value.metadata_props.clear()
            value.metadata_props.update(metadata)
        before, structure = structure, without_initializers(model)
        if steps and structure == before:
            break
        steps += more if number == 1 else [replace(step, name=f"{step.name} ({number})") for step in more]
        model = model.clone()  # in which order values are read is forgotten, as in a file
    _give_constants_a_place(model)
    validate(model, "the passes made an invalid graph")
    return model, steps


def _refuse_nameless(graph: ir.Graph) -> None:
    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        nameless = [i for i, value in enumerate(values) if not value.name]
        if nameless:
            raise ExportError(
                f"the graph is invalid: {kind} {nameless[0]} has no name", expected="a name for every input and output"
            )


def _ordered(model: ir.Model) -> ir.Model:
    """Inline functions and sort, so that nothing is left of the order in the file, not even who reads a value first."""
    what = "the graph is invalid"
    try:
        for function in model.functions.values():
            put_in_order(function.graph)
        put_in_order(model.graph)
        what = "the model's functions cannot be inlined"
        common.InlinePass()(model)
        what = "the graph is invalid"
        put_in_order(model.graph)
        return model.clone()
    except Exception as error:  # of onnx_ir's own making
        raise ExportError(
            f"{what}: {first_line(root_of(error))}", expected="a valid ONNX graph, functions of its opset"
        ) from error


def _take_in_inner_data(model: ir.Model) -> None:
    """Let only constants of the main graph stand in files of their own; they are mapped, not read."""
    for graph in model.graph.subgraphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name)
    for node in model.graph.all_nodes():
        for key, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[key] = ir.AttrTensor(key, ir.Tensor(attribute.value.numpy(), name=attribute.value.name))


def validate(model: ir.Model, what: str = "the graph is invalid") -> None:
    """Let ONNX check the graph; the contents of its constants are left out, which may be gigabytes.

    Raises:
        ExportError: it is invalid.
    """
    frame, body = without_initializers(model)
    message = onnx.ModelProto.FromString(frame)
    message.graph.ParseFromString(body)
    _fill_in(message.graph)
    for name, value in model.graph.initializers.items():
        if value.dtype is not None:
            message.graph.initializer.add(name=name, data_type=int(value.dtype), dims=[0])
    try:
        onnx.checker.check_model(message)
    except Exception as error:  # ValidationError, and what a broken message raises
        raise ExportError(f"{what}: {first_line(error)}", expected="a valid ONNX graph") from error


def _fill_in(graph: onnx.GraphProto) -> None:
    """Give inputs and outputs the types and shapes that the checker asks for, and that runtimes infer."""
    for value in (*graph.input, *graph.output):
        if not value.HasField("type") or value.type.WhichOneof("value") is None:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in GRAPHS else ():
                _fill_in(inner)


def _give_constants_a_place(model: ir.Model) -> None:
    """Before version 4 of the format every constant had to be an input as well, and none could be replaced."""
    if (model.ir_version or 0) >= 4:
        return
    model.ir_version = 4
    for value in [value for value in model.graph.inputs if value.is_initializer()]:
        model.graph.inputs.remove(value)
