"""Open an engine of either product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycli.exporters.target.product import RTX
from deploycli.exporters.tensorrt.rtx_runtime import RtxRuntime
from deploycli.exporters.tensorrt.runtime import TensorRtRuntime

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.bundle.engine import Sidecar


def open_engine(
    folder: Path, sidecar: Sidecar, *, allow_host_code: bool = False, cuda_graph: bool = False
) -> TensorRtRuntime:
    """Load an engine into the runtime of its product; see `TensorRtRuntime`.

    Args:
        folder: where plan and sidecar are, in the bundle.
        sidecar: the sidecar.
        allow_host_code: see `check_host`.
        cuda_graph: `TensorRtRuntime.capture` will be called.
    """
    if sidecar.product is RTX:
        return RtxRuntime(folder, sidecar, cuda_graph=cuda_graph)
    return TensorRtRuntime(folder, sidecar, allow_host_code=allow_host_code)
