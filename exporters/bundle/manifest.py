"""manifest.json: what a bundle holds, what each file was made from, and the hash of every file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from deploycli.exporters.bundle.artifact import EXPORT_AGAIN, MANIFEST_NAME, Artifact, FileRecord
from deploycli.models.codec import load
from deploycli.models.errors import InvalidValue, UsageError
from deploycli.models.spec import ModelSpec, Preprocessing, Weights

if TYPE_CHECKING:
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
        factory_signature: of the function that makes the eager model, see `deploycli.exporters.bundle.trust`; empty
            where none does.
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

    def __post_init__(self) -> None:
        """Refuse two records of one file: one of them would be wrong as soon as the other's file is written."""
        paths = [record.path for record in self.files()]
        if twice := {path for path in paths if paths.count(path) > 1 or path == MANIFEST_NAME}:
            raise InvalidValue(f"the file {min(twice)!r} is recorded twice", expected="one record for each file")

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
