"""The engines of a bundle: the very plans that ship, checked against their sidecars before they are loaded.

TensorRT for RTX finishes kernels when it loads an engine. That is timed apart, on engines that are loaded for it alone:
once with no kernels at hand, once with those of the first time. The cache beside the engine is not touched by it.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from deploycli.exporters.bench.candidate import Arrays, BenchOptions, Candidate, FirstLoad, Prepare, Prepared
from deploycli.exporters.target.product import RTX
from deploycli.exporters.tensorrt.runtime import TensorRtRuntime, open_engine
from deploycli.models.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deploycli.exporters.bundle.bundle import Bundle, Engine


def engine_candidates(bundle: Bundle, options: BenchOptions) -> Iterator[Candidate]:
    """Return every engine of a bundle.

    Raises:
        IntegrityError: a plan without a sidecar, or a sidecar that is malformed.
    """
    for engine in bundle.engines():
        name, opened = engine.sidecar.product.mark, partial(_open, engine, options)
        yield Candidate(name, engine.precision, "cuda", opened, engine)


@contextmanager
def _open(engine: Engine, options: BenchOptions) -> Iterator[Prepare]:
    with open_engine(engine.path.parent, engine.sidecar, cuda_graph=options.cuda_graph) as runtime:
        yield partial(_prepare, runtime, options, partial(_first_load, engine))


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


def _first_load(engine: Engine, inputs: Arrays) -> FirstLoad:
    from deploycli.exporters.tensorrt.runtime import InMemory, RtxRuntime

    cache, seconds = InMemory(), []
    for _ in range(2):
        begin = time.perf_counter()
        with RtxRuntime(engine.path.parent, engine.sidecar, cache=cache) as runtime:
            runtime.run(inputs)
            seconds.append(time.perf_counter() - begin)
    return FirstLoad(*seconds)
