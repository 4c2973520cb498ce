"""NVIDIA's two compilers of engines, which share an interface: what tells one from the other before either is imported.

TensorRT builds on the GPU that an engine is for, whose kernels it measures. TensorRT for RTX compiles ahead of time, on
any x86-64 machine, for GPUs of compute capability 7.5 to 12.1; kernels are finished when the engine is first loaded.
Plan headers: NVIDIA/TensorRT, samples/common/sampleEngines.cpp, and plans of TensorRT for RTX 1.7.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

CompilerName = Literal["tensorrt", "rtx"]


@dataclass(frozen=True)
class Product:
    """One of the two.

    Attributes:
        key: what the command line calls it.
        title: what NVIDIA calls it.
        module: what is imported.
        mark: stands before the version in the name of a plan.
        tag: the first bytes of a plan.
        minimum: the first version that this program was written for.
        install: how to get it.
    """

    key: CompilerName
    title: str
    module: str
    mark: str
    tag: bytes
    minimum: tuple[int, ...]
    install: str

    @property
    def expected(self) -> str:
        """The versions that serve, in words."""
        return f"{self.title} {'.'.join(map(str, self.minimum))} or later"


# 10.12: the first whose strongly typed networks NVIDIA recommends (NVIDIA/TensorRT, strong typing migration).
TENSORRT = Product(
    "tensorrt",
    "TensorRT",
    "tensorrt",
    "trt",
    b"ftrt",
    (10, 12),
    'pip install "tensorrt>=10.12", or work in the container nvcr.io/nvidia/tensorrt',
)
RTX = Product(
    "rtx",
    "TensorRT for RTX",
    "tensorrt_rtx",
    "rtx",
    b"vtrt",
    (1, 7),
    'pip install "deploycli[rtx]"',
)
PRODUCTS: Mapping[CompilerName, Product] = {product.key: product for product in (TENSORRT, RTX)}
