"""Write ONNX files one tensor at a time.

Serialising a model in one piece holds it in memory three times: as tensors, as a message, as bytes. A protobuf message
may be written field by field, so only one tensor at a time is held in addition to the weights themselves.

Source of the field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Literal

import onnx
import onnx_ir as ir

from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

ExternalData = Literal["auto", "always", "never"]

INLINE_LIMIT = 2**31 - 2**24
"""A protobuf message ends at 2 GiB; the graph itself needs a little of it, bytes."""

_SMALL = 1024
"""Tensors below this stay in the file even with external data: shapes must be readable without it, bytes."""

_LARGE = 2**16
"""Tensors below this stay in an outline: there are scales and bounds among them, bytes."""

_ALIGNMENT = 4096
"""External tensors start on a page, so that a runtime can map them, bytes."""

_LENGTH_DELIMITED = 2
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = 7, 5, 9


def write_model(
    model: ir.Model, path: Path, external: ExternalData = "auto", *, data_name: str | None = None
) -> list[Path]:
    """Write a model; the same model always gives the same bytes.

    Files of these names are replaced, not written into: another name of theirs keeps the old content.

    Args:
        model: the model; its initializers keep their tensors.
        path: the ``.onnx`` file. External data stands beside it as ``<name>.data``.
        data_name: name of the data file in place of that.
        external: ``auto`` moves the weights to a file of their own only above 2 GiB.

    Returns:
        The files written, the model first.

    Raises:
        UsageError: external data was forbidden and the model is above 2 GiB.
    """
    tensors = {name: v.const_value for name, v in model.graph.initializers.items() if v.const_value is not None}
    total = sum(tensor.nbytes for tensor in tensors.values())
    if external == "never" and total > INLINE_LIMIT:
        raise UsageError(
            f"the weights take {total / 2**30:.1f} GiB",
            expected="at most 2 GiB in one ONNX file",
            hint="--external-data auto",
        )
    if external == "always" or total > INLINE_LIMIT:
        data = path.with_name(data_name or f"{path.name}.data")
        _write(model, path, _write_external(tensors, data), list(tensors.values()))
        return [path, data]
    _write(model, path, [_header(name, tensor) for name, tensor in tensors.items()], list(tensors.values()))
    return [path]


def write_outline(model: ir.Model, path: Path) -> None:
    """Write a model without the numbers of its large weights, for who looks at shapes and types only.

    They are external data in one file that is all zeros and takes no room on the disk. What decides more than a number
    stays: integers of 32 and 64 bits, which are axes, shapes and indices, and scales and zero points.

    Args:
        model: the model; its initializers keep their tensors.
        path: the ``.onnx`` file. Its data stands beside it as ``<name>.data``.
    """
    tensors = {name: v.const_value for name, v in model.graph.initializers.items() if v.const_value is not None}
    data, length, headers = path.with_name(f"{path.name}.data"), 0, []
    for name, tensor in tensors.items():
        header = _header(name, tensor)
        headers.append(header)
        if tensor.nbytes >= _LARGE and not _decides(model.graph.initializers[name]):
            _locate(header, data, length, tensor.nbytes)  # no two at one place: TensorRT takes them for one tensor
            length += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    with data.open("wb") as file:
        file.truncate(length)
    _write(model, path, headers, list(tensors.values()))


def _decides(value: ir.Value) -> bool:
    """Whether the numbers of a constant may decide what becomes of a graph."""
    is_index = value.dtype in (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.STRING)
    return is_index or any(
        use.node.op_type in ("QuantizeLinear", "DequantizeLinear") and use.idx for use in value.uses()
    )


def _header(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    header = onnx.TensorProto(dims=tuple(tensor.shape.numpy()), data_type=int(tensor.dtype), name=name)
    if tensor.dtype.is_string():  # these have no bytes of their own: they are part of the message
        header.string_data.extend(tensor.numpy().reshape(-1).tolist())
    return header


def _write_external(tensors: Mapping[str, ir.TensorProtocol], path: Path) -> list[onnx.TensorProto]:
    headers = []
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            header = _header(name, tensor)
            headers.append(header)
            if tensor.nbytes < _SMALL or tensor.dtype.is_string():
                continue
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            _locate(header, path, file.tell(), tensor.nbytes)
            file.write(tensor.tobytes())
    return headers


def _locate(header: onnx.TensorProto, path: Path, offset: int, length: int) -> None:
    header.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", path.name), ("offset", offset), ("length", length)):
        header.external_data.add(key=key, value=str(value))


def _write(
    model: ir.Model, path: Path, headers: Sequence[onnx.TensorProto], tensors: Sequence[ir.TensorProtocol]
) -> None:
    contents = [
        None if header.external_data or tensor.dtype.is_string() else tensor
        for header, tensor in zip(headers, tensors, strict=True)
    ]
    frame, graph = without_initializers(model)
    heads = [header.SerializeToString(deterministic=True) for header in headers]
    sizes = [
        len(head) + (0 if tensor is None else len(_field(_TENSOR_RAW_DATA, tensor.nbytes)) + tensor.nbytes)
        for head, tensor in zip(heads, contents, strict=True)
    ]
    total = len(graph) + sum(len(_field(_GRAPH_INITIALIZER, size)) + size for size in sizes)
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(frame)
        file.write(_field(_MODEL_GRAPH, total))
        file.write(graph)
        for head, size, tensor in zip(heads, sizes, contents, strict=True):
            _write_tensor(file, head, size, tensor)


def _write_tensor(file: BinaryIO, head: bytes, size: int, tensor: ir.TensorProtocol | None) -> None:
    file.write(_field(_GRAPH_INITIALIZER, size))
    file.write(head)
    if tensor is not None:
        file.write(_field(_TENSOR_RAW_DATA, tensor.nbytes))
        file.write(tensor.tobytes())


def without_initializers(model: ir.Model) -> tuple[bytes, bytes]:
    """Return the serialised model without its graph, and the serialised graph without its initializers."""
    graph = model.graph
    values = list(graph.initializers.values())
    graph.initializers.clear()
    try:
        proto = ir.to_proto(model)
    finally:
        for value in values:
            graph.register_initializer(value)
    assert isinstance(proto, onnx.ModelProto)
    body = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    return proto.SerializeToString(deterministic=True), body


def _field(number: int, length: int) -> bytes:
    """Return the key and the length of a length-delimited protobuf field."""
    return bytes((*_varint(number << 3 | _LENGTH_DELIMITED), *_varint(length)))


def _varint(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
