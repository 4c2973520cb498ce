"""config.pbtxt: what Triton is told of a model, and what an existing one of ours says.

Sources: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto, and of the warm-up and
the CUDA graphs `backend_model_instance.cc` of the core and `instance_state.cc` of the TensorRT backend: a warm-up of
batch 0 is skipped, a graph of a model without batching has batch 0, and a graph without shapes is captured for exactly
its batch.

It is protobuf's text format, written without the message classes. A message is a mapping from field names to values. A
value is a bool, an int, a text, a `Symbol`, another message, or a list: of messages, which repeats the field, or of
scalars, which is written as ``[1, 3, 224]``. Source: https://protobuf.dev/reference/protobuf/textformat-spec/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deploycli.exporters.serving.release import VARIABLE
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deploycli.exporters.serving.release import Servable
    from deploycli.models.spec import TensorInfo


Flavour = Literal["onnx", "tensorrt"]

CONFIG_NAME = "config.pbtxt"
LABELS_NAME = "labels.txt"
MARK = "deploycli_version"
"""The parameter that tells our configurations from those that people wrote."""

BACKENDS: Mapping[Flavour, str] = {"onnx": "onnxruntime", "tensorrt": "tensorrt"}
_TYPES = {  # NumPy's name -> Triton's
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "string": "TYPE_STRING",
    "bfloat16": "TYPE_BF16",
}


_TENSOR = re.compile(
    r'^(input|output) \{\n  name: "((?:[^"\\\n]|\\.)*)"\n  data_type: (\w+)\n  dims: (\[[^]]*\])', re.MULTILINE
)
"""An input or an output as `dumps` writes it."""


@dataclass(frozen=True)
class TritonOptions:
    """What a user may choose.

    Attributes:
        flavour: ONNX Runtime on any machine, or a TensorRT engine.
        precision: of the file; None means FP32 for ONNX, and the best verified one for TensorRT.
        engine: file name of the engine, where there are several of one precision.
        name: of the model; None means the bundle's.
        version: number of the version; None means the next one.
        max_batch: largest batch that the server may form; None means 32, or the largest that an engine takes.
        preferred_batch: batches that the server should form.
        queue_delay: how long a request may wait for others, microseconds; None leaves it to Triton, which never waits.
        instances: how many copies run beside each other, on each GPU where there are GPUs.
        kind: ``auto``, ``cpu`` or ``gpu``; None means auto, and GPU for TensorRT.
        onnx_tensorrt: let ONNX Runtime use TensorRT.
        labels: names of the classes, one a line.
        force: package what is not for release, and replace the configuration of another interface.
    """

    flavour: Flavour = "onnx"
    precision: str | None = None
    engine: str | None = None
    name: str | None = None
    version: int | None = None
    max_batch: int | None = None
    preferred_batch: tuple[int, ...] = ()
    queue_delay: int | None = None
    instances: int = 1
    kind: str | None = None
    onnx_tensorrt: bool = False
    labels: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Interface:
    """What clients of a model rely on.

    Attributes:
        backend: what runs it.
        batched: whether a batch axis stands before the dims.
        tensors: ``input`` or ``output``, name, type and dims of each.
    """

    backend: str
    batched: bool
    tensors: frozenset[str]

    def differences(self, other: Interface) -> list[str]:
        """Return what another one has otherwise, a line each."""
        found = [f"backend {self.backend}, not {other.backend}"] if self.backend != other.backend else []
        if self.batched != other.batched:
            found.append(f"{'a' if self.batched else 'no'} batch axis")
        return found + sorted(self.tensors - other.tensors) + [f"no {t}" for t in sorted(other.tensors - self.tensors)]


def config_text(
    name: str,
    servable: Servable,
    max_batch: int,
    options: TritonOptions,
    *,
    label_output: str = "",
    example: Mapping[str, tuple[int, ...]],
    parameters: Mapping[str, str],
    warnings: Sequence[str] = (),
) -> str:
    """Return the text of config.pbtxt.

    Args:
        name: of the model, which is its folder's.
        servable: the model file.
        max_batch: largest batch, or 0 where the file has no variable batch axis.
        options: the user's.
        label_output: the output whose classes have names, or empty.
        example: input name -> a shape without the batch axis, for axes that are variable.
        parameters: where the model came from, name -> text.
        warnings: why it is not for release; comments at the top.

    Raises:
        UsageError: an element type that Triton does not know.
    """
    warmed = [_warm_up(servable, size, example) for size in sorted({1, max(max_batch, 1)})]
    message: dict[str, Any] = {
        "name": name,
        "backend": BACKENDS[options.flavour],
        "max_batch_size": max_batch,
        "input": [_tensor(tensor, max_batch) for tensor in servable.inputs],
        "output": [
            _tensor(tensor, max_batch) | ({"label_filename": LABELS_NAME} if tensor.name == label_output else {})
            for tensor in servable.outputs
        ],
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": [{"kind": _kind(options), "count": options.instances}],
        "dynamic_batching": _dynamic_batching(options),
        "optimization": _optimization(servable, max_batch, options),
        "model_warmup": warmed,
        "parameters": [{"key": key, "value": {"string_value": text}} for key, text in parameters.items()],
    }
    if max_batch < 2:
        del message["dynamic_batching"]
    if not message["optimization"]:
        del message["optimization"]
    return "".join(map(comment, warnings)) + dumps(message)


def interface(text: str) -> Interface | None:
    """Return what a configuration of ours says of inputs and outputs, or None where the configuration is not ours.

    It is read as `config_text` writes it: one whose inputs were edited may have another interface than it had.
    """
    if f'"{MARK}"' not in text:
        return None
    backend, batch = (re.search(rf'^{field}: "?(\w+)', text, re.MULTILINE) for field in ("backend", "max_batch_size"))
    tensors = (f"{kind} {name} {dtype} {dims}" for kind, name, dtype, dims in _TENSOR.findall(text))
    return Interface(backend[1] if backend else "", batch is not None and batch[1] != "0", frozenset(tensors))


def _tensor(tensor: TensorInfo[int], max_batch: int) -> dict[str, Any]:
    if tensor.dtype not in _TYPES:
        raise UsageError(
            f"{tensor.name!r} is {tensor.dtype}, which no input or output of a Triton model can be",
            expected=", ".join(_TYPES),
        )
    dims = _dims(tensor, max_batch)
    message = {"name": tensor.name, "data_type": Symbol(_TYPES[tensor.dtype]), "dims": list(dims) or [1]}
    return message if dims else message | {"reshape": {}}  # Triton wants a dimension where a sample has none


def _dims(tensor: TensorInfo[int], max_batch: int) -> tuple[int, ...]:
    return tensor.shape[1:] if max_batch else tensor.shape


def _warm_up(servable: Servable, size: int, example: Mapping[str, tuple[int, ...]]) -> Message:
    """Return zeros of one batch, so that the first request of a client finds kernels chosen and memory taken."""

    def zeros(tensor: TensorInfo[int]) -> Message:
        known = (1, *example.get(tensor.name, ()))
        if len(known) != len(tensor.shape):
            known = (1,) * len(tensor.shape)
        shape = tuple(like if size == VARIABLE else size for size, like in zip(tensor.shape, known, strict=True))
        dims = shape[1:] if servable.batched else shape
        return {"data_type": Symbol(_TYPES[tensor.dtype]), "dims": list(dims) or [1], "zero_data": True}

    return {
        "name": f"zeros, batch {size}" if servable.batched else "zeros",
        "batch_size": size,
        "inputs": [{"key": tensor.name, "value": zeros(tensor)} for tensor in servable.inputs],
    }


def _kind(options: TritonOptions) -> Symbol:
    return Symbol(f"KIND_{(options.kind or ('gpu' if options.flavour == 'tensorrt' else 'auto')).upper()}")


def _dynamic_batching(options: TritonOptions) -> Message:
    message: dict[str, Any] = {}
    if options.preferred_batch:
        message["preferred_batch_size"] = sorted({*options.preferred_batch})
    if options.queue_delay is not None:
        message["max_queue_delay_microseconds"] = options.queue_delay
    return message


def _optimization(servable: Servable, max_batch: int, options: TritonOptions) -> Message:
    if options.flavour == "onnx":
        if not options.onnx_tensorrt:
            return {}
        modes = {"fp16": "FP16", "bf16": "BF16", "fp8": "FP16", "int8": "INT8"}
        mode: Message = {"key": "precision_mode", "value": modes.get(servable.file.precision, "FP32")}
        accelerator: Message = {"name": "tensorrt", "parameters": [mode]}
        return {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}
    if any(VARIABLE in _dims(tensor, max_batch) for tensor in servable.inputs):
        return {}  # a graph is captured for one shape
    # No graph_lower_bound: a smaller batch in a larger graph would leave uninitialised rows.
    batches = sorted({1, *options.preferred_batch, max_batch}) if max_batch else [0]
    return {"cuda": {"graphs": True, "graph_spec": [{"batch_size": batch} for batch in batches]}}


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TypeAlias

    Scalar: TypeAlias = bool | int | str
    Message: TypeAlias = Mapping[str, "Value"]
    Value: TypeAlias = Scalar | Message | Sequence[Scalar] | Sequence[Message]

_WIDTH = 100
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Symbol(str):
    """A value of an enumeration, which is written without quotes."""

    __slots__ = ()


def dumps(message: Message) -> str:
    """Return a message as text, each field on a line of its own."""
    return "".join(f"{line}\n" for line in _lines(message))


def comment(text: str) -> str:
    """Return a comment of one line; line breaks and what else is not printable cannot end it."""
    return "# " + "".join(char if char.isprintable() else " " for char in text) + "\n"


def quote(text: str) -> str:
    """Return a string literal: quotes, backslashes and control characters escaped, all else as UTF-8.

    Half a surrogate pair, which is how Python holds bytes of a file name that are no UTF-8, becomes a question mark.
    """
    return '"' + "".join(map(_escaped, text.encode("utf-8", "replace").decode())) + '"'


def _escaped(char: str) -> str:
    # Octal has three digits always: "\1" followed by "2" would be one character.
    return _ESCAPES.get(char) or (f"\\{ord(char):03o}" if ord(char) < 0x20 or ord(char) == 0x7F else char)


def _lines(message: Message) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield from _block(name, value)
        elif isinstance(value, bool | int | str):
            yield f"{name}: {_scalar(value)}"
        elif value and isinstance(value[0], Mapping):
            for item in value:
                assert isinstance(item, Mapping), "a list is of messages or of scalars"
                yield from _block(name, item)
        else:
            yield f"{name}: [{', '.join(map(_scalar, value))}]"  # type: ignore[arg-type]  # no messages: see above


def _block(name: str, message: Message) -> Iterator[str]:
    """Yield a message on one line where it fits and holds no list, or one line a field."""
    lines = list(_lines(message))
    line = f"{name} {{ {' '.join(lines)} }}"
    if len(line) <= _WIDTH and len(lines) <= 2 and not any("{" in part or "[" in part for part in lines[:-1]):
        yield line if lines else f"{name} {{ }}"
    else:
        yield f"{name} {{"
        yield from (f"  {part}" for part in lines)
        yield "}"


def _scalar(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return quote(value) if isinstance(value, str) and not isinstance(value, Symbol) else str(value)
