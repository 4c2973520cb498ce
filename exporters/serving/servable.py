"""A model file of a bundle as a server sees it: its inputs and outputs, the batches that it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deploycli.exporters.bundle.bundle import Engine
from deploycli.exporters.bundle.engine import ENGINES
from deploycli.exporters.bundle.golden import load_golden
from deploycli.exporters.graph.onnx_file import load_model
from deploycli.exporters.target.product import TENSORRT
from deploycli.models.errors import UsageError
from deploycli.models.spec import TensorInfo, numpy_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from deploycli.exporters.bundle.bundle import Bundle, ModelFile, OnnxFile

VARIABLE = -1
"""The size of an axis that is not fixed."""


@dataclass(frozen=True)
class Servable:
    """What a server must know of a model file to load it.

    Attributes:
        file: the file.
        inputs: in the file's order; -1 is a size that is not fixed.
        outputs: likewise.
        smallest_batch: that it takes; of an engine in its first optimization profile, which is what servers use.
        largest_batch: likewise, or None where any size goes.
        facts: what else tells it apart, name -> text, such as the TensorRT version of an engine.
    """

    file: ModelFile
    inputs: tuple[TensorInfo[int], ...]
    outputs: tuple[TensorInfo[int], ...]
    smallest_batch: int = 1
    largest_batch: int | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def batched(self) -> bool:
        """Whether every input and output begins with a variable axis: the batch."""
        return all(tensor.shape[:1] == (VARIABLE,) for tensor in (*self.inputs, *self.outputs))


def served_engines(bundle: Bundle) -> list[Engine]:
    """Return the engines of a bundle that a server can load: those of TensorRT.

    Raises:
        UsageError: there is none.
        IntegrityError: a plan without a sidecar, or a sidecar that is malformed.
    """
    found, ahead = [], ""
    instead = f"on the GPU that will serve it: deploycli build-trt {bundle.path.name}"
    for engine in bundle.engines():
        if engine.sidecar.product is not TENSORRT:
            ahead = f" but of {engine.sidecar.product.title}, which Triton has no backend for"
            instead = "--ort-rtx DIR, which writes its ONNX file for ONNX Runtime's TensorRT RTX provider"
            continue
        found.append(engine)
    if not found:
        raise UsageError(
            f"{bundle.path} holds no TensorRT engine{ahead}",
            expected=f"a plan and its sidecar in {ENGINES}/",
            hint=f"{instead}; or --flavour onnx",
        )
    return found


def servable(file: OnnxFile | Engine) -> Servable:
    """Read the inputs and outputs of a model file.

    Raises:
        UsageError: it does not say all of them, or it has no weights.
        IntegrityError: an engine is not the recorded one.
    """
    return _engine(file) if isinstance(file, Engine) else _onnx(file)


def _onnx(file: OnnxFile) -> Servable:
    graph = load_model(file.path).graph
    return Servable(
        file,
        tuple(_tensor(file, value) for value in graph.inputs if value.name not in graph.initializers),
        tuple(_tensor(file, value, _recorded_shape(file, value)) for value in graph.outputs),
    )


def _recorded_shape(file: OnnxFile, value: ir.Value) -> tuple[int, ...] | None:
    """Return the shape of an output as the eager model gave it, where the file does not say its own."""
    if value.shape is not None:
        return None
    array = load_golden(file.bundle.golden)[1].get(value.name or "")
    return None if array is None else (file.artifact.batch or VARIABLE, *array.shape[1:])


def _tensor(file: OnnxFile, value: ir.Value, recorded: tuple[int, ...] | None = None) -> TensorInfo[int]:
    shape = recorded
    if value.shape is not None:
        shape = tuple(dim if isinstance(dim, int) else VARIABLE for dim in value.shape)
    if value.dtype is None or shape is None:
        missing = "element type" if value.dtype is None else "shape"
        raise UsageError(
            f"{file.path} does not say the {missing} of {value.name!r}",
            expected="types and ranks of all inputs and outputs, which a server asks for",
            hint="export the model again",
        )
    return TensorInfo(value.name or "", numpy_name(value.dtype.name), shape)


def _engine(engine: Engine) -> Servable:
    engine.check()
    sidecar = engine.sidecar
    if sidecar.settings.strip_weights:
        raise UsageError(
            f"{engine.name} has no weights: it was built with --strip-weights",
            expected="a plan that a server can load as it is",
            hint="refit it first, or build it again without --strip-weights",
        )
    inputs, outputs = (
        tuple(TensorInfo(tensor.name, tensor.dtype, tensor.shape) for tensor in sidecar.io if tensor.mode == mode)
        for mode in ("input", "output")
    )
    profiles = [tensor.profile for tensor in sidecar.io if tensor.profile]
    return Servable(
        engine,
        inputs,
        outputs,
        max((profile[0][0] for profile in profiles), default=1),
        min((profile[-1][0] for profile in profiles), default=None),
        {
            "tensorrt": sidecar.tensorrt + (" or later" if sidecar.settings.version_compatible else ""),
            "gpu": sidecar.runs_on,
            "onnx_sha256": sidecar.onnx_sha256,
        },
    )
