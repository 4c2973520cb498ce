"""A model that also returns intermediate tensors, without a copy of its weights in memory; and how large the values of
a graph become on data: what FP16 has no room for.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from deploycli.exporters.bundle.files import temporary_folder
from deploycli.exporters.graph.onnx_file import external_files, load_model
from deploycli.exporters.precision.dtypes import feeds_softmax, fill_types
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.models.errors import EnvironmentUnsuitable, NumericsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from deploycli.exporters.data.samples import Samples

    Progress = Callable[[str, int, int], None]


@contextmanager
def observed(path: Path, tensors: Sequence[str]) -> Iterator[OrtRuntime]:
    """Run a model whose outputs are its own and ``tensors``, inputs left out: those the caller has.

    Args:
        path: an ONNX file.
        tensors: float32 values of the main graph.

    Raises:
        UsageError: there is no such file, or no such float32 tensor.
        IntegrityError: it is no ONNX file, or its external data is missing or outside its folder.
        ExportError: ONNX Runtime cannot load it.
        EnvironmentUnsuitable: there is no space for a copy of the file.
    """
    extra, files = _read(path, tensors)
    with (
        temporary_folder(_place(path, files)) as folder,
        OrtRuntime(_write(path, extra, files, folder)) as runtime,
    ):
        _check_types(runtime, tensors)
        yield runtime


def _read(path: Path, tensors: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the tensors that are neither input nor output, and the files of the external data."""
    model = load_model(path)
    names = _names(model)
    if unknown := [name for name in tensors if name not in names]:
        raise UsageError(
            f"{path} computes no tensor {', '.join(unknown)}", expected="inputs and values of its main graph"
        )
    ends = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    return [name for name in tensors if name not in ends], external_files(model)


def _names(model: ir.Model) -> set[str | None]:
    constants = model.graph.initializers
    inputs = {value.name for value in model.graph.inputs if value.name not in constants}
    return inputs | {value.name for node in model.graph for value in node.outputs if value.name}


def _place(path: Path, files: Sequence[str]) -> Path | None:
    """Return where the temporary folder should be: external data can be linked to within a file system only."""
    return path.parent if files and os.access(path.parent, os.W_OK) else None


def _write(path: Path, outputs: Sequence[str], files: Sequence[str], folder: Path) -> Path:
    """Write the model with further outputs into a folder, its external data beside it; return the file."""
    copy = folder / path.name
    # Messages that follow each other are one whose repeated fields are appended. ONNX Runtime infers the types.
    graph = onnx.GraphProto(output=[onnx.ValueInfoProto(name=name) for name in outputs])
    try:
        shutil.copyfile(path, copy)
        with copy.open("ab") as stream:
            stream.write(onnx.ModelProto(graph=graph).SerializeToString())
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            _link((path.parent / file).resolve(), folder / file)
    except OSError as error:
        raise EnvironmentUnsuitable(
            f"cannot copy {path} to {folder}: {error.strerror or error}",
            expected="space for one more copy of the ONNX file",
            hint="free some space, or set TMPDIR to another folder",
        ) from error
    return copy


def _link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy; ONNX Runtime refuses external data behind a symbolic one."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _check_types(runtime: OrtRuntime, tensors: Sequence[str]) -> None:
    dtypes = {info.name: info.dtype for info in (*runtime.inputs, *runtime.outputs)}
    if wrong := [f"{name} ({dtypes[name]})" for name in tensors if dtypes[name] != "float32"]:
        raise UsageError(f"a range was asked of {', '.join(wrong)}", expected="float32 tensors")


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
