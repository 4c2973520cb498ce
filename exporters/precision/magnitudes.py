"""How large the values of a graph become on data: what FP16 has no room for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.onnx_file import load_model
from deploycli.exporters.precision.constants import feeds_softmax
from deploycli.exporters.precision.dtypes import fill_types
from deploycli.exporters.precision.observed import observed
from deploycli.models.errors import NumericsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deploycli.exporters.data.samples import Samples

    Progress = Callable[[str, int, int], None]


def magnitudes(path: Path, samples: Samples, *, progress: Progress) -> dict[str, float]:
    """Return the largest magnitude of every FP32 value of a graph, constants aside; that of a mask may be infinite.

    Args:
        path: an FP32 ONNX file.
        samples: the data; samples are run one by one, or as many as a fixed batch has.
        progress: called with a label, what is done and how much there is.

    Raises:
        UsageError: no sample can be read, or too few for a fixed batch.
        NumericsError: a value is NaN already in FP32, or infinite where it is no mask.
        ExportError: ONNX Runtime cannot load or run the model.
    """
    model = load_model(path)
    fill_types(model)
    computed = (output for node in model.graph if node.op_type != "Constant" for output in node.outputs)
    values = [*(value for value in model.graph.inputs if value.const_value is None), *computed]
    floats = {value.name: value for value in values if value.dtype == ir.DataType.FLOAT and value.name}
    masks = {name for name, value in floats.items() if feeds_softmax(value)}
    batch = _fixed_batch(model.graph) or 1
    seen: dict[str, float] = {}
    with observed(path, list(floats)) as runtime:
        for read in samples.batches(batch):
            progress("looking for large values", read.stop - 1, len(samples.names))
            if any(len(array) < batch for array in read.inputs.values()):
                continue  # what is left over does not fill a fixed batch
            arrays = {**read.inputs, **runtime.run(read.inputs)}
            for name in floats:  # in the order of the graph: the first that is none is the cause
                largest = float(np.abs(arrays[name]).max(initial=0.0))
                if not np.isfinite(largest) and not (name in masks and largest == np.inf):
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
    shapes = (value.shape for value in graph.inputs if value.const_value is None)
    return next((dim for shape in shapes if shape and isinstance(dim := shape[0], int)), None)
