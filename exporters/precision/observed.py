"""A model that also returns intermediate tensors, without a copy of its weights in memory."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

import onnx

from deploycli.exporters.bundle.files import temporary_folder
from deploycli.exporters.graph.onnx_file import external_files, load_model
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.models.errors import EnvironmentUnsuitable, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import onnx_ir as ir


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
