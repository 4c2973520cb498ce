"""The product's own use of TensorRT; that its calls have the right types in every version is in test_stubs.py."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest

from tests.exporters.lint.rtx import WHY
from tests.tensorrt_api import names, stubs

if TYPE_CHECKING:
    from pathlib import Path


def test_every_name_is_in_every_version() -> None:
    assert names.problems(names.product_files()) == []


def test_tensorrt_is_imported_where_it_is_used() -> None:
    assert names.values(names.product_files()) == []


@pytest.fixture(scope="module")
def rtx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip(WHY)
    return stubs.rtx_stubs(tmp_path_factory.mktemp("rtx"))


def test_every_name_and_call_is_of_tensorrt_for_rtx_too(rtx: Path) -> None:
    """The real library, as it is installed: what drives TensorRT drives it as well, and what is its own is there."""
    files = names.product_files(rtx=True)
    assert {path.name for path in files} > {"build_engine.py", "runtime.py", "rtx.py"}
    assert stubs.check(rtx, files) == []


WRONG = {
    "engine.create_runtime_config().cuda_graph_strategy": 'Item "None"',
    "config.create_runtime_cache(b'')": "Too many arguments",
    "config.set_runtime_cache(b'')": 'expected "IRuntimeCache | None"',
    "config.dynamic_shapes_kernel_specialization_strategy = trt.CudaGraphStrategy.DISABLED": "Incompatible types",
    "trt.DynamicShapesKernelSpecializationStrategy.SOON": "has no attribute",
    "engine.create_execution_context('lazy')": "No overload variant",
    "cache.deserialize('text')": 'expected "Buffer"',
    "bytes(cache.serialize())": "incompatible type",
}


def test_another_name_or_call_would_be_found(rtx: Path, tmp_path: Path) -> None:
    arguments = "engine: trt.ICudaEngine, config: trt.IRuntimeConfig, cache: trt.IRuntimeCache"
    file = tmp_path / "wrong.py"
    lines = "\n".join(f"    {wrong}" for wrong in WRONG)
    file.write_text(f"import tensorrt_rtx as trt\ndef wrong({arguments}) -> None:\n{lines}\n")
    found = stubs.check(rtx, [file])
    assert len(found) == len(WRONG)
    for line, (number, words) in zip(found, enumerate(WRONG.values(), 3), strict=True):
        assert f"wrong.py:{number}: " in line
        assert words in line


def test_names_that_are_compared_as_text_are_of_tensorrt_for_rtx() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason=WHY)
    from deploycli.exporters.tensorrt.runtime import NUMPY_TYPES

    assert set(NUMPY_TYPES) <= set(rtx.DataType.__members__)
    assert "INPUT" in rtx.TensorIOMode.__members__
    assert "DEVICE" in rtx.TensorLocation.__members__
