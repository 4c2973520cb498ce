"""The ONNX files of a bundle in ONNX Runtime, on the CPU and on a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from deploycli.exporters.bench.candidate import Candidate, Prepared
from deploycli.exporters.graph.onnx_file import load_model
from deploycli.exporters.precision.number_format import FORMATS
from deploycli.exporters.precision.simulate import holds_fp8, reduced_type
from deploycli.exporters.runtime.runtimes import PROVIDERS, OrtRuntime
from deploycli.models.errors import ExportError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deploycli.exporters.bench.candidate import Arrays, BenchOptions, Prepare
    from deploycli.exporters.bundle.bundle import Bundle, ModelFile


def ort_candidates(bundle: Bundle, options: BenchOptions) -> Iterator[Candidate]:
    """Return every ONNX file of a bundle, on the CPU and on a GPU."""
    files = list(bundle.onnx_files())
    for device in PROVIDERS:
        for file in files:
            opened = partial(_open, file.path, device, options)
            yield Candidate(f"ort-{device}", file.precision, device, opened, file, _emulated(file, device))


def _emulated(file: ModelFile, device: str) -> str:
    """Say where ONNX Runtime computes in another precision than the file's."""
    if file.precision == "fp32":
        return ""
    if device == "cuda":
        return "ONNX Runtime's CUDA provider dequantizes, and multiplies floats" if file.precision in FORMATS else ""
    reduced = reduced_type(load_model(file.path))
    if reduced is None:
        return ""
    return f"ONNX Runtime's CPU provider computes {'FP16' if reduced == ir.DataType.FLOAT16 else 'BF16'} in FP32"


@contextmanager
def _open(path: Path, device: str, options: BenchOptions) -> Iterator[Prepare]:
    fp8 = holds_fp8(load_model(path))  # loaded, it is judged as for every other command
    with OrtRuntime(path, move_qdq=not fp8, threads=options.threads, device=device, timed=True) as runtime:
        yield partial(_prepare, runtime, device, options)


def _prepare(runtime: OrtRuntime, device: str, options: BenchOptions, inputs: Arrays) -> Prepared:
    try:
        run, outputs = (_host_run if device == "cpu" else _bound_run)(runtime, device, runtime.feed(inputs))
        run()
    except Exception as error:  # its exceptions share no base class
        raise ExportError(f"{runtime.name} failed: {first_line(error)}") from error
    if device == "cpu":
        return Prepared(run, outputs, threads=options.threads)
    notes = ("TF32 off", "what has no CUDA kernel runs on the CPU")
    return Prepared(run, outputs, transfers="excluded", notes=notes)


def _host_run(runtime: OrtRuntime, _device: str, feed: Arrays) -> tuple[Any, Any]:
    session, names = runtime.session, [info.name for info in runtime.outputs]
    last: list[Any] = []

    def run() -> None:
        last[:] = session.run(names, feed)

    return run, lambda: dict(zip(names, last, strict=True))


def _bound_run(runtime: OrtRuntime, device: str, feed: Arrays) -> tuple[Any, Any]:
    """Inputs and outputs stay on the device; a run returns when it has finished there."""
    import onnxruntime as ort

    session, names = runtime.session, [info.name for info in runtime.outputs]
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
    for name in names:
        binding.bind_output(name, device, 0)
    session.run_with_iobinding(binding)
    for name, value in zip(names, binding.get_outputs(), strict=True):
        binding.bind_ortvalue_output(name, value)  # now that the shapes are known: no allocation in a run

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run, lambda: dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))
