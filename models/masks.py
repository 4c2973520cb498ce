"""Which inputs of a model are masks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploycli.models.spec import TensorSpec

_NAMES = re.compile(r"mask|keep|pad|valid|visible|hide", re.IGNORECASE)


def is_mask(spec: TensorSpec) -> bool:
    """Say whether an input is one that hides parts of another: it is boolean, or named so."""
    return spec.dtype == "bool" or bool(_NAMES.search(spec.name))
