"""The TensorRT engines of a bundle: the very plans that ship, checked against their sidecars before they are loaded."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from exporters.benchmark.candidate import Candidate, Prepared
from exporters.tensorrt.runtime import TensorRtRuntime
from exporters.tensorrt.sidecar import sidecars
from models.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from exporters.benchmark.candidate import Arrays, BenchOptions, Prepare
    from exporters.bundle import Bundle
    from exporters.tensorrt.sidecar import Sidecar

ENGINES = "engines"


def engine_candidates(bundle: Bundle, options: BenchOptions) -> Iterator[Candidate]:
    """Return every engine of a bundle.

    Raises:
        IntegrityError: a plan without a sidecar, or a sidecar that is malformed.
    """
    folder = bundle.path / ENGINES
    for sidecar in sidecars(folder):
        yield Candidate(
            "trt",
            sidecar.precision,
            "cuda",
            partial(_open, folder, sidecar, options),
            f"{ENGINES}/{sidecar.plan}",
            sidecar.batches,
        )


@contextmanager
def _open(folder: Path, sidecar: Sidecar, options: BenchOptions) -> Iterator[Prepare]:
    with TensorRtRuntime(folder, sidecar) as runtime:
        yield partial(_prepare, runtime, options)


def _prepare(runtime: TensorRtRuntime, options: BenchOptions, inputs: Arrays) -> Prepared:
    """Copy a batch to the GPU; a run then infers there, on the runtime's own stream, and waits for it."""
    runtime.prepare(inputs)
    enqueue: Callable[[], None] = runtime.enqueue
    notes: tuple[str, ...] = ()
    if options.cuda_graph:
        try:
            enqueue = runtime.capture()
        except DeployError as error:
            notes = (f"no CUDA graph: {error.found}",)

    def run() -> None:
        enqueue()
        runtime.synchronize()

    return Prepared(
        run, runtime.outputs, transfers="excluded", cuda_graph=options.cuda_graph and not notes, notes=notes
    )
