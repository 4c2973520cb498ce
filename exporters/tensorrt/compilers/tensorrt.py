"""TensorRT itself: it measures its kernels on the GPU that the engine is for.

Polygraphy's ``CreateConfig`` sets the configuration, for it knows which versions have what. Its other loaders do not
serve: ``NetworkFromOnnxPath`` and ``EngineBytesFromNetwork`` bring a logger of their own and no way to another, and do
not say on which node the parser failed; ``Profile`` takes input names for patterns; what ``CreateConfig`` does with a
timing cache is not checked; and ``EngineFromBytes`` lets the plan run host code.

Sources: TensorRT, Python API of 10.13 to 11.4; "Migrating from TensorRT 10.x to 11.x"; Polygraphy 0.53, backend/trt.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycli.exporters.target.product import TENSORRT
from deploycli.exporters.target.targets import dotted
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.readback import EngineReport, hardware_compatibility, inspect_engine, network_io
from deploycli.exporters.tensorrt.timing_cache import TimingCache
from deploycli.models.errors import BuildError, EnvironmentUnsuitable, first_line

if TYPE_CHECKING:
    import tensorrt as trt

    from deploycli.exporters.bundle.engine import GpuRecord, PlanHeader
    from deploycli.exporters.tensorrt.callbacks import Log, Monitor
    from deploycli.exporters.tensorrt.job import Job

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
            return EngineReport(None, network_io(network, settings), _facts(config))
        return EngineReport(engine.layers, engine.io, {**_facts(config), **engine.facts})

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


def _facts(config: trt.IBuilderConfig) -> dict[str, Any]:
    import tensorrt as trt

    members = trt.BuilderFlag.__members__.items()
    flags = [name for name, flag in members if name != _OLD_NAME and config.get_flag(flag)]
    return {
        "hardware_compatibility": hardware_compatibility(config.hardware_compatibility_level),
        "builder_flags": sorted(flags),
    }
