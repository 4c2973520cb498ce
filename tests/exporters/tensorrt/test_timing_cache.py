"""Timings are kept per TensorRT version and GPU."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from deploycli.exporters.bundle.engine import GpuRecord
from deploycli.exporters.tensorrt.compilers.tensorrt import TimingCache
from deploycli.exporters.tensorrt.messages import Messages
from deploycli.models.errors import BuildError, IntegrityError
from tests.exporters.tensorrt.fakes import Bench, bench

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["bench"]

FILE = "trt10.13.3.9-sm89-nvidia-l4.cache"
L4 = GpuRecord("NVIDIA L4", (8, 9))


def taken(serialized: Any = None) -> Any:
    """A configuration that takes any timings, and gives these."""
    cache = SimpleNamespace(serialize=lambda: serialized)
    return SimpleNamespace(create_timing_cache=lambda _: cache, set_timing_cache=lambda *_: True)


def test_the_name_of_the_file(tmp_path: Path) -> None:
    assert TimingCache(tmp_path, "10.13.3.9", L4, taken()).file == tmp_path / FILE
    gpu = GpuRecord("NVIDIA H100 80GB HBM3 MIG 1g.10gb / ../x", (9, 0))
    name = "trt11.4.0.106-sm90-nvidia-h100-80gb-hbm3-mig-1g-10gb-x.cache"
    assert TimingCache(tmp_path, "11.4.0.106", gpu, taken()).file == tmp_path / name


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploycli.exporters.tensorrt.compilers.tensorrt.MOST_TIMINGS_BYTES", 10)
    (tmp_path / FILE).write_bytes(b"x" * 11)
    with pytest.raises(IntegrityError, match="too large"):
        TimingCache(tmp_path, "10.13.3.9", L4, taken())


@pytest.mark.parametrize("place", ["nothing is given", "too much is given", "not writable"])
def test_timings_that_cannot_be_kept_do_not_cost_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr("deploycli.exporters.tensorrt.compilers.tensorrt.MOST_TIMINGS_BYTES", 10)
    (tmp_path / FILE).write_bytes(b"old")
    log = Messages()
    given = {"nothing is given": None, "too much is given": b"x" * 11}.get(place, b"new")
    cache = TimingCache(tmp_path, "10.13.3.9", L4, taken(given))
    if place == "not writable":
        cache.file = tmp_path / FILE / "under a file"
    told: list[str] = []
    monkeypatch.setattr(log, "write", told.append)
    assert cache.keep(log) == "cba06b5736faf67e54b07b561eae94395e774c517a7d910a54369e1263ccfbd4"  # of b"old"
    assert (tmp_path / FILE).read_bytes() == b"old"
    assert ["the timing cache was not updated" in text for text in told] == [True]


def entries(data: bytes) -> dict[str, list[float]]:
    return dict(json.loads(data)["entries"])


def test_a_build_reads_and_adds(bench: Bench, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    file = place / FILE
    first = bench.build(timing_cache=str(place)).timing_cache_sha256
    assert first
    once = entries(file.read_bytes())
    bench.set(FAKE_FASTEST="2")  # another kernel would win now, but it is not measured again
    second = bench.build(timing_cache=str(place), error_on_timing_cache_miss=True).timing_cache_sha256
    assert second == first
    assert entries(file.read_bytes()) == once
    with pytest.raises(BuildError, match="timing cache miss") as caught:  # another level has other layers
        bench.build(timing_cache=str(place), error_on_timing_cache_miss=True, optimization_level=5)
    assert "--error-on-timing-cache-miss" in caught.value.hint
    bench.build(timing_cache=str(place), optimization_level=5)
    assert len(entries(file.read_bytes())) == 2 * len(once)
    bench.set(FAKE_GPU="NVIDIA T4|7|5")
    bench.build(timing_cache=str(place))
    assert {path.name for path in place.iterdir()} == {FILE, "trt10.13.3.9-sm75-nvidia-t4.cache"}


@pytest.mark.parametrize("found", ["damaged", "of another GPU"])
def test_timings_that_tensorrt_refuses(bench: Bench, tmp_path: Path, found: str) -> None:
    stored = {"of": ["10.13.3.9", "NVIDIA T4|7|5"], "entries": {}}
    (tmp_path / FILE).write_bytes(b"{" if found == "damaged" else json.dumps(stored).encode())
    with pytest.raises(IntegrityError, match="TensorRT refuses the timing cache"):
        bench.build(timing_cache=str(tmp_path))
