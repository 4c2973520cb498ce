"""Rules 3, 4, 5, 7 and 8: element types, and the operators whose restrictions a graph can break."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from exporters.tensorrt.lint.element_types import allowed_types, attribute, formal, is_onnx, schema_of
from exporters.tensorrt.lint.inference import declared_type
from exporters.tensorrt.lint.problem import error, listed, type_name, warning
from exporters.tensorrt.lint.subject import operand

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exporters.tensorrt.lint.problem import Problem
    from exporters.tensorrt.lint.subject import Subject

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

QUANTIZED = frozenset(
    {ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1, ir.DataType.UINT8}
)
"""Types that exist between Q and DQ only; UINT8 also at the edge of the graph."""

_PLAIN = FLOATS | {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL}

_QDQ = ("QuantizeLinear", "DequantizeLinear")

_DATA_OPERAND = {"OneHot": 2, "Where": 1}
"""Position of the operand of which the table's element types speak, where it is not the first."""

_JUDGED_BY_OUTPUT = frozenset({"Constant", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform"})

_NOT_JUDGED = frozenset({"DequantizeLinear", "If", "Loop", "QuantizeLinear", "Scan"})


def supported_types(subject: Subject) -> Iterator[Problem]:
    """Rule 3: every tensor has a type that TensorRT has, and every operator one that it takes.

    Source: onnx-tensorrt docs/operators.md: the list of types ("DOUBLE is cast to FLOAT", "UINT8 is only supported as
    network input or output", INT8, INT4, FP8 and FP4 "only through quantization") and the column "Supported Types".
    """
    dtype = subject.inference.dtype
    values: dict[ir.Value, None] = dict.fromkeys(subject.graph.inputs)
    for graph in (subject.graph, *subject.graph.subgraphs()):
        values.update(dict.fromkeys(graph.initializers.values()))
    for node in subject.nodes:
        values.update(dict.fromkeys(node.outputs))
    for value in values:
        yield from _type_of_value(value, dtype(value), subject)
    for node in subject.nodes:
        supported = subject.operators.types.get(node.op_type)
        if not is_onnx(node) or supported is None or node.op_type in _NOT_JUDGED:
            continue
        data = operand(node, _DATA_OPERAND.get(node.op_type, 0))
        if node.op_type in _JUDGED_BY_OUTPUT:
            data = node.outputs[0]
        found = dtype(data)
        if found in _PLAIN and found not in supported:
            names = sorted(t.name for t in supported)
            yield error(node, f"{node.op_type} has no {type_name(found)} form", f"Cast to one of {listed(names, 9)}")


def _type_of_value(value: ir.Value, dtype: ir.DataType | None, subject: Subject) -> Iterator[Problem]:
    name, producer = value.name or "", value.producer()
    where: ir.Node | str = name if producer is None else producer
    if dtype is None or dtype in _PLAIN:
        return
    if dtype == ir.DataType.DOUBLE:
        yield warning(where, f"{name} is DOUBLE: TensorRT computes it in FP32", "make it FP32")
    elif dtype not in QUANTIZED:
        yield error(where, f"{name} is {type_name(dtype)}, which TensorRT does not have", "Cast it before the export")
    elif not (producer is not None and is_onnx(producer, *_QDQ)):  # what a Q makes is rule 6's
        readers = [n for n in value.consumers() if not is_onnx(n, *_QDQ)]
        if dtype == ir.DataType.UINT8:
            # At the edge it may be: an input that is cast at once, an output that a Cast makes.
            from_edge = value.is_graph_input() and value.const_value is None
            to_edge = value.is_graph_output() and producer is not None and is_onnx(producer, "Cast") and not readers
            if not to_edge and not (from_edge and all(is_onnx(n, "Cast") for n in readers)):
                if value.consumers() and not readers and not from_edge:
                    return  # data or a zero point of Q/DQ: rule 6's
                yield error(where, f"{name} is UINT8 inside the graph", "UINT8 may be an input or output that is cast")
        elif readers or value.is_graph_output():
            by = f"is read by {listed(n.op_type for n in readers)}" if readers else "is an output"
            yield error(where, f"{name} is {type_name(dtype)} and {by}", "only Q/DQ pairs hold quantized types")


_ALSO_EQUAL = {"Attention": (0, 1, 2), "Pow": (0, 1), "RMSNormalization": (0, 1)}
"""Operands that ONNX lets differ in type and a strongly typed network does not."""


def strong_typing(subject: Subject) -> Iterator[Problem]:
    """Rule 4: the operands of an operator agree in type, as ONNX and a strongly typed network ask.

    Source: ONNX operator schemas (one type parameter, one type); TensorRT documentation, "Strongly Typed Networks":
    types are never converted silently. Declared types must be those that follow: strict readers refuse the file.
    """
    dtype = subject.inference.dtype
    for node in subject.nodes:
        schema = schema_of(node, subject.opset)
        if schema is None or node.op_type in _QDQ:  # those are rule 6's
            continue
        groups: dict[str, list[tuple[str, ir.DataType]]] = {}
        for i, value in enumerate(node.inputs):
            found, parameter = dtype(value), formal(schema.inputs, i)
            if found is None or parameter is None or value is None:
                continue
            allowed = allowed_types(schema, parameter.type_str)
            if allowed and found not in allowed:
                takes = listed(sorted(t.name for t in allowed), 4)
                yield error(node, f"{parameter.name} is {type_name(found)}", f"opset {subject.opset} takes {takes}")
            if parameter.is_homogeneous:
                groups.setdefault(parameter.type_str, []).append((value.name or "", found))
        extra = [(operand(node, i), dtype(operand(node, i))) for i in _ALSO_EQUAL.get(node.op_type, ())]
        groups["together"] = [(v.name or "", t) for v, t in extra if v is not None and t is not None]
        for members in groups.values():
            if len({t for _, t in members}) > 1:
                found_types = listed((f"{name} is {type_name(t)}" for name, t in members), 6)
                hint = "Cast one of them; TensorRT converts no type by itself"
                yield error(node, f"operands of {node.op_type} differ in type: {found_types}", hint)
                break
    yield from _declared_types(subject)


def _declared_types(subject: Subject) -> Iterator[Problem]:
    inner = [v for graph in subject.graph.subgraphs() for v in graph.inputs]
    values = [output for node in subject.nodes for output in node.outputs] + inner
    values += [v for v in subject.graph.inputs if v.const_value is not None] + list(subject.graph.initializers.values())
    for value in dict.fromkeys(values):
        declared, found = declared_type(value), subject.inference.dtype(value)
        if declared is not None and found is not None and declared != found:
            producer = value.producer()
            where: ir.Node | str = (value.name or "") if producer is None else producer
            message = f"{value.name} is declared {type_name(declared)}, it is {type_name(found)}"
            yield error(where, message, "infer the types anew, or Cast it")


_ONE_RESULT = frozenset({"LayerNormalization", "BatchNormalization", "MaxPool", "GroupNormalization"})


def inference_only(subject: Subject) -> Iterator[Problem]:
    """Rule 5: normalisations have one result, and nothing trains.

    A second result that has a name is refused even where nothing reads it.

    Source: onnx-tensorrt docs/operators.md: "Only the first output Y is supported", "is_training must be an initializer
    and evaluate to False", "Indices output tensor unsupported".
    """
    for node in subject.nodes:
        if not is_onnx(node):
            continue
        name = node.op_type
        extra = [o.name or "" for o in node.outputs[1:] if o.name]
        if name in _ONE_RESULT and extra:
            yield error(node, f"{name} has more than one result: {listed(extra)}", "keep the first only")
        if name in ("LayerNormalization", "RMSNormalization"):
            rank, axis = subject.inference[operand(node, 0)].rank, attribute(node, "axis", -1)
            if rank is not None and not -rank <= axis < rank:
                yield error(node, f"axis {axis} of a tensor with {rank} dimensions")
        if name == "BatchNormalization" and attribute(node, "training_mode", 0):
            yield error(node, "BatchNormalization trains", "export the model in evaluation mode")
        if name == "Dropout":
            yield from _dropout(node, subject)


def _dropout(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    mode = operand(node, 2)
    training = subject.constant(mode)
    if mode is not None and (training is None or training.any()):
        yield error(node, "Dropout trains, or may", "export the model in evaluation mode")
    elif any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        yield error(node, "the mask of Dropout is read")
    else:
        yield warning(node, "Dropout is left in the graph", "remove it: it returns its operand")


_FORBIDDEN_OPERANDS = ("past_key", "past_value", "nonpad_kv_seqlen")


def attention_operator(subject: Subject) -> Iterator[Problem]:
    """Rule 7: ONNX's Attention has the operands, attributes and single result that the parser takes.

    Source: onnx-tensorrt docs/operators.md, row Attention; NVIDIA/TensorRT issues 4738 and 4739 (several results, and
    Attention inside an If). ``TRT_decomposable`` and ``TRT_normalization_op`` are the parser's own attributes: ONNX's
    checker and ONNX Runtime refuse a model that has them.
    """
    for node in subject.nodes:
        if not is_onnx(node, "Attention"):
            continue
        extra = [o.name or "" for o in node.outputs[1:] if o.name]
        if extra:
            yield error(node, f"it has more than one result: {listed(extra)}", "keep the first only")
        for i, name in enumerate(_FORBIDDEN_OPERANDS, 4):
            if operand(node, i) is not None:
                yield error(node, f"its operand {name} is not supported")
        for name in ("qk_matmul_output_mode", "softmax_precision"):
            if attribute(node, name, 0):
                yield error(node, f"its attribute {name} is not supported")
        if attribute(node, "softcap", 0.0):
            yield error(node, "its attribute softcap is not supported")
        for name in ("TRT_decomposable", "TRT_normalization_op"):
            if name in node.attributes:
                hint = "set it on the layer of the TensorRT network; ONNX's checker and ONNX Runtime refuse it here"
                yield error(node, f"{name} is no attribute of ONNX", hint)
        if node.graph is not subject.graph:
            make = error if subject.version < (11,) else warning  # seen to fail in 10.16
            yield make(node, "Attention inside the body of a control-flow operator", "move it out")
        yield from _attention_operands(node, subject)


def _attention_operands(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    inference = subject.inference
    heads = attribute(node, "q_num_heads", 0) and attribute(node, "kv_num_heads", 0)
    for name, value in zip(("Q", "K", "V"), node.inputs, strict=False):
        rank = inference[value].rank
        if rank is not None and rank != 4 and not (rank == 3 and heads):
            yield error(node, f"{name} has {rank} dimensions", "[batch, heads, tokens, channels]")
    mask = inference[operand(node, 3)]
    if mask.rank is not None and mask.rank > 4:
        yield error(node, f"its mask has {mask.rank} dimensions", "at most 4, broadcastable to [B, N, Sq, Skv]")
    query = inference.dtype(operand(node, 0))
    if mask.dtype is not None and query is not None and mask.dtype not in (ir.DataType.BOOL, query):
        yield error(node, f"its mask is {type_name(mask.dtype)}, Q is {type_name(query)}", "BOOL, or the type of Q")


def gemm(subject: Subject) -> Iterator[Problem]:
    """Rule 8: a Gemm multiplies matrices and scales nothing.

    Source: onnx-tensorrt ``onnxOpImporters.cpp``: for alpha or beta other than 1 the importer adds an FP32 constant,
    which a strongly typed FP16 network refuses. In FP32 it is a multiplication that could be in the weights.
    """
    for node in subject.nodes:
        if not is_onnx(node, "Gemm"):
            continue
        dtype = subject.inference.dtype(operand(node, 0))
        factors = {"alpha": attribute(node, "alpha", 1.0)}
        if operand(node, 2) is not None:
            factors["beta"] = attribute(node, "beta", 1.0)
        for name, factor in factors.items():
            if np.float32(factor) != 1:
                make = warning if dtype == ir.DataType.FLOAT else error
                found = f"{name} is {factor:g}, and becomes an FP32 constant"
                yield make(node, found, "multiply it into the weight or the bias")
        for i in (0, 1):
            rank = subject.inference[operand(node, i)].rank
            if rank not in (None, 2):
                yield error(node, f"operand {i} has {rank} dimensions", "2: use MatMul, or reshape it")
