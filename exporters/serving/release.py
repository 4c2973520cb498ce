"""What is delivered of a bundle, whoever serves it: which file, as a server sees it, whether it may go out, and where
it came from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from deploycli.exporters.bundle.bundle import Engine
from deploycli.exporters.bundle.engine import ENGINES
from deploycli.exporters.bundle.files import unreadable
from deploycli.exporters.bundle.golden import load_golden
from deploycli.exporters.bundle.manifest import MANIFEST_NAME
from deploycli.exporters.graph.onnx_file import load_model
from deploycli.exporters.target.product import TENSORRT
from deploycli.models.errors import EnvironmentUnsuitable, NumericsError, UsageError
from deploycli.models.spec import TensorInfo, numpy_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir

    from deploycli.exporters.bundle.bundle import Bundle, ModelFile, OnnxFile

    File = TypeVar("File", bound=ModelFile)


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


_SMALLEST_FIRST = ("int8", "fp8", "fp16", "bf16", "fp32")
_MAKE = {"fp16": "deploycli cast", "bf16": "deploycli cast", **dict.fromkeys(("fp8", "int8"), "deploycli quantize")}


@dataclass(frozen=True)
class Packaged:
    """A model file that was delivered.

    Attributes:
        file: the file of the bundle.
        path: the folder that it was written into.
        forced: why it is not for release; empty unless that was forced.
    """

    file: ModelFile
    path: str
    forced: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "bundle": str(self.file.bundle.path),
            "path": self.path,
            "precision": self.file.precision,
            "artifact": self.file.name,
            "sha256": self.file.record.sha256,
            "size": self.file.size,
            "verified": self.file.verdict.status,
            "forced": list(self.forced),
        }


def choose(bundle: Bundle, found: Sequence[File], precision: str, make: str = "") -> list[File]:
    """Return the files of a precision, of which there is one at least.

    Args:
        bundle: whose they are.
        found: all that there are.
        precision: the one that is wanted.
        make: the command that makes such a file; by default that of an ONNX file.

    Raises:
        UsageError: there is none.
    """
    fitting = [file for file in found if file.precision == precision]
    if not fitting:
        raise UsageError(
            f"{bundle.path} holds no {precision}",
            expected=names(found),
            hint=f"one of these, or {make or _MAKE.get(precision, 'deploycli export')}",
        )
    return fitting


def names(found: Sequence[ModelFile]) -> str:
    """Return the names of files, in words."""
    return ", ".join(file.path.name for file in found)


def smallest_proven(found: Sequence[ModelFile]) -> str:
    """Return the smallest precision that is fit for release, or the smallest where none is."""
    fit = [file for file in found if not file.unreleasable and file.verdict.passed]
    return min((file.precision for file in fit or found), key=_SMALLEST_FIRST.index)


def not_for_release(file: ModelFile, *, force: bool) -> tuple[str, ...]:
    """Return why a file is not for release.

    Raises:
        UsageError, NumericsError: it is not, and that was not forced; the latter where verification found it outside
            its budget.
    """
    weights, verdict = file.bundle.manifest.weights, file.verdict
    why = [] if verdict.passed else [f"{verdict.status}: {verdict.reason}"]
    if weights.source == "random":
        why.append(f"random weights ({weights.describe()})")
    if file.unreleasable:
        why.append(file.unreleasable)
    if why and not force:
        raise _refusal(file, why)
    return tuple(why)


def _refusal(file: ModelFile, why: Sequence[str]) -> NumericsError | UsageError:
    verdict = file.verdict
    kind = NumericsError if verdict.status == "failed" else UsageError
    again = f"deploycli verify {file.bundle.path.name}"
    real = "export it with --checkpoint or --pretrained, quantise it on real data"
    return kind(
        f"{file.path} is not for release: {'; '.join(why)}",
        expected="a verified file, of trained weights, calibrated on data",
        hint=f"{real if verdict.passed else again}; or --force, which the configuration then says",
    )


def provenance(served: Servable, forced: Sequence[str]) -> dict[str, str]:
    """Return where a file came from and what was found of it, name -> text."""
    file, last = served.file, served.file.verification
    manifest, status = file.bundle.manifest, file.verdict.status
    judged = last.judged.get(file.name) if status in ("ok", "failed") else None
    found = {
        "bundle": file.bundle.path.resolve().name,
        "model": f"{manifest.spec.name} ({manifest.spec.family})",
        "artifact": file.name,
        "precision": file.precision,
        "sha256": file.record.sha256,
        **{f"sha256 {record.path}": record.sha256 for record in file.external},
        **served.facts,
        "weights": manifest.weights.describe(),
        "proof": status,
    }
    if judged is not None:
        found |= {
            "proof_reference": last.reference,
            "proof_time": last.time,
            "proof_checks": ", ".join(judged.checks),
            "proof_runtime": ", ".join(judged.runtimes),
        }
        if judged.tolerances:
            found["proof_tolerances"] = ", ".join(f"{name} {bound:.3g}" for name, bound in judged.tolerances.items())
    if manifest.preprocessing is not None:
        found["preprocessing"] = json.dumps(manifest.preprocessing.to_json())
    if forced:
        found["not_for_release"] = "; ".join(forced)
    return found


def place(root: Path, name: str, config: str, *, wanted: str, foreign: str, option: str) -> Path:
    """Return the folder of a model, where one may be made, or where there is one of the kind already.

    Args:
        root: gets the folder.
        name: of the model.
        config: name of the file that says what is served; a folder that is not empty has one.
        wanted: what may be there, in words.
        foreign: what a folder without that file is, in words.
        option: names the root on the command line.

    Raises:
        UsageError: the name is none of a folder, or something else stands there.
        EnvironmentUnsuitable: the root cannot be read.
    """
    _check_name(name)
    folder = root / name
    try:
        wrong = _wrong(root, folder, folder / config, foreign)
    except OSError as error:
        raise unreadable(error.filename or root, error, "folder") from error
    if wrong:
        raise UsageError(wrong, expected=wanted, hint=f"another {option} or --name")
    return folder


def _wrong(root: Path, folder: Path, config: Path, foreign: str) -> str:
    """Return what stands in the way, or an empty string."""
    if (root / MANIFEST_NAME).exists():
        return f"{root} is a bundle"
    if root.exists() and not root.is_dir():
        return f"{root} is a file"
    for path in (folder, config):
        if path.is_symlink():
            return f"{path} is a symbolic link"
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file"
    if folder.exists() and not config.is_file() and any(folder.iterdir()):
        return f"{folder} is a folder without {config.name}, {foreign}"
    return ""


def cannot_write(folder: Path, error: OSError, option: str) -> EnvironmentUnsuitable:
    """Return what to say where a model cannot be written; ``option`` names its root on the command line."""
    where = f" ({error.filename})" if error.filename else ""
    return EnvironmentUnsuitable(
        f"cannot write {folder}: {error.strerror or error}{where}",
        expected="a folder with write permission and space for the model",
        hint=f"free some space, or name another folder with {option}",
    )


def _check_name(name: str) -> None:
    if name != name.strip() or name[:1] in ("", ".") or not name.isprintable() or {*name} & {*"/\\"}:
        raise UsageError(
            f"{name!r} cannot name a model", expected="a folder's name, not beginning with a dot", hint="--name NAME"
        )
