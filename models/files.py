"""Hashes of files, and texts that a user gives."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_CHUNK = 1 << 20  # bytes; hashing a 1 GB file must not hold it in memory
LONGEST_TEXT = 1 << 24
"""Bytes of a text that is read whole, such as a list of names; a device, or a pipe, may never end."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_several(digests: Sequence[str]) -> str:
    """Return one hash for several files: that of the only one, or the hash of theirs, in order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def text_of(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a file, a device or a pipe that ends.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer than :data:`LONGEST_TEXT`, or not in that encoding.
    """
    with path.open("rb") as stream:
        data = stream.read(LONGEST_TEXT + 1)
    if len(data) > LONGEST_TEXT:
        raise ValueError(f"it is longer than {LONGEST_TEXT} bytes")
    return io.TextIOWrapper(io.BytesIO(data), encoding).read()
