"""manifest.json: what a bundle holds, what each file was made from, and the hash of every file."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from exporters.steps import Step
from models.errors import IntegrityError, UsageError
from models.files import sha256_of
from models.spec import ModelSpec, Preprocessing, Weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
_EXPORT_AGAIN = "export the model again, or restore the folder from where it was copied"


@dataclass(frozen=True)
class FileRecord:
    """One file of a bundle.

    Attributes:
        path: path relative to the bundle's folder, with forward slashes; it never leaves the folder.
        sha256: 64 hexadecimal digits.
        size: bytes.
    """

    path: str
    sha256: str
    size: int

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
        if not file.resolve().is_relative_to(folder.resolve()):
            raise IntegrityError(
                f"{file} is a link that leaves the bundle", expected="a file inside the bundle's folder"
            )
        if not file.is_file():
            raise IntegrityError(
                f"{file} is missing", expected=f"{self.size} bytes, sha256 {self.sha256}", hint=_EXPORT_AGAIN
            )
        found = file.stat().st_size
        if found != self.size and not content:
            raise IntegrityError(f"{file} has {found} bytes", expected=f"{self.size} bytes", hint=_EXPORT_AGAIN)
        if content and (digest := sha256_of(file)) != self.sha256:
            raise IntegrityError(
                f"{file} has changed: {found} bytes, sha256 {digest}",
                expected=f"{self.size} bytes, sha256 {self.sha256}",
                hint=_EXPORT_AGAIN,
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FileRecord:
        """Rebuild a record.

        Raises:
            ValueError: a hash or a size that is none.
            IntegrityError: a path that leaves the folder.
        """
        path, digest, size = data["path"], data["sha256"], data["size"]
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"{digest!r} is no sha256")
        if type(size) is not int or size < 0:
            raise ValueError(f"{size!r} is no file size")
        # Both flavours, so that a manifest is judged alike on every system that reads it.
        flavours = (PurePosixPath(path), PureWindowsPath(path))
        if not path or "\0" in path or any(p.is_absolute() or p.drive or ".." in p.parts for p in flavours):
            raise IntegrityError(
                f"{MANIFEST_NAME} records the path {path!r}",
                expected="a relative path inside the bundle's folder",
                hint="do not use this bundle; export the model again",
            )
        return cls(path, digest, size)


@dataclass(frozen=True)
class Artifact:
    """One model file, and what made it.

    Attributes:
        file: the model file.
        external: its external data files.
        precision: ``fp32``; the key of its budget.
        opset: ONNX operator set version.
        batch: the batch size, or None where the batch axis is symbolic.
        ops_before: operator type -> number of nodes, as traced.
        ops_after: the same for the shipped graph.
        steps: what was done in between, in order.
    """

    file: FileRecord
    external: tuple[FileRecord, ...]
    precision: str
    opset: int
    batch: int | None
    ops_before: Mapping[str, int]
    ops_after: Mapping[str, int]
    steps: tuple[Step, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Artifact:
        """Rebuild an artifact.

        Raises:
            ValueError: a batch size that is none.
            IntegrityError: a path that leaves the folder.
        """
        batch = data["batch"]
        if batch is not None and (type(batch) is not int or batch < 1):
            raise ValueError(f"{batch!r} is no batch size")
        return cls(
            FileRecord.from_json(data["file"]),
            tuple(FileRecord.from_json(record) for record in data["external"]),
            data["precision"],
            data["opset"],
            batch,
            dict(data["ops_before"]),
            dict(data["ops_after"]),
            tuple(Step.from_json(step) for step in data["steps"]),
        )


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
        artifacts: the model files, each derived from the one before.
        golden: the recorded inputs and eager outputs.
        versions: package -> version at export.
    """

    schema_version: int
    tool_version: str
    name: str
    spec: ModelSpec
    weights: Weights
    preprocessing: Preprocessing | None
    artifacts: tuple[Artifact, ...]
    golden: FileRecord
    versions: Mapping[str, str]

    def files(self) -> Iterator[FileRecord]:
        """Yield every recorded file."""
        for artifact in self.artifacts:
            yield artifact.file
            yield from artifact.external
        yield self.golden

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values."""
        return asdict(self)

    def dumps(self) -> str:
        """Return the text of manifest.json."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Rebuild a manifest.

        Args:
            data: parsed JSON.

        Raises:
            UsageError: a schema version that this tool does not read.
            IntegrityError: not the layout of a manifest, or a path that leaves the folder.
        """
        version = data.get("schema_version") if isinstance(data, dict) else None
        if type(version) is int and version != SCHEMA_VERSION:
            raise UsageError(
                f"{MANIFEST_NAME} has schema version {version}",
                expected=f"schema version {SCHEMA_VERSION}",
                hint="export the model again, or use the deploycli that wrote the bundle",
            )
        try:
            if type(version) is not int:
                raise ValueError("no schema version")
            if not data["artifacts"]:
                raise ValueError("no artifacts")
            preprocessing = data["preprocessing"]
            return cls(
                version,
                data["tool_version"],
                data["name"],
                ModelSpec.from_json(data["spec"]),
                Weights(**data["weights"]),
                None if preprocessing is None else Preprocessing.from_json(preprocessing),
                tuple(Artifact.from_json(artifact) for artifact in data["artifacts"]),
                FileRecord.from_json(data["golden"]),
                dict(data["versions"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(
                f"{MANIFEST_NAME} is malformed ({type(error).__name__}: {error})",
                expected=f"a manifest of schema version {SCHEMA_VERSION}",
                hint=_EXPORT_AGAIN,
            ) from error

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``folder / manifest.json``.

        Raises:
            UsageError: there is none, or its schema version is unknown.
            IntegrityError: it is malformed.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise UsageError(
                f"{folder} is no bundle: it has no {MANIFEST_NAME}",
                expected="a folder that `deploycli export` wrote",
                hint="deploycli export MODEL --fmt onnx",
            )
        try:
            data = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise IntegrityError(f"{path} is not JSON: {error}", expected="a manifest", hint=_EXPORT_AGAIN) from error
        return cls.from_json(data)
