"""The engines of a bundle: the very plans that ship, checked against their sidecars before they are loaded.

TensorRT for RTX finishes kernels when it loads an engine. That is timed apart, on engines that are loaded for it alone:
once with no kernels at hand, once with those of the first time. The cache beside the engine is not touched by it.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from deploycli.exporters.bench.candidate import Candidate, FirstLoad, Prepared
from deploycli.exporters.bundle.engine import sidecars
from deploycli.exporters.target.product import RTX
from deploycli.exporters.tensorrt.kernel_cache import InMemory
from deploycli.exporters.tensorrt.runtime import open_engine
from deploycli.models.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from deploycli.exporters.bench.candidate import Arrays, BenchOptions, Prepare
    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.bundle.engine import Sidecar
    from deploycli.exporters.tensorrt.runtime import TensorRtRuntime

ENGINES = "engines"


def engine_candidates(bundle: Bundle, options: BenchOptions) -> Iterator[Candidate]:
    """Return every engine of a bundle.

    Raises:
        IntegrityError: a plan without a sidecar, or a sidecar that is malformed.
    """
    folder = bundle.path / ENGINES
    for sidecar in sidecars(folder):
        yield Candidate(
            sidecar.product.mark,
            sidecar.precision,
            "cuda",
            partial(_open, folder, sidecar, options),
            f"{ENGINES}/{sidecar.plan}",
            sidecar.batches,
        )


@contextmanager
def _open(folder: Path, sidecar: Sidecar, options: BenchOptions) -> Iterator[Prepare]:
    with open_engine(folder, sidecar, cuda_graph=options.cuda_graph) as runtime:
        yield partial(_prepare, runtime, options, partial(_first_load, folder, sidecar))


def _prepare(
    runtime: TensorRtRuntime, options: BenchOptions, first_load: Callable[[Arrays], FirstLoad], inputs: Arrays
) -> Prepared:
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
        run,
        runtime.outputs,
        transfers="excluded",
        cuda_graph=options.cuda_graph and not notes,
        notes=notes,
        first_load=partial(first_load, inputs) if runtime.product is RTX else None,
    )


def _first_load(folder: Path, sidecar: Sidecar, inputs: Arrays) -> FirstLoad:
    from deploycli.exporters.tensorrt.rtx_runtime import RtxRuntime

    cache, seconds = InMemory(), []
    for _ in range(2):
        begin = time.perf_counter()
        with RtxRuntime(folder, sidecar, cache=cache) as runtime:
            runtime.run(inputs)
            seconds.append(time.perf_counter() - begin)
    return FirstLoad(*seconds)
