"""An engine of TensorRT for RTX on a real RTX GPU: ``pytest -m gpu -n 0``. Elsewhere it is skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deploycli.exporters.bench.candidate import BenchOptions
from deploycli.exporters.bench.run import bench
from deploycli.exporters.build_trt import EngineOptions, build_all
from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.export import ExportOptions, export
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.targets import TARGETS
from deploycli.exporters.tensorrt import library
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.errors import EnvironmentUnsuitable

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu


def test_it_is_as_good_as_its_graph_and_loads_faster_with_its_kernels(tmp_path: Path) -> None:
    try:
        library.require(RTX)
        gpu = library.gpu()
    except EnvironmentUnsuitable as error:
        pytest.skip(f"needs an RTX GPU and TensorRT for RTX: {error.found}")
    if gpu.compute_capability not in TARGETS:
        pytest.skip(f"needs an RTX GPU, here is {gpu.name}")
    path = export(ExportOptions("deit_t", tmp_path)).path
    list(build_all([Bundle.open(path)], EngineOptions(product=RTX), progress=lambda *_: None))
    bundle = Bundle.open(path)
    assert verify(bundle, VerifyOptions(engines="all")).failures == ()
    assert len(list(path.glob("engines/*.kernels"))) == 1
    report = bench(bundle, BenchOptions(only=("rtx",), seconds=5))
    for row in report.rows:
        loads = row.measurement.first_load
        assert loads is not None
        assert loads.cached < loads.compiling
