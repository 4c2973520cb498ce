"""Element types of a graph: those that a file does not say, and whether an operator's definition allows another."""

from __future__ import annotations

from functools import cache

import onnx
import onnx_ir as ir

from deploycli.exporters.graph.builder import inner_graphs
from deploycli.exporters.graph.operators import is_onnx, opset
from deploycli.exporters.lint.element_types import allowed_types, derive, formal

REDUCED = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def fill_types(model: ir.Model) -> None:
    """Write down the element types that follow from the operators, in inner graphs too; shapes play no part."""
    _fill(model.graph, opset(model.opset_imports))


def _fill(graph: ir.Graph, version: int) -> None:
    for node in graph:
        for body in inner_graphs(node):
            _fill(body, version)
        for output, dtype in zip(node.outputs, derive(node, type_of, version), strict=True):
            if output.type is None and dtype is not None:
                output.type = ir.TensorType(dtype)


def type_of(value: ir.Value | None) -> ir.DataType | None:
    """Return the element type of a value, or None where it has none or is absent."""
    if value is None:
        return None
    return value.const_value.dtype if value.type is None and value.const_value is not None else value.dtype


def drop_idle_casts(graph: ir.Graph) -> None:
    """Take out what casts a value to the type that it has; what makes an output of the graph becomes an Identity."""
    for node in list(graph):
        if not is_onnx(node, "Cast") or node.inputs[0] is None or node.inputs[0].dtype != node.outputs[0].dtype:
            continue
        if node.outputs[0].is_graph_output():
            node.op_type = "Identity"
            node.attributes.clear()
        else:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            graph.remove(node, safe=True)


def opset_of(node: ir.Node) -> int:
    """Return the version of the ONNX operator set that a node of a main graph is defined by."""
    graph = node.graph
    assert isinstance(graph, ir.Graph), "nodes of functions are not asked for"
    return opset(graph.opset_imports)


def takes(node: ir.Node, position: int, dtype: ir.DataType) -> bool:
    """Whether the definition of an operator allows an element type for the operand at this position."""
    return is_onnx(node) and _allows(node.op_type, opset_of(node), "inputs", position, dtype)


def makes(node: ir.Node, position: int, dtype: ir.DataType) -> bool:
    """Whether the definition of an operator allows an element type for the result at this position."""
    return is_onnx(node) and _allows(node.op_type, opset_of(node), "outputs", position, dtype)


@cache
def _allows(op_type: str, opset: int, side: str, position: int, dtype: ir.DataType) -> bool:
    schema = onnx.defs.get_schema(op_type, opset, "")
    parameter = formal(getattr(schema, side), position)
    return parameter is not None and dtype in allowed_types(schema, parameter.type_str)
