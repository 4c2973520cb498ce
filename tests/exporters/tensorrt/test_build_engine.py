"""The build: configured in a real library, whose methods also fail in turn; read back from the stand-in."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploycli.exporters.bundle.engine import IoTensor
from deploycli.exporters.tensorrt.compilers.tensorrt import inspect_engine
from deploycli.exporters.tensorrt.runtime import NUMPY_TYPES
from deploycli.models.errors import BuildError
from tests.exporters.tensorrt import builds
from tests.exporters.tensorrt.fakes import PROFILE, Bench, bench, write_model
from tests.tensorrt_api import child
from tests.tensorrt_api.child import RTX

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["bench"]


def test_every_setting_reaches_the_library() -> None:
    """But for hardware compatibility, which TensorRT for RTX has none of: the stand-in is told."""
    found = child.call(
        RTX,
        builds.configured,
        {
            "workspace": 1 << 30,
            "optimization_level": 4,
            "version_compatible": True,
            "strip_weights": True,
            "max_aux_streams": 2,
            "timing_cache": True,
            "error_on_timing_cache_miss": True,
            "tf32": True,
        },
    )
    # Neither REFIT nor EXCLUDE_LEAN_RUNTIME.
    flags = ["ERROR_ON_TIMING_CACHE_MISS", "REFIT_IDENTICAL", "STRIP_PLAN", "TF32", "VERSION_COMPATIBLE"]
    assert found == {
        "flags": flags,
        "workspace": 1 << 30,
        "level": 4,
        "streams": 2,
        "verbosity": "DETAILED",
        "monitored": True,
        "cache": [f"trt{builds.VERSION}-sm89-nvidia-l4.cache"],
    }


def test_defaults_touch_nothing_but_tf32() -> None:
    found = child.call(RTX, builds.configured, {})
    assert found["flags"] == []
    assert (found["level"], found["cache"]) == (3, [])


def test_every_failure_is_noticed(tmp_path: Path) -> None:
    expected = {
        "start": "EnvironmentUnsuitable: TensorRT for RTX does not start",
        "network": "BuildError: TensorRT for RTX makes no strongly typed network",
        "configuration": "BuildError: TensorRT for RTX makes no configuration",
        "target": "BuildError: TensorRT for RTX does not take compute capability 8.6",
        "profile": "BuildError: TensorRT makes no optimization profile",
        "shapes": "BuildError: TensorRT refuses the shapes image 1x3, 2x3, 4x3: inconsistent",
        "empty profile": "BuildError: TensorRT refuses the shapes",
        "index": "BuildError: TensorRT refuses the shapes",
        "engine": "BuildError: TensorRT for RTX built no engine: ",
    }
    found = child.call(RTX, builds.failures, write_model(tmp_path / "model.onnx"))
    assert found.keys() == expected.keys()
    assert {name: text for name, text in found.items() if not text.startswith(expected[name])} == {}


def test_what_tensorrt_does_not_take() -> None:
    assert child.call(RTX, builds.refused_by_tensorrt) == {
        "init_libnvinfer_plugins": "BuildError: TensorRT cannot register its plugins",
        "IBuilderConfig.set_flag": "BuildError: TensorRT does not take a setting: no such flag",
    }


@pytest.mark.parametrize(
    ("inspector", "words"), [(None, "makes no engine inspector"), ("Error: none", "the engine inspector gives no JSON")]
)
def test_an_engine_that_cannot_be_described(inspector: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = SimpleNamespace(get_engine_information=lambda _: inspector)
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector and told)
    module = SimpleNamespace(
        Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: engine),
        LayerInformationFormat=SimpleNamespace(JSON=1),
    )
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    log: Any = SimpleNamespace(last=lambda: "")
    with pytest.raises(BuildError, match=words):
        inspect_engine(b"", log, may_have_host_code=False)


def test_what_is_read_back(bench: Bench) -> None:
    result = bench.build(strip_weights=True, hardware_compatibility="same-compute-capability", workspace=1 << 20)
    assert result.tensorrt == "10.13.3.9"
    assert (result.gpu.name, result.gpu.compute_capability) == ("NVIDIA L4", (8, 9))
    image = PROFILE["image"]
    assert result.io == (
        IoTensor("image", "input", "float32", (-1, 3), (image.min, image.opt, image.max)),
        IoTensor("logits", "output", "float16", (-1, 3)),
    )
    assert result.facts["hardware_compatibility"] == "same-compute-capability"
    assert result.facts["refittable"] is True
    assert result.facts["builder_flags"] == ["REFIT_IDENTICAL", "STRIP_PLAN"]
    assert result.facts["profiling_verbosity"] == "DETAILED"
    assert result.layers is not None
    built = json.loads(result.layers.read_text())["Built"]
    assert (built["workspace"], built["verbosity"]) == (1 << 20, "DETAILED")


def test_element_types_are_those_that_the_runtime_knows() -> None:
    assert {name: np.dtype(dtype).name for name, dtype in NUMPY_TYPES.items()} == {
        "FLOAT": "float32",
        "HALF": "float16",
        "BF16": "bfloat16",
        "INT8": "int8",
        "UINT8": "uint8",
        "INT32": "int32",
        "INT64": "int64",
        "BOOL": "bool",
    }


def test_host_code_is_not_allowed_even_to_inspect(bench: Bench) -> None:
    result = bench.build(version_compatible=True)
    assert result.layers is None
    assert "not inspected" in bench.log
    assert [tensor.dtype for tensor in result.io] == ["float32", "float16"]
    assert result.io[0].profile == tuple(vars(PROFILE["image"]).values())
    assert "EXCLUDE_LEAN_RUNTIME" not in result.facts["builder_flags"]
