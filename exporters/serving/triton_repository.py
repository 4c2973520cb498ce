"""A Triton model repository on disk: where a version may be written, and writing it whole or not at all.

A new model appears by one rename. So does a new version of an existing one; then its labels and its configuration are
replaced, and all is put back where that fails. Of two that package the same model at once each makes a version of its
own or is refused, and the configuration is the later one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.files import replaced_folder, write_whole
from deploycli.exporters.serving.release import Packaged, cannot_write
from deploycli.exporters.serving.triton_config import CONFIG_NAME, LABELS_NAME, interface
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


_MODEL_FILES = {"onnx": "model.onnx", "tensorrt": "model.plan"}


@dataclass(frozen=True)
class PackagedVersion(Packaged):
    """A version of a model in a repository.

    Attributes:
        name: of the model.
        version: its number.
        flavour: ``onnx`` or ``tensorrt``.
        max_batch_size: the largest batch, or 0 where the file has a fixed one.
        notes: what the user should know.
    """

    name: str
    version: int
    flavour: str
    max_batch_size: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return super().to_json() | {
            "name": self.name,
            "version": self.version,
            "flavour": self.flavour,
            "max_batch_size": self.max_batch_size,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Delivery:
    """A version that may be written: everything was checked, nothing was written yet.

    Attributes:
        folder: of the model.
        config: text of config.pbtxt.
        labels: text of labels.txt, or None.
        packaged: what it will be.
    """

    folder: Path
    config: str
    labels: str | None
    packaged: PackagedVersion

    def write(self) -> PackagedVersion:
        """Write the version.

        Raises:
            IntegrityError: a file of the bundle changed meanwhile.
            UsageError: another process wrote this version meanwhile.
            EnvironmentUnsuitable: the repository cannot be written, or the disk is full.
        """
        try:
            if self.folder.exists():
                self._add_version()
            else:
                self._add_model()
        except FileExistsError as error:
            raise UsageError(
                f"{error.filename} appeared while it was written", expected="nobody else", hint="package it again"
            ) from error
        except OSError as error:
            raise cannot_write(self.folder, error, "--triton") from error
        return self.packaged

    def _add_model(self) -> None:
        with replaced_folder(self.folder, replace=False) as staged:
            (staged / str(self.packaged.version)).mkdir()
            self._copy(staged / str(self.packaged.version))
            for name, text in self._texts().items():
                (staged / name).write_bytes(text)

    def _add_version(self) -> None:
        """Add the version, then replace labels and configuration beside it; where that fails, take it all back."""
        texts = {self.folder / name: text for name, text in self._texts().items()}
        before = {path: path.read_bytes() if path.is_file() else None for path in texts}
        version = self.folder / str(self.packaged.version)
        with replaced_folder(version, replace=False, late=lambda _: _replace(texts, before)) as staged:
            self._copy(staged)

    def _texts(self) -> dict[str, bytes]:
        """Return the files beside the versions; labels first, for the configuration names them."""
        labels = {} if self.labels is None else {LABELS_NAME: self.labels.encode()}
        return labels | {CONFIG_NAME: self.config.encode()}

    def _copy(self, folder: Path) -> None:
        self.packaged.file.copy(folder, _MODEL_FILES[self.packaged.flavour])


def _replace(texts: Mapping[Path, bytes], before: Mapping[Path, bytes | None]) -> None:
    """Write files, each whole; where one fails, all are as they were before."""
    try:
        for path, text in texts.items():
            write_whole(path, text)
    except BaseException:
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            elif path.read_bytes() != content:
                write_whole(path, content)
        raise


def next_version(folder: Path, wanted: int | None) -> int:
    """Return the number of the new version: above all that are there, for Triton serves the largest.

    Raises:
        UsageError: the wanted one is taken, or would not be served.
    """
    taken = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()] if folder.exists() else []
    latest = max(taken, default=0)
    if wanted is None:
        return latest + 1
    if wanted in taken:
        raise UsageError(f"{folder} has a version {wanted} already", expected=f"{latest + 1} or above")
    if wanted < latest:
        raise UsageError(
            f"version {wanted} of {folder} would not be served, for version {latest} is there",
            expected=f"{latest + 1} or above",
        )
    return wanted


def check_existing(path: Path, config: str, *, force: bool) -> None:
    """Refuse to replace a configuration that people wrote, or one of another interface, unless forced.

    Raises:
        UsageError: the one at ``path`` is such, or cannot be read.
    """
    if force or not path.exists():
        return
    try:
        old, new = interface(path.read_text("utf-8")), interface(config)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}", expected="a model configuration", hint="--force") from error
    if old is None:
        raise UsageError(
            f"{path} was not written by deploycli, and would be replaced",
            expected="a model of this tool's",
            hint="another --name, or --force",
        )
    if new is not None and (differences := new.differences(old)):
        raise UsageError(
            f"{path} describes another interface; the new one has {'; '.join(differences)}",
            expected="the inputs and outputs that clients of the model know",
            hint="another --name, or --force, after which the older versions no longer fit their configuration",
        )
