"""The files of a bundle: what each one is, what it was made from, and its hash."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from exporters.steps import Step
from models.errors import IntegrityError
from models.files import sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MANIFEST_NAME = "manifest.json"
EXPORT_AGAIN = "export the model again, or restore the folder from where it was copied"


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
class CalibrationRecord:
    """What the INT8 ranges of an artifact were measured on.

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
    sha256: str
    skipped: tuple[str, ...]
    random: bool
    cache: FileRecord

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CalibrationRecord:
        """Rebuild a record.

        Raises:
            ValueError: a hash that is none, or a mark that is neither true nor false.
            IntegrityError: a path that leaves the folder.
        """
        if type(data["random"]) is not bool:
            raise ValueError(f"{data['random']!r} is neither true nor false")
        return cls(
            data["method"],
            data["data"],
            tuple(data["samples"]),
            data["sha256"],
            tuple(data["skipped"]),
            data["random"],
            FileRecord.from_json(data["cache"]),
        )


@dataclass(frozen=True)
class Artifact:
    """One model file, and what made it.

    Attributes:
        file: the model file.
        external: its external data files.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``; the key of its budget.
        opset: ONNX operator set version.
        batch: the batch size, or None where the batch axis is symbolic.
        ops_before: operator type -> number of nodes, as traced.
        ops_after: the same for the shipped graph.
        steps: what was done in between, in order.
        source: the file of the bundle that it was made from; empty for the exported graph.
        calibration: what its INT8 ranges were measured on, or None where it has none.
        quantized: the operators and attentions that are in INT8, by name.
        reverted: what an accuracy budget took out of INT8 again.
    """

    file: FileRecord
    external: tuple[FileRecord, ...]
    precision: str
    opset: int
    batch: int | None
    ops_before: Mapping[str, int]
    ops_after: Mapping[str, int]
    steps: tuple[Step, ...]
    source: str = ""
    calibration: CalibrationRecord | None = None
    quantized: tuple[str, ...] = ()
    reverted: tuple[str, ...] = ()

    def files(self) -> Iterator[FileRecord]:
        """Yield every file that belongs to it."""
        yield self.file
        yield from self.external
        if self.calibration is not None:
            yield self.calibration.cache

    @property
    def unreleasable(self) -> str:
        """Why it must not be shipped, or an empty string."""
        random = self.calibration is not None and self.calibration.random
        return "calibrated on random data" if random else ""

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
            data.get("source", ""),
            None if (calibration := data.get("calibration")) is None else CalibrationRecord.from_json(calibration),
            tuple(data.get("quantized", ())),
            tuple(data.get("reverted", ())),
        )
