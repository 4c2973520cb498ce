"""A folder for ONNX Runtime with NVIDIA's TensorRT RTX execution provider, which serves RTX GPUs.

    <folder>/<model>/model.onnx [+ data]   the typed file, as it was verified
                     onnxruntime.json      the provider, its options, hashes, and where the model came from
                     load.py               opens it

No server loads an engine of TensorRT for RTX: Triton has no backend for it, and its ONNX Runtime backend appends the
providers that it knows, which are TensorRT, CUDA and OpenVINO. The provider takes the ONNX file that the engine was
compiled from, compiles it as `build-trt` does, and keeps what it made. So the folder holds the file with the shapes of
the engine. What is not for release is refused, as for Triton; see `deploycli.exporters.serving.release`.

Sources: onnxruntime-ep-nv-tensorrt-rtx-cu12 0.5.0, tensorrt_rtx_provider_options.h, and of the shapes the library's own
message ("input1:dim1xdim2...,input2:..."); triton-inference-server/onnxruntime_backend, src/onnxruntime.cc.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.files import replaced_folder
from deploycli.exporters.bundle.manifest import version_of
from deploycli.exporters.serving.release import (
    VARIABLE,
    Packaged,
    cannot_write,
    choose,
    names,
    not_for_release,
    place,
    provenance,
    servable,
    smallest_proven,
)
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.settings import ShapeOptions, shapes_text
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploycli.exporters.bundle.bundle import Bundle, Engine, OnnxFile
    from deploycli.exporters.serving.release import Servable
    from deploycli.exporters.target.settings import ShapeRange

    Profiles = Sequence[Mapping[str, ShapeRange]]

SCHEMA_VERSION = 1
PROVIDER = "NvTensorRTRTXExecutionProvider"
PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx-cu12"
CONFIG_NAME = "onnxruntime.json"
LOADER_NAME = "load.py"
MODEL_NAME = "model.onnx"

_LOADER = Path(__file__).with_name("ort_rtx_load.py")
_SEPARATORS = ",:;"


@dataclass(frozen=True)
class OrtRtxOptions:
    """What a user may choose.

    Attributes:
        precision: of the file; None means the smallest that is verified.
        engine: file name of the engine whose file and shapes are taken; None means the one that was compiled from the
            file.
        name: of the model; None means the bundle's.
        force: package what is not for release, which the configuration then says.
    """

    precision: str | None = None
    engine: str | None = None
    name: str | None = None
    force: bool = False


@dataclass(frozen=True)
class PackagedFolder(Packaged):
    """A folder that was written.

    Attributes:
        provider_options: of the provider.
        engine: the engine whose shapes they have, or an empty string.
    """

    provider_options: Mapping[str, str]
    engine: str

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return super().to_json() | {"provider_options": dict(self.provider_options), "engine": self.engine}


@dataclass(frozen=True)
class FolderDelivery:
    """A folder that may be written: everything was checked, nothing was written yet.

    Attributes:
        config: text of the configuration.
        packaged: what it will be.
    """

    config: str
    packaged: PackagedFolder

    def write(self) -> PackagedFolder:
        """Write the folder, whole or not at all, in the place of one that this program wrote before.

        Raises:
            IntegrityError: a file of the bundle changed meanwhile.
            EnvironmentUnsuitable: it cannot be written, or the disk is full.
        """
        folder = Path(self.packaged.path)
        try:
            with replaced_folder(folder) as staged:
                (staged / CONFIG_NAME).write_text(self.config, "utf-8")
                (staged / LOADER_NAME).write_bytes(_LOADER.read_bytes())
                self.packaged.file.copy(staged, MODEL_NAME)
        except OSError as error:
            raise cannot_write(folder, error, "--ort-rtx") from error
        return self.packaged


def prepare(bundle: Bundle, root: Path, options: OrtRtxOptions | None = None) -> FolderDelivery:
    """Check all that can be checked before a folder is written.

    Args:
        bundle: an opened bundle; its hashes were checked by `Bundle.open`.
        root: gets a folder for the model; made where it is missing.
        options: what the user chose.

    Raises:
        UsageError: the file is not for release, an option does not fit it, or something else stands in its place.
        NumericsError: verification found it outside its budget.
        IntegrityError: a sidecar of an engine is malformed.
        EnvironmentUnsuitable: the root cannot be read.
    """
    options = options or OrtRtxOptions()
    name = options.name or bundle.path.resolve().name
    folder = place(
        root,
        name,
        CONFIG_NAME,
        wanted="nothing there, or what was packaged before",
        foreign="which this program did not write",
        option="--ort-rtx",
    )
    engines, found = _engines(bundle, options.engine), list(bundle.onnx_files())
    default = engines[0].precision if options.engine else smallest_proven(found)
    (file,) = choose(bundle, found, options.precision or default)
    forced = not_for_release(file, force=options.force)
    served = servable(file)
    engine, profiles = _profiles(file, engines)
    if options.engine not in (None, engine):
        raise UsageError(
            f"{options.engine} was compiled from another file than {file.name} is now",
            expected="an engine of that very file",
            hint="deploycli build-trt --compiler rtx, or without --engine",
        )
    given = _provider_options(served, profiles)
    files = {MODEL_NAME: file.record.sha256, **{record.path: record.sha256 for record in file.external}}
    config = {
        "schema_version": SCHEMA_VERSION,
        "model": MODEL_NAME,
        "files": files,
        "execution_provider": PROVIDER,
        "package": PACKAGE,
        "provider_options": given,
        "inputs": [asdict(tensor) for tensor in served.inputs],
        "outputs": [asdict(tensor) for tensor in served.outputs],
        "deploycli": {"version": version_of("deploycli"), **provenance(served, forced)},
    }
    packaged = PackagedFolder(file, str(folder), forced, given, engine)
    return FolderDelivery(json.dumps(config, indent=2, allow_nan=False) + "\n", packaged)


def _engines(bundle: Bundle, name: str | None) -> list[Engine]:
    """Return the engines of TensorRT for RTX, or the one of that name."""
    found = [engine for engine in bundle.engines() if engine.sidecar.product is RTX]
    named = [engine for engine in found if name in (None, engine.path.name)]
    if name is not None and not named:
        raise UsageError(
            f"{bundle.path} holds no engine {name} of {RTX.title}",
            expected=names(found) or "one that deploycli build-trt made",
            hint="without --engine",
        )
    return named


def _profiles(file: OnnxFile, engines: Sequence[Engine]) -> tuple[str, Profiles]:
    """Return the engine that was compiled from a file, if any, and the shapes to compile the file for."""
    found = [engine for engine in engines if engine.sidecar.onnx == file.name and not engine.stale]
    if not found:
        return "", ShapeOptions().profiles(file.bundle.manifest.spec.inputs, file.artifact.batch)
    profiles = found[0].sidecar.settings.profiles
    if any(engine.sidecar.settings.profiles != profiles for engine in found):
        raise UsageError(
            f"{file.bundle.path} holds engines of several shapes from {file.name}",
            expected="one",
            hint=f"--engine: {names(found)}",
        )
    return found[0].path.name, profiles


def _provider_options(servable: Servable, profiles: Profiles) -> dict[str, str]:
    """Return the provider's options; all are text.

    Raises:
        UsageError: the name of an input cannot be written in one of them.
    """
    given = {"nv_runtime_cache_path": "cache"}  # beside the model: the loader makes it absolute
    if all(VARIABLE not in tensor.shape for tensor in servable.inputs):
        return given  # there is one shape
    for tensor in servable.inputs:
        if {*tensor.name} & {*_SEPARATORS}:
            raise UsageError(
                f"the input {tensor.name!r} has a sign that separates shapes in the options of {PROVIDER}",
                expected=f"a name without {' '.join(_SEPARATORS)}",
                hint="export the model with --input NAME:SHAPE",
            )
    for which in ("min", "opt", "max"):
        shapes = (f"{name}:{shapes_text(getattr(r, which))}" for profile in profiles for name, r in profile.items())
        given[f"nv_profile_{which}_shapes"] = ",".join(shapes)
    if len(profiles) > 1:
        given["nv_multi_profile_enable"] = "1"
    return given
