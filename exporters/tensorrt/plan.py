"""The header of a plan, which is read without TensorRT: who serialised it.

Source: NVIDIA/TensorRT, samples/common/sampleEngines.cpp, ``printPlanVersion``.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_HEADER_BYTES = 28
_TAG = 0x74727466  # the bytes "ftrt"


def plan_version(head: bytes) -> tuple[int, int, int, int] | None:
    """Return major, minor, patch and build (its lowest eight bits) of the TensorRT that wrote a plan.

    Args:
        head: the first bytes of the file, 28 or more.

    Returns:
        None where it is no plan.
    """
    if len(head) < _HEADER_BYTES:
        return None
    tag, serialization = struct.unpack_from("<II", head)
    if tag != _TAG or serialization != 0:
        return None
    major, minor, patch, build = head[24:28]
    return major, minor, patch, build


def version_of_plan(path: Path) -> tuple[int, int, int, int] | None:
    """Return the TensorRT version that wrote the file, or None where it is no plan."""
    with path.open("rb") as file:
        return plan_version(file.read(_HEADER_BYTES))
