"""Build an engine, in the child process (`deploycli.exporters.tensorrt.child`): one code path for TensorRT 10.12 to
11.x and for TensorRT for RTX, whose differences are in `deploycli.exporters.tensorrt.compilers`.

The network is strongly typed, so precision is what the ONNX file says. What can fail in TensorRT tells so by what it
returns, None, False or -1, and not by an exception: each return value is looked at.

Sources: TensorRT, Python API of 10.13 to 11.4, and of TensorRT for RTX 1.7.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deploycli.exporters.bundle.engine import HEADER_BYTES, plan_header
from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.settings import shapes_text
from deploycli.exporters.target.verdict import shown
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.job import LAYERS, LOG, PLAN, BuildResult, Progress
from deploycli.exporters.tensorrt.parser import fill, make_builder, make_network
from deploycli.models.errors import BuildError, UsageError, first_line
from deploycli.models.memory import shortage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import tensorrt as trt

    from deploycli.exporters.target.settings import BuildSettings, ShapeRange
    from deploycli.exporters.tensorrt.callbacks import Log, Monitor
    from deploycli.exporters.tensorrt.compilers import Compiler
    from deploycli.exporters.tensorrt.job import Job


def build(job: Job, progress: Callable[[Progress], None], log: Log) -> BuildResult:
    """Build what the job asks for; the plan and what is told of its layers are then in its folder.

    Args:
        job: the job.
        progress: is called with each step.
        log: of TensorRT.

    Raises:
        BuildError: TensorRT refuses the model or the settings.
        UsageError: the profile does not fit the model's inputs.
        IntegrityError: the timing cache is damaged or for something else.
        EnvironmentUnsuitable: not installed, no GPU where one is needed, no Polygraphy, no space.
    """
    title, seconds = job.product.title, _Stopwatch(progress)
    compiler = compiler_of(job, log)
    compiler.start()
    with seconds.phase("parse"):
        builder = make_builder(log, title)
        network = make_network(builder, title)
        parser = parse(network, job.onnx, log, title)  # kept: the network points into the parser's weights
    compiler.adapt(network)
    monitor = make_monitor(progress)
    config = compiler.configure(builder, monitor)
    add_profiles(builder, network, config, job.settings)
    with seconds.phase("build"):
        memory = builder.build_serialized_network(network, config)
    if memory is None:
        raise _not_built(title, log.last(), compiler.advice())
    plan = bytes(memory)
    header = plan_header(plan[:HEADER_BYTES])
    if header is None or header.product is not job.product:
        raise BuildError(f"what {title} built does not begin as a plan does: {plan[:8]!r}, {len(plan)} bytes")
    with seconds.phase("inspect"):
        engine = compiler.read(plan, header, config, network)
    del parser, memory
    timing_cache = compiler.keep()
    write_whole(job.file(PLAN), plan)
    layers = None
    if engine.layers is not None:
        layers = job.file(LAYERS)
        write_whole(layers, engine.layers.encode())
    return BuildResult(
        plan=job.file(PLAN),
        sha256=hashlib.sha256(plan).hexdigest(),
        size=len(plan),
        layers=layers,
        log=job.file(LOG),
        tensorrt=library.version(job.product),
        gpu=compiler.gpu,
        io=engine.io,
        facts={
            "plan_version": ".".join(map(str, header.version)),
            "network_flags": ["STRONGLY_TYPED"],
            **engine.facts,
        },
        timing_cache_sha256=timing_cache,
        seconds=seconds.taken,
    )


def compiler_of(job: Job, log: Log) -> Compiler:
    """Return the compiler of a job.

    Raises:
        EnvironmentUnsuitable: it needs a GPU, and there is none.
    """
    if job.product is RTX:
        from deploycli.exporters.tensorrt.compilers.rtx import Rtx

        return Rtx(job, log)
    from deploycli.exporters.tensorrt.compilers.tensorrt import TensorRt

    return TensorRt(job, log)


def parse(network: trt.INetworkDefinition, onnx: Path, log: Log, title: str) -> trt.OnnxParser:
    """Fill the network from an ONNX file; the parser must outlive the network.

    Raises:
        BuildError: the parser refuses the file: all its errors, with node and operator; or finds nothing in it, which
            it does not call an error.
    """
    parser, refusals = fill(network, onnx, log)
    if refusals:
        raise BuildError(
            "\n  ".join([f"{title} cannot read {onnx}:", *shown(refusals, max(0, parser.num_errors - len(refusals)))]),
            hint="deploycli lint, which names what TensorRT does not take",
        )
    return parser


def add_profiles(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, settings: BuildSettings
) -> None:
    """Add the optimization profiles, in their order.

    Raises:
        UsageError: one does not name the network's inputs.
        BuildError: TensorRT refuses one.
    """
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    for place, wanted in enumerate(settings.profiles):
        if set(inputs) != set(wanted):
            raise UsageError(
                f"the shapes are for {', '.join(sorted(wanted)) or 'no input'}",
                expected=f"the model's inputs: {', '.join(sorted(inputs))}",
            )
        profile = builder.create_optimization_profile()
        if profile is None:
            raise BuildError("TensorRT makes no optimization profile")
        try:
            for name, shapes in wanted.items():
                profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        except ValueError as error:
            raise _bad_profile(wanted, first_line(error)) from error
        if not profile or config.add_optimization_profile(profile) != place:
            raise _bad_profile(wanted, "")


def _not_built(title: str, said: str, advice: str) -> BuildError:
    if shortage(RuntimeError(said)) is not None:
        return BuildError(f"{title} ran out of memory: {said}", hint="a smaller batch, or a machine with more memory")
    return BuildError(f"{title} built no engine: {said or 'it does not say why'}", hint=advice)


def make_monitor(progress: Callable[[Progress], None]) -> Monitor:
    """Return what TensorRT reports its progress to."""
    from deploycli.exporters.tensorrt.callbacks import Monitor

    return Monitor(progress)


class _Stopwatch:
    def __init__(self, progress: Callable[[Progress], None]) -> None:
        self._progress = progress
        self.taken: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report and time a phase of ours."""
        self._progress(Progress(f"deploycli: {name}", 0, 1))
        begun = time.monotonic()
        yield
        self.taken[name] = round(time.monotonic() - begun, 3)
        self._progress(Progress(f"deploycli: {name}", 1, 1))


def _bad_profile(profile: Mapping[str, ShapeRange], reason: str) -> BuildError:
    shapes = "; ".join(f"{name} {shapes_text(r.min, r.opt, r.max, between=', ')}" for name, r in profile.items())
    return BuildError(
        f"TensorRT refuses the shapes {shapes}" + (f": {reason}" if reason else ""),
        expected="shapes that the model takes: its batch axis may be fixed",
    )
