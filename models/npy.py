"""What the arrays in a file of NumPy's claim to be, before room is made for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import zipfile
    from collections.abc import Iterator


@dataclass(frozen=True)
class Claim:
    """An array of an ``.npz`` file, by its head.

    Attributes:
        name: of the member of the archive.
        shape: that it claims.
        dtype: that it claims.
        held: bytes that follow the head.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    held: int

    @property
    def claimed(self) -> int:
        """The bytes that its shape and its type need."""
        return math.prod(self.shape) * self.dtype.itemsize


def claims(archive: zipfile.ZipFile) -> Iterator[Claim]:
    """Yield what every array of an ``.npz`` file claims to be.

    Raises:
        ValueError: a member is no array.
    """
    for member in archive.infolist():
        with archive.open(member) as stream:
            shape, _, dtype = array_header(stream)
            yield Claim(member.filename, shape, dtype, member.file_size - stream.tell())


def array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Read the head of an ``.npy`` file, up to its first element: shape, whether it lies by columns, element type.

    Raises:
        ValueError: it is none.
    """
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)
