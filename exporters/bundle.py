"""A bundle on disk: open it and check every hash, find all below a folder, write one atomically."""

from __future__ import annotations

import errno
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.artifact import MANIFEST_NAME
from exporters.atomic import interrupted, recover, replaced_folder
from exporters.manifest import Manifest
from models.errors import EnvironmentUnsuitable, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from exporters.artifact import Artifact

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
_FULL_BELOW = 1 << 20  # bytes left on a disk that counts as full


@dataclass(frozen=True)
class Bundle:
    """A folder that holds model files, golden arrays and their manifest.

    Attributes:
        path: the folder.
        manifest: what it holds.
    """

    path: Path
    manifest: Manifest

    @property
    def golden(self) -> Path:
        """Where the golden arrays are."""
        return self.path / self.manifest.golden.path

    @classmethod
    def open(cls, path: Path, *, check: bool = True) -> Bundle:
        """Open a bundle, first putting back the old one where a replacement was killed half-way.

        Args:
            path: the bundle's folder.
            check: compare the SHA-256 of every recorded file.

        Raises:
            UsageError: no bundle, or one of another schema version.
            IntegrityError: the manifest is malformed, or a file is missing or has changed.
            EnvironmentUnsuitable: the folder cannot be read.
        """
        try:
            recover(path)
            manifest = Manifest.read(path)
            if check:
                for record in manifest.files():
                    record.check(path)
        except OSError as error:
            raise EnvironmentUnsuitable(
                f"cannot read {error.filename or path}: {error.strerror or error}",
                hint="check the folder's permissions",
            ) from error
        return cls(path, manifest)


def find_bundles(root: Path) -> list[Path]:
    """Return the folders directly below ``root`` that are bundles, by name.

    Raises:
        UsageError: there is none.
        EnvironmentUnsuitable: the folder cannot be read.
    """
    try:
        if root.is_dir():
            for target in interrupted(root):
                recover(target)
            found = sorted(path.parent for path in root.glob(f"[!.]*/{MANIFEST_NAME}"))
            if found:
                return found
    except OSError as error:
        raise EnvironmentUnsuitable(
            f"cannot read {error.filename or root}: {error.strerror or error}", hint="check the folder's permissions"
        ) from error
    raise UsageError(
        f"there is no bundle in {root}",
        expected="folders that `deploycli export` wrote",
        hint="export a model first (deploycli export swin_t --fmt onnx), or name the folder with --output",
    )


def write_bundle(root: Path, name: str, fill: Callable[[Path], Manifest]) -> Bundle:
    """Write the bundle ``root / name``, replacing an existing one whole, or not at all.

    Args:
        root: folder of bundles; made where it is missing.
        name: name of the bundle.
        fill: writes every file of the bundle into the folder it is given, and returns the manifest.

    Raises:
        UsageError: the name is no plain file name, or something that is no bundle stands in its place.
        EnvironmentUnsuitable: the folder cannot be written, or the disk is full.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise UsageError(
            f"{name!r} cannot name a bundle", expected="letters, digits, '.', '_', '+', '-', not starting with a sign"
        )
    target = root / name
    try:
        _refuse_foreign(target)
        with replaced_folder(target) as folder:
            manifest = fill(folder)
            for record in manifest.files():
                record.check(folder, content=False)
            (folder / MANIFEST_NAME).write_text(manifest.dumps(), "utf-8")
    except OSError as error:
        if _concerns_disk(error, root):
            raise _unwritable(target, error) from error
        raise
    return Bundle(target, manifest)


def extend_bundle(bundle: Bundle, make: Callable[[Path], Artifact]) -> Bundle:
    """Add an artifact to a bundle, or replace the one of the same file name; on disk all of it happens, or nothing.

    What else is in the folder is kept.

    Args:
        bundle: an opened bundle.
        make: writes the artifact's files into the folder it is given, in which the bundle's other files stand.

    Raises:
        EnvironmentUnsuitable: the folder cannot be written, or the disk is full.
    """

    def fill(folder: Path) -> Manifest:
        shutil.copytree(bundle.path, folder, copy_function=_link, dirs_exist_ok=True)
        (folder / MANIFEST_NAME).unlink()  # a link: writing through it would change the old bundle
        artifact = make(folder)
        others = tuple(a for a in bundle.manifest.artifacts if a.file.path != artifact.file.path)
        return replace(bundle.manifest, artifacts=(*others, artifact))

    return write_bundle(bundle.path.parent, bundle.path.name, fill)


def _link(source: str, target: str) -> None:
    """Give a file a second name, which takes no space; copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _refuse_foreign(target: Path) -> None:
    """Raise UsageError where replacing ``target`` would delete something that is no bundle."""
    if target.is_symlink():
        found = "a symbolic link"
    elif not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    elif not target.is_dir():
        found = "a file"
    elif not _looks_like_manifest(target / MANIFEST_NAME):
        found = "a folder that is no bundle"
    else:
        return
    raise UsageError(
        f"{target} exists and is {found}",
        expected="nothing there, an empty folder, or a bundle to replace",
        hint="another --name or --output, or move it away",
    )


def _looks_like_manifest(path: Path) -> bool:
    """A damaged bundle may be replaced, but many other things keep a manifest.json too."""
    return path.is_file() and b'"schema_version"' in path.read_bytes()


def _concerns_disk(error: OSError, root: Path) -> bool:
    """Whether writing below ``root`` failed, as against a checkpoint that ``fill`` could not read or download."""
    if error.errno in _DISK_ERRORS:
        return True
    if isinstance(error.filename, str | Path):
        path = Path(error.filename)
        return path.is_relative_to(root) or root.is_relative_to(path)
    # numpy reports a short write without an error number; so do errors that have nothing to do with the disk.
    return error.errno is None and root.is_dir() and shutil.disk_usage(root).free < _FULL_BELOW


def _unwritable(target: Path, error: OSError) -> EnvironmentUnsuitable:
    return EnvironmentUnsuitable(
        f"cannot write the bundle {target}: {error.strerror or error}",
        expected="a folder with write permission and space for the model",
        hint="free some space, or name another folder with --output",
    )
