"""ONNX files: the one reader and the one writer.

Every command opens a file through `load_model`, and the lint through `read`, which is as strict. A file comes from
anywhere. It names other files, which must stay in its folder; its tensors have the lengths that their shapes say,
before anything is made of the shapes; its names are text; its functions come to an end. What is computed from the graph
afterwards weighs sizes by itself.

A file is written one tensor at a time. Serialising a model in one piece holds it in memory three times: as tensors, as
a message, as bytes. A protobuf message may be written field by field, so only one tensor at a time is held in addition
to the weights themselves.

Sources: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto and docs/ExternalData.md there.
"""

from __future__ import annotations

import logging
import math
import warnings
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, BinaryIO, Literal

import onnx
import onnx_ir as ir

from deploycli.exporters.graph.operators import QDQ
from deploycli.models.errors import ExportError, IntegrityError, UsageError, first_line
from deploycli.models.files import sha256_of, sha256_of_several

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

LARGEST_MESSAGE = 2**31 - 1
"""A protobuf message is no longer, bytes."""

LARGEST_EXPANSION = 10_000
"""Nodes that a model's functions may become where they are called: a model of 40 layers has some thousands, and onnx_ir
takes time with their square."""

DEEPEST_CALL = 100
"""Functions that call each other, one in the other."""

GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)

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


# --- reading ---------------------------------------------------------------------------------------------------------


def load_model(path: Path, *, dense: bool = False) -> ir.Model:
    """Read an ONNX file; its external data are read when they are asked for.

    Args:
        path: the file.
        dense: refuse what an inference graph with dense constants does not have.

    Raises:
        UsageError: there is no such file, it is no ONNX file, or its graph cannot be drawn.
        IntegrityError: external data that are missing, of another length, or outside the file's folder.
        ExportError: a tensor that is not as long as its shape says.
    """
    with quiet():
        message = read_message(path)
        if dense:
            _refuse_sparse(message, path)
        model, wrong = from_message(message, path)
    for tensor in stored_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            if fault := wrong.get(tensor.name or "") or external_fault(tensor):
                raise IntegrityError(
                    f"{path}: {tensor.name}: {fault}",
                    expected="external data in the folder of the model, whole",
                    hint="copy the model with its data file",
                )
        elif fault := inline_fault(tensor):
            raise ExportError(f"the graph in {path} is invalid: {tensor.name}: {fault}", expected="a valid ONNX graph")
    return model


def read(path: Path) -> tuple[ir.Model, dict[str, str]]:
    """Read an ONNX file for the lint, to which what is wrong with a tensor's data is a finding.

    Returns:
        The model, and what is wrong with external data entries, by tensor name.

    Raises:
        UsageError: see `load_model`.
    """
    return from_message(read_message(path), path)


def read_message(path: Path) -> onnx.ModelProto:
    """Read an ONNX file as a message, without its external data.

    Raises:
        UsageError: no such file, or it is no ONNX file.
        OSError: it cannot be read.
    """
    try:
        there, size = path.is_file(), path.stat().st_size if path.is_file() else 0
    except (OSError, ValueError) as error:  # a name that is too long
        raise UsageError(f"{path} cannot be read: {first_line(error)}", expected="an ONNX file") from error
    if not there:
        raise UsageError(f"there is no file {path}", expected="an ONNX file", hint="deploycli export MODEL --fmt onnx")
    if size > LARGEST_MESSAGE:
        raise UsageError(f"{path} is no ONNX file: it has {size} bytes", expected="at most 2 GiB, which protobuf reads")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # protobuf's exceptions differ between its implementations
        raise UsageError(f"{path} is no ONNX file: {first_line(error)}", expected="a complete ONNX file") from error
    if not proto.HasField("graph") or not (proto.ir_version or proto.opset_import):
        raise UsageError(f"{path} is no ONNX file: it holds no graph", expected="an ONNX file")
    return proto


def from_message(proto: onnx.ModelProto, path: Path) -> tuple[ir.Model, dict[str, str]]:
    """Return the model in a message of a file, and what is wrong with external data entries, by tensor name.

    Raises:
        UsageError: the graph cannot be drawn, or its functions do not end.
    """
    wrong = _repair_entries(proto)
    try:
        _refuse_endless(proto)
        model = ir.from_proto(proto)
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            ir.external_data.set_base_dir(graph, path.parent)
        _refuse_names(model)
    except UsageError as error:
        raise UsageError(
            f"the graph in {path} cannot be read: {error.found}", expected=error.expected, hint=error.hint
        ) from error
    except Exception as error:  # a graph that cannot be drawn: a value with two producers, a type of no number
        raise UsageError(
            f"the graph in {path} cannot be read: {first_line(root_of(error))}", expected="a valid ONNX graph"
        ) from error
    return model, wrong


def external_files(model: ir.Model) -> list[str]:
    """Return the files that hold a model's external data, relative to the model's folder, sorted."""
    return sorted({str(t.location) for t in stored_tensors(model) if isinstance(t, ir.ExternalTensor)})


def stored_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yield every tensor of a model: initializers and attributes, those of inner graphs and of functions, too."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in [*graphs, *(inner for g in graphs for inner in g.subgraphs())]:
        yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.value
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.value


def model_sha256(path: Path) -> str:
    """Return the hash of a model: of its file, or of its file and its external data.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is no ONNX file, or its external data is missing or outside its folder.
    """
    files = external_files(load_model(path))
    return sha256_of_several([sha256_of(path), *(sha256_of(path.parent / file) for file in files)])


def map_external(model: ir.Model) -> None:
    """Map the external data of a model into memory, which reads nothing yet.

    The files of a bundle that is extended have a second name for a while, and onnx_ir takes that for an attack.

    Raises:
        IntegrityError: a file has a second name already, or is too short.
    """
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            try:
                value.const_value.numpy()
            except ValueError as error:
                raise IntegrityError(
                    f"{name} cannot be read: {error}",
                    expected="external data in a file of its own, as it was written",
                    hint="copy the folder, without hard links",
                ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Reading a broken graph warns and logs; what is wrong with it is the report's to say."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# --- what is wrong with a tensor -------------------------------------------------------------------------------------


def _repair_entries(model: onnx.ModelProto) -> dict[str, str]:
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


def external_fault(tensor: ir.ExternalTensor) -> str | None:
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


_TYPED_FIELDS: Mapping[str, frozenset[ir.DataType]] = {
    "float_data": frozenset({ir.DataType.FLOAT, ir.DataType.COMPLEX64}),
    "int64_data": frozenset({ir.DataType.INT64}),
    "double_data": frozenset({ir.DataType.DOUBLE, ir.DataType.COMPLEX128}),
    "uint64_data": frozenset({ir.DataType.UINT32, ir.DataType.UINT64}),
    "int32_data": frozenset(),  # all others
}
"""Where values stand that are no raw bytes, by their type. Source: onnx.proto, TensorProto."""


def inline_fault(tensor: ir.TensorProtocol) -> str | None:
    """Say why the data of a tensor that is stored in the model itself cannot be read; None where they can."""
    if isinstance(tensor, ir.StringTensor):
        found = len(tensor.string_data())
        return None if found == math.prod(tensor.shape.numpy()) else f"it has {found} strings, not as its shape says"
    needed = byte_count(tensor)
    if needed is None:
        return "its shape or element type says nothing of its size"
    if not isinstance(tensor, ir.serde.TensorProtoTensor):
        return None
    proto = tensor.raw
    if proto.HasField("raw_data"):
        found = len(proto.raw_data)
        return None if found == needed else f"it has {found} bytes, its shape needs {needed}"
    home = next((name for name, kinds in _TYPED_FIELDS.items() if tensor.dtype in kinds), "int32_data")
    if stray := next((name for name in _TYPED_FIELDS if name != home and len(getattr(proto, name))), None):
        return f"its values stand in {stray}, those of {tensor.dtype.name} belong in {home}"
    entries = len(getattr(proto, home))
    size = math.prod(proto.dims)
    if tensor.dtype.bitwidth in (2, 4):  # several values share an entry
        size = needed
    elif tensor.dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        size *= 2
    if entries == size and tensor.dtype.bitwidth == 6 and not all(0 <= value < 64 for value in proto.int32_data):
        return "it has values of more than 6 bits"
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


# --- what is wrong with a graph --------------------------------------------------------------------------------------


def _refuse_sparse(message: onnx.ModelProto, path: Path) -> None:
    for name, found in (("training information", message.training_info), ("sparse", message.graph.sparse_initializer)):
        if len(found):
            raise UsageError(f"{path} holds {name}", expected="an inference graph with dense constants")


def _refuse_names(model: ir.Model) -> None:
    """Raise where a name, or what else is shown of a model, is no text: the file holds bytes there."""
    tops = [model.graph, *(function.graph for function in model.functions.values())]
    names: list[object] = [*model.opset_imports, *(part for key in model.functions for part in key)]
    names += [model.producer_name, model.producer_version, model.domain, model.doc_string, *_words(model)]
    for graph in (*tops, *(inner for top in tops for inner in top.subgraphs())):
        values = [*graph.inputs, *graph.initializers.values(), *graph.outputs]
        for node in graph:
            names += [node.name, node.op_type, node.domain, node.overload, node.doc_string, *node.attributes]
            names += _words(node)
            values += [value for value in (*node.inputs, *node.outputs) if value is not None]
        names += [graph.name, graph.doc_string, *_words(graph)]
        for value in values:
            names += [value.name, value.doc_string, *_words(value)]
            names += [dim.value for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)]
    broken = next((name for name in names if not isinstance(name, str | None)), None)
    if broken is not None:
        raise UsageError(f"the name {broken!r} is no text", expected="a valid ONNX graph")


def _words(holder: ir.Model | ir.Graph | ir.Node | ir.Value) -> list[str]:
    """Return the keys and values of what metadata a file attaches."""
    return [*holder.metadata_props, *holder.metadata_props.values()]


def _refuse_endless(proto: onnx.ModelProto) -> None:
    """Raise where the functions of a model call themselves, or become more nodes than anything here would end with.

    They are weighed as they stand: a function is as large as its nodes, and as the functions that these call.
    """
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(nodes: Iterable[onnx.NodeProto], calls: tuple[tuple[str, str, str], ...]) -> int:
        total = 0
        for node in _nodes(nodes):
            key = (node.domain, node.op_type, node.overload)
            if key in functions and key not in sizes:
                if key in calls or len(calls) >= DEEPEST_CALL:
                    circle = " calls ".join(name for _, name, _ in (*calls[-3:], key))
                    how = "in a circle" if key in calls else f"more than {DEEPEST_CALL} deep"
                    raise UsageError(
                        f"its functions call each other {how}: {circle}", expected="functions that can be inlined"
                    )
                sizes[key] = size(functions[key].node, (*calls, key))
            total += 1 + sizes.get(key, 0)
        return total

    expanded = size(proto.graph.node, ())
    for key, function in functions.items():
        size(function.node, (key,))
    if functions and expanded > LARGEST_EXPANSION:
        raise UsageError(
            f"its functions become {expanded if expanded < 10**12 else f'{expanded:.0e}'} nodes where they are called",
            expected=f"at most {LARGEST_EXPANSION:,}",
            hint="inline them first, with onnx.inliner.inline_local_functions" if expanded < 10**6 else "",
        )


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes, and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in GRAPHS else ():
                yield from _nodes(inner.node)


def root_of(error: BaseException) -> BaseException:
    """Return what an error was first, before libraries said it again."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


# --- writing ---------------------------------------------------------------------------------------------------------


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
    return is_index or any(use.node.op_type in QDQ and use.idx for use in value.uses())


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
