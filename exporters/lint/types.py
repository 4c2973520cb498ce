"""Rules 3, 4, 5, 8 and 20: element types, operators whose restrictions a graph can break, and the GPUs for both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.operators import DRAWN, QDQ, WINDOWS, is_onnx, operand
from deploycli.exporters.graph.unique import listed
from deploycli.exporters.lint.element_types import allowed_types, attribute, formal, schema_of
from deploycli.exporters.lint.inference import declared_type
from deploycli.exporters.lint.report import differs, error, name_of, type_name, warning
from deploycli.exporters.target.targets import NEEDS, dotted, lacking, named, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from deploycli.exporters.lint.report import Problem
    from deploycli.exporters.lint.subject import Subject

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

PLAIN = FLOATS | {ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL}

LOW_BITS = frozenset({ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1})
"""Types that exist between Q and DQ only, and there may be moved."""

_MOVES = (
    *("Concat", "DepthToSpace", "Dropout", "Flatten", "Identity", "Reshape", "Shape", "Size", "SpaceToDepth"),
    "Transpose",
)
"""What may stand between a Q and its DQ, and at the edge of the graph: ``validateQuantizedTypesProducersConsumers``."""

_MAKES_UINT8 = ("Cast", "CastLike", "Identity")

_DATA_OPERAND = {"OneHot": 2, "Where": 1}
"""Position of the operand of which the table's element types speak, where it is not the first."""

_MADE_BY_ATTRIBUTE = WINDOWS | DRAWN
"""Their type is an attribute, and the importer takes it for what it is: DOUBLE is not FP32 there."""

_JUDGED_BY_OUTPUT = _MADE_BY_ATTRIBUTE | {"Constant", "ConstantOfShape", "EyeLike"}

_NOT_JUDGED = frozenset({"If", "Loop", "Scan", *QDQ})


def supported_types(subject: Subject) -> Iterator[Problem]:
    """Rule 3: every tensor has a type that TensorRT has, and every operator one that it takes.

    INT8 is a type like others, but not of stored tensors: these are for a DQ. UINT8 is a type of inputs and outputs.

    Source: onnx-tensorrt docs/operators.md: the list of types ("DOUBLE is cast to FLOAT", "UINT8 is only supported as
    network input or output", INT8, INT4, FP8 and FP4 "only through quantization") and the column "Supported Types", as
    far as the parser and the compiler of TensorRT for RTX 1.7 hold to them: they take INT8 in many operators.
    """
    dtype = subject.inference.dtype
    values: dict[ir.Value, None] = dict.fromkeys(subject.graph.inputs)
    for graph in (subject.graph, *subject.graph.subgraphs()):
        values.update(dict.fromkeys(graph.initializers.values()))
    for node in subject.nodes:
        values.update(dict.fromkeys(node.outputs))
    for value in values:
        yield from _type_of_value(value, dtype(value), subject)
    for result in subject.graph.outputs:  # the parser reads what is declared of them, and of no other result
        shown = declared_type(result)
        if shown not in PLAIN | LOW_BITS | {ir.DataType.UINT8, ir.DataType.DOUBLE, dtype(result), None}:
            message = f"{result.name} is declared {type_name(shown)}, which TensorRT does not have"
            yield error(result.name or "", message, "declare the type that it has, or Cast it")
    for node in subject.nodes:
        supported = subject.operators.types.get(node.op_type)
        if not is_onnx(node) or supported is None or node.op_type in _NOT_JUDGED:
            continue
        data = operand(node, _DATA_OPERAND.get(node.op_type, 0))
        if node.op_type in _JUDGED_BY_OUTPUT:
            data = node.outputs[0]
        found = dtype(data)
        is_judged = found in PLAIN | {ir.DataType.UINT8} or node.op_type in _MADE_BY_ATTRIBUTE
        is_for_dq = found in (ir.DataType.INT8, ir.DataType.UINT8) and subject.stored(data) is not None
        if (
            found is not None
            and is_judged
            and found not in supported
            and not is_for_dq
            and not _is_cast_pow(node, dtype)
        ):
            names = sorted(t.name for t in supported)
            yield error(node, f"{node.op_type} has no {type_name(found)} form", f"Cast to one of {listed(names, 9)}")


def _is_cast_pow(node: ir.Node, dtype: Callable[[ir.Value | None], ir.DataType | None]) -> bool:
    """Whether the parser casts both operands of a Pow, and its result back to the type of the base: they differ."""
    base, exponent = dtype(operand(node, 0)), dtype(operand(node, 1))
    return is_onnx(node, "Pow") and None not in (base, exponent) and base != exponent


def _type_of_value(value: ir.Value, dtype: ir.DataType | None, subject: Subject) -> Iterator[Problem]:
    name, producer = value.name or "", value.producer()
    where: ir.Node | str = name if producer is None else producer
    is_stored = subject.stored(value) is not None
    if dtype is None or (dtype in PLAIN and not (is_stored and dtype == ir.DataType.INT8)):
        return
    if dtype == ir.DataType.DOUBLE:
        yield warning(where, f"{name} is DOUBLE: TensorRT computes it in FP32", "make it FP32")
    elif dtype == ir.DataType.UINT8:
        yield from _uint8(value, where, is_stored=is_stored)
    elif dtype not in LOW_BITS | {ir.DataType.INT8}:
        yield error(where, f"{name} is {type_name(dtype)}, which TensorRT does not have", "Cast it before the export")
    elif dtype in LOW_BITS or is_stored:
        moves = () if is_stored else _MOVES
        readers = [n for n in value.consumers() if is_onnx(n) and not is_onnx(n, *QDQ, *moves)]
        if producer is not None and is_onnx(producer) and not is_stored and not is_onnx(producer, *QDQ, *moves):
            yield error(where, f"{name} is {type_name(dtype)} that {producer.op_type} makes", _ONLY_QDQ)
        elif readers or (value.is_graph_output() and is_stored):
            by = f"is read by {listed(n.op_type for n in readers)}" if readers else "is an output"
            kind = f"stored {type_name(dtype)}" if is_stored else type_name(dtype)
            yield error(where, f"{name} is {kind} and {by}", _ONLY_QDQ)


_ONLY_QDQ = "only Q/DQ pairs hold quantized types"


def _uint8(value: ir.Value, where: ir.Node | str, *, is_stored: bool) -> Iterator[Problem]:
    """UINT8 may be an input, and an output that a Cast makes; which operators read it, the table says."""
    producer = value.producer()
    if is_stored:
        readers = [n for n in value.consumers() if not is_onnx(n, "Cast", *QDQ)]
        is_fine = not readers and not value.is_graph_output()  # data or a zero point of Q/DQ: rule 6's
    else:
        is_fine = value.is_graph_input() or (
            value.is_graph_output() and producer is not None and is_onnx(producer, *_MAKES_UINT8)
        )
    if not is_fine and not (producer is not None and is_onnx(producer, *QDQ)):
        yield error(where, f"{value.name} is UINT8 inside the graph", "UINT8 may be an input or output that is cast")


_ALSO_EQUAL = {"Attention": (0, 1, 2), "GridSample": (0, 1)}
"""Operands that ONNX lets differ in type and a strongly typed network does not. The importer of Pow casts."""


def strong_typing(subject: Subject) -> Iterator[Problem]:
    """Rule 4: the operands of an operator agree in type, as ONNX and a strongly typed network ask.

    Source: ONNX operator schemas (one type parameter, one type); TensorRT documentation, "Strongly Typed Networks":
    types are never converted silently. Declared types must be those that follow: strict readers refuse the file. A type
    that ONNX gave an operator later, or never, and TensorRT takes is only strange.
    """
    dtype = subject.inference.dtype
    for node in subject.nodes:
        schema = schema_of(node, subject.opset)
        if schema is None or node.op_type in QDQ:  # those are rule 6's
            continue
        groups: dict[str, list[tuple[str, ir.DataType]]] = {}
        for i, value in enumerate(node.inputs):
            found, parameter = dtype(value), formal(schema.inputs, i)
            if found is None or parameter is None or value is None:
                continue
            allowed = allowed_types(schema, parameter.type_str)
            if allowed and found not in allowed:
                takes = listed(sorted(t.name for t in allowed), 4)
                data = formal(schema.inputs, _DATA_OPERAND.get(node.op_type, 0))
                is_data = data is not None and parameter.type_str == data.type_str
                is_data = is_data or i in _ALSO_EQUAL.get(node.op_type, ())
                is_taken = found in subject.operators.types.get(node.op_type, ())
                is_moved = found in LOW_BITS and is_onnx(node, *_MOVES)
                is_narrow = found == ir.DataType.INT32 and allowed == {ir.DataType.INT64}  # indices: both are taken
                is_cast = is_onnx(node, "BatchNormalization", "RMSNormalization", *_MADE_BY_ATTRIBUTE)  # or not read
                is_cast = is_cast or (is_onnx(node, "Pow") and i == 1) or _is_cast_pow(node, dtype)
                is_carried = is_onnx(node, "Loop", "Scan") and not parameter.is_homogeneous
                make = warning if is_narrow or is_cast or is_carried or (is_data and (is_taken or is_moved)) else error
                yield make(node, f"{parameter.name} is {type_name(found)}", f"opset {subject.opset} takes {takes}")
            if parameter.is_homogeneous:
                groups.setdefault(parameter.type_str, []).append((value.name or "", found))
        extra = [(operand(node, i), dtype(operand(node, i))) for i in _ALSO_EQUAL.get(node.op_type, ())]
        groups["together"] = [(v.name or "", t) for v, t in extra if v is not None and t is not None]
        for members in groups.values():
            if len({t for _, t in members}) > 1:
                found_types = listed((f"{name} is {type_name(t)}" for name, t in members), 6)
                hint = "Cast one of them; TensorRT converts no type by itself"
                make = warning if _is_cast(node, [t for _, t in members]) else error
                yield make(node, f"operands of {node.op_type} differ in type: {found_types}", hint)
                break
        if is_onnx(node, "RMSNormalization"):
            yield from _scale_of_rms(node, subject)
    yield from _declared_types(subject)


def _is_cast(node: ir.Node, types: Sequence[ir.DataType]) -> bool:
    """Say whether the parser makes operands alike: the factors of a BatchNormalization, the limits of a Clip, the
    value of a Pad, if it looks at it at all.
    """
    if {ir.DataType.FLOAT, ir.DataType.DOUBLE}.issuperset(types):
        return True  # DOUBLE is read as FP32
    if is_onnx(node, "Pad"):
        return types[-1] in FLOATS or attribute(node, "mode", "constant") != "constant"
    return is_onnx(node, "BatchNormalization", "Clip") and FLOATS.issuperset(types)


def _scale_of_rms(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    """In ONNX its result has the type of the scale; the importer casts the scale to that of the data."""
    data, scale = (subject.inference.dtype(operand(node, i)) for i in (0, 1))
    if data is not None and scale is not None and data != scale:
        found = f"TensorRT gives a result of {type_name(data)}, ONNX one of {type_name(scale)}, as the scale is"
        yield differs(node, found, "Cast the scale")


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
            yield differs(where, message, "infer the types anew, or Cast it")


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
    else:
        yield warning(node, "Dropout is left in the graph", "remove it: it returns its operand")


_FACTORS_TYPED_SINCE = (11,)
"""First version whose importer of Gemm was seen to give its factors the type of the data."""


def gemm(subject: Subject) -> Iterator[Problem]:
    """Rule 8: a Gemm multiplies matrices and scales nothing.

    Source: onnx-tensorrt ``onnxOpImporters.cpp``: for alpha or beta other than 1 the importer adds a multiplication,
    which could be in the weights; before TensorRT 11 by an FP32 constant, which a strongly typed FP16 network refuses.
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
                make = warning if dtype == ir.DataType.FLOAT or subject.version >= _FACTORS_TYPED_SINCE else error
                found = f"{name} is {factor:g}, and becomes a multiplication"
                yield make(node, found, "multiply it into the weight or the bias")
        for i in (0, 1):
            rank = subject.inference[operand(node, i)].rank
            if rank not in (None, 2):
                yield error(node, f"operand {i} has {rank} dimensions", "2: use MatMul, or reshape it")


_FEATURE_NAMES: Mapping[ir.DataType, str] = {
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT4E2M1: "fp4",
}


def hardware_features(subject: Subject) -> dict[str, str]:
    """Return what a graph has that not every GPU computes, of `NEEDS`, each with the first place that has it."""
    found: dict[str, str] = {}
    for value in subject.graph.inputs:
        _note(found, value.dtype, value.name)
    for name, tensor in subject.tensors:
        _note(found, tensor.dtype, name)
    for node in subject.nodes:
        dtype = subject.inference.dtype(node.outputs[0])
        _note(found, dtype, name_of(node))
        if is_onnx(node, "MatMul", "Gemm", "Einsum", "Attention") and dtype == ir.DataType.FLOAT:
            found.setdefault("fp32 products", name_of(node))
    return found


def hardware(subject: Subject) -> Iterator[Problem]:
    """Rule 20: the GPUs that are named (`--gpu`) compute everything in the graph.

    Source: TensorRT for RTX, which compiles no BF16 and no matrix products in FP32 below compute capability 8.0, no FP8
    below 8.9, no FP4 below 12.0.
    """
    features = hardware_features(subject)
    for feature, targets in lacking(subject.targets, features).items():
        yield error(
            features[feature],
            f"TensorRT for RTX compiles no {shown(feature)} for {named(targets)}",
            f"another precision, or GPUs from compute capability {dotted(NEEDS[feature])}",
        )


def _note(found: dict[str, str], dtype: ir.DataType | None, where: str | None) -> None:
    if dtype is not None and dtype in _FEATURE_NAMES:
        found.setdefault(_FEATURE_NAMES[dtype], where or "graph")
