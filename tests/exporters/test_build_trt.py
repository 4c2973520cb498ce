"""The seams of engines with the rest, and what the stand-in may have."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import pytest

from deploycli.exporters.bench.candidate import BenchOptions
from deploycli.exporters.bench.run import bench
from deploycli.exporters.build_trt import EngineOptions
from deploycli.exporters.lint import lint
from deploycli.exporters.target.settings import BuildSettings
from deploycli.exporters.tensorrt.inspector import PrecisionAssertion
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.errors import NumericsError, UsageError
from tests.exporters.bundle import bundles
from tests.exporters.tensorrt.running_engines import installed, rewritten, write_engine
from tests.tensorrt_api import names
from tests.tensorrt_api.bindings import VERSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deploycli.exporters.bundle.bundle import Bundle


@pytest.fixture
def cuda() -> Iterator[Any]:
    with installed() as module:
        yield module
        assert module.LIVE == {}, "memory of the GPU was not freed"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    from onnx import TensorProto, helper

    model = bundles.graph()
    for output in model.graph.output:  # with shapes, as exported graphs have them
        output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, ["batch", bundles.CLASSES]))
    return bundles.make(tmp_path, model=model)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stand_in_has_only_names_of_the_bindings(version: str) -> None:
    known = names.names(version)
    with installed(FAKE_TENSORRT_VERSION=version):
        import tensorrt

        ours = {name: value for name, value in vars(tensorrt).items() if not name.startswith("_")}
        classes = {
            name: value
            for name, value in ours.items()
            if isinstance(value, type) and value.__module__ in ("tensorrt", "builtins") and name in known
        }
        helpers = {"annotations", "base64", "ctypes", "json", "os", "IntEnum", "Path", "Any"}
        assert set(ours) - helpers <= set(known) | set(known[""]) | set(sys.stdlib_module_names)
        assert {"Runtime", "ICudaEngine", "IExecutionContext", "Refitter", "OnnxParserRefitter"} <= set(classes)
        for name, cls in classes.items():
            members = getattr(cls, "__members__", None) or vars(cls)
            public = {member for member in members if not member.startswith("_")}
            assert public <= known[name], name


def test_an_engine_is_timed_by_itself(cuda: Any, bundle: Bundle) -> None:
    write_engine(bundle.path, "model.onnx", (1, 2, 8))
    report = bench(bundle, BenchOptions(batches=(1, 8, 16), only=("trt",), rounds=2, warmup_runs=1))
    assert [(row.measurement.candidate.label, row.measurement.batch) for row in report.rows] == [
        ("trt fp16", 1),
        ("trt fp16", 8),
    ]
    (absence,) = report.absences
    assert absence.reason == "takes batches 1 to 8"
    without = bench(bundle, BenchOptions(batches=(1,), only=("trt",), rounds=1, cuda_graph=False))
    assert not without.to_json()["measurements"][0]["cuda_graph"]


def test_a_wrong_engine_is_not_timed(cuda: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploycli.exporters.bench.report import failure_of

    write_engine(bundle.path, "model.onnx", (1, 2, 8))
    monkeypatch.setenv("FAKE_ENGINE", "zeros")
    report = bench(bundle, BenchOptions(batches=(8,), only=("trt",), rounds=1))
    assert report.rows == ()
    assert isinstance(failure_of([report]), NumericsError)


def test_an_engine_of_larger_batches_is_not_judged_by_few_samples(cuda: Any, bundle: Bundle) -> None:
    sidecar = write_engine(bundle.path, "model.onnx", (16, 16, 32))
    report = verify(bundle, VerifyOptions(reference="golden"))
    assert report.passed
    assert [engine.reason for engine in report.not_judged] == ["it takes batches from 16, and there are 8 samples"]
    rewritten(bundle.path, sidecar, onnx="model.int8.onnx", unreleasable="calibrated on random data")
    found = verify(bundle, VerifyOptions(reference="golden"))
    assert found.unreleasable == (f"engines/{sidecar.plan}: calibrated on random data",)


def test_engines_are_left_alone(bundle: Bundle) -> None:
    (bundle.path / "engines").mkdir()
    (bundle.path / "engines/a.plan").touch()
    report = verify(bundle, VerifyOptions(reference="golden", engines="none"))
    assert report.passed
    assert (report.not_judged, report.notes, {stage.artifact for stage in report.stages}) == ((), (), {"model.onnx"})


def test_what_the_options_ask_for() -> None:
    assert EngineOptions(("int8",)).ordered == ("fp16", "int8")
    assert EngineOptions(("int8", "fp16", "fp32")).ordered == ("fp32", "fp16", "int8")
    report = lint(ir.from_proto(bundles.graph()))
    assert [str(a) for a in EngineOptions().asserted("fp16", report)] == ["fp16>=80%"]
    half = PrecisionAssertion("fp16", 0.5)
    assert EngineOptions(assertions=(half,)).asserted("fp16", report) == (half,)
    assert EngineOptions(settings=BuildSettings({}, version_compatible=True)).asserted("fp16", report) == ()
    assert EngineOptions(("fp8", "int8")).ordered == ("fp16", "fp8", "int8")
    with pytest.raises(UsageError, match="no precision 'fp4'"):
        EngineOptions(("fp4",))
