"""An ONNX file that is written where nobody sees it, until it takes its place."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from deploycli.exporters.bundle.files import regular_file, scratch_folder, temporary_folder, unwritable
from deploycli.exporters.graph.onnx_file import INLINE_LIMIT, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx_ir as ir

    from deploycli.exporters.graph.onnx_file import ExternalData


def real_target(target: Path) -> Path:
    """Return the file that will be replaced or made, or say at once that it cannot be.

    Raises:
        UsageError: it is no file.
        EnvironmentUnsuitable: its folder cannot be read.
    """
    try:
        return regular_file(target)
    except OSError as error:
        raise unwritable(target, error) from error


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
        raise unwritable(path, error) from error


@contextmanager
def folder_beside(target: Path | None) -> Iterator[Path]:
    """Yield a folder beside the target, or anywhere if there is none; it vanishes.

    Raises:
        EnvironmentUnsuitable: it cannot be made.
    """
    if target is None:
        with temporary_folder() as anywhere:
            yield anywhere
        return
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder(target))
        except OSError as error:
            raise unwritable(target, error) from error
        yield folder
