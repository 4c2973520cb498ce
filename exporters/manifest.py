"""manifest.json: what a bundle holds, what each file was made from, and the hash of every file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from exporters.artifact import EXPORT_AGAIN, MANIFEST_NAME, Artifact, FileRecord
from models.errors import IntegrityError, UsageError
from models.spec import ModelSpec, Preprocessing, Weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

SCHEMA_VERSION = 1


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

    def artifact(self, file: str) -> Artifact | None:
        """Return the artifact of a file name."""
        return next((a for a in self.artifacts if a.file.path == file), None)

    def files(self) -> Iterator[FileRecord]:
        """Yield every recorded file."""
        for artifact in self.artifacts:
            yield from artifact.files()
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
                hint=EXPORT_AGAIN,
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
            raise IntegrityError(f"{path} is not JSON: {error}", expected="a manifest", hint=EXPORT_AGAIN) from error
        return cls.from_json(data)
