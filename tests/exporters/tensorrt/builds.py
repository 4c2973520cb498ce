"""Builds with doubles over the real bindings, for `tests.tensorrt_api.child.call`: run in a process that has them."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.tensorrt import library
from exporters.tensorrt.job import Job
from exporters.tensorrt.progress import Reader, Reporter
from exporters.tensorrt.settings import BuildSettings, ShapeRange
from exporters.tensorrt.sidecar import GpuRecord
from models.errors import DeployError

if TYPE_CHECKING:
    from tests.tensorrt_api.doubles import Recorder

IMAGES = {"images": ShapeRange((1, 3, 224, 224), (8, 3, 224, 224), (16, 3, 224, 224))}


CALLS = (
    "Builder.create_network",
    "OnnxParser.parse_from_file",
    "IOptimizationProfile.set_shape",
    "IBuilderConfig.set_flag",
    "IBuilderConfig.clear_flag",
    "IBuilderConfig.set_memory_pool_limit",
    "IBuilderConfig.builder_optimization_level",
    "IBuilderConfig.max_aux_streams",
    "IBuilderConfig.hardware_compatibility_level",
    "IBuilderConfig.profiling_verbosity",
    "IBuilderConfig.add_optimization_profile",
)


def run(scenario: Any, settings: BuildSettings) -> tuple[Recorder, Any, list[Any], str]:
    """Build in a folder of its own; return the calls, the result, the progress and the log."""
    from exporters.tensorrt.builder import build
    from exporters.tensorrt.callbacks import Log
    from tests.tensorrt_api.doubles import install

    recorder = install(scenario)
    library.gpu = lambda: GpuRecord("NVIDIA L4", (8, 9))
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path("model.onnx"), "0" * 64, settings, Path(folder))
        reading, writing = os.pipe()
        with (job.folder / "log").open("w+") as log:
            result = build(job, Reporter(writing), Log(log))
            os.close(writing)
            seen = list(Reader().feed(os.read(reading, 1 << 16)))
            os.close(reading)
            log.seek(0)
            result.save(job)
            assert result.layers is None or json.loads(result.layers.read_text()) == {"Layers": []}
            assert type(result).load(job).io == result.io
            return recorder, result, seen, log.read()


def scenario(**answers: Any) -> Any:
    """An engine that builds, with a plan that begins as plans do."""
    import tensorrt as trt

    from tests.tensorrt_api.doubles import Scenario

    def builds(builder: Any, given: Any) -> Any:
        monitor = given["config"].progress_monitor
        monitor.phase_start("Building", None, 2)
        going = [monitor.step_complete("Building", step) for step in range(2)]
        monitor.phase_finish("Building")
        builder.logger.log(trt.ILogger.Severity.WARNING, "a warning\nof two lines")
        from tests.tensorrt_api.doubles import HostMemory

        return HostMemory(plan) if all(going) else None

    version = [int(part) & 0xFF for part in trt.__version__.split(".")]
    plan = struct.pack("<II16x4B", 0x74727466, 0, *version) + b"rest"
    return Scenario(plan=plan, answers={"Builder.build_serialized_network": builds, **answers})


def everything() -> dict[str, Any]:
    """Build with every setting that does not exclude another one."""
    with tempfile.TemporaryDirectory() as folder:
        settings = BuildSettings(
            IMAGES,
            workspace=1 << 30,
            optimization_level=4,
            hardware_compatibility="ampere+",
            version_compatible=True,
            strip_weights=True,
            max_aux_streams=0,
            timing_cache=f"{folder}/",
            error_on_timing_cache_miss=True,
        )
        recorder, result, seen, log = run(scenario(), settings)
        cache = [path.name for path in Path(folder).glob("[!.]*")]
    return {
        "calls": recorder.plain(*CALLS),
        "caches": [call.plain()[1:] for call in recorder.of("IBuilderConfig.set_timing_cache")],
        "host code": [call.arguments["value"] for call in recorder.of("Runtime.engine_host_code_allowed")],
        "io": [[t.name, t.mode, t.dtype, t.shape, t.profile] for t in result.io],
        "facts": result.facts,
        "seen": [[p.phase, p.step, p.total] for p in seen],
        "log": log,
        "cache": cache,
    }


def defaults(tf32: bool = False) -> dict[str, Any]:
    recorder, result, _, _ = run(scenario(), BuildSettings(IMAGES, tf32=tf32))
    return {"calls": recorder.plain("IBuilderConfig.set_flag", "IBuilderConfig.clear_flag"), "facts": result.facts}


FAILURES = {
    "plugins": {"init_libnvinfer_plugins": False},
    "start": {"Builder.__init__": TypeError("pybind11::init(): factory function returned nullptr")},
    "network": {"Builder.create_network": None},
    "profile": {"Builder.create_optimization_profile": None},
    "shapes": {"IOptimizationProfile.set_shape": ValueError("inconsistent")},
    "empty profile": {"IOptimizationProfile.__bool__": False},
    "index": {"IBuilderConfig.add_optimization_profile": -1},
    "engine": {"Builder.build_serialized_network": None},
    "plan": {"Runtime.deserialize_cuda_engine": None},
    "inspector": {"ICudaEngine.create_engine_inspector": None},
    "layers": {"EngineInspector.get_engine_information": "Error: none"},
    "cache": {"IBuilderConfig.create_timing_cache": None},
    "attach": {"IBuilderConfig.set_timing_cache": False},
    "serialise": {"ITimingCache.serialize": None},
}


def failures() -> dict[str, str]:
    """What becomes of each failure: the class of the error and what it says."""
    outcomes = {}
    for name, answers in FAILURES.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = BuildSettings(IMAGES, timing_cache=f"{folder}/")
            try:
                _, result, _, _ = run(scenario(**answers), settings)
                outcomes[name] = f"built: {result.timing_cache['problem']}"
            except DeployError as error:
                outcomes[name] = f"{type(error).__name__}: {error.found}"
    return outcomes


def refused() -> str:
    """What is said of a model that the parser refuses."""
    errors = [{"desc": f"reason {n}", "node": n, "node_name": "attention", "node_operator": "Einsum"} for n in (3, 4)]
    try:
        run(replace(scenario(), parser_errors=errors), BuildSettings(IMAGES))
    except DeployError as error:
        return str(error)
    return "built"


def lock() -> dict[str, Any]:
    """Write a lock, and pin by it a cache that has other tactics."""
    import tensorrt as trt

    table = {"0x" + "1" * 32: 7, "0x" + "2" * 32: 8}

    def keys(cache: Any, given: Any) -> list[Any]:
        return [trt.TimingCacheKey.parse(text) for text in table]

    def query(cache: Any, given: Any) -> Any:
        return trt.TimingCacheValue(table[str(given["key"])], 0.5)

    def update(cache: Any, given: Any) -> bool:
        table[str(given["key"])] = given["value"].tacticHash
        return True

    answers = {"ITimingCache.queryKeys": keys, "ITimingCache.query": query, "ITimingCache.update": update}
    with tempfile.TemporaryDirectory() as folder:
        settings = BuildSettings(IMAGES, locked=f"{folder}/lock")
        first, result, _, _ = run(scenario(**answers), settings)
        written = json.loads(Path(folder, "lock").read_text())["tactics"]
        table["0x" + "1" * 32] = 9
        again, _, _, _ = run(scenario(**answers), settings)

        def measures_more(builder: Any, given: Any) -> Any:
            table["0x" + "3" * 32] = 1
            return build_answer(builder, given)

        build_answer = scenario().answers["Builder.build_serialized_network"]
        try:
            run(scenario(**{**answers, "Builder.build_serialized_network": measures_more}), settings)
            unknown = "built"
        except DeployError as error:
            unknown = f"{error.exit_code}: {error.found}"
    return {
        "written": written,
        "flags": [call.arguments["flag"].name for call in first.of("IBuilderConfig.set_flag")],
        "lock": [result.lock["tactics"], result.lock["written"]],
        "updates": [
            [str(call.arguments["key"]), call.arguments["value"].tacticHash] for call in again.of("ITimingCache.update")
        ],
        "unknown": unknown,
    }
