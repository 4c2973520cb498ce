"""TensorRT itself: it measures its kernels on the GPU that the engine is for.

Polygraphy's ``CreateConfig`` sets the configuration, for it knows which versions have what. Its other loaders do not
serve: ``NetworkFromOnnxPath`` and ``EngineBytesFromNetwork`` bring a logger of their own and no way to another, and do
not say on which node the parser failed; ``Profile`` takes input names for patterns; what ``CreateConfig`` does with a
timing cache is not checked; and ``EngineFromBytes`` lets the plan run host code.

Sources: TensorRT, Python API of 10.13 to 11.4; "Migrating from TensorRT 10.x to 11.x"; Polygraphy 0.53, backend/trt;
"Timing Cache" and "Security"; ``IBuilderConfig.set_timing_cache``.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.engine import IoTensor
from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.target.product import TENSORRT
from deploycli.exporters.target.targets import dotted
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.compilers import EngineReport, network_io
from deploycli.models.errors import BuildError, DeployError, EnvironmentUnsuitable, IntegrityError, first_line
from deploycli.models.spec import numpy_name

if TYPE_CHECKING:
    import tensorrt as trt

    from deploycli.exporters.bundle.engine import GpuRecord, PlanHeader
    from deploycli.exporters.tensorrt.callbacks import Log, Monitor
    from deploycli.exporters.tensorrt.job import Job
    from deploycli.exporters.tensorrt.messages import Messages


_OLD_NAME = "WEIGHTLESS"
"""Of STRIP_PLAN, which TensorRT 10 knows under both."""

_POLYGRAPHY = (0, 50, 3)
"""First Polygraphy whose ``CreateConfig`` runs on TensorRT 11; earlier ones ask layers for their precision."""


class TensorRt:
    """TensorRT, for one build; see `deploycli.exporters.tensorrt.compilers.Compiler`.

    Raises:
        EnvironmentUnsuitable: no GPU.
    """

    def __init__(self, job: Job, log: Log) -> None:
        self.gpu: GpuRecord = library.gpu()
        self._job = job
        self._log = log
        self._timings: TimingCache | None = None

    def start(self) -> None:
        """Say where this runs, and register the plugins."""
        import tensorrt as trt

        version, capability = library.version(), dotted(self.gpu.compute_capability)
        self._log.write(f"TensorRT {version}, {self.gpu.name}, compute capability {capability}")
        if not trt.init_libnvinfer_plugins(self._log, ""):
            raise BuildError("TensorRT cannot register its plugins", expected=self._log.last())

    def configure(self, builder: trt.Builder, monitor: Monitor) -> trt.IBuilderConfig:
        """Return the configuration; what is not in the settings stays TensorRT's default, but for TF32, which is off
        unless asked for.

        Raises:
            BuildError: this TensorRT does not have a setting, or not with this value.
            IntegrityError: the timing cache is damaged or for something else.
            EnvironmentUnsuitable: Polygraphy is missing or too old.
        """
        config = self._config(builder, monitor)
        if (folder := self._job.settings.timing_cache) is not None:
            self._timings = TimingCache(Path(folder), library.version(), self.gpu, config)
        return config

    def _config(self, builder: trt.Builder, monitor: Monitor) -> trt.IBuilderConfig:
        import tensorrt as trt

        settings = self._job.settings
        _require_polygraphy()
        from polygraphy.backend.trt import CreateConfig
        from polygraphy.exception import PolygraphyException

        hardware = None
        if settings.hardware_compatibility != "none":
            name = settings.hardware_compatibility.upper().replace("-", "_").replace("+", "_PLUS")
            hardware = _member(trt.HardwareCompatibilityLevel, name)
        create = CreateConfig(
            tf32=settings.tf32,
            memory_pool_limits=None
            if settings.workspace is None
            else {trt.MemoryPoolType.WORKSPACE: settings.workspace},
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
            # 10.x strips nothing without a refit flag. Not REFIT: it may lose a bias (TensorRT 11.3, "Refitting").
            config.set_flag(_member(trt.BuilderFlag, "REFIT_IDENTICAL"))
        return config

    def adapt(self, network: trt.INetworkDefinition) -> None:
        """Change nothing."""

    def read(
        self, plan: bytes, header: PlanHeader, config: trt.IBuilderConfig, network: trt.INetworkDefinition
    ) -> EngineReport:
        """Load the plan, and let TensorRT's inspector describe it."""
        settings = self._job.settings
        engine = inspect_engine(plan, self._log, may_have_host_code=settings.version_compatible)
        if engine is None:
            return EngineReport(None, network_io(network, settings), _config_facts(config))
        return EngineReport(engine.layers, engine.io, {**_config_facts(config), **engine.facts})

    def keep(self) -> str:
        """Write the timings; return their hash."""
        return "" if self._timings is None else self._timings.keep(self._log)

    def advice(self) -> str:
        """Say what to try where no engine was built."""
        if self._job.settings.error_on_timing_cache_miss:
            return "the timing cache may lack a layer: build once without --error-on-timing-cache-miss"
        return "a larger --workspace" if self._job.settings.workspace is not None else ""


def _member(enum: Any, name: str) -> Any:
    """Return a member of an enumeration of TensorRT's by name, for numbers and members differ between versions.

    Raises:
        EnvironmentUnsuitable: this version does not have it.
    """
    try:
        return enum.__members__[name]
    except KeyError as error:
        raise EnvironmentUnsuitable(
            f"TensorRT {library.version()} has no {enum.__name__}.{name}", hint=library.install_hint(TENSORRT)
        ) from error


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


def _config_facts(config: trt.IBuilderConfig) -> dict[str, Any]:
    import tensorrt as trt

    members = trt.BuilderFlag.__members__.items()
    flags = [name for name, flag in members if name != _OLD_NAME and config.get_flag(flag)]
    return {
        "hardware_compatibility": hardware_compatibility(config.hardware_compatibility_level),
        "builder_flags": sorted(flags),
    }


def inspect_engine(plan: bytes, log: Log, *, may_have_host_code: bool) -> EngineReport | None:
    """Load a plan that was just built and read what it is.

    Args:
        plan: its bytes.
        log: of TensorRT.
        may_have_host_code: a version compatible plan holds a lean runtime, and TensorRT does not load that while host
            code is forbidden. We never allow it: such a plan is not inspected.

    Returns:
        None for a plan with host code that TensorRT does not load for that reason.

    Raises:
        BuildError: TensorRT does not load the plan, or does not describe it.
    """
    import tensorrt as trt

    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        if may_have_host_code:
            log.write("the plan holds a lean runtime, which is host code: it is not loaded, and not inspected")
            return None
        raise BuildError(f"TensorRT cannot load the plan that it has just built: {log.last()}")
    inspector = engine.create_engine_inspector()
    if inspector is None:
        raise BuildError(f"TensorRT makes no engine inspector: {log.last()}")
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise BuildError(f"the engine inspector gives no JSON: {error}") from error
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return EngineReport(text, tuple(_io(engine, name) for name in names), _facts(engine))


def hardware_compatibility(level: trt.HardwareCompatibilityLevel) -> str:
    """Return a level as `deploycli.exporters.target.settings.HARDWARE_COMPATIBILITY` spells it."""
    return str(level.name).lower().replace("_plus", "+").replace("_", "-")


def _io(engine: trt.ICudaEngine, name: str) -> IoTensor:
    import tensorrt as trt

    is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    shapes = engine.get_tensor_profile_shape(name, 0) if is_input else []  # of inputs only
    return IoTensor(
        name,
        "input" if is_input else "output",
        numpy_name(engine.get_tensor_dtype(name).name),
        tuple(engine.get_tensor_shape(name)),
        tuple(tuple(shape) for shape in shapes),
    )


def _facts(engine: trt.ICudaEngine) -> dict[str, Any]:
    return {
        "name": engine.name,
        "layers": engine.num_layers,
        "optimization_profiles": engine.num_optimization_profiles,
        "aux_streams": engine.num_aux_streams,
        "device_memory": engine.device_memory_size_v2,
        "streamable_weights": engine.streamable_weights_size,
        "hardware_compatibility": hardware_compatibility(engine.hardware_compatibility_level),
        "profiling_verbosity": engine.profiling_verbosity.name,
        "refittable": engine.refittable,
    }


MOST_TIMINGS_BYTES = 1 << 28
"""Largest file of timings, bytes. Those of vision transformers have a few megabytes."""

_DELETE = "delete it, the next build makes it anew"


class TimingCache:
    """Kernel timings that are kept from build to build, so that the next one measures less: those that a build is
    given, and those that it adds.

    Timings are those of one TensorRT version on one GPU, and TensorRT takes no others: a folder holds one file for
    each, ``trt10.13.3.9-sm89-nvidia-l4.cache``, which trtexec reads as well. When a build is done it replaces its file
    whole. Of two builds at once the later one's timings stay; what is lost is measured again. A cache is untrusted
    input, for it also holds compiled kernels: only TensorRT's own check of it is relied on.

    Args:
        folder: of the timings; it may not exist yet.
        tensorrt: version, four parts.
        gpu: where kernels are measured.
        config: of the build, which is given what is stored.

    Raises:
        IntegrityError: the file is too large, or TensorRT does not take it.
        EnvironmentUnsuitable: it cannot be read.
    """

    def __init__(self, folder: Path, tensorrt: str, gpu: GpuRecord, config: trt.IBuilderConfig) -> None:
        self.file = folder / f"trt{tensorrt}-{gpu.slug}.cache"
        self._stored = _read(self.file)
        cache = config.create_timing_cache(self._stored)
        if cache is None or not config.set_timing_cache(cache, False):  # False: do not ignore another GPU
            raise IntegrityError(
                f"TensorRT refuses the timing cache in {self.file}",
                expected="timings of this TensorRT and this GPU, undamaged",
                hint=_DELETE,
            )
        self._cache = cache

    def keep(self, log: Messages) -> str:
        """Write all timings; return the hash of the file. The engine is not lost for its timings: the log tells why."""
        try:
            stored = self._bytes()
            write_whole(self.file, stored)
        except DeployError as error:
            log.write(f"the timing cache was not updated: {error.found}")
            stored = self._stored
        return hashlib.sha256(stored).hexdigest() if stored else ""

    def _bytes(self) -> bytes:
        memory = self._cache.serialize()
        if memory is None:
            raise BuildError("TensorRT cannot serialise its timing cache")
        data = bytes(memory)
        if len(data) > MOST_TIMINGS_BYTES:
            raise BuildError(
                f"the timing cache has {len(data)} bytes", expected=f"at most {MOST_TIMINGS_BYTES}", hint=_DELETE
            )
        return data


def _read(path: Path) -> bytes:
    """Return what a file holds, nothing where there is none."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_TIMINGS_BYTES + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise EnvironmentUnsuitable(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > MOST_TIMINGS_BYTES:
        raise IntegrityError(f"{path} is too large for a timing cache", expected=f"at most {MOST_TIMINGS_BYTES} bytes")
    return data
