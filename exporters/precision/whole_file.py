"""Replace a file whole: the disk holds the old one or the new one, whatever is killed when."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from models.errors import EnvironmentUnsuitable


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, in a folder that is created where it is missing.

    Raises:
        EnvironmentUnsuitable: it cannot be written, or the disk is full; ``path`` is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
        temporary = Path(name)
        try:
            with open(descriptor, "wb") as stream:  # noqa: PTH123 - of a descriptor
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise EnvironmentUnsuitable(
            f"cannot write {path}: {error.strerror or error}",
            expected="a place with write permission and some space",
        ) from error
