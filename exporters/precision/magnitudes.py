"""How large the values of a graph become on data: what FP16 has no room for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from exporters.onnx_file import load_model
from exporters.precision.observed import observed
from models.errors import NumericsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from exporters.samples import Samples

    Progress = Callable[[str, int, int], None]


def magnitudes(path: Path, samples: Samples, *, progress: Progress) -> dict[str, float]:
    """Return the largest magnitude of every FP32 value of a graph, constants aside.

    Args:
        path: an FP32 ONNX file.
        samples: the data; samples are run one by one, or as many as a fixed batch has.
        progress: called with a label, what is done and how much there is.

    Raises:
        UsageError: no sample can be read, or too few for a fixed batch.
        NumericsError: a value is NaN or infinite already in FP32.
        ExportError: ONNX Runtime cannot load or run the model.
    """
    graph = load_model(path).graph
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    names = [value.name or "" for value in values if value.dtype == ir.DataType.FLOAT and value.name]
    batch = _fixed_batch(graph) or 1
    seen: dict[str, float] = {}
    with observed(path, names) as runtime:
        for read in samples.batches(batch):
            progress("looking for large values", read.stop, len(samples.names))
            if any(len(array) < batch for array in read.inputs.values()):
                continue  # what is left over does not fill a fixed batch
            for name, array in {**read.inputs, **runtime.run(read.inputs)}.items():
                largest = float(np.abs(array).max(initial=0.0))
                if not np.isfinite(largest):
                    raise NumericsError(
                        f"{name} is NaN or infinite in FP32, at sample {samples.names[read.stop - 1]}",
                        expected="finite activations",
                        hint="check the preprocessing, the data and the weights",
                    )
                seen[name] = max(seen.get(name, 0.0), largest)
    if not seen:
        raise UsageError(
            f"{samples.description}: no batch of {batch} samples can be read", expected="data for a whole batch"
        )
    return seen


def _fixed_batch(graph: ir.Graph) -> int | None:
    shapes = (value.shape for value in graph.inputs)
    return next((dim for shape in shapes if shape is not None and isinstance(dim := shape[0], int)), None)
