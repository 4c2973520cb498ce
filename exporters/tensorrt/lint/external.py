"""Rule 13: where external tensor data lie, and whether they may be read.

An ONNX file from a stranger names other files. They must stay in its folder and must be as long as it says.

Source: https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from exporters.tensorrt.lint.problem import error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exporters.tensorrt.lint.problem import Problem
    from exporters.tensorrt.lint.subject import Subject


def repair_entries(model: onnx.ModelProto) -> dict[str, str]:
    """Replace offsets and lengths that are no numbers, so that the rest of the file can be read.

    Returns:
        Tensor name -> what was wrong.
    """
    wrong = {}
    for tensor in _tensors(model.graph):
        for entry in tensor.external_data:
            if entry.key in ("offset", "length") and not (entry.value.isascii() and entry.value.isdigit()):
                wrong[tensor.name] = f"its {entry.key} is {entry.value!r}, not a number of bytes"
                entry.value = "0"
    return wrong


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from (t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    for node in graph.node:
        for attribute in node.attribute:
            found = [*attribute.tensors, attribute.t]
            yield from (t for t in found if t.data_location == onnx.TensorProto.EXTERNAL)
            for inner in (*attribute.graphs, attribute.g):
                if inner.node or inner.initializer:
                    yield from _tensors(inner)


def fault(tensor: ir.ExternalTensor) -> str | None:
    """Say why the data of a tensor cannot be read, or must not be; None where they can."""
    location = str(tensor.location)
    outside = _leaves_folder(location)
    if outside:
        return outside
    folder = Path(tensor.base_dir or ".")
    path = folder / location
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"its file {location!r} is a link that leaves the folder of the model"
        if not path.is_file():
            return f"its file {location!r} does not exist"
        size = path.stat().st_size
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name with a zero byte
        return f"its file {location!r} cannot be read: {error}"
    needed = byte_count(tensor)
    if needed is None:
        return "its shape or element type says nothing of its size"
    start, length = span(tensor)
    if length != needed:
        return f"it has {length} bytes, its shape needs {needed}"
    if start + length > size:
        return f"it ends at byte {start + length} of {location!r}, which has {size}"
    return None


_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def inline_fault(tensor: ir.TensorProtocol) -> str | None:
    """Say why the data of a tensor that is stored in the model itself cannot be read; None where they can."""
    if tensor.dtype.is_string():
        return None
    needed = byte_count(tensor)
    if needed is None:
        return "its shape or element type says nothing of its size"
    if not isinstance(tensor, ir.serde.TensorProtoTensor):
        return None
    proto = tensor.raw
    if proto.HasField("raw_data"):
        found = len(proto.raw_data)
        return None if found == needed else f"it has {found} bytes, its shape needs {needed}"
    entries = sum(len(getattr(proto, name)) for name in _TYPED_FIELDS)
    size = math.prod(proto.dims)
    if tensor.dtype.bitwidth < 8:  # several values share an entry
        size = needed
    elif tensor.dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        size *= 2
    return None if entries == size else f"it has {entries} values, its shape needs {size}"


def _leaves_folder(location: str) -> str | None:
    if not location:
        return "its data have no file"
    kinds = (PurePosixPath(location), PureWindowsPath(location))  # the engine may be built on another system
    if any(path.is_absolute() or path.drive or path.root for path in kinds):
        return f"its file {location!r} is an absolute path"
    if any(".." in path.parts for path in kinds):
        return f"its file {location!r} leaves the folder of the model"
    return None


def span(tensor: ir.ExternalTensor) -> tuple[int, int]:
    """Return where the data of a tensor start, and how long they are, bytes."""
    length = tensor.length if tensor.length is not None else byte_count(tensor)
    return tensor.offset or 0, length or 0


def byte_count(tensor: ir.TensorProtocol) -> int | None:
    """Return the bytes that a tensor's shape and element type need; None where they do not say."""
    dims = list(tensor.shape.numpy())
    try:
        bits = tensor.dtype.bitwidth
    except (KeyError, TypeError, ValueError):  # strings, and types that are not defined
        return None
    return None if min(dims, default=0) < 0 else -(-math.prod(dims) * bits // 8)


def external_data(subject: Subject) -> Iterator[Problem]:
    """Rule 13: external data lie in the folder of the model, are there, and are as long as their shapes say.

    Source: ONNX ExternalData.md; TensorRT documentation, "Security": data paths of a model are untrusted input.
    """
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for name, tensor in subject.tensors:
        reason = subject.fault(tensor)
        if reason is not None:
            yield error(name, reason, "write the model anew, its data beside it")
        elif isinstance(tensor, ir.ExternalTensor):
            start, length = span(tensor)
            if length:
                spans.setdefault(str(tensor.location), []).append((start, length, name))
    for location, found in spans.items():
        found.sort()
        for (start, length, name), (following, size, other) in pairwise(found):
            if following < start + length and (following, size) != (start, length):
                yield error(other, f"its data overlap those of {name} in {location}", "write the model anew")
