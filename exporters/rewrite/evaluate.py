"""Evaluate one node on constants, bit-equal to ONNX Runtime.

Movement and integer arithmetic are exact by nature and run in numpy, where a node costs microseconds. Everything else
runs in ONNX Runtime itself, so that a folded constant is the number that the graph would have computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from exporters.rewrite.movement_ops import Array, NotMovementError, is_movement, move

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from exporters.rewrite.movement_ops import Operands

NONDETERMINISTIC = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def _truncating_division(a: Array, b: Array) -> Array:
    quotient: Array = np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))
    return quotient.astype(a.dtype)


# Integer and boolean operators of shape arithmetic. Binary ones broadcast as numpy does.
_INTEGER: dict[str, Callable[..., Array]] = {
    "Abs": np.abs,
    "Add": np.add,
    "And": np.logical_and,
    "Div": _truncating_division,
    "Equal": np.equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Sub": np.subtract,
    "Where": np.where,
}


def can_evaluate(node: ir.Node) -> bool:
    """Say whether the node is a deterministic operator of the ONNX domain without subgraphs."""
    return (
        node.domain == ""
        and node.op_type not in NONDETERMINISTIC
        and not any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
    )


def evaluate(node: ir.Node, operands: Operands, opset_imports: Mapping[str, int]) -> list[Array]:
    """Return the node's outputs for constant operands.

    Raises:
        ValueError: the node cannot be evaluated; the message says why.
    """
    if is_movement(node):
        try:
            return move(node, operands)
        except NotMovementError:
            return _in_onnxruntime(node, operands, opset_imports)
    if node.op_type == "Shape" and operands[0] is not None:
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        return [np.array(operands[0].shape[start:end], np.int64)]
    arithmetic = _INTEGER.get(node.op_type)
    if arithmetic and all(x is not None and x.dtype.kind in "ib" for x in operands) and len(operands) <= 3:
        if len(operands) == 1 and node.op_type in ("Max", "Min"):
            return [x for x in operands if x is not None]
        if node.op_type == "Where" or len(operands) <= 2:
            return [np.asarray(arithmetic(*operands))]
    return _in_onnxruntime(node, operands, opset_imports)


def _in_onnxruntime(node: ir.Node, operands: Operands, opset_imports: Mapping[str, int]) -> list[Array]:
    import onnx
    import onnxruntime as ort

    proto = ir.to_proto(node)
    assert isinstance(proto, onnx.NodeProto)
    del proto.input[:], proto.output[:]
    inputs, feed = [], {}
    for i, operand in enumerate(operands):
        name = "" if operand is None else f"x{i}"
        proto.input.append(name)
        if operand is not None:
            feed[name] = np.ascontiguousarray(operand)
            elem_type = onnx.helper.np_dtype_to_tensor_dtype(operand.dtype)
            inputs.append(onnx.helper.make_tensor_value_info(name, elem_type, operand.shape))
    proto.output.extend(f"y{i}" if output.name else "" for i, output in enumerate(node.outputs))
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
    graph = onnx.helper.make_graph([proto], "node", inputs, outputs)
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in opset_imports.items()], ir_version=10
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # the reason is in the exception; nothing goes to the terminal
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [np.asarray(y) for y in session.run(None, feed)]
    except Exception as error:  # ONNX Runtime raises classes of its own, one per status code
        raise ValueError(f"{node.op_type} could not be evaluated: {error}") from error
