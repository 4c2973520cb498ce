"""What an array in a file of NumPy's claims to be, before room is made for it."""

from __future__ import annotations

from typing import IO

import numpy as np


def array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """Read the head of an ``.npy`` file, up to its first element: the shape and the type that it claims.

    Raises:
        ValueError: it is none.
    """
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype
