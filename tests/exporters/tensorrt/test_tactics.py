"""The lock: the first build writes it, later ones take its kernels or fail."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import onnx
import pytest

from deploycli.exporters.target.settings import BuildSettings
from deploycli.exporters.tensorrt.tactics import Lock, LockScope
from deploycli.models.errors import IntegrityError, UsageError
from tests.exporters.tensorrt.fakes import PROFILE, Bench, bench

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["bench"]


@pytest.fixture
def locked(bench: Bench, tmp_path: Path) -> Path:
    """A lock that a first build has written."""
    path = tmp_path / "model.lock"
    result = bench.build(locked=str(path))
    assert result.lock is not None
    assert result.lock["written"] is True
    assert result.lock["tactics"] == 3
    return path


def tactics(layers: Path | None) -> dict[str, str]:
    """What the engine was built with, by the inspector's JSON."""
    assert layers is not None
    return dict(json.loads(layers.read_text())["Built"]["tactics"])


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def test_the_locked_kernels_are_taken_though_others_win(bench: Bench, locked: Path) -> None:
    written = json.loads(locked.read_text())
    assert written["scope"]["tensorrt"] == "10.13.3.9"
    assert written["scope"]["gpu"] == "NVIDIA L4"
    before = locked.read_bytes()
    bench.set(FAKE_FASTEST="1000")
    result = bench.build(locked=str(locked))
    assert result.lock is not None
    assert result.lock["written"] is False
    assert tactics(result.layers) == written["tactics"]
    assert locked.read_bytes() == before
    free = bench.build()
    assert tactics(free.layers) != written["tactics"]


def test_a_kernel_may_be_chosen_by_hand(bench: Bench, locked: Path) -> None:
    chosen = json.loads(locked.read_text())["tactics"]
    chosen[min(chosen)] = "0x000ABC"  # other ways to write a number are the same number
    edit(locked, tactics=chosen)
    result = bench.build(locked=str(locked))
    assert tactics(result.layers)[min(chosen)] == "0xabc"
    chosen[min(chosen)] = "0x0"
    edit(locked, tactics=chosen)
    with pytest.raises(IntegrityError, match="TensorRT refuses the tactic 0x0"):
        bench.build(locked=str(locked))


def test_it_is_for_one_version_gpu_model_and_settings(bench: Bench, locked: Path) -> None:
    with pytest.raises(IntegrityError, match="setting optimization_level None, here it is 5") as caught:
        bench.build(locked=str(locked), optimization_level=5)
    assert caught.value.exit_code == 8
    bench.set(FAKE_GPU="NVIDIA L40S|8|9")
    with pytest.raises(IntegrityError, match="with gpu NVIDIA L4, here it is NVIDIA L40S"):
        bench.build(locked=str(locked))
    bench.set(FAKE_GPU="NVIDIA L4|8|9", FAKE_TENSORRT_VERSION="11.4.0.106")
    with pytest.raises(IntegrityError, match=r"tensorrt 10\.13\.3\.9, here it is 11\.4\.0\.106"):
        bench.build(locked=str(locked))
    bench.set(FAKE_TENSORRT_VERSION="10.13.3.9")
    model = onnx.load(bench.onnx)
    model.doc_string = "another one"
    onnx.save(model, bench.onnx)
    with pytest.raises(IntegrityError, match="with onnx_sha256"):
        bench.build(locked=str(locked))
    assert bench.files() == {"job.json", "builder.log"}


def test_keys_that_do_not_fit(bench: Bench, locked: Path) -> None:
    good = json.loads(locked.read_text())["tactics"]
    edit(locked, tactics={**good, "0x" + "0" * 32: "0x1"})
    with pytest.raises(IntegrityError, match=f"beside the lock does not know 0x{'0' * 32}"):
        bench.build(locked=str(locked))
    edit(locked, tactics=dict(list(good.items())[1:]))
    with pytest.raises(IntegrityError, match="the lock does not know"):
        bench.build(locked=str(locked))
    edit(locked, tactics=good)
    bench.set(FAKE_ANOTHER_LAYER="yes")
    with pytest.raises(IntegrityError, match="measured layers that the lock does not know"):
        bench.build(locked=str(locked))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"schema_version": 1, "scope": {}, "tactics": {}, "cache_sha256": ""}', "[" * 100_000],
)
def test_what_is_no_lock(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    with pytest.raises(IntegrityError, match=r"is no JSON|is malformed at"):
        Lock.read(tmp_path / "lock", LockScope("", "", "", "", {}))


def test_its_timing_cache_is_checked(bench: Bench, locked: Path) -> None:
    cache = locked.with_name(f"{locked.name}.cache")
    cache.write_bytes(cache.read_bytes() + b" ")
    with pytest.raises(IntegrityError, match="is not the timing cache of the lock"):
        bench.build(locked=str(locked))
    cache.unlink()
    with pytest.raises(IntegrityError, match="lacks its timing cache"):
        bench.build(locked=str(locked))


def test_settings_that_contradict_a_lock() -> None:
    with pytest.raises(UsageError, match="a timing cache and a lock"):
        BuildSettings(PROFILE, locked="a", timing_cache="b")
    with pytest.raises(UsageError, match="level 0"):
        BuildSettings(PROFILE, locked="a", optimization_level=0)
