"""Raise the opset of a graph, where every operator in it goes on meaning the same.

An operator means the same if its definition is the same, if a newer one only takes more types or has more attributes,
or if what changed is rewritten here: reductions take their axes as an operand from 18 on, and Split says how many parts
it makes. Anything else is a reason to stay. Sources: https://onnx.ai/onnx/operators/ (each page has the differences).
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from deploycli.exporters.graph.builder import initializer
from deploycli.exporters.graph.operators import REDUCTIONS
from deploycli.exporters.graph.unique import Names, value_names

OLDEST, NEWEST = 13, 23
"""The opsets between which the tables below were made."""

_WIDENED = frozenset(
    {
        *("Add", "AveragePool", "Cast", "CastLike", "Constant", "ConstantOfShape", "CumSum", "Div", "Equal", "Flatten"),
        *("GreaterOrEqual", "Identity", "If", "IsInf", "IsNaN", "LeakyRelu", "LessOrEqual", "Loop", "LpPool", "Mul"),
        *("PRelu", "Pad", "Pow", "Relu", "Reshape", "Resize", "Scan", "ScatterElements", "ScatterND", "Shape", "Size"),
        *("Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
        *("Conv", "ConvTranspose", "GlobalAveragePool", "GlobalMaxPool", "InstanceNormalization", "MaxPool"),
        *("Elu", "HardSigmoid", "HardSwish", "Mish", "Selu", "Softplus", "Softsign", "ThresholdedRelu"),
        *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "Sin", "Sinh", "Tan"),
        *("DequantizeLinear", "QuantizeLinear"),
    }
)
"""Operators that take more types, or whose new attributes change nothing where they are absent."""

_REDUCTIONS = REDUCTIONS - {"ReduceSum"}  # which takes its axes as an operand from 13 on
_AXES_ARE_OPERANDS = 18


def raise_opset(model: ir.Model, target: int) -> str | None:
    """Raise the opset of a model in place; one that is high enough stays.

    Args:
        model: its operators are of an opset from :data:`OLDEST` on.
        target: the opset, at most :data:`NEWEST`.

    Returns:
        None, or the reason why the model was left as it is.
    """
    opset = model.opset_imports.get("", 0)
    if opset >= target:
        return None
    if not OLDEST <= opset <= target <= NEWEST:
        return f"opset {opset} cannot be raised to {target}"
    if any(function.opset_imports.get("", target) != target for function in model.functions.values()):
        return f"a function of the model is of opset {opset}, not {target}"
    nodes = [node for node in model.graph.all_nodes() if node.domain == ""]
    for node in nodes:
        if not _goes_on(node, opset, target):
            return f"{node.op_type} has another meaning in opset {target} than in {opset}"
    names = Names(value_names(model.graph))
    for node in nodes:
        if opset < _AXES_ARE_OPERANDS <= target:
            _move_axes(node, model.graph, names)
    model.opset_imports[""] = target
    oldest = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", target)])
    model.ir_version = max(model.ir_version, oldest)
    return None


def _goes_on(node: ir.Node, opset: int, target: int) -> bool:
    """Say whether a node means the same in both opsets, perhaps after :func:`_move_axes`."""
    try:
        before, after = (onnx.defs.get_schema(node.op_type, version) for version in (opset, target))
    except onnx.defs.SchemaError:
        return False
    if after.deprecated:
        return False
    if before.since_version == after.since_version or node.op_type in _REDUCTIONS | {"Split"}:
        return True
    if node.op_type == "BatchNormalization":
        return len(node.outputs) == 1  # statistics of training were made another way
    # Windows that reach beyond the padding were averaged over other counts.
    rounds_up = node.op_type in ("AveragePool", "MaxPool") and node.attributes.get_int("ceil_mode", 0) == 1
    return node.op_type in _WIDENED and not rounds_up


def _move_axes(node: ir.Node, graph: ir.Graph, names: Names) -> None:
    """Write a reduction or a Split as opset 18 and above do."""
    if node.op_type in _REDUCTIONS and "axes" in node.attributes:
        axes = np.array(node.attributes.pop("axes").as_ints(), np.int64)
        name = names.unique("axes")
        value = initializer(name, ir.tensor(axes, name=name))
        graph.register_initializer(value)  # a graph inside this one reads it too
        node.resize_inputs(2)
        node.replace_input_with(1, value)
    elif node.op_type == "Split" and (len(node.inputs) < 2 or node.inputs[1] is None):
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
