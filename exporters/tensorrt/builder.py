"""Build an engine, in the child process (`exporters.tensorrt.worker`): one code path for TensorRT 10.12 to 11.x.

The network is strongly typed, so precision is what the ONNX file says. What can fail in TensorRT tells so by what it
returns, None, False or -1, and not by an exception: each return value is looked at.

Polygraphy's ``CreateConfig`` sets the configuration, for it knows which versions have what. Its other loaders do not
serve: ``NetworkFromOnnxPath`` and ``EngineBytesFromNetwork`` bring a logger of their own and no way to another, and do
not say on which node the parser failed; ``Profile`` takes input names for patterns; what ``CreateConfig`` does with a
timing cache is not checked; and ``EngineFromBytes`` lets the plan run host code.

Sources: TensorRT, Python API of 10.13 to 11.4; "Migrating from TensorRT 10.x to 11.x"; Polygraphy 0.53, backend/trt.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.atomic import write_whole
from exporters.tensorrt import library
from exporters.tensorrt.job import LAYERS, LOG, PLAN, BuildResult, Job
from exporters.tensorrt.plan import plan_version
from exporters.tensorrt.readback import hardware_compatibility, inspect_engine, network_io
from exporters.tensorrt.tactics import Lock, LockScope, tactics_of
from exporters.tensorrt.timing_cache import (
    CacheStore,
    cache_bytes,
    cache_key,
    load_cache,
    merged,
    sha256_of_bytes,
)
from models.errors import BuildError, DeployError, EnvironmentUnsuitable, UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    import tensorrt as trt

    from exporters.tensorrt.callbacks import Log, Monitor
    from exporters.tensorrt.progress import Reporter
    from exporters.tensorrt.settings import BuildSettings
    from exporters.tensorrt.sidecar import GpuRecord

_ERRORS_SHOWN = 20

_OLD_NAME = "WEIGHTLESS"
"""Of STRIP_PLAN, which TensorRT 10 knows under both."""

_POLYGRAPHY = (0, 50, 3)
"""First Polygraphy whose ``CreateConfig`` runs on TensorRT 11; earlier ones ask layers for their precision."""


class Cancelled(Exception):  # noqa: N818 - it was asked for
    """The build was stopped from outside."""


def build(job: Job, reporter: Reporter, log: Log) -> BuildResult:
    """Build what the job asks for; the plan and the inspector's text are then in its folder.

    Args:
        job: the job.
        reporter: is told of progress; may stop the build.
        log: of TensorRT.

    Raises:
        BuildError: TensorRT refuses the model or the settings.
        UsageError: the profile does not fit the model's inputs.
        IntegrityError: the timing cache or the lock is damaged or for something else.
        EnvironmentUnsuitable: no GPU, no Polygraphy, no space.
        Cancelled: the reporter said so.
    """
    library.require()
    import tensorrt as trt

    gpu, seconds = library.gpu(), _Stopwatch(reporter)
    log.write(
        f"TensorRT {library.version()}, {gpu.name}, compute capability {'.'.join(map(str, gpu.compute_capability))}"
    )
    if not trt.init_libnvinfer_plugins(log, ""):
        raise BuildError("TensorRT cannot register its plugins", expected=log.last())
    with seconds.phase("parse"):
        builder = make_builder(log)
        network = make_network(builder)
        parser = parse(network, job.onnx, log)  # kept: the network points into the parser's weights
    monitor = make_monitor(reporter)
    config = configure(builder, job.settings, monitor)
    add_profile(builder, network, config, job.settings)
    kernels = _Kernels(job, config, gpu)
    with seconds.phase("build"):
        memory = builder.build_serialized_network(network, config)
    if reporter.cancelled.is_set():
        raise Cancelled
    if memory is None:
        raise BuildError(
            f"TensorRT built no engine: {log.last() or 'it does not say why'}", hint=_why_no_engine(job.settings)
        )
    plan = bytes(memory)
    if plan_version(plan[:64]) is None:
        raise BuildError(f"what TensorRT built does not begin as a plan does: {plan[:8]!r}, {len(plan)} bytes")
    with seconds.phase("inspect"):
        engine = inspect_engine(plan, log, may_have_host_code=job.settings.version_compatible)
    del parser, memory
    lock, cache = kernels.keep(log)
    write_whole(job.file(PLAN), plan)
    layers = None
    if engine is not None:
        layers = job.file(LAYERS)
        write_whole(layers, engine.layers.encode())
    return BuildResult(
        plan=job.file(PLAN),
        sha256=sha256_of_bytes(plan),
        size=len(plan),
        layers=layers,
        log=job.file(LOG),
        tensorrt=library.version(),
        gpu=gpu,
        io=network_io(network, job.settings) if engine is None else engine.io,
        facts={**_facts(config, plan), **({} if engine is None else engine.facts)},
        timing_cache=cache,
        lock=lock,
        seconds=seconds.taken,
    )


def make_builder(log: Log) -> trt.Builder:
    """Return a builder.

    Raises:
        EnvironmentUnsuitable: TensorRT does not start on this machine.
    """
    import tensorrt as trt

    try:
        return trt.Builder(log)
    except TypeError as error:  # pybind11's "factory function returned nullptr"
        raise EnvironmentUnsuitable(
            f"TensorRT does not start: {log.last() or first_line(error)}",
            expected="a GPU and a driver that this TensorRT supports, with free memory",
            hint="nvidia-smi",
        ) from error


def make_network(builder: trt.Builder) -> trt.INetworkDefinition:
    """Return an empty, strongly typed network.

    Raises:
        BuildError: TensorRT makes none.
    """
    import tensorrt as trt

    # The flag's number is 1 in TensorRT 10 and 0 in 11, where all networks are strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if network is None:
        raise BuildError("TensorRT makes no strongly typed network")
    return network


def parse(network: trt.INetworkDefinition, onnx: Path, log: Log) -> trt.OnnxParser:
    """Fill the network from an ONNX file; the parser must outlive the network.

    Raises:
        BuildError: the parser refuses the file: all its errors, with node and operator.
    """
    import tensorrt as trt

    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):  # from a file, so that external data is found
        errors = [_parser_error(parser.get_error(i)) for i in range(min(parser.num_errors, _ERRORS_SHOWN))]
        if (more := parser.num_errors - len(errors)) > 0:
            errors.append(f"and {more} more")
        raise BuildError(
            "\n  ".join([f"TensorRT cannot read {onnx}:", *(errors or [log.last() or "it does not say why"])]),
            hint="deploycli lint, which names what TensorRT does not take",
        )
    return parser


def configure(builder: trt.Builder, settings: BuildSettings, monitor: Monitor) -> trt.IBuilderConfig:
    """Return the configuration of a build, without its profile and its timing cache.

    Args:
        builder: of the build.
        settings: what is not in them stays TensorRT's default, but for TF32, which is off unless asked for.
        monitor: must outlive the build.

    Raises:
        BuildError: this TensorRT does not have a setting, or not with this value.
        EnvironmentUnsuitable: Polygraphy is missing or too old.
    """
    import tensorrt as trt

    _require_polygraphy()
    from polygraphy.backend.trt import CreateConfig
    from polygraphy.exception import PolygraphyException

    hardware = None
    if settings.hardware_compatibility != "none":
        name = settings.hardware_compatibility.upper().replace("-", "_").replace("+", "_PLUS")
        hardware = member(trt.HardwareCompatibilityLevel, name)
    create = CreateConfig(
        tf32=settings.tf32,
        memory_pool_limits=None if settings.workspace is None else {trt.MemoryPoolType.WORKSPACE: settings.workspace},
        builder_optimization_level=settings.optimization_level,
        hardware_compatibility_level=hardware,
        version_compatible=settings.version_compatible,  # with its lean runtime, for we never exclude that
        strip_plan=settings.strip_weights,
        max_aux_streams=settings.max_aux_streams,
        error_on_timing_cache_miss=settings.error_on_timing_cache_miss,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        progress_monitor=monitor,
    )
    try:
        config: trt.IBuilderConfig = create(builder, None)  # None: no network, for the profile is ours to add
    except (PolygraphyException, TypeError, ValueError) as error:  # the latter two: TensorRT takes no such value
        raise BuildError(f"TensorRT does not take a setting: {first_line(error)}") from error
    if settings.strip_weights:
        # 10.x strips nothing without a refit flag. Not REFIT: NVIDIA warns that it may lose a bias (11.3, "Refitting").
        config.set_flag(member(trt.BuilderFlag, "REFIT_IDENTICAL"))
    if settings.locked is not None:
        config.set_flag(member(trt.BuilderFlag, "EDITABLE_TIMING_CACHE"))
    return config


def add_profile(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, settings: BuildSettings
) -> None:
    """Add the one optimization profile.

    Raises:
        UsageError: it does not name the network's inputs.
        BuildError: TensorRT refuses it.
    """
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    if set(inputs) != set(settings.profile):
        raise UsageError(
            f"the shapes are for {', '.join(sorted(settings.profile)) or 'no input'}",
            expected=f"the model's inputs: {', '.join(sorted(inputs))}",
        )
    profile = builder.create_optimization_profile()
    if profile is None:
        raise BuildError("TensorRT makes no optimization profile")
    try:
        for name, shapes in settings.profile.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
    except ValueError as error:
        raise _bad_profile(settings, first_line(error)) from error
    if not profile or config.add_optimization_profile(profile) != 0:
        raise _bad_profile(settings, "")


def make_monitor(reporter: Reporter) -> Monitor:
    """Return what TensorRT reports its progress to."""
    from exporters.tensorrt.callbacks import Monitor

    return Monitor(reporter)


def member(enum: Any, name: str) -> Any:
    """Return a member of an enumeration of TensorRT's by name, for numbers and members differ between versions.

    Raises:
        EnvironmentUnsuitable: this version does not have it.
    """
    try:
        return enum.__members__[name]
    except KeyError as error:
        raise EnvironmentUnsuitable(
            f"TensorRT {library.version()} has no {enum.__name__}.{name}", hint=library.INSTALL
        ) from error


class _Kernels:
    """What decides on kernels beside measurement: a lock, or a timing cache, or neither."""

    def __init__(self, job: Job, config: trt.IBuilderConfig, gpu: GpuRecord) -> None:
        settings, version = job.settings, library.version()
        self._config = config
        self._settings = settings
        self._stored = b""
        self._lock: Lock | None = None
        self._cache: trt.ITimingCache | None = None
        self._scope = LockScope.of(version, gpu, job.onnx_sha256, settings)
        if settings.locked is not None:
            path = Path(settings.locked)
            self._lock = Lock.read(path, self._scope)
            self._cache = load_cache(config, b"" if self._lock is None else self._lock.cache, path)
            if self._lock is not None:
                self._lock.pin(self._cache)
        elif settings.timing_cache is not None:
            self._store = CacheStore(settings.timing_cache, cache_key(version, gpu))
            self._stored = self._store.read()
            self._cache = load_cache(config, self._stored, self._store.file)

    def keep(self, log: Log) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Write the lock, or merge the timings; return what the result says of either."""
        if self._cache is None:
            return None, None
        if self._settings.locked is not None:
            return self._keep_lock(Path(self._settings.locked), self._cache), None
        cache, store = self._cache, self._store
        read = sha256_of_bytes(self._stored)
        found = {"file": str(store.file), "read_sha256": read}
        try:
            data = store.merge(lambda stored: merged(self._config, cache, stored, store.file))
        except DeployError as error:  # the engine is there: it is not thrown away for its timings
            log.write(f"the timing cache was not updated: {error.found}")
            return None, {**found, "sha256": read, "problem": error.found}
        return None, {**found, "sha256": sha256_of_bytes(data), "problem": ""}

    def _keep_lock(self, path: Path, cache: trt.ITimingCache) -> dict[str, Any]:
        written = self._lock is None
        if self._lock is None:
            tactics = tactics_of(cache)
            if not tactics:
                raise BuildError("TensorRT recorded no tactics: there is nothing to lock")
            self._lock = Lock(self._scope, cache_bytes(cache), tactics)
            self._lock.write(path)
        else:
            self._lock.check(cache)
        digest = sha256_of_bytes(path.read_bytes())
        return {"file": str(path), "sha256": digest, "tactics": len(self._lock.tactics), "written": written}


class _Stopwatch:
    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.taken: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report and time a phase of ours; stop before the next one if that was asked for."""
        if self._reporter.cancelled.is_set():
            raise Cancelled
        self._reporter.start(f"deploycli: {name}", 1)
        begun = time.monotonic()
        yield
        self.taken[name] = round(time.monotonic() - begun, 3)
        self._reporter.finish(f"deploycli: {name}")


def _require_polygraphy() -> None:
    try:
        import polygraphy
    except ImportError as error:
        found = f"Polygraphy cannot be imported: {first_line(error)}"
    else:
        if tuple(int(part) for part in re.findall(r"\d+", polygraphy.__version__)[:3]) >= _POLYGRAPHY:
            return
        found = f"Polygraphy {polygraphy.__version__} is installed"
    needed = ".".join(map(str, _POLYGRAPHY))
    raise EnvironmentUnsuitable(
        found, expected=f"Polygraphy {needed} or later", hint=f'pip install "polygraphy>={needed}"'
    )


def _parser_error(error: trt.ParserError | None) -> str:
    if error is None:
        return "an error that TensorRT does not describe"
    return f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): {error.desc()} [{error.code().name}]"


def _why_no_engine(settings: BuildSettings) -> str:
    if settings.error_on_timing_cache_miss:
        return "the timing cache may lack a layer: build once without --error-on-timing-cache-miss"
    return "a larger --workspace" if settings.workspace is not None else ""


def _bad_profile(settings: BuildSettings, reason: str) -> BuildError:
    shapes = "; ".join(
        f"{name} {', '.join('x'.join(map(str, shape)) for shape in (r.min, r.opt, r.max))}"
        for name, r in settings.profile.items()
    )
    return BuildError(
        f"TensorRT refuses the shapes {shapes}" + (f": {reason}" if reason else ""),
        expected="shapes that the model takes: its batch axis may be fixed",
    )


def _facts(config: trt.IBuilderConfig, plan: bytes) -> dict[str, Any]:
    import tensorrt as trt

    members = trt.BuilderFlag.__members__.items()
    flags = [name for name, flag in members if name != _OLD_NAME and config.get_flag(flag)]
    written_by = plan_version(plan[:64])
    return {
        "plan_version": "" if written_by is None else ".".join(map(str, written_by)),
        "network_flags": ["STRONGLY_TYPED"],
        "hardware_compatibility": hardware_compatibility(config.hardware_compatibility_level),
        "builder_flags": sorted(flags),
    }
