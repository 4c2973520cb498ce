"""``deploycli build-trt``: for every precision a typed graph, a lint, an engine, its proof, its sidecar.

bundle/engines/fp16-sm89-trt10.13.3.9.plan, .json      the engine and what is known of it
bundle/engines/fp16-rtx1.7.1.116.plan, .json           the same by TensorRT for RTX, for all GPUs that it knows
bundle/reports/build-fp16/                             job, builder's log and layers of the last build, kept
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.bundle import Engine
from deploycli.exporters.bundle.engine import ENGINES, KernelTotals, Sidecar, engine_name, sidecar_of
from deploycli.exporters.bundle.files import require_inside
from deploycli.exporters.bundle.manifest import PRECISIONS, Manifest
from deploycli.exporters.cast import cast_bundle
from deploycli.exporters.derive import exported_file, fp32_file
from deploycli.exporters.gate import require_passed
from deploycli.exporters.lint import lint
from deploycli.exporters.lint.rules import DEFAULT_VERSION
from deploycli.exporters.precision.number_format import FORMATS
from deploycli.exporters.precision.options import CastOptions, QuantizeOptions
from deploycli.exporters.quantize import quantize_bundle
from deploycli.exporters.target.product import RTX, TENSORRT
from deploycli.exporters.target.settings import BuildSettings, ShapeOptions, shapes_text
from deploycli.exporters.target.targets import DEFAULT_TARGETS, NEEDS, dotted, lacking, named, shown
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.child import run_build
from deploycli.exporters.tensorrt.inspector import EngineLayers, PrecisionAssertion, default_assertion, parse_layers
from deploycli.exporters.tensorrt.traffic import by_profile, one_batch, read_engine
from deploycli.models.errors import (
    DeployError,
    EnvironmentUnsuitable,
    IntegrityError,
    RequirementError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from deploycli.exporters.bundle.bundle import Bundle, OnnxFile
    from deploycli.exporters.lint import LintReport
    from deploycli.exporters.precision.options import CalibrationData
    from deploycli.exporters.target.product import Product
    from deploycli.exporters.target.settings import ShapeRange
    from deploycli.exporters.target.targets import Capability
    from deploycli.exporters.tensorrt.job import BuildResult
    from deploycli.exporters.tensorrt.job import Progress as Step
    from deploycli.exporters.tensorrt.traffic import Reading

    Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EngineOptions:
    """Which engines to build.

    Attributes:
        precisions: of `PRECISIONS`; INT8 and FP8 always come with FP16, for they can be the slower of the two.
        shapes: what the engines take.
        settings: everything else; its profile is made from ``shapes``.
        cast: how a graph is cast that the bundle does not hold yet.
        quantize: how it is quantised.
        recast: cast again, where the bundle holds a graph of the precision already.
        data: to calibrate INT8 and FP8 with; None takes the graphs that the bundle holds.
        assertions: what must hold of the engines of their precision, in place of the default.
        timeout: seconds that one build may take, or None.
        tensorrt: version to lint for where TensorRT is not installed.
        product: the compiler.
        targets: compute capabilities to compile for, of TensorRT for RTX; empty for all that compute what is in
            the graph.
        verbose: keep the compiler's verbose messages in the log.
    """

    precisions: tuple[str, ...] = ("fp16",)
    shapes: ShapeOptions = field(default_factory=ShapeOptions)
    settings: BuildSettings = field(default_factory=lambda: BuildSettings({}))
    cast: CastOptions = field(default_factory=CastOptions)
    recast: bool = False
    quantize: QuantizeOptions = field(default_factory=lambda: QuantizeOptions(around=CastOptions()))
    data: CalibrationData | None = None
    assertions: tuple[PrecisionAssertion, ...] = ()
    timeout: float | None = None
    tensorrt: str = DEFAULT_VERSION
    product: Product = TENSORRT
    targets: tuple[Capability, ...] = ()
    verbose: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown precisions, and what would have no effect."""
        if unknown := [p for p in self.precisions if p not in PRECISIONS]:
            raise UsageError(f"there is no precision {unknown[0]!r} for an engine", expected=", ".join(PRECISIONS))
        built = ", ".join(self.ordered)
        if idle := [a for a in self.assertions if a.precision not in self.ordered]:
            raise UsageError(f"{idle[0]} was asserted, and no such engine is built", expected=f"of {built}")
        if self.data is not None and not FORMATS.keys() & {*self.ordered}:
            raise UsageError(
                f"data to calibrate with were given, and what is built is {built}", hint="--precision int8 or fp8"
            )
        if self.product is RTX:
            _refuse_what_rtx_lacks(self.settings)
        elif self.targets:
            raise UsageError(
                f"--gpu names {named(self.targets)}, and TensorRT builds for the GPU of this machine",
                hint="--compiler rtx, which compiles for GPUs that are not here; or without --gpu",
            )
        if self.assertions and self.settings.version_compatible:
            raise UsageError(
                f"{self.assertions[0]} was asserted of a version compatible engine",
                expected="no assertion: such a plan holds host code, and is not opened to look at its layers",
            )

    @property
    def ordered(self) -> tuple[str, ...]:
        """The precisions to build, each once; FP16 before INT8 and FP8."""
        wanted = {*self.precisions, *(("fp16",) if FORMATS.keys() & {*self.precisions} else ())}
        return tuple(p for p in PRECISIONS if p in wanted)

    def asserted(self, precision: str, report: LintReport) -> tuple[PrecisionAssertion, ...]:
        """What must hold of an engine: the user's assertions on this precision, or else the default.

        Nothing is asserted of a version compatible plan: it holds host code, and is not opened to look at its layers.

        Args:
            precision: of the engine.
            report: on its graph.
        """
        if self.settings.version_compatible:
            return ()
        given = tuple(a for a in self.assertions if a.precision == precision)
        return given or (default_assertion(precision, report.quantized_share),)


@dataclass(frozen=True)
class PlannedEngine:
    """An engine that could be built now.

    Attributes:
        onnx: the typed graph, in its bundle.
        settings: what it is built with.
        report: what the lint says of the graph.
        product: the compiler.
        targets: compute capabilities to compile for; empty for TensorRT.
    """

    onnx: OnnxFile
    settings: BuildSettings
    report: LintReport
    product: Product
    targets: tuple[Capability, ...]

    @property
    def precision(self) -> str:
        """Its precision."""
        return self.onnx.precision

    def describe(self) -> str:
        """Say in one line what would be built."""
        gpus = f", for {named(self.targets)}" if self.targets else ""
        return (
            f"{self.precision} from {self.onnx.path} by {self.product.title}, {_describe(self.settings.profiles)}{gpus}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "bundle": str(self.onnx.bundle.path),
            "precision": self.precision,
            "onnx": self.onnx.name,
            "compiler": self.product.key,
            "targets": list(map(dotted, self.targets)),
            "settings": self.settings.to_json(),
            "lint": self.report.to_json(),
        }


@dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk.

    Attributes:
        planned: what was to be built.
        engine: the plan and its sidecar.
        layers: what its layers compute in.
        kept: it was there already, and building it again would have given the same bytes: nothing was done.
    """

    planned: PlannedEngine
    engine: Engine
    layers: EngineLayers
    kept: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the engine as JSON values."""
        return {
            **self.planned.to_json(),
            "plan": str(self.engine.path),
            "kept": self.kept,
            "sidecar": self.engine.sidecar.to_json(),
        }


def plan_all(bundles: Sequence[Bundle], options: EngineOptions, *, progress: Progress) -> Iterator[PlannedEngine]:
    """Write the typed graphs of bundles and lint them. Needs no TensorRT.

    Raises:
        UsageError: shapes that a model does not take, or INT8 or FP8 without data.
        ExportError: the lint finds errors.
        NumericsError, IntegrityError, EnvironmentUnsuitable: see `cast_bundle` and `quantize_bundle`.
    """
    for bundle in bundles:
        _check_usage(bundle, options)
    for bundle in bundles:
        yield from _plan(bundle, options, progress)


def build_all(bundles: Sequence[Bundle], options: EngineOptions, *, progress: Progress) -> Iterator[BuiltEngine]:
    """Build, prove and write the engines of bundles, one after another.

    All graphs of a bundle are written and linted before the first engine is built: that takes long. An engine of
    TensorRT for RTX that is there already, from the same graph, settings and versions, is not built again.

    Raises:
        EnvironmentUnsuitable: no TensorRT or no GPU; the message says what would have been built.
        BuildError: the builder refused, crashed, or ran out of time.
        RequirementError: an engine does not have the precision or the compatibility that was asked for.
        UsageError, ExportError, NumericsError, IntegrityError: see `plan_all`.
    """
    profiles = [_check_usage(bundle, options) for bundle in bundles]
    _check_host(bundles, profiles, options)
    for bundle in bundles:
        for planned in _plan(bundle, options, progress):
            yield _kept(planned, options) or _build(planned, options, progress)


def _check_usage(bundle: Bundle, options: EngineOptions) -> str:
    """Refuse what cannot be built of a bundle; return the shapes that can, in words."""
    profiles = options.shapes.profiles(bundle.manifest.spec.inputs, exported_file(bundle).artifact.batch)
    for name, quantized in FORMATS.items():
        held = exported_file(bundle).precision == name or bundle.onnx_file(f"model.{name}.onnx") is not None
        if name in options.ordered and options.data is None and not held:
            raise UsageError(
                f"{bundle.path} holds no {quantized.title} graph, and there is no data to calibrate one with",
                expected="pictures such as the model will see",
                hint="--calibrate DIR, or deploycli quantize first",
            )
    return _describe(profiles)


def _plan(bundle: Bundle, options: EngineOptions, progress: Progress) -> list[PlannedEngine]:
    planned = []
    for precision in _to_build(bundle, options):
        onnx = _typed(bundle, precision, options, progress)
        bundle = onnx.bundle
        profile, *more = options.shapes.profiles(bundle.manifest.spec.inputs, onnx.artifact.batch)
        report = lint(onnx.path, version=_lint_version(options))
        require_passed(report, report.model, f"deploycli lint {report.model}, which shows all")
        settings = replace(options.settings, profile=profile, more_profiles=tuple(more))
        targets = _targets(options, report)
        planned.append(PlannedEngine(onnx, settings, report, options.product, targets))
    # Each step may have replaced the bundle: all of them stand in the last one.
    return [replace(engine, onnx=replace(engine.onnx, bundle=bundle)) for engine in planned]


def _to_build(bundle: Bundle, options: EngineOptions) -> Sequence[str]:
    """Return the precisions to build; of a file that was imported in 8 bits there is no FP16 graph to add."""
    exported = exported_file(bundle).precision
    return options.ordered if exported == "fp32" else [p for p in options.ordered if p in options.precisions]


def _check_host(bundles: Sequence[Bundle], profiles: Sequence[str], options: EngineOptions) -> None:
    """Fail before anything is calibrated where nothing can be built."""
    try:
        library.require(options.product)
        if options.product is TENSORRT:
            library.gpu()
    except EnvironmentUnsuitable as error:
        what = "; ".join(f"{bundle.path}, {shapes}" for bundle, shapes in zip(bundles, profiles, strict=True))
        raise EnvironmentUnsuitable(
            f"{error.found}; nothing was built: {' and '.join(options.ordered)} of {what}",
            expected=error.expected,
            hint=f"{error.hint}; --dry-run writes the typed ONNX and shows the plan without TensorRT",
        ) from error


def _targets(options: EngineOptions, report: LintReport) -> tuple[Capability, ...]:
    """Return the GPUs that a graph is compiled for.

    Raises:
        UsageError: one that was named does not compute something in the graph.
    """
    if options.product is TENSORRT:
        return ()
    below = lacking(options.targets or DEFAULT_TARGETS, report.features)
    lack = {target for targets in below.values() for target in targets}
    if options.targets and lack:
        feature, targets = next(iter(below.items()))
        raise UsageError(
            f"{report.model} has {shown(feature)}, which {RTX.title} does not compile for {named(targets)}",
            expected=f"compute capability {dotted(NEEDS[feature])} or later",
            hint="another --gpu, or another --precision",
        )
    return tuple(target for target in options.targets or DEFAULT_TARGETS if target not in lack)


def _refuse_what_rtx_lacks(settings: BuildSettings) -> None:
    """Refuse settings that would have no effect, or that need a GPU.

    Raises:
        UsageError: one of them was given.
    """
    for name, (option, why) in _NOT_OF_RTX.items():
        if getattr(settings, name) != BuildSettings.default(name):
            raise UsageError(
                f"{option} was given, and {RTX.title} {why}",
                expected="what it takes: shapes and --gpu",
                hint=f"without {option}; or --compiler tensorrt, which needs a GPU",
            )


_NOT_OF_RTX: Mapping[str, tuple[str, str]] = {
    "workspace": ("--workspace", "does not limit scratch memory"),
    "optimization_level": ("--builder-optimization-level", "has one level of effort"),
    "hardware_compatibility": ("--hardware-compatibility", "compiles for the GPUs that --gpu names"),
    "version_compatible": ("--version-compatible", "ships no lean runtime to put into a plan"),
    "strip_weights": ("--strip-weights", "takes no weights out of an engine without a GPU"),
    "max_aux_streams": ("--max-aux-streams", "chooses streams by itself"),
    "timing_cache": ("--timing-cache", "measures no kernels"),
    "error_on_timing_cache_miss": ("--error-on-timing-cache-miss", "measures no kernels"),
    "tf32": ("--tf32", "does not take that flag into account"),
}


def _describe(profiles: Sequence[Mapping[str, ShapeRange]]) -> str:
    return "; ".join(
        ", ".join(f"{name} {shapes_text(r.min, r.opt, r.max)}" for name, r in profile.items()) for profile in profiles
    )


def _lint_version(options: EngineOptions) -> str:
    try:
        return ".".join(library.version().split(".")[:2]) if options.product is TENSORRT else options.tensorrt
    except EnvironmentUnsuitable:
        return options.tensorrt


def _typed(bundle: Bundle, precision: str, options: EngineOptions, progress: Progress) -> OnnxFile:
    """Return the graph of a precision."""
    exported = exported_file(bundle)
    if precision == exported.precision:
        return exported
    if precision == "fp32":
        return fp32_file(bundle)
    found = bundle.onnx_file(f"model.{precision}.onnx")
    if precision in FORMATS and options.data is not None:
        how = replace(options.quantize, precision=precision, targets=options.targets)
        return quantize_bundle(bundle, how, options.data, lint=False, progress=progress).file
    if found is not None and (precision in FORMATS or not options.recast):
        return found
    return cast_bundle(bundle, replace(options.cast, type=precision), lint=False, progress=progress).file


def _kept(planned: PlannedEngine, options: EngineOptions) -> BuiltEngine | None:
    """Return the engine that the bundle holds, if building it again would give the very same bytes."""
    if planned.product is not RTX:  # TensorRT measures: no two builds are the same
        return None
    bundle = planned.onnx.bundle
    name = engine_name(planned.precision, *planned.targets, version=library.version(RTX), product=planned.product)
    try:
        sidecar = Sidecar.load(sidecar_of(bundle.path / ENGINES / name))
        engine = Engine.of(bundle, sidecar, planned.onnx.verification)
        engine.check()
    except DeployError:  # not there, changed, or of another layout: it is built
        return None
    made_from = (sidecar.onnx_sha256, sidecar.settings, sidecar.assertions, sidecar.tool_version)
    assertions = tuple(map(str, options.asserted(planned.precision, planned.report)))
    wanted = (planned.onnx.artifact.sha256, planned.settings, assertions, version("deploycli"))
    if made_from != wanted or not sidecar.kernels:
        return None
    return BuiltEngine(planned, engine, EngineLayers(()), kept=True)


def _build(planned: PlannedEngine, options: EngineOptions, progress: Progress) -> BuiltEngine:
    work = planned.onnx.bundle.path / "reports" / f"build-{planned.precision}"

    def show(now: Step) -> None:
        if planned.product is RTX and now.parent:  # of a few seconds, nobody wants to read every part
            return
        label = f"building {planned.precision}: {now.phase.removeprefix('deploycli: ')}"
        progress(label, min(now.step, now.total - 1), now.total)  # steps that are done: one runs until the phase ends

    result = run_build(
        planned.onnx.path,
        planned.settings,
        work,
        timeout=options.timeout,
        compiler=planned.product.key,
        targets=planned.targets,
        verbose=options.verbose,
        progress=show,
    )
    try:
        readings = _read(planned, result)
        assertions = _assert(planned, result, readings, options.asserted(planned.precision, planned.report))
        sidecar = _sidecar(planned, result, readings, assertions)
        _install(planned, result, sidecar)
        engine = Engine.of(planned.onnx.bundle, sidecar, planned.onnx.verification)
        return BuiltEngine(planned, engine, readings[0].layers)
    finally:
        result.plan.unlink(missing_ok=True)  # moved already where all is well


def _inspected(result: BuildResult) -> EngineLayers:
    return EngineLayers(()) if result.layers is None else parse_layers(result.layers.read_text("utf-8"))


def _read(planned: PlannedEngine, result: BuildResult) -> list[Reading]:
    """Return what is known of the layers of every optimization profile, as far as they are told apart."""
    profiles, layers = planned.settings.profiles, _inspected(result)
    groups = by_profile(layers, len(profiles)) if planned.product is RTX else (layers,)
    return read_engine(planned.onnx.path, zip(groups, map(one_batch, profiles), strict=False))


def _assert(
    planned: PlannedEngine,
    result: BuildResult,
    readings: Sequence[Reading],
    assertions: Sequence[PrecisionAssertion],
) -> tuple[str, ...]:
    """Compare the engine with what was asked for; what a flag asks for is read back, not assumed.

    TensorRT for RTX names the nodes of every layer, so there a product of the graph that no layer names is not proven.
    """
    names_nodes = planned.product is RTX
    breaches = [
        breach
        for found in readings
        for assertion in assertions
        if (breach := assertion.breach(found.layers, found.missing if names_nodes else ()))
    ]
    wanted = planned.settings.hardware_compatibility
    level = result.facts.get("hardware_compatibility", "none" if planned.product is RTX else None)
    if level != wanted:
        breaches.append(f"the engine's hardware compatibility is {level}, expected {wanted}")
    if breaches:
        raise RequirementError(
            f"the {planned.precision} engine of {planned.onnx.bundle.path}: " + "; ".join(breaches),
            expected="an engine as it was asked for; this one was not kept",
            hint=f"see {result.layers or result.log}; --assert-precision for another share",
        )
    return tuple(map(str, assertions))


def _sidecar(
    planned: PlannedEngine,
    result: BuildResult,
    readings: Sequence[Reading],
    assertions: tuple[str, ...],
) -> Sidecar:
    found = readings[0]
    totals = KernelTotals.of(found.kernels)
    gpus = planned.targets if result.gpu is None else (result.gpu.compute_capability,)
    return Sidecar(
        plan=engine_name(planned.precision, *gpus, version=result.tensorrt, product=planned.product),
        sha256=result.sha256,
        size=result.size,
        precision=planned.precision,
        onnx=planned.onnx.name,
        onnx_sha256=planned.onnx.artifact.sha256,
        tensorrt=result.tensorrt,
        gpu=result.gpu,
        settings=planned.settings,
        io=result.io,
        layers={**found.layers.to_json(), **totals.to_json(), "products_not_found": len(found.missing)},
        assertions=assertions,
        facts=result.facts,
        timing_cache_sha256=result.timing_cache_sha256,
        seconds=sum(result.seconds.values()),
        tool_version=version("deploycli"),
        built_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        unreleasable=planned.onnx.unreleasable,
        compiler=planned.product.key,
        targets=planned.targets,
        kernels=tuple(
            replace(kernel, profile=place) for place, reading in enumerate(readings) for kernel in reading.kernels
        ),
    )


def _install(planned: PlannedEngine, result: BuildResult, sidecar: Sidecar) -> None:
    """Put plan and sidecar into the bundle, if it still holds the graph; until both are there, both are refused."""
    bundle = planned.onnx.bundle
    with bundle.held():
        if Manifest.read(bundle.path).artifact(sidecar.onnx) != planned.onnx.artifact:
            raise IntegrityError(
                f"{planned.onnx.path} was replaced while an engine was built from it",
                expected="the bundle as it was",
                hint="run this command again",
            )
        _move(bundle, result, sidecar)


def _move(bundle: Bundle, result: BuildResult, sidecar: Sidecar) -> None:
    folder = bundle.path / ENGINES
    target = folder / sidecar.plan
    try:
        folder.mkdir(exist_ok=True)
        require_inside(folder, bundle.path)
        sidecar_of(target).unlink(missing_ok=True)
        result.plan.replace(target)
        sidecar.save(folder)
    except OSError as error:
        with suppress(OSError):
            target.unlink()
        raise EnvironmentUnsuitable(
            f"cannot write {target}: {error.strerror or error}", hint="check the folder's permissions"
        ) from error
    except BaseException:  # such as Ctrl-C: a plan without its sidecar would be refused by every command
        with suppress(OSError):
            target.unlink()
        raise
