"""manifest.json: what a bundle holds, what each file was made from, and the hash of every file.

It is written with all else of a bundle, whole or not at all: `deploycli.exporters.bundle.bundle.new_bundle`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

from msgspec import Meta

from deploycli.exporters.bundle.files import require_inside
from deploycli.exporters.graph.steps import Step
from deploycli.models.codec import Count, Positive, Sha256, load
from deploycli.models.errors import IntegrityError, InvalidValue, UsageError
from deploycli.models.files import sha256_of, sha256_of_several
from deploycli.models.spec import ModelSpec, Preprocessing, Weights

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
EXPORT_AGAIN = "export the model again, or restore the folder from where it was copied"

PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")
"""What a model file can be made as, the most exact first."""

Precision = Annotated[str, Meta(pattern=rf"^({'|'.join(PRECISIONS)})\Z")]

_LONGEST_NAME, _LONGEST_PATH = 255, 4096
_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class FileRecord:
    """One file of a bundle.

    Attributes:
        path: path relative to the bundle's folder, with forward slashes; it never leaves the folder.
        sha256: 64 hexadecimal digits.
        size: bytes.
    """

    path: str
    sha256: Sha256
    size: Count

    def __post_init__(self) -> None:
        """Refuse a path that leaves the folder, or that no system can have."""
        # Both flavours, so that a manifest is judged alike on every system that reads it.
        flavours = (PurePosixPath(self.path), PureWindowsPath(self.path))
        if (
            not any(flavours[0].parts)
            or any(p.is_absolute() or p.drive or ".." in p.parts for p in flavours)
            or not _can_be_a_name(self.path)
        ):
            raise InvalidValue(
                f"the path {self.path!r}",
                expected="a relative path inside the bundle's folder",
                hint="do not use this bundle; export the model again",
            )

    @classmethod
    def of(cls, folder: Path, path: str) -> FileRecord:
        """Record the file ``folder / path`` as it is now."""
        file = folder / path
        return cls(path, sha256_of(file), file.stat().st_size)

    def check(self, folder: Path, *, content: bool = True) -> None:
        """Compare the file on disk with the record.

        Args:
            folder: the bundle's folder.
            content: hash the file; otherwise only its place and its size are compared.

        Raises:
            IntegrityError: the file is missing, changed, or reached through a link that leaves the folder.
        """
        file = folder / self.path
        require_inside(file, folder)
        if not file.is_file():
            raise IntegrityError(
                f"{file} is missing", expected=f"{self.size} bytes, sha256 {self.sha256}", hint=EXPORT_AGAIN
            )
        found = file.stat().st_size
        if found != self.size and not content:
            raise IntegrityError(f"{file} has {found} bytes", expected=f"{self.size} bytes", hint=EXPORT_AGAIN)
        if content and (digest := sha256_of(file)) != self.sha256:
            raise IntegrityError(
                f"{file} has changed: {found} bytes, sha256 {digest}",
                expected=f"{self.size} bytes, sha256 {self.sha256}",
                hint=EXPORT_AGAIN,
            )

    def copy(self, folder: Path, target: Path) -> None:
        """Copy the file, and check that what was copied is what was recorded.

        Args:
            folder: the bundle's folder.
            target: the new file; its folder is made where it is missing.

        Raises:
            IntegrityError: it is another one.
            OSError: from the file system.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with (folder / self.path).open("rb") as source, target.open("xb") as copy:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                copy.write(chunk)
            copy.flush()
            os.fsync(copy.fileno())
        if digest.hexdigest() != self.sha256:
            raise IntegrityError(
                f"{folder / self.path} changed while it was packaged: sha256 {digest.hexdigest()}",
                expected=f"sha256 {self.sha256}",
                hint="package it again",
            )


@dataclass(frozen=True)
class CalibrationRecord:
    """What the ranges of a quantised artifact were measured on.

    Attributes:
        method: how ranges were chosen, such as ``mse``.
        data: where the data came from, for people.
        samples: the names of the samples, in order.
        sha256: hash of the samples' names and contents.
        skipped: names of those that could not be read.
        random: made up, not data: the artifact is not for release.
        cache: the ranges, as a file of the bundle.
    """

    method: str
    data: str
    samples: tuple[str, ...]
    sha256: Sha256
    skipped: tuple[str, ...]
    random: bool
    cache: FileRecord


@dataclass(frozen=True)
class Artifact:
    """One model file, and what made it.

    Attributes:
        file: the model file.
        external: its external data files.
        precision: one of `PRECISIONS`; the key of its budget.
        opset: ONNX operator set version.
        batch: the batch size, or None where the batch axis is symbolic.
        ops_before: operator type -> number of nodes, as traced.
        ops_after: the same for the shipped graph.
        steps: what was done in between, in order.
        source: the file of the bundle that it was made from; empty for the exported graph.
        calibration: what its ranges were measured on, or None where it has none.
        quantized: the operators and attentions that are in INT8 or FP8, by name.
        reverted: what an accuracy budget took out of them again.
    """

    file: FileRecord
    external: tuple[FileRecord, ...]
    precision: Precision
    opset: Positive
    batch: Positive | None
    ops_before: Mapping[str, Count]
    ops_after: Mapping[str, Count]
    steps: tuple[Step, ...]
    source: str = ""
    calibration: CalibrationRecord | None = None
    quantized: tuple[str, ...] = ()
    reverted: tuple[str, ...] = ()

    def records(self) -> Iterator[FileRecord]:
        """Yield every file that belongs to it."""
        yield self.file
        yield from self.external
        if self.calibration is not None:
            yield self.calibration.cache

    @property
    def sha256(self) -> str:
        """What `deploycli.exporters.graph.onnx_file.model_sha256` returns for the file as it was recorded."""
        external = sorted(self.external, key=lambda record: record.path)
        return sha256_of_several([self.file.sha256, *(record.sha256 for record in external)])

    @property
    def unreleasable(self) -> str:
        """Why it must not be shipped, or an empty string."""
        random = self.calibration is not None and self.calibration.random
        return "calibrated on random data" if random else ""


@dataclass(frozen=True)
class Manifest:
    """All that is known of a bundle.

    Attributes:
        schema_version: version of this layout.
        tool_version: version of deploycli that wrote it.
        name: the bundle's name, which is also its folder's at the time of writing.
        spec: what determines the graph.
        weights: where the weights came from.
        preprocessing: how pictures become inputs, where the model reads pictures.
        artifacts: the model files, the exported one first.
        golden: the recorded inputs and eager outputs.
        versions: package -> version at export.
        factory_signature: of the function that makes the eager model, see `deploycli.exporters.bundle.trust`; empty
            where none does.
        reference: of what came as an ONNX file, that file as it was and its external data; none where the exported
            artifact is that file.
        labels: what the classes are called, in order; none where nobody said.
        recorded_inputs: the golden inputs were given, and random numbers are none that the model takes.
    """

    schema_version: int
    tool_version: str
    name: str
    spec: ModelSpec
    weights: Weights
    preprocessing: Preprocessing | None
    artifacts: Annotated[tuple[Artifact, ...], Meta(min_length=1)]
    golden: FileRecord
    versions: Mapping[str, str]
    factory_signature: Annotated[str, Meta(pattern=r"^([0-9a-f]{64}(-[0-9a-f]{64})?)?\Z")] = ""
    reference: tuple[FileRecord, ...] = ()
    recorded_inputs: bool = False
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse two records of one file: one of them would be wrong as soon as the other's file is written."""
        paths = [record.path for record in self.records()]
        if twice := {path for path in paths if paths.count(path) > 1 or path == MANIFEST_NAME}:
            raise InvalidValue(f"the file {min(twice)!r} is recorded twice", expected="one record for each file")

    def artifact(self, file: str) -> Artifact | None:
        """Return the artifact of a file name."""
        return next((a for a in self.artifacts if a.file.path == file), None)

    def records(self) -> Iterator[FileRecord]:
        """Yield every recorded file."""
        for artifact in self.artifacts:
            yield from artifact.records()
        yield from self.reference
        yield self.golden

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values."""
        return asdict(self)

    def dumps(self) -> str:
        """Return the text of manifest.json."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``folder / manifest.json``.

        Raises:
            UsageError: there is none, or its schema version is unknown.
            IntegrityError: it is malformed; the message names the field.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise UsageError(
                f"{folder} is no bundle: it has no {MANIFEST_NAME}",
                expected="a folder that `deploycli export` wrote",
                hint="deploycli export MODEL --fmt onnx",
            )
        return load(path, cls, what="a manifest", hint=EXPORT_AGAIN, version=SCHEMA_VERSION)


def version_of(package: str, otherwise: str = "unknown") -> str:
    """Return the version of an installed package; one that runs from a source tree has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise


def _can_be_a_name(path: str) -> bool:
    try:
        parts = os.fsencode(path).split(b"/")
    except UnicodeEncodeError:
        return False
    return b"\0" not in b"".join(parts) and max(map(len, parts)) <= _LONGEST_NAME and len(path) <= _LONGEST_PATH
