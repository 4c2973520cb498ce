"""The kernels that an engine launches: what its sidecar records of them, and how they are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploycli.models.codec import Count

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Kernel:
    """One kernel that an engine launches.

    Attributes:
        name: the compiler's name of it.
        kind: the compiler's type of layer.
        precision: the narrowest type that it reads.
        product: whether it is a matrix product, a convolution or fused attention.
        attention: whether it is fused attention.
        reads: types and shapes of the activations that it reads, -1 for an axis that is not fixed.
        writes: the same of those that it writes.
        nodes: the ONNX nodes in it, in the order of the graph.
        module: the PyTorch module that it belongs to: of its product, or else of its last node; may be empty.
        moved: bytes of activations that it reads and writes for one image; None where that does not follow.
        profile: number of the optimization profile that it is for.
    """

    name: str
    kind: str
    precision: str
    product: bool
    attention: bool
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    nodes: tuple[str, ...]
    module: str
    moved: Count | None
    profile: Count = 0


@dataclass(frozen=True)
class KernelTotals:
    """Kernels, counted.

    Attributes:
        launches: how many.
        attention: those that are fused attention.
        products: precision -> matrix products, convolutions and fused attention.
        moved: bytes of activations for one image, of those kernels where they are known.
        unknown: kernels whose bytes are not known.
    """

    launches: int
    attention: int
    products: Mapping[str, int]
    moved: int
    unknown: int

    @classmethod
    def of(cls, kernels: Sequence[Kernel]) -> KernelTotals:
        """Count kernels."""
        products: dict[str, int] = {}
        for kernel in kernels:
            if kernel.product:
                products[kernel.precision] = products.get(kernel.precision, 0) + 1
        return cls(
            len(kernels),
            sum(kernel.attention for kernel in kernels),
            products,
            sum(kernel.moved or 0 for kernel in kernels),
            sum(kernel.moved is None for kernel in kernels),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "launches": self.launches,
            "attention": self.attention,
            "products": dict(self.products),
            "moved": self.moved,
            "moved_unknown": self.unknown,
        }


def by_module(kernels: Sequence[Kernel], depth: int) -> dict[str, KernelTotals]:
    """Return totals by PyTorch module, in the order of execution; ``depth`` parts of a module's path count."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(_cut(kernel.module, depth), []).append(kernel)
    return {module: KernelTotals.of(group) for module, group in groups.items()}


def readable_depth(*engines: Sequence[Kernel], most: int = 32) -> int:
    """Return how many parts of modules' paths give a table of at most so many rows, if any does."""
    kernels = [kernel for engine in engines for kernel in engine]
    deepest = max((kernel.module.count(".") + 1 for kernel in kernels), default=1)
    depths = (d for d in range(deepest, 1, -1) if len({_cut(kernel.module, d) for kernel in kernels}) <= most)
    return next(depths, 1)


def _cut(module: str, depth: int) -> str:
    return ".".join(module.split(".")[:depth])
