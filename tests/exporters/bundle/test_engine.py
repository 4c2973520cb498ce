from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.bundle.engine import (
    PlanHeader,
    Sidecar,
    engine_name,
    header_of_plan,
    plan_header,
    sidecar_of,
    sidecars,
)
from deploycli.exporters.target.product import RTX, TENSORRT
from deploycli.exporters.target.settings import BuildSettings, ShapeOptions, ShapeRange, parse_size
from deploycli.models.codec import decode
from deploycli.models.errors import EnvironmentUnsuitable, IntegrityError, UsageError
from deploycli.models.spec import TensorSpec
from tests.exporters import engines
from tests.exporters.bundle import bundles

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = BuildSettings({"images": ShapeRange((1, 12), (8, 12), (16, 12))}, workspace=1 << 30, tf32=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bundles.make(tmp_path).path / "engines"


@pytest.fixture
def sidecar(folder: Path) -> Sidecar:
    return engines.build(Bundle.open(folder.parent), settings=SETTINGS)


def test_it_comes_back_as_it_was(sidecar: Sidecar, folder: Path) -> None:
    (found,) = sidecars(folder)
    assert found == sidecar
    assert found.batches == (1, 16)
    assert sidecar.check_file(folder) == folder / "fp16-sm89-trt10.13.3.9.plan"
    assert sidecar_of(folder / sidecar.plan).name == "fp16-sm89-trt10.13.3.9.json"
    assert engine_name("int8", (12, 0), version="11.4.0.106") == "int8-sm120-trt11.4.0.106.plan"


def change(folder: Path, sidecar: Sidecar, **data: Any) -> None:
    path = sidecar_of(folder / sidecar.plan)
    path.write_text(json.dumps({**json.loads(path.read_text()), **data}))


@pytest.mark.parametrize(
    "data",
    [
        {"sha256": "z" * 64},
        {"sha256": None},
        {"plan": "../other.plan"},
        {"plan": 3},
        {"onnx": "../model.onnx"},
        {"onnx": "/etc/passwd"},
        {"onnx": "a\\b"},
        {"tensorrt": "ten"},
        {"gpu": {}},
        {"gpu": {"name": "x", "compute_capability": [8]}},
        {"settings": {"profile": {}, "hardware_compatibility": "all"}},
        {"settings": {"profile": {"images": {"min": [2], "opt": [1], "max": [3]}}}},
        {"io": []},
        {"io": [{"name": "x", "mode": "input", "dtype": "float32", "shape": ["a"], "profile": []}]},
        {"io": None},
        {"surprise": 1},
    ],
)
def test_what_is_malformed_is_refused(data: dict[str, Any], sidecar: Sidecar, folder: Path) -> None:
    change(folder, sidecar, **data)
    with pytest.raises(IntegrityError):
        list(sidecars(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_what_is_no_json(content: bytes, sidecar: Sidecar, folder: Path) -> None:
    sidecar_of(folder / sidecar.plan).write_bytes(content)
    with pytest.raises(IntegrityError):
        list(sidecars(folder))


def test_another_schema(sidecar: Sidecar, folder: Path) -> None:
    change(folder, sidecar, schema_version=99)
    with pytest.raises(UsageError, match="schema version 99"):
        list(sidecars(folder))


def test_a_sidecar_elsewhere(sidecar: Sidecar, folder: Path, tmp_path: Path) -> None:
    path = sidecar_of(folder / sidecar.plan)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(IntegrityError, match="leaves the bundle"):
        list(sidecars(folder))


def test_no_engines_and_hidden_files(folder: Path) -> None:
    assert list(sidecars(folder)) == []
    folder.mkdir()
    (folder / ".half.plan").touch()
    assert list(sidecars(folder)) == []


def test_a_file_that_is_no_plan(sidecar: Sidecar, folder: Path) -> None:
    (folder / sidecar.plan).write_bytes(b"<html>")
    with pytest.raises(IntegrityError, match="has changed"):
        sidecar.check_file(folder)
    import hashlib

    with pytest.raises(IntegrityError, match="does not begin as a TensorRT plan does"):
        replace(sidecar, sha256=hashlib.sha256(b"<html>").hexdigest()).check_file(folder)


class TestHeader:
    def test_versions(self, sidecar: Sidecar, folder: Path) -> None:
        assert header_of_plan(folder / sidecar.plan) == PlanHeader(TENSORRT, (10, 13, 3, 9))
        plan = struct.pack("<II16x4B", 0x74727466, 0, 11, 4, 0, 106) + b"more"
        assert plan_header(plan) == PlanHeader(TENSORRT, (11, 4, 0, 106))

    def test_the_other_product(self) -> None:
        plan = b"vtrt" + struct.pack("<I16x4B", 0, 1, 7, 1, 116) + b"vtrt" + struct.pack("<I", 0x2C)
        assert plan_header(plan) == PlanHeader(RTX, (1, 7, 1, 116), ((8, 6), (8, 9), (12, 1)))
        assert plan_header(plan[:-1]) is None

    @pytest.mark.parametrize("head", [b"", b"ftrt", bytes(28), struct.pack("<II16x4B", 0x74727466, 1, 11, 4, 0, 106)])
    def test_what_is_no_plan(self, head: bytes) -> None:
        assert plan_header(head) is None

    def test_the_last_part_has_eight_bits(self, sidecar: Sidecar, folder: Path) -> None:
        replace(sidecar, tensorrt="10.13.3.265").check_file(folder)  # 256 + 9
        with pytest.raises(IntegrityError, match="as its header says"):
            replace(sidecar, tensorrt="10.13.4.9").check_file(folder)


L4 = ((8, 9), "NVIDIA L4")


@pytest.mark.parametrize(
    ("compatible", "built", "here", "fits"),
    [
        (False, "10.13.3.9", "10.13.3.9", True),
        (False, "10.13.3.9", "10.13.3.10", False),
        (True, "10.13.3.9", "10.13.3.10", True),
        (True, "10.13.3.9", "10.16.1.11", True),
        (True, "10.16.1.11", "10.13.3.9", False),
        (True, "10.13.3.9", "11.4.0.106", True),
        (True, "11.0.0.114", "11.4.0.106", True),
        (True, "11.0.0.114", "12.0.0.1", False),
        (True, "10.13.3.9", "12.0.0.1", False),
    ],
)
def test_versions_that_run_it(compatible: bool, built: str, here: str, fits: bool, sidecar: Sidecar) -> None:
    found = replace(sidecar, tensorrt=built, settings=replace(SETTINGS, version_compatible=compatible))
    if fits:
        found.check_host(here, *L4)
    else:
        with pytest.raises(EnvironmentUnsuitable, match=f"was built by TensorRT {built}, here is {here}"):
            found.check_host(here, *L4)


@pytest.mark.parametrize(
    ("level", "built", "here", "fits"),
    [
        ("none", L4, L4, True),
        ("none", L4, ((8, 9), "NVIDIA L40S"), False),
        ("none", L4, ((9, 0), "NVIDIA H200"), False),
        ("same-compute-capability", L4, ((8, 9), "NVIDIA L40S"), True),
        ("same-compute-capability", L4, ((8, 6), "NVIDIA A10"), False),
        ("ampere+", L4, ((8, 0), "NVIDIA A100"), True),
        ("ampere+", L4, ((12, 0), "NVIDIA RTX 5090"), True),
        ("ampere+", L4, ((7, 5), "Tesla T4"), False),
    ],
)
def test_gpus_that_run_it(level: str, built: Any, here: Any, fits: bool, sidecar: Sidecar) -> None:
    gpu = replace(sidecar.gpu, name=built[1], compute_capability=built[0])
    found = replace(sidecar, gpu=gpu, settings=replace(SETTINGS, hardware_compatibility=level))
    if fits:
        found.check_host(sidecar.tensorrt, *here)
        return
    with pytest.raises(EnvironmentUnsuitable, match=f"here is {here[1]}") as caught:
        found.check_host(sidecar.tensorrt, *here)
    assert caught.value.exit_code == 7
    # No level covers a GPU before Ampere; none is proposed there.
    assert ("--hardware-compatibility ampere" in caught.value.hint) == (
        here[0] >= (8, 0) and here[0] != built[0] and level != "ampere+"
    )


class TestShapes:
    INPUTS = (TensorSpec("images", (3, 8, 8)),)

    def test_the_default_and_what_replaces_it(self) -> None:
        (found,) = ShapeOptions().profile(self.INPUTS, None).values()
        assert (found.min[0], found.opt[0], found.max[0]) == (1, 8, 32)
        (found,) = ShapeOptions((2, 4, 8)).profile(self.INPUTS, None).values()
        assert found == ShapeRange((2, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))

    def test_a_fixed_batch(self) -> None:
        (found,) = ShapeOptions().profile(self.INPUTS, 4).values()
        assert found.min == found.opt == found.max == (4, 3, 8, 8)
        with pytest.raises(UsageError, match="exported with batch 4, and cannot have batch 1") as caught:
            ShapeOptions((1, 4, 8)).profile(self.INPUTS, 4)
        assert caught.value.expected == "batch 4"

    def test_several_profiles(self) -> None:
        request = ShapeOptions((1, 1, 1), more=((2, 8, 32),))
        first, second = request.profiles(self.INPUTS, None)
        assert (first["images"].max[0], second["images"].min, second["images"].max[0]) == (1, (2, 3, 8, 8), 32)
        settings = BuildSettings(first, more_profiles=(second,))
        assert decode(json.dumps(settings.to_json()), BuildSettings, where="it", what="settings") == settings
        assert settings.profiles == (first, second)
        ShapeOptions((1, 4, 8), more=((4, 8, 16), (9, 32, 64)))

    @pytest.mark.parametrize(
        ("batch", "more", "gap"),
        [((1, 1, 1), ((3, 8, 32),), "batch 2"), ((8, 8, 8), ((1, 1, 1), (2, 3, 4)), "batch 5 to 7")],
    )
    def test_profiles_that_leave_a_gap(self, batch: Any, more: Any, gap: str) -> None:
        with pytest.raises(UsageError, match=f"no profile takes {gap}\n"):
            ShapeOptions(batch, more=more)

    def test_the_batches_of_several_profiles(self, sidecar: Sidecar) -> None:
        second = {"images": ShapeRange((17, 12), (32, 12), (64, 12))}
        assert replace(sidecar, settings=replace(SETTINGS, more_profiles=(second,))).batches == (1, 64)

    @pytest.mark.parametrize(("text", "size"), [("4G", 4 << 30), ("512M", 512 << 20), ("1.5k", 1536), ("7", 7)])
    def test_sizes(self, text: str, size: int) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "G", "0", "-1M", "4T", "4 G B"])
    def test_what_is_no_size(self, text: str) -> None:
        with pytest.raises(UsageError, match="is no size"):
            parse_size(text)

    def test_settings_come_back(self) -> None:
        text = json.dumps(SETTINGS.to_json())
        assert decode(text, BuildSettings, where="it", what="settings") == SETTINGS
