"""A model file of a bundle as a server sees it: its bytes, its inputs and outputs, the batches that it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from deploycli.exporters.bundle.engine import Sidecar, sidecars
from deploycli.exporters.bundle.golden import load_golden
from deploycli.exporters.bundle.manifest import FileRecord
from deploycli.exporters.graph.onnx_file import load_model
from deploycli.exporters.target.product import TENSORRT
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import onnx_ir as ir

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.bundle.engine import IoTensor
    from deploycli.exporters.bundle.manifest import Artifact

VARIABLE = -1
"""The size of an axis that is not fixed."""

ENGINES = "engines"


@dataclass(frozen=True)
class Tensor:
    """An input or an output of a model file.

    Attributes:
        name: its name.
        dtype: NumPy's name of the element type, as the file has it.
        shape: sizes, the batch axis included; -1 where an axis is variable.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Servable:
    """One model file that a server can load.

    Attributes:
        file: the model file.
        external: its external data.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        inputs: in the file's order.
        outputs: in the file's order.
        smallest_batch: that it takes.
        largest_batch: that it takes, or None where any size goes.
        unreleasable: why it must not be shipped, or an empty string.
        facts: what else tells it apart, name -> text, such as the TensorRT version of an engine.
    """

    file: FileRecord
    external: tuple[FileRecord, ...]
    precision: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    smallest_batch: int = 1
    largest_batch: int | None = None
    unreleasable: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def batched(self) -> bool:
        """Whether every input and output begins with a variable axis: the batch."""
        return all(tensor.shape[:1] == (VARIABLE,) for tensor in (*self.inputs, *self.outputs))


@dataclass(frozen=True)
class Candidate:
    """A model file that may be served; it is read only once it is chosen.

    Attributes:
        file: the model file.
        external: its external data.
        precision: what it was made as.
        unreleasable: why it must not be shipped, or an empty string.
        read: checks the file, and reads its inputs and outputs.
    """

    file: FileRecord
    external: tuple[FileRecord, ...]
    precision: str
    unreleasable: str
    read: Callable[[], Servable]


def onnx_candidates(bundle: Bundle) -> list[Candidate]:
    """Return the ONNX files of a bundle, the exported one first."""

    return [
        Candidate(a.file, a.external, a.precision, a.unreleasable, partial(_read_onnx, bundle, a))
        for a in bundle.manifest.artifacts
    ]


def engine_candidates(bundle: Bundle) -> list[Candidate]:
    """Return the engines of a bundle that a server can load: those of TensorRT.

    Reading one checks that its bytes are those that its sidecar records.

    Raises:
        UsageError: there is none.
        IntegrityError: a plan without a sidecar, or a sidecar that is malformed.
    """
    folder = bundle.path / ENGINES
    found, ahead = [], ""
    instead = f"on the GPU that will serve it: deploycli build-trt {bundle.path.name}"
    for sidecar in sidecars(folder):
        if sidecar.product is not TENSORRT:
            ahead = f" but of {sidecar.product.title}, which Triton has no backend for"
            instead = "--ort-rtx DIR, which writes its ONNX file for ONNX Runtime's TensorRT RTX provider"
            continue
        file = FileRecord(f"{ENGINES}/{sidecar.plan}", sidecar.sha256, sidecar.size)
        read = partial(_read_engine, folder, file, sidecar)
        found.append(Candidate(file, (), sidecar.precision, sidecar.unreleasable, read))
    if not found:
        raise UsageError(
            f"{bundle.path} holds no TensorRT engine{ahead}",
            expected=f"a plan and its sidecar in {ENGINES}/",
            hint=f"{instead}; or --flavour onnx",
        )
    return found


_NUMPY_NAMES = {"FLOAT": "float32", "DOUBLE": "float64"}  # ONNX's other names are NumPy's in capitals


def _read_onnx(bundle: Bundle, artifact: Artifact) -> Servable:
    path = bundle.path / artifact.file.path
    graph = load_model(path).graph
    return Servable(
        artifact.file,
        artifact.external,
        artifact.precision,
        tuple(_tensor(path, value) for value in graph.inputs if value.name not in graph.initializers),
        tuple(_tensor(path, value, _recorded_shape(bundle, artifact, value)) for value in graph.outputs),
        unreleasable=artifact.unreleasable,
    )


def _recorded_shape(bundle: Bundle, artifact: Artifact, value: ir.Value) -> tuple[int, ...] | None:
    """Return the shape of an output as the eager model gave it, where the file does not say its own."""
    if value.shape is not None:
        return None
    array = load_golden(bundle.golden)[1].get(value.name or "")
    return None if array is None else (artifact.batch or VARIABLE, *array.shape[1:])


def _tensor(path: Path, value: ir.Value, recorded: tuple[int, ...] | None = None) -> Tensor:
    shape = recorded
    if value.shape is not None:
        shape = tuple(dim if isinstance(dim, int) else VARIABLE for dim in value.shape)
    if value.dtype is None or shape is None:
        missing = "element type" if value.dtype is None else "shape"
        raise UsageError(
            f"{path} does not say the {missing} of {value.name!r}",
            expected="types and ranks of all inputs and outputs, which a server asks for",
            hint="export the model again",
        )
    return Tensor(value.name or "", _NUMPY_NAMES.get(value.dtype.name, value.dtype.name.lower()), shape)


def _read_engine(folder: Path, file: FileRecord, sidecar: Sidecar) -> Servable:
    sidecar.check_file(folder)
    if sidecar.settings.strip_weights:
        raise UsageError(
            f"{file.path} has no weights: it was built with --strip-weights",
            expected="a plan that a server can load as it is",
            hint="refit it first, or build it again without --strip-weights",
        )
    profiles = [tensor.profile for tensor in sidecar.io if tensor.profile]
    return Servable(
        file,
        (),
        sidecar.precision,
        tuple(_io(tensor) for tensor in sidecar.io if tensor.mode == "input"),
        tuple(_io(tensor) for tensor in sidecar.io if tensor.mode == "output"),
        max((profile[0][0] for profile in profiles), default=1),
        min((profile[-1][0] for profile in profiles), default=None),
        sidecar.unreleasable,
        {
            "tensorrt": sidecar.tensorrt + (" or later" if sidecar.settings.version_compatible else ""),
            "gpu": sidecar.runs_on,
            "onnx_sha256": sidecar.onnx_sha256,
        },
    )


def _io(tensor: IoTensor) -> Tensor:
    return Tensor(tensor.name, tensor.dtype, tensor.shape)
