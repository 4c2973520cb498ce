"""Write a model where nobody sees it, then let it take its place."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.onnx_file import INLINE_LIMIT, write_model
from models.errors import EnvironmentUnsuitable

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from exporters.onnx_file import ExternalData


def write_beside(model: ir.Model, path: Path, external: ExternalData) -> list[Path]:
    """Write a model; a data file carries a hash of its content in its name, so that no other file's is replaced.

    Raises:
        UsageError: external data was forbidden and the model is above 2 GiB.
        EnvironmentUnsuitable: it cannot be written, or the disk is full.
    """
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    try:
        if external == "always" or (external == "auto" and sum(tensor.nbytes for tensor in tensors) > INLINE_LIMIT):
            digest = hashlib.sha256()
            for tensor in tensors:
                digest.update(tensor.tobytes())
            return write_model(model, path, "always", data_name=f"{path.name}.{digest.hexdigest()[:12]}.data")
        return write_model(model, path, external)
    except OSError as error:
        raise _unwritable(path, error) from error


@contextmanager
def temporary_folder(target: Path | None) -> Iterator[Path]:
    """Yield a folder beside the target, or anywhere if there is none; it vanishes.

    Raises:
        EnvironmentUnsuitable: it cannot be made.
    """
    try:
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".optimize-", dir=None if target is None else target.parent))
    except OSError as error:
        raise _unwritable(target or Path(tempfile.gettempdir()), error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place(files: list[Path], folder: Path) -> tuple[Path, ...]:
    """Move the files to where they belong, the model last: killed at any time, the old model still has its data.

    Raises:
        EnvironmentUnsuitable: a file cannot be replaced; all are as they were.
    """
    placed = [folder / path.name for path in files]
    made = [path for path in placed[1:] if not path.exists()]
    try:
        for path in files:
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        for path, target in reversed(list(zip(files, placed, strict=True))):
            path.replace(target)
    except BaseException as error:
        for path in made if files[0].exists() else ():  # the model has not been moved
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(placed[0], error) from error
        raise
    return tuple(placed)


def same_file(one: Path, other: Path) -> bool:
    """Say whether the second path is there, and is the first by whatever name."""
    return other.exists() and one.samefile(other)


def _unwritable(path: Path, error: OSError) -> EnvironmentUnsuitable:
    return EnvironmentUnsuitable(
        f"cannot write {path}: {error.strerror or error}", expected="a place with write permission and some space"
    )
