"""What TensorRT for RTX makes of an ONNX file: compiled ahead of time, for one GPU and one batch."""

import tempfile
from pathlib import Path

import onnx_ir as ir

from deploycli.exporters.bundle.engine import KernelTotals
from deploycli.exporters.graph.steps import KernelFigures
from deploycli.exporters.tensorrt.traffic import compiled
from deploycli.exporters.tune import settings_of

GPU = (8, 9)


def compiled_figures(path: Path, batch: int) -> KernelFigures:
    """Compile a file and count its kernels; the bytes are for one sample.

    Raises:
        BuildError: the compiler refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        kernels = compiled(path, settings_of(ir.load(path), batch), Path(folder) / "work", (GPU,)).kernels
    totals = KernelTotals.of(kernels)
    return KernelFigures(totals.launches, totals.moved, totals.attention)
