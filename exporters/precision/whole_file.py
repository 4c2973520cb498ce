"""Replace a file whole: the disk holds the old one or the new one, whatever is killed when."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

from models.errors import EnvironmentUnsuitable

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, in a folder that is created where it is missing.

    Raises:
        EnvironmentUnsuitable: it cannot be written, or the disk is full; ``path`` is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.tmp-{secrets.token_hex(4)}"
        try:
            with temporary.open("xb") as stream:  # with the permissions of any other file, as mkstemp does not
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
