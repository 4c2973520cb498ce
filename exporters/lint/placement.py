"""Rule 15: Q/DQ pairs that are legal, and slower or less exact than others.

Each GEMM reads two quantized operands; normalisation, bias and Softmax stay in floating point; nothing stands between a
GEMM and its bias or activation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.graph.operators import is_onnx, operand
from deploycli.exporters.lint.attention import attentions, dequantized, is_weight, made_by, quantized_type
from deploycli.exporters.lint.element_types import attribute
from deploycli.exporters.lint.fusion import int8_limits
from deploycli.exporters.lint.quantization import FOUR_BITS, GEMMS, axis_of
from deploycli.exporters.lint.report import warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploycli.exporters.lint.report import Problem
    from deploycli.exporters.lint.subject import Subject

_NORMS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization")


def quantization_placement(subject: Subject) -> Iterator[Problem]:
    """Rule 15: Q/DQ pairs stand where TensorRT makes one kernel of them and their GEMM.

    Source: TensorRT documentation, "Working with Quantized Types", recommendations for the placement of Q/DQ; issues
    2981, 3243, 3280 and 4167 of NVIDIA/TensorRT (transformers).
    """
    for node in subject.nodes:
        if is_onnx(node, *_NORMS):
            yield from _norm(node)
        elif is_onnx(node, "Softmax"):
            source = made_by(operand(node, 0), "Cast")
            if source is not None and is_onnx(source, "DequantizeLinear"):
                yield warning(node, "the input of Softmax is quantized", "remove that Q/DQ pair: quantize its result")
        elif is_onnx(node, *GEMMS):
            yield from _gemm(node, subject)
        elif is_onnx(node, "Add"):
            yield from _bias(node, subject)
        elif is_onnx(node, "Gelu", "Erf"):
            yield from _activation(node, subject)
    yield from _repeated(subject)
    yield from _attention(subject)


def _norm(node: ir.Node) -> Iterator[Problem]:
    dq = dequantized(operand(node, 0))
    q = None if dq is None else made_by(operand(dq, 0))
    if q is None or not is_onnx(q, "QuantizeLinear"):
        return
    source = made_by(operand(q, 0), "Add")
    if source is None or not is_onnx(source, "Conv"):  # a patch embedding ends in the norm: that pair is the Conv's
        yield warning(node, f"the input of {node.op_type} is quantized", "quantize its result, once for all readers")


def _gemm(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    if dequantized(operand(node, 2)) is not None:
        yield warning(node, "its bias is quantized", "keep the bias in floating point: the GEMM adds it as it is")
    pair = [operand(node, i) for i in (0, 1)]
    types = [quantized_type(value, subject) for value in pair]
    if None in types and types != [None, None]:
        stored = next(dtype for dtype in types if dtype is not None)
        if stored not in FOUR_BITS:  # these quantize weights alone, on purpose
            found = f"operand {types.index(None)} of {node.op_type} is not quantized, the other is"
            yield warning(node, found, "quantize both: half a quantized GEMM runs in floating point")
    for i, value in enumerate(pair):
        if types[i] is not None and is_weight(value, subject):
            yield from _weight(node, i, subject)


def _weight(node: ir.Node, position: int, subject: Subject) -> Iterator[Problem]:
    value = operand(node, position)
    dq = dequantized(value)
    scale = None if dq is None else subject.inference[operand(dq, 1)].dims
    rank = subject.inference[value].rank
    if dq is None or scale is None or rank is None or rank < 2 or len(scale) > 1:
        return
    channel = _channel_axis(node, position, rank)
    last = None if value is None else value.producer()
    if last is not None and is_onnx(last, "Transpose") and operand(last, 0) in dq.outputs:
        channel = attribute(last, "perm", list(reversed(range(rank))))[channel]
    elif last is not dq:
        return  # moved in another way: which axis it was is not followed
    dims = subject.inference.dims(dq.outputs[0])
    if not scale or scale[0] == 1:
        if dims is not None and dims[channel] != 1:
            yield warning(
                dq, f"one scale for all channels of the weight of {node.op_type}", f"one each, axis {channel}"
            )
    elif axis_of(dq, subject) % rank != channel:
        found = f"scales along axis {axis_of(dq, subject)} of the weight of {node.op_type}"
        yield warning(dq, found, f"axis {channel}, the output channels: a sum cannot be scaled term by term")


def _channel_axis(node: ir.Node, position: int, rank: int) -> int:
    """Return the axis of a weight that its result keeps."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    is_transposed = node.op_type == "Gemm" and attribute(node, "transB" if position else "transA", 0)
    return rank - 1 if bool(position) != bool(is_transposed) else rank - 2


def _bias(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    """An Add of a stored vector to what a GEMM made."""
    for value, bias in ((operand(node, 0), operand(node, 1)), (operand(node, 1), operand(node, 0))):
        if not is_weight(bias, subject) or is_weight(value, subject) or subject.inference[bias].rank not in (0, 1):
            continue
        if _is_gemm(made_by(value)) and dequantized(bias) is not None:
            yield warning(node, "its bias is quantized", "keep the bias in floating point: the GEMM adds it as it is")
        q = _quantizer(value)
        if q is not None and _is_gemm(made_by(operand(q, 0))):
            yield warning(q, "a Q/DQ pair between a GEMM and its bias", "move it behind the bias and the activation")


def _activation(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    """A GELU, or the Erf of one that is spelled out."""
    value = operand(node, 0)
    producer = None if value is None else value.producer()
    if producer is not None and is_onnx(producer, "Div", "Mul") and node.op_type == "Erf":
        value = next((v for v in producer.inputs if not is_weight(v, subject)), None)
    q = _quantizer(value)
    source = None if q is None else made_by(operand(q, 0))
    if source is not None and is_onnx(source, "Add"):
        source = next((s for s in map(made_by, source.inputs) if _is_gemm(s)), None)
    if q is not None and _is_gemm(source):
        yield warning(q, "a Q/DQ pair between a GEMM and its activation", "quantize the result of the activation")


def _is_gemm(node: ir.Node | None) -> bool:
    return node is not None and is_onnx(node, *GEMMS)


def _quantizer(value: ir.Value | None) -> ir.Node | None:
    """Return the Q of the pair that a value comes from."""
    dq = dequantized(value)
    q = None if dq is None else made_by(operand(dq, 0))
    return q if q is not None and is_onnx(q, "QuantizeLinear") else None


def _repeated(subject: Subject) -> Iterator[Problem]:
    """One pair for all readers of a value, not one for each."""
    by_value: dict[ir.Value, list[ir.Node]] = {}
    for node in subject.nodes:
        value = operand(node, 0)
        if is_onnx(node, "QuantizeLinear") and value is not None:
            by_value.setdefault(value, []).append(node)
    for value, nodes in by_value.items():
        if len(nodes) > 1:
            yield warning(
                nodes[0], f"{value.name} is quantized {len(nodes)} times", "one Q/DQ pair for all its readers"
            )


def _attention(subject: Subject) -> Iterator[Problem]:
    for found in attentions(subject):
        types = [quantized_type(value, subject) for value in found.operands]
        products = [all(types[:2]), all(types[2:])]
        if products[0] != products[1]:
            which, other = ("first", "second") if products[0] else ("second", "first")
            message = f"the {which} product of the attention is quantized, the {other} is not"
            yield warning(found.softmax, message, "quantize both, or neither")
        if types[0] == ir.DataType.INT8:
            for text in int8_limits(found, subject):
                yield warning(found.softmax, text, "keep this attention in FP16")
