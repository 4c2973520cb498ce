"""Evaluate one node on constants, bit-equal to ONNX Runtime.

Movement and integer arithmetic are exact by nature and run in numpy, where a node costs microseconds. Everything else
runs in ONNX Runtime itself, so that a folded constant is the number that the graph would have computed.

What comes out is weighed before it is computed: how large it will be follows from shapes, and a few bytes of a file can
ask for terabytes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.movement_ops import is_movement, move
from deploycli.exporters.graph.operators import DRAWN, QDQ
from deploycli.exporters.graph.products import multiply_adds
from deploycli.exporters.graph.shapes import INTEGERS, NodeShapes, Operand, item_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from deploycli.exporters.graph.movement_ops import Array, Operands

_RANDOM = DRAWN | {"Bernoulli", "Dropout", "Multinomial"}  # a Dropout that is still there at this point trains

_QUANTIZATION = frozenset({"DynamicQuantizeLinear", *QDQ})
"""These say in which type a weight is kept: folding one would undo the quantization."""

_NEVER = _RANDOM | _QUANTIZATION


def _truncating_division(a: Array, b: Array) -> Array:
    if not b.all():
        raise ValueError("division by zero")
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
        and node.op_type not in _NEVER
        and not any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
    )


def evaluate(node: ir.Node, operands: Operands, opset_imports: Mapping[str, int], most: int) -> Sequence[Array | None]:
    """Return the node's outputs for constant operands; None for an optional output that is absent.

    Args:
        node: the operator.
        operands: its inputs, None where an optional one is absent.
        opset_imports: domain -> version.
        most: bytes that the outputs may take; a view of what is there already takes none.

    Raises:
        ValueError: the node cannot be evaluated; the message says why.
    """
    _weigh(node, operands, opset_imports, most)
    if is_movement(node, operands):
        return move(node, operands)
    present = [x for x in operands if x is not None]
    if node.op_type == "Shape":
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        return [np.array(present[0].shape[start:end], np.int64)]
    if node.op_type == "ConstantOfShape":  # as a view: whether it is worth its bytes is decided later
        fill = node.attributes.get_tensor("value", None)
        scalar = np.zeros((), np.float32) if fill is None else fill.numpy().reshape(())
        return [np.broadcast_to(scalar, tuple(present[0].tolist()))]
    if node.op_type == "Cast" and present[0].dtype.kind == "i" and node.attributes.get_int("to", 0) in INTEGERS:
        return [present[0].astype(INTEGERS[node.attributes.get_int("to", 0)])]
    arithmetic = _INTEGER.get(node.op_type)
    if arithmetic and len(operands) == len(present) == _arity(node) and all(x.dtype.kind in "ib" for x in present):
        return [np.asarray(arithmetic(*present))]
    return _in_onnxruntime(node, operands, opset_imports)


_MADE_AS_VIEWS = frozenset({"ConstantOfShape", "Expand"})
_SIZED_BY_VALUE = frozenset(
    {"CenterCropPad", "Col2Im", "Einsum", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"}
)
"""Operators whose result may be large though their operands are small."""

_SMALL = 512
"""Operands of no more elements than this, all together, make no large result by broadcasting."""

_NO_LARGER = frozenset({"Compress", "NonZero", "Unique"})
"""Operators of which only the values say how large the results are, but no larger than a few times the operands."""

MOST_SPELLED_OUT = 256 * 2**20
"""Bytes of operands that are one number repeated, and that ONNX Runtime wants whole."""

MOST_PRODUCTS = 4 * 10**9
"""Multiply-adds of one constant: some seconds."""


def _weigh(node: ir.Node, operands: Operands, opset_imports: Mapping[str, int], most: int) -> None:
    """Refuse what is too large to be computed.

    Raises:
        ValueError: with the size that it would have.
    """
    present = [x for x in operands if x is not None]
    if node.op_type in _MADE_AS_VIEWS or node.op_type == "Shape":
        return
    if sum(x.size for x in present) <= _SMALL and node.op_type not in _SIZED_BY_VALUE:
        return
    if node.op_type in _NO_LARGER:
        size = sum(8 * x.size * max(x.ndim, 3) for x in present)
    else:
        known = [None if x is None else Operand(ir.DataType.from_numpy(x.dtype), x.shape, (x, x)) for x in operands]
        inferred = NodeShapes(opset_imports).infer(node, known)
        outputs = [out for i, out in enumerate(inferred or ()) if node.outputs[i].name]
        if not outputs or any(out is None or None in out[2] for out in outputs):
            raise ValueError(f"how large the result of {node.op_type} is, is not known before it is computed")
        shapes = [(dtype, [d for d in axes if d is not None]) for dtype, _, axes in filter(None, outputs)]
        size = sum(math.ceil(math.prod(dims) * item_bytes(dtype)) for dtype, dims in shapes)
        products = multiply_adds(node, [() if x is None else x.shape for x in operands], tuple(shapes[0][1]))
        if products is None or products > MOST_PRODUCTS:
            raise ValueError(f"{products} multiply-adds of constants")
    if size > most:
        raise ValueError(f"{size} bytes of constants")


def _arity(node: ir.Node) -> int:
    """Operands that the numpy function of the same meaning takes; Max and Min of ONNX take any number."""
    return {"Abs": 1, "Neg": 1, "Not": 1, "Where": 3}.get(node.op_type, 2)


def _in_onnxruntime(node: ir.Node, operands: Operands, opset_imports: Mapping[str, int]) -> list[Array | None]:
    import onnx
    import onnxruntime as ort

    views = sum(x.nbytes for x in operands if x is not None and 0 in x.strides)
    if views > MOST_SPELLED_OUT:
        raise ValueError(f"{views} bytes of constants, spelled out")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # the reason is in the exception; nothing goes to the terminal
    try:
        inputs, feed = [], {}
        for i, operand in enumerate(operands):
            if operand is not None:
                feed[f"x{i}"] = np.asarray(operand, order="C")  # unlike ascontiguousarray, a scalar stays one
                elem_type = onnx.helper.np_dtype_to_tensor_dtype(operand.dtype)
                inputs.append(onnx.helper.make_tensor_value_info(f"x{i}", elem_type, operand.shape))
        proto = ir.serde.serialize_node(node)
        del proto.input[:], proto.output[:]
        proto.input.extend("" if operand is None else f"x{i}" for i, operand in enumerate(operands))
        proto.output.extend(f"y{i}" if output.name else "" for i, output in enumerate(node.outputs))
        graph = onnx.helper.make_graph(
            [proto], "node", inputs, [onnx.ValueInfoProto(name=name) for name in proto.output if name]
        )
        opsets = [onnx.helper.make_opsetid(d, v) for d, v in opset_imports.items()]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results = dict(zip([y.name for y in session.get_outputs()], session.run(None, feed), strict=True))
    except Exception as error:  # ONNX Runtime raises classes of its own, one per status code
        raise ValueError(f"{node.op_type} could not be evaluated: {error}") from error
    if not all(isinstance(y, (np.ndarray, np.generic)) and y.dtype.kind != "O" for y in results.values()):
        raise ValueError(f"{node.op_type} makes something else than a tensor of numbers")
    return [np.asarray(results[name]) if name else None for name in proto.output]
