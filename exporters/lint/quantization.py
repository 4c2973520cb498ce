"""Rules 6 and 15: Q and DQ as the parser takes them, and those that are legal, and slower or less exact than others.

As the parser takes them a stored scale is above zero and a zero point is zero; there is one scale for the tensor, one
for each index of an axis, or one for each block of one of the last two axes. As they are fast and exact each GEMM reads
two quantized operands; normalisation, bias and Softmax stay in floating point; nothing stands between a GEMM and its
bias or activation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.operators import QDQ, is_onnx, operand
from deploycli.exporters.lint.element_types import QUANTIZED, attribute, data_type
from deploycli.exporters.lint.fused_attention import int8_limits
from deploycli.exporters.lint.report import differs, error, type_name, warning
from deploycli.exporters.lint.subject import dequantized, is_weight, made_by, quantized_type
from deploycli.exporters.lint.types import FLOATS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.shapes import Dims
    from deploycli.exporters.lint.report import Problem
    from deploycli.exporters.lint.subject import Subject


_SMALLEST_NORMAL = {
    ir.DataType.FLOAT: 2.0**-126,
    ir.DataType.FLOAT16: 2.0**-14,
    ir.DataType.BFLOAT16: 2.0**-126,
    ir.DataType.DOUBLE: 2.0**-126,  # it becomes FP32
}
"""By the types that a scale may have."""

Q, DQ = QDQ

GEMMS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply matrices."""

FOUR_BITS = (ir.DataType.INT4, ir.DataType.FLOAT4E2M1)

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

_SYMMETRIC = "quantize symmetrically, to INT8 with zero point 0"

_MIXED_SINCE = (11,)
"""First version that was seen to take a scale of another type than the data: TensorRT for RTX 1.7 has its parser."""


def quantized_share(subject: Subject) -> float:
    """Return how many of a graph's matrix products and convolutions read quantized operands only, 0 to 1.

    Products of one value that are split into heads at once count as one: they are one kernel.
    """
    products = {_kernel_of(node): node for node in subject.nodes if is_onnx(node, *GEMMS)}
    quantized = [node for node in products.values() if all(map(dequantized, node.inputs[:2]))]
    return len(quantized) / max(len(products), 1)


def _kernel_of(node: ir.Node) -> object:
    shaped = {reader.op_type for reader in node.outputs[0].consumers()}
    return (node.inputs[0], len(node.outputs[0].consumers())) if shaped == {"Reshape"} else node


def quantization(subject: Subject) -> Iterator[Problem]:
    """Rule 6: scales, zero points, axes and neighbours of every Q and DQ are those that the parser takes.

    Source: onnx-tensorrt ``onnxOpImporters.cpp``, ``QuantDequantLinearHelper``; TensorRT documentation, "Working with
    Quantized Types"; the builder of TensorRT for RTX 1.7, which takes INT8 between any two operators.
    """
    for node in subject.nodes:
        if is_onnx(node, Q, DQ):
            yield from _scale(node, subject)
            yield from _zero_point(node, subject)
            yield from _granularity(node, subject)
            yield from _types(node, subject)
            yield from _readers(node) if node.op_type == Q else _source(node, subject)
        elif is_onnx(node, *GEMMS):
            yield from _product(node, subject)
            yield from _types_of_scales(node, subject)


def _product(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    """Both operands of a product are quantized to one type, or the DQ of one is a kernel of its own.

    Source: the builder of TensorRT for RTX 1.7, asked about every product of two types and granularities.
    """
    sources = [dequantized(operand(node, i)) for i in (0, 1)]
    first, second = (None if dq is None else subject.inference.dtype(operand(dq, 0)) for dq in sources)
    if first is None or second is None or (first == second and first not in FOUR_BITS):
        return
    scales = [subject.inference[operand(dq, 1)].dims for dq in sources if dq is not None]
    is_blocked = any(scale is not None and len(scale) > 1 for scale in scales)
    if math.prod(scales[1] or ()) > 1 and is_onnx(node, "Conv", "ConvTranspose") and sources[1] is not None:
        is_blocked |= axis_of(sources[1], subject) != (0 if node.op_type == "Conv" else 1)
    is_split = any(scale is not None and math.prod(scale) > 1 for scale in scales)
    if is_onnx(node, "MatMul", "Gemm"):
        both = {first, second}
        is_taken = both == {ir.DataType.INT4} or (both == {ir.DataType.INT8, ir.DataType.INT4} and is_split)
    elif is_onnx(node, "ConvTranspose"):
        is_taken = is_blocked or ir.DataType.INT8 in (first, second)
    else:
        is_taken = is_blocked
    if not is_taken:
        found = f"it multiplies {type_name(first)} with {type_name(second)}"
        yield error(node, found, "quantize both operands to INT8 or FP8, or one of them alone")


def _types_of_scales(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    """The scales of both operands of a MatMul have one type if one of them has several numbers.

    Source: the builder of TensorRT for RTX 1.7, "type mismatch between matmul operand scales", Casts or not; it takes
    those of a Gemm and a Conv, and two single numbers.
    """
    scales = [subject.inference[operand(dq, 1)] for dq in _dequantizers(node)]
    if not is_onnx(node, "MatMul") or len(scales) != 2 or all(math.prod(scale.dims or ()) == 1 for scale in scales):
        return
    first, second = (scale.dtype for scale in scales)
    if first is not None and second is not None and first != second:
        found = f"the scales of its operands are {type_name(first)} and {type_name(second)}"
        yield error(node, found, "one type for both: that of the data around them")


def _dequantizers(node: ir.Node) -> list[ir.Node]:
    """Return the DQs of the two operands of a product, seen through Casts; fewer where one is not quantized."""
    sources = [made_by(operand(node, i), "Cast") for i in (0, 1)]
    return [source for source in sources if source is not None and is_onnx(source, DQ)]


def _scale(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    value = operand(node, 1)
    tensor = subject.stored(value)
    if value is None:
        yield error(node, "it has no scale", "store the scale as an initializer")
        return
    if tensor is None:
        source = value.producer()
        quantized = operand(source, 0) if source is not None and is_onnx(source, DQ) else None
        is_int8 = subject.stored(quantized) is not None and subject.inference.dtype(quantized) == ir.DataType.INT8
        make = error if is_int8 else warning  # the builder folds such a DQ, and then finds INT8 that no DQ reads
        found = "is a dequantized constant" if is_int8 else "is computed"
        yield make(node, f"its scale {value.name} {found}", "store the scale as an initializer")
        return
    dtype = subject.inference.dtype(value)
    if dtype is None or dtype not in _SMALLEST_NORMAL:
        yield error(node, f"its scale is {type_name(dtype)}", "FP32, FP16 or BF16")
        return
    array = subject.read(tensor)
    if array is None:
        yield error(node, f"its scale {value.name} cannot be read")
        return
    scale = array.astype(np.float64)
    make = error if _is_asked(node, value, subject) else warning
    if not scale.size:
        yield error(node, "its scale has no elements")
    elif np.isnan(scale).any():
        yield make(node, "its scale is no number", "calibrate anew, with more data")
    elif (scale <= 0).any():
        hint = "a scale that became 0 underflowed: keep it in FP32, or merge it with its neighbour"
        yield make(node, f"its scale is {scale.min():g}: the parser takes only positive ones", hint)
    elif np.isinf(scale).any():
        yield warning(node, "its scale is not finite", "calibrate anew, with more data")
    elif (scale < _SMALLEST_NORMAL[dtype]).any():
        found = f"its scale {scale.min():g} is subnormal in {type_name(dtype)}"
        yield warning(node, found, "it is not exact, and a GPU may flush it to 0: keep the pair in FP32")


def _is_asked(node: ir.Node, scale: ir.Value, subject: Subject) -> bool:
    """Say whether the parser asks that a scale is positive: not that of a DQ of INT4, nor one behind an Identity."""
    source = scale.producer()
    if source is not None and is_onnx(source, "Identity"):
        return False
    return node.op_type == Q or subject.inference.dtype(operand(node, 0)) != ir.DataType.INT4


def _zero_point(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    value = operand(node, 2)
    if value is None:
        if node.op_type == Q and not attribute(node, "output_dtype", 0):
            hint = "write an INT8 zero point of 0"
            yield differs(node, "it has no zero point: ONNX means UINT8, TensorRT INT8", hint)
        return
    dtype = subject.inference.dtype(value)
    if dtype == ir.DataType.FLOAT8E4M3FN:
        return  # the parser does not look at it
    array = subject.constant(value)
    if array is None:
        yield error(node, f"its zero point {value.name} is no constant", "store it as an initializer")
    elif array.astype(np.float64).any():
        yield error(node, "its zero point is not 0", _SYMMETRIC)
    elif dtype not in QUANTIZED and node.op_type == Q:
        yield differs(node, f"its zero point is {type_name(dtype)}: TensorRT takes INT8 for it", _SYMMETRIC)
    scale = subject.inference[operand(node, 1)].dims
    if array is not None and scale is not None and array.size != math.prod(scale):
        yield error(node, f"{math.prod(scale)} scales and {array.size} zero points", "one for each scale")


def axis_of(node: ir.Node, subject: Subject) -> int:
    """Return the axis of a Q or DQ as it is written; before opset 13 the parser takes 0 by default."""
    return attribute(node, "axis", 1 if subject.opset >= 13 else 0)


def _granularity(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    """One scale for the tensor, one for each index of an axis, or one for each block of an axis.

    That there are blocks is seen by the shape of the scale; ``block_size`` is not read.
    """
    scale, data = subject.inference[operand(node, 1)].dims, subject.inference[operand(node, 0)].dims
    if scale is None or data is None or (math.prod(scale) == 1 and len(scale) < 2):
        return
    axis = axis_of(node, subject)
    if not -len(data) <= axis < len(data):
        yield error(node, f"axis {axis} of a tensor with {len(data)} dimensions")
    elif len(scale) == 1:
        if axis % len(data) in dynamic_axes(data):
            yield error(node, f"one scale for each index of axis {axis}, which is dynamic", "another axis")
        elif scale[0] != data[axis]:
            found = f"{scale[0]} scales for axis {axis}, which has {data[axis]}"
            yield error(node, found, "one for each index of the axis")
    elif len(scale) != len(data):
        hint = "one value, one for each index of an axis, or as many dimensions as the data"
        yield error(node, f"its scale has shape {list(scale)}", hint)
    else:
        yield from _blocks(node, scale, data, axis % len(data))


def _blocks(node: ir.Node, scale: Dims, data: Dims, axis: int) -> Iterator[Problem]:
    others = [i for i in range(len(data)) if i != axis and scale[i] != data[i]]
    if others:
        yield error(node, f"a scale {list(scale)} for data {list(data)}", f"blocks on axis {axis} alone")
    elif axis < len(data) - 2:
        yield error(node, f"blocks on axis {axis} of {len(data)}", "on one of the last two axes")
    elif not scale[axis] or data[axis] % scale[axis]:
        yield error(node, f"{scale[axis]} blocks on axis {axis}, which has {data[axis]}", "blocks of one size")
    elif scale[axis] == data[axis]:
        yield error(node, f"blocks of one element on axis {axis}", "larger blocks")


def _types(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    dtype = subject.inference.dtype
    data, scale = dtype(operand(node, 0)), dtype(operand(node, 1))
    if node.op_type == Q:
        if data is not None and data not in FLOATS | {ir.DataType.DOUBLE}:
            yield error(node, f"it quantizes {type_name(data)}", "FP32, FP16 or BF16")
        elif data in FLOATS and scale in FLOATS and data != scale:
            is_taken = _takes_scale(data, scale, dtype(node.outputs[0]))
            make = warning if is_taken and (subject.opset < 19 or subject.version >= _MIXED_SINCE) else error
            found = f"its scale is {type_name(scale)}, its data are {type_name(data)}"
            yield make(node, found, "one type for both: Cast the scale when it is stored")
        made = dtype(node.outputs[0])
        if made is not None and made not in QUANTIZED:
            yield error(node, f"it quantizes to {type_name(made)}", _SYMMETRIC)
        quantized = made
    else:
        made = data_type(attribute(node, "output_dtype", 0))
        if made is not None and made not in FLOATS:
            yield error(node, f"it dequantizes to {type_name(made)}", "FP32, FP16 or BF16")
        if data is not None and data not in QUANTIZED:
            hint = "keep the bias in floating point" if data == ir.DataType.INT32 else _SYMMETRIC
            yield error(node, f"it dequantizes {type_name(data)}", hint)
        zero_point = dtype(operand(node, 2))
        if data in QUANTIZED and zero_point is not None and zero_point != data:
            found = f"its data are {type_name(data)}, its zero point is {type_name(zero_point)}"
            yield warning(node, found, "one type for both, as ONNX asks: TensorRT does not look")
        quantized = data
    dims = subject.inference[operand(node, 0)].dims
    is_static = dims is not None and not dynamic_axes(dims)
    if quantized in FOUR_BITS and is_static and math.prod(dims or ()) % 2:
        yield error(node, f"{type_name(quantized)} needs an even number of elements", "pad the tensor")


def _takes_scale(data: ir.DataType | None, scale: ir.DataType | None, quantized: ir.DataType | None) -> bool:
    """Say whether the builder quantizes with a scale of another type: to INT8 with any, else with an FP32 one."""
    if quantized == ir.DataType.INT8:
        return True
    return scale == ir.DataType.FLOAT and data != scale and quantized != ir.DataType.FLOAT4E2M1


def _readers(node: ir.Node) -> Iterator[Problem]:
    """Between a Q and its DQ stands nothing: what stands there computes with integers, and costs a fusion."""
    for output in node.outputs[:1]:
        if output.is_graph_output():
            yield warning(node, f"its result {output.name} is an output of the graph", "dequantize it first")
        readers = list(output.consumers())
        if not readers and not output.is_graph_output():
            yield warning(node, "nothing dequantizes its result", "remove it, or let a DQ read it")
        for reader in readers:
            if not is_onnx(reader, DQ) or reader.inputs[0] is not output:
                hint = "move it before the Q or behind the DQ: TensorRT commutes it by itself"
                yield warning(node, f"its result is read by {reader.op_type}, not by a DQ", hint)


def _source(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    """A DQ reads what its Q made, with the same parameters, or a stored INT8 weight."""
    value = operand(node, 0)
    producer = None if value is None else value.producer()
    if value is None:
        yield error(node, "it has no data")
    elif producer is not None and is_onnx(producer, Q):
        yield from _pair(producer, node, subject)
    elif subject.stored(value) is None and not value.is_graph_input():
        found = "nothing" if producer is None else producer.op_type
        yield warning(node, f"its data come from {found}", "a Q, or an INT8 initializer")


def _pair(q: ir.Node, dq: ir.Node, subject: Subject) -> Iterator[Problem]:
    scales = [subject.constant(operand(node, 1)) for node in (q, dq)]
    if scales[0] is not None and scales[1] is not None and not _same(scales[0], scales[1]):
        yield warning(dq, f"its scale is not that of its Q {q.name}", "let both read one initializer")
    is_per_axis = scales[0] is not None and scales[0].size > 1
    dims = subject.inference[operand(q, 0)].dims
    rank = 0 if dims is None else len(dims)
    axes = [axis + rank if axis < 0 else axis for axis in (axis_of(q, subject), axis_of(dq, subject))]
    if is_per_axis and axes[0] != axes[1]:
        yield warning(dq, f"its axis is {axes[1]}, that of its Q {q.name} is {axes[0]}")


def _same(a: Array, b: Array) -> bool:
    """Values alone count: a scale may be a scalar here and have one element there."""
    return a.size == b.size and bool((a.reshape(-1).astype(np.float64) == b.reshape(-1).astype(np.float64)).all())


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
    if len(_dequantizers(node)) == 2:
        yield from _wide_scales(node, subject)
    elif None in types and types != [None, None]:
        stored = next(dtype for dtype in types if dtype is not None)
        if stored not in FOUR_BITS:  # these quantize weights alone, on purpose
            found = f"operand {types.index(None)} of {node.op_type} is not quantized, the other is"
            yield warning(node, found, "quantize both: half a quantized GEMM runs in floating point")
    for i, value in enumerate(pair):
        if types[i] is not None and is_weight(value, subject):
            yield from _weight(node, i, subject)


def _wide_scales(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    """FP32 scales where all else is FP16: the product writes FP32, which a Cast then reads."""
    types = {subject.inference.dtype(operand(dq, 1)) for dq in _dequantizers(node)}
    casts = [reader for reader in node.outputs[0].consumers() if is_onnx(reader, "Cast")]
    around = [*node.inputs[:2], *(value for cast in casts for value in cast.outputs)]
    half = next((dtype for value in around if (dtype := subject.inference.dtype(value)) in _HALVES), None)
    if types == {ir.DataType.FLOAT} and half is not None:
        found = f"the scales of its operands are FP32, and what is around it is {type_name(half)}"
        hint = "scales of the type of the data, without Casts: the product then writes half the bytes"
        yield warning(node, found, hint)


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
        if dims is not None and dims[channel] != 1 and not _is_one_of_several(node, position, dq):
            yield warning(
                dq, f"one scale for all channels of the weight of {node.op_type}", f"one each, axis {channel}"
            )
    elif axis_of(dq, subject) % rank != channel:
        found = f"scales along axis {axis_of(dq, subject)} of the weight of {node.op_type}"
        yield warning(dq, found, f"axis {channel}, the output channels: a sum cannot be scaled term by term")


def _is_one_of_several(node: ir.Node, position: int, dq: ir.Node) -> bool:
    """Say whether products of one value have weights of one scale: query, key and value, which are then one kernel."""
    value, scale = operand(node, 1 - position), operand(dq, 1)
    beside = [] if value is None else [n for n in value.consumers() if _is_gemm(n) and n is not node]
    scales = [None if (other := dequantized(operand(n, position))) is None else operand(other, 1) for n in beside]
    return bool(scales) and all(each is scale for each in scales)


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
    for found in subject.attentions:
        types = [quantized_type(value, subject) for value in found.operands]
        products = [all(types[:2]), all(types[2:])]
        if products[0] != products[1]:
            which, other = ("first", "second") if products[0] else ("second", "first")
            message = f"the {which} product of the attention is quantized, the {other} is not"
            yield warning(found.softmax, message, "quantize both, or neither")
        if types[0] == ir.DataType.INT8:
            for text in int8_limits(found, subject):
                yield warning(found.softmax, text, "keep this attention in FP16")
