"""The build: over the bindings of four versions with doubles for what needs the libraries, and with the stand-in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.tensorrt.readback import NUMPY_NAMES
from exporters.tensorrt.runtime import NUMPY_TYPES
from exporters.tensorrt.settings import ShapeRange
from exporters.tensorrt.sidecar import IoTensor
from models.errors import BuildError, UsageError
from tests.exporters.tensorrt import builds
from tests.exporters.tensorrt.fakes import PROFILE, Bench, bench
from tests.tensorrt_api import child, names
from tests.tensorrt_api.bindings import VERSIONS

__all__ = ["bench"]

each_version = pytest.mark.parametrize("version", VERSIONS)
ROOT = Path(__file__).parents[3]


@each_version
def test_every_setting_reaches_tensorrt(version: str) -> None:
    done = child.call(version, builds.everything)
    calls: dict[str, list[Any]] = {}
    for target, arguments, _ in done["calls"]:
        calls.setdefault(target.rpartition(".")[2], []).append(arguments)
    assert calls["create_network"] == [{"flags": 2 if version.startswith("10.") else 1}]
    assert calls["parse_from_file"] == [{"model": "model.onnx"}]
    flags = {"VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT_IDENTICAL", "ERROR_ON_TIMING_CACHE_MISS"}
    found = {call["flag"].replace("WEIGHTLESS", "STRIP_PLAN") for call in calls["set_flag"]}  # its name before 10.0
    assert found == flags  # neither REFIT nor EXCLUDE_LEAN_RUNTIME
    assert calls["clear_flag"] == [{"flag": "TF32"}]
    assert calls["set_memory_pool_limit"] == [{"pool": "WORKSPACE", "pool_size": 1 << 30}]
    assert calls["builder_optimization_level"] == [{"value": 4}]
    assert calls["max_aux_streams"] == [{"value": 0}]
    assert calls["hardware_compatibility_level"] == [{"value": "AMPERE_PLUS"}]
    assert calls["profiling_verbosity"] == [{"value": "DETAILED"}]
    shapes = {"min": [1, 3, 224, 224], "opt": [8, 3, 224, 224], "max": [16, 3, 224, 224]}
    assert calls["set_shape"] == [{"input": "images", **shapes}]
    assert len(calls["add_optimization_profile"]) == 1
    assert all(call == [{"cache": "ITimingCache", "ignore_mismatch": False}, True] for call in done["caches"])
    assert done["host code"] == [False]
    assert done["io"] == [
        ["images", "input", "float32", [-1, 3, 224, 224], list(shapes.values())],
        ["logits", "output", "float32", [-1, 1000], []],
    ]
    assert set(done["facts"]["builder_flags"]) == flags
    assert done["facts"]["plan_version"] == ".".join(str(int(part) & 0xFF) for part in version.split("."))
    assert ["Building", 2, 2] in done["seen"]
    assert done["log"].endswith("[W] a warning\n[W] of two lines\n")
    assert done["cache"] == [f"trt{version}-sm89-nvidia-l4.cache"]


@each_version
def test_defaults_touch_nothing_but_tf32(version: str) -> None:
    done = child.call(version, builds.defaults)
    assert done["calls"] == [["IBuilderConfig.clear_flag", {"flag": "TF32"}, None]]
    assert done["facts"]["builder_flags"] == []
    done = child.call(version, builds.defaults, True)
    assert done["calls"] == [["IBuilderConfig.set_flag", {"flag": "TF32"}, None]]
    assert done["facts"]["builder_flags"] == ["TF32"]


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_every_failure_is_noticed(version: str) -> None:
    expected = {
        "plugins": "BuildError: TensorRT cannot register its plugins",
        "start": "EnvironmentUnsuitable: TensorRT does not start",
        "network": "BuildError: TensorRT makes no strongly typed network",
        "profile": "BuildError: TensorRT makes no optimization profile",
        "shapes": "BuildError: TensorRT refuses the shapes images 1x3x224x224, 8x3x224x224, 16x3x224x224: inconsistent",
        "empty profile": "BuildError: TensorRT refuses the shapes",
        "index": "BuildError: TensorRT refuses the shapes",
        "engine": "BuildError: TensorRT built no engine: it does not say why",
        "plan": "BuildError: TensorRT cannot load the plan that it has just built",
        "inspector": "BuildError: TensorRT makes no engine inspector",
        "layers": "BuildError: the engine inspector gives no JSON",
        "cache": "BuildError: TensorRT does not take a setting",
        "attach": "IntegrityError: TensorRT refuses the timing cache",
        "serialise": "built: TensorRT cannot serialise its timing cache",  # the engine is there, after all
    }
    found = child.call(version, builds.failures)
    assert found.keys() == expected.keys() == builds.FAILURES.keys()
    assert {name: text for name, text in found.items() if not text.startswith(expected[name])} == {}


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_parser_errors_name_node_and_operator(version: str) -> None:
    text = child.call(version, builds.refused)
    assert "cannot read model.onnx:\n  node 3 'attention' (Einsum): reason 3 [" in text
    assert "\n  node 4 'attention' (Einsum): reason 4 [" in text
    assert "deploycli lint" in text


@each_version
def test_a_lock_pins_tactics(version: str) -> None:
    one, two, three = (f"0x{str(digit) * 32}" for digit in (1, 2, 3))
    assert child.call(version, builds.lock) == {
        "written": {one: "0x7", two: "0x8"},
        "flags": ["EDITABLE_TIMING_CACHE"],
        "lock": [2, True],
        "updates": [[one, 7]],
        "unknown": f"8: the build measured layers that the lock does not know, {three}",
    }


SURFACE = """
import json, tensorrt
classes = {name: value for name, value in vars(tensorrt).items() if isinstance(value, type)}
objects = [tensorrt.IBuilderConfig(), tensorrt.ITensor("", 0, ())]
found = {name: [n for n in dir(value) if not n.startswith("_")] for name, value in classes.items()}
for thing in objects:
    found[type(thing).__name__] += [name for name in vars(thing) if not name.startswith("_")]
inherited = set(dir(int)) | set(dir(bytes)) | {"name", "value", "Severity"}
names = found.keys() - {"IntEnum", "Any"}
print(json.dumps({name: sorted(set(found[name]) - inherited) for name in names}))
"""


@pytest.mark.parametrize("version", ["10.13.3.9", "11.4.0.106"])
def test_the_stand_in_has_no_names_of_its_own(bench: Bench, version: str) -> None:
    bench.set(FAKE_TENSORRT_VERSION=version)
    found = subprocess.run([sys.executable, "-c", SURFACE], cwd=ROOT, capture_output=True, text=True, check=True)
    table = names.names(version)
    for cls, members in json.loads(found.stdout).items():
        assert cls in table
        assert set(members) <= table[cls], cls


def test_the_model_is_refused(bench: Bench) -> None:
    with pytest.raises(BuildError, match=re.escape("node 7 'blocks.0/attention' (Einsum): no importer")) as caught:
        bench.build("refuse")
    assert "and 10 more" in caught.value.found


def test_the_shapes_are_for_the_models_inputs(bench: Bench) -> None:
    with pytest.raises(UsageError, match="the shapes are for image, other"):
        bench.build(profile={**PROFILE, "other": ShapeRange((1, 3), (1, 3), (1, 3))})


@pytest.mark.parametrize("version", ["10.13.3.9", "11.4.0.106"])
def test_what_is_read_back(bench: Bench, version: str) -> None:
    bench.set(FAKE_TENSORRT_VERSION=version)
    result = bench.build(strip_weights=True, hardware_compatibility="same-compute-capability", workspace=1 << 20)
    assert result.tensorrt == version
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
    assert {name: np.dtype(dtype).name for name, dtype in NUMPY_TYPES.items()} == NUMPY_NAMES


def test_host_code_is_not_allowed_even_to_inspect(bench: Bench) -> None:
    result = bench.build(version_compatible=True)
    assert result.layers is None
    assert "not inspected" in bench.log
    assert [tensor.dtype for tensor in result.io] == ["float32", "float16"]
    assert result.io[0].profile == tuple(vars(PROFILE["image"]).values())
    assert "EXCLUDE_LEAN_RUNTIME" not in result.facts["builder_flags"]
