"""Element types, operator by operator, as a strongly typed network derives them.

The types follow from ONNX's own operator schemas and from a few attributes. Nothing is taken from what the file
declares of its intermediate values: declarations may lie, and TensorRT does not read them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import onnx
import onnx_ir as ir

from deploycli.exporters.graph.operators import QDQ, WINDOWS, is_onnx

if TYPE_CHECKING:
    from collections.abc import Callable

    Type = ir.DataType | None
    TypeOf = Callable[[ir.Value | None], Type]

T = TypeVar("T")

QUANTIZED = frozenset({ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1})
"""What a Q may make and a DQ may read."""

_BY_NAME = {f"tensor({t.name.lower()})": t for t in ir.DataType}

_TYPE_ATTRIBUTE = {
    "Bernoulli": "dtype",
    "BlackmanWindow": "output_datatype",
    "Cast": "to",
    "EyeLike": "dtype",
    "HammingWindow": "output_datatype",
    "HannWindow": "output_datatype",
    "MelWeightMatrix": "output_datatype",
    "Multinomial": "dtype",
    "RandomNormal": "dtype",
    "RandomNormalLike": "dtype",
    "RandomUniform": "dtype",
    "RandomUniformLike": "dtype",
}

_MAKES_FLOATS = WINDOWS | {"MelWeightMatrix", "RandomNormal", "RandomUniform"}


def attribute(node: ir.Node, name: str, default: T) -> T:
    """Return an attribute that has the type of its default, or else the default: a file may hold any type."""
    found = node.attributes.get(name)
    value: Any = None if found is None or found.is_ref() else found.value
    if isinstance(default, float) and isinstance(value, int):
        value = float(value)
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        value = type(default)(value)
    return value if isinstance(value, type(default)) else default


_NEWEST = onnx.defs.onnx_opset_version()


@cache
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except TypeError:  # the name is no text
        return None
    except onnx.defs.SchemaError:  # TensorRT reads an operator that is newer than the opset, too
        return None if opset == _NEWEST else _schema(op_type, _NEWEST)


def schema_of(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    """Return ONNX's definition of an operator, or None where it has none."""
    return _schema(node.op_type, min(max(opset, 1), _NEWEST)) if is_onnx(node) else None


def formal(parameters: Any, position: int) -> onnx.defs.OpSchema.FormalParameter | None:
    """Return the formal parameter that an operand stands for; the last one may be variadic."""
    if position < len(parameters):
        found: onnx.defs.OpSchema.FormalParameter = parameters[position]
        return found
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    return parameters[-1] if parameters and parameters[-1].option == variadic else None


def allowed_types(schema: onnx.defs.OpSchema, type_str: str) -> frozenset[ir.DataType]:
    """Return the element types that a type parameter may take; empty where tensors are not what it takes."""
    if type_str in _BY_NAME:
        return frozenset({_BY_NAME[type_str]})
    names = next((c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == type_str), ())
    return frozenset(_BY_NAME[name] for name in names if name in _BY_NAME)


def derive(node: ir.Node, type_of: TypeOf, opset: int) -> list[Type]:
    """Return the element types of a node's outputs; None where they do not follow."""
    inputs = [type_of(value) for value in node.inputs]
    special = _special(node, inputs, type_of)
    schema = schema_of(node, opset)
    derived: list[Type] = []
    for i in range(len(node.outputs)):
        own: Type = special[i] if i < len(special) else None
        parameter = None if own is not None or schema is None else formal(schema.outputs, i)
        if parameter is not None and schema is not None and parameter.is_homogeneous:
            own = _from_schema(schema, parameter.type_str, inputs)
        derived.append(own)
    return derived


def _from_schema(schema: onnx.defs.OpSchema, type_str: str, inputs: list[Type]) -> Type:
    """An output has the type of the first operand that shares its type parameter, or the only one there is."""
    for i, dtype in enumerate(inputs):
        parameter = formal(schema.inputs, i)
        if dtype is not None and parameter is not None and parameter.type_str == type_str:
            return dtype
    allowed = allowed_types(schema, type_str)
    return next(iter(allowed)) if len(allowed) == 1 else None


def _special(node: ir.Node, inputs: list[Type], type_of: TypeOf) -> list[Type]:
    """Derive the types that an attribute, a second operand or a body decides."""
    if not is_onnx(node):
        return []
    key = _TYPE_ATTRIBUTE.get(node.op_type)
    if key is not None and attribute(node, key, 0):
        return [data_type(attribute(node, key, 0))]
    if node.op_type in _MAKES_FLOATS:
        return [ir.DataType.FLOAT]
    if node.op_type in ("EyeLike", "Bernoulli", "RandomNormalLike", "RandomUniformLike"):
        return inputs[:1]
    if node.op_type == "CastLike":
        return inputs[1:2]
    if node.op_type == "Constant":
        return [_constant_type(node)]
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        is_tensor = value is not None and value.type == ir.AttributeType.TENSOR and value.value is not None
        return [value.value.dtype if is_tensor and value is not None else ir.DataType.FLOAT]
    if node.op_type in QDQ:
        given = data_type(attribute(node, "output_dtype", 0))
        if node.op_type == "DequantizeLinear":
            return [given or (inputs[1] if len(inputs) > 1 else None)]
        # Without a zero point, or with one of another type, the parser takes INT8; without one ONNX means UINT8.
        zero_point = inputs[2] if len(inputs) > 2 else None
        return [given or (zero_point if zero_point in QUANTIZED else ir.DataType.INT8)]
    return _of_bodies(node, type_of)


def _constant_type(node: ir.Node) -> Type:
    for name, dtype in (("value_float", ir.DataType.FLOAT), ("value_int", ir.DataType.INT64)):
        if name in node.attributes or f"{name}s" in node.attributes:
            return dtype
    if "value_string" in node.attributes or "value_strings" in node.attributes:
        return ir.DataType.STRING
    value = node.attributes.get("value")
    if value is None or value.type != ir.AttributeType.TENSOR or value.value is None:
        return None
    dtype = value.value.dtype
    return dtype if isinstance(dtype, ir.DataType) else None


def _of_bodies(node: ir.Node, type_of: TypeOf) -> list[Type]:
    """The outputs of a control-flow operator are those of its body; of a Loop, after the condition."""
    name = {"If": "then_branch", "Loop": "body", "Scan": "body"}.get(node.op_type)
    body = node.attributes.get(name) if name else None
    if body is None or body.type != ir.AttributeType.GRAPH:
        return []
    outputs = list(body.value.outputs)[1 if node.op_type == "Loop" else 0 :]
    return [type_of(value) for value in outputs]


def data_type(number: int) -> Type:
    """Return the element type of a number in a file; None where it stands for none."""
    try:
        dtype = ir.DataType(number)
    except ValueError:
        return None
    return None if dtype == ir.DataType.UNDEFINED else dtype
