"""The header of a plan, which is read without TensorRT: who serialised it, and for which GPUs.

Sources: NVIDIA/TensorRT, samples/common/sampleEngines.cpp, ``printPlanVersion``; of TensorRT for RTX the plans of 1.7.1
for each of its targets.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycli.exporters.target.product import PRODUCTS, RTX
from deploycli.exporters.target.targets import TARGETS

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.target.product import Product
    from deploycli.exporters.target.targets import Capability

HEADER_BYTES = 36

_TENSORRT_BYTES = 28


@dataclass(frozen=True)
class PlanHeader:
    """What a plan says of itself.

    Attributes:
        product: what wrote it.
        version: major, minor, patch and build; of the build its lowest eight bits.
        targets: compute capabilities that it was compiled for; empty for TensorRT, whose plans are for one GPU.
    """

    product: Product
    version: tuple[int, int, int, int]
    targets: tuple[Capability, ...] = ()

    def __str__(self) -> str:
        """Return product and version."""
        return f"{self.product.title} {'.'.join(map(str, self.version))}"


def plan_header(head: bytes) -> PlanHeader | None:
    """Read the first `HEADER_BYTES` of a file; None where it is no plan."""
    product = next((p for p in PRODUCTS.values() if head.startswith(p.tag)), None)
    if product is None or len(head) < (HEADER_BYTES if product is RTX else _TENSORRT_BYTES):
        return None
    if struct.unpack_from("<I", head, 4) != (0,):  # the version of the serialisation
        return None
    major, minor, patch, build = head[24:28]
    targets: tuple[Capability, ...] = ()
    if product is RTX:
        (mask,) = struct.unpack_from("<I", head, 32)
        targets = tuple(target for bit, target in enumerate(TARGETS) if mask & 1 << bit)  # a bit for each
    return PlanHeader(product, (major, minor, patch, build), targets)


def header_of_plan(path: Path) -> PlanHeader | None:
    """Read the header of a file; None where it is no plan."""
    with path.open("rb") as file:
        return plan_header(file.read(HEADER_BYTES))
