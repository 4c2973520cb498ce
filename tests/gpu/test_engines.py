"""Engines on a real GPU: ``pytest -m gpu -n 0``. Elsewhere all of it is skipped, for one reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploycli.commands.bench import show_benches
from deploycli.exporters.bench.candidate import BenchOptions
from deploycli.exporters.bench.run import bench
from deploycli.exporters.build_trt import EngineOptions, build_all
from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.export import ExportOptions, export
from deploycli.exporters.precision.options import CalibrationData
from deploycli.exporters.target.settings import ShapeOptions
from deploycli.exporters.tensorrt import library
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.errors import EnvironmentUnsuitable

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu

FAMILIES = ("swin_t", "vit_b_16", "deit_t_distilled", "crossformer_t", "crossformer_pp_s")


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    try:
        library.require()
        library.gpu()
    except EnvironmentUnsuitable as error:
        pytest.skip(f"needs an NVIDIA GPU and TensorRT: {error.found}")


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with an FP16 and an INT8 engine."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    bundle = export(ExportOptions(request.param, folder))
    (spec,) = bundle.manifest.spec.inputs
    noise = np.random.default_rng(0).standard_normal((16, *spec.shape), np.float32)
    np.save(folder / "noise.npy", noise)
    asked = EngineOptions(
        precisions=("int8",),
        shapes=ShapeOptions((1, 4, 8)),
        data=CalibrationData(folder / "noise.npy"),
        timeout=3600,
    )
    engines = list(build_all([bundle], asked, progress=lambda *_: None))
    assert [built.engine.precision for built in engines] == ["fp16", "int8"]
    for engine in engines:
        assert engine.layers.detailed
    return Bundle.open(bundle.path)


def test_every_engine_is_as_good_as_its_graph(built: Bundle) -> None:
    report = verify(built, VerifyOptions(engines="all"))
    failed = {stage.artifact for stage in report.stages if not stage.passed}
    # The weights are random, and INT8 on noise may be outside the budget: then its graph is, too.
    assert {path for path in failed if "int8" not in path} == set()
    assert not failed or "model.int8.onnx" in failed, report.failures
    assert sum(stage.artifact.startswith("engines/") for stage in report.stages) == 8


def test_the_table(built: Bundle, capfd: pytest.CaptureFixture[str]) -> None:

    report = bench(built, BenchOptions(only=("trt",), seconds=5))
    with capfd.disabled():
        show_benches([report])
    assert {row.measurement.candidate.precision for row in report.rows} == {"fp16", "int8"}
