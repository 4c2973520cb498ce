"""Random damage to an ONNX message: what a broken exporter, a broken disk or a stranger could make of it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import onnx
from onnx import AttributeProto, TensorProto, helper

if TYPE_CHECKING:
    from collections.abc import Callable

NUMBERS = (-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 8, 49, 2**20, 2**31, 2**62, 2**63 - 1)
OPERATORS = (
    *("Add", "Attention", "BatchNormalization", "Cast", "CastLike", "Clip", "Concat", "Constant", "ConstantOfShape"),
    *("Conv", "DequantizeLinear", "Dropout", "Einsum", "Expand", "EyeLike", "Gather", "Gemm", "GridSample", "If"),
    *(
        "LSTM",
        "LayerNormalization",
        "Loop",
        "MatMul",
        "MaxPool",
        "Nonsense",
        "OneHot",
        "Pad",
        "QuantizeLinear",
        "Range",
    ),
    *("ReduceMean", "Reshape", "Resize", "Scan", "ScatterND", "SequenceConstruct", "Shape", "Size", "Slice", "Softmax"),
    *("Split", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze", "Where", "", "\0"),
)
ATTRIBUTES = (
    *(
        "axis",
        "block_size",
        "body",
        "dilations",
        "equation",
        "mode",
        "output_dtype",
        "perm",
        "to",
        "value",
        "value_ints",
    ),
)


def damage(model: onnx.ModelProto, seed: int) -> None:
    """Apply a few random mutations in place."""
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 4)):
        draw.choice(MUTATIONS)(model, draw)


def _names(model: onnx.ModelProto) -> list[str]:
    graph = model.graph
    names = [t.name for t in graph.initializer] + [v.name for v in (*graph.input, *graph.output)]
    return [*names, *(name for node in graph.node for name in node.output), "", "nowhere"]


def _node(model: onnx.ModelProto, draw: random.Random) -> onnx.NodeProto:
    return draw.choice(model.graph.node) if model.graph.node else model.graph.node.add(op_type="Relu", output=["made"])


def _tensor(model: onnx.ModelProto, draw: random.Random) -> onnx.TensorProto:
    tensors = model.graph.initializer
    return draw.choice(tensors) if tensors else tensors.add(name="made", data_type=1)


def _operator(model: onnx.ModelProto, draw: random.Random) -> None:
    _node(model, draw).op_type = draw.choice(OPERATORS)


def _operand(model: onnx.ModelProto, draw: random.Random) -> None:
    node, name = _node(model, draw), draw.choice(_names(model))
    if node.input and draw.random() < 0.7:
        node.input[draw.randrange(len(node.input))] = name
    else:
        node.input.append(name)


def _result(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if node.output and draw.random() < 0.5:
        del node.output[draw.randrange(len(node.output))]
    else:
        node.output.append(draw.choice(["", "more", *_names(model)]))


def _fewer(model: onnx.ModelProto, draw: random.Random) -> None:
    fields = [f for f in (model.graph.node, model.graph.initializer, model.graph.input, model.graph.output) if f]
    if not fields:
        return
    field = draw.choice(fields)
    del field[draw.randrange(len(field))]


def _order(model: onnx.ModelProto, draw: random.Random) -> None:
    nodes = list(model.graph.node)
    draw.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    node, name = _node(model, draw), draw.choice(ATTRIBUTES)
    number = draw.choice(NUMBERS)
    value = draw.choice(
        [number, float(draw.random()), [number], [0.5], "text", b"\xff", ["a"], model.graph, _tensor(model, draw)]
    )
    attribute = helper.make_attribute(name, value)
    if draw.random() < 0.1:
        attribute.ref_attr_name = "elsewhere"
    if draw.random() < 0.1:
        attribute.type = draw.choice(list(AttributeProto.AttributeType.values()))
    for i, old in reversed(list(enumerate(node.attribute))):
        if old.name == name and draw.random() < 0.9:
            del node.attribute[i]
    node.attribute.append(attribute)


def _element_type(model: onnx.ModelProto, draw: random.Random) -> None:
    dtype = draw.choice([*range(28), 99, -1])
    if draw.random() < 0.5:
        _tensor(model, draw).data_type = dtype
    else:
        values = [*model.graph.input, *model.graph.output]
        if values:
            draw.choice(values).type.tensor_type.elem_type = dtype


def _dims(model: onnx.ModelProto, draw: random.Random) -> None:
    tensor = _tensor(model, draw)
    if tensor.dims and draw.random() < 0.6:
        tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(NUMBERS)
    else:
        tensor.dims.append(draw.choice(NUMBERS))


def _input_shape(model: onnx.ModelProto, draw: random.Random) -> None:
    if not model.graph.input:
        return
    tensor_type = draw.choice(model.graph.input).type.tensor_type
    if draw.random() < 0.3:
        tensor_type.ClearField("shape")
    elif tensor_type.shape.dim:
        dim = draw.choice(tensor_type.shape.dim)
        dim.Clear()
        kind = draw.random()
        if kind < 0.4:
            dim.dim_value = draw.choice(NUMBERS)
        elif kind < 0.8:
            dim.dim_param = draw.choice(["batch", "n", ""])


def _content(model: onnx.ModelProto, draw: random.Random) -> None:
    tensor = _tensor(model, draw)
    kind = draw.random()
    if kind < 0.4 and tensor.raw_data:
        content = bytearray(tensor.raw_data)
        content[draw.randrange(len(content))] = draw.choice([0, 1, 0x7F, 0x80, 0xFF])
        tensor.raw_data = bytes(content[: draw.choice([len(content), len(content) - 1])])
    elif kind < 0.6:
        tensor.ClearField("raw_data")
    elif kind < 0.7:
        tensor.int32_data.append(draw.choice([-1, 0, 2**31 - 1]))
    else:
        tensor.data_location = TensorProto.EXTERNAL
        for key in draw.sample(["location", "offset", "length", "checksum", "nonsense"], draw.randint(0, 4)):
            value = draw.choice(["../x", "/etc/hostname", "", "weights", "0", "-1", "abc", "9" * 30, "a\0b"])
            tensor.external_data.add(key=key, value=value)


def _header(model: onnx.ModelProto, draw: random.Random) -> None:
    kind = draw.randrange(4)
    if kind == 0:
        model.ir_version = draw.choice(NUMBERS)
    elif kind == 1 and model.opset_import:
        draw.choice(model.opset_import).version = draw.choice(NUMBERS)
    elif kind == 2:
        del model.opset_import[:]
    else:
        model.opset_import.add(domain=draw.choice(["", "ai.onnx", "x"]), version=draw.choice(NUMBERS))


def _kind_of_value(model: onnx.ModelProto, draw: random.Random) -> None:
    values = [*model.graph.input, *model.graph.output]
    if values:
        value = draw.choice(values)
        value.type.Clear()
        if draw.random() < 0.5:
            value.type.sequence_type.elem_type.tensor_type.elem_type = 1


def _function(model: onnx.ModelProto, draw: random.Random) -> None:
    name = draw.choice(["Relu", "Own"])
    node = helper.make_node(draw.choice([name, "Relu"]), ["a"], ["b"], domain=draw.choice(["", "own"]))
    opsets = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("own", name, ["a"], ["b"], [node], opsets))
    called = _node(model, draw)
    called.domain, called.op_type = "own", name


MUTATIONS: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    *(_operator, _operand, _result, _fewer, _order, _attribute, _element_type, _dims, _input_shape, _content, _header),
    *(_kind_of_value, _function),
)
