"""Timings are kept per TensorRT version and GPU, and merged by builds that run at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploycli.exporters.bundle.engine import GpuRecord
from deploycli.exporters.tensorrt import timing_cache
from deploycli.exporters.tensorrt.timing_cache import CacheStore, cache_key, exclusive
from deploycli.models.errors import BuildError, EnvironmentUnsuitable, IntegrityError
from tests.exporters.tensorrt.fakes import Bench, bench

__all__ = ["bench"]

ROOT = Path(__file__).parents[3]
KEY = "trt10.13.3.9-sm89-nvidia-l4"


def test_the_key() -> None:
    assert cache_key("10.13.3.9", GpuRecord("NVIDIA L4", (8, 9))) == KEY
    name = "NVIDIA H100 80GB HBM3 MIG 1g.10gb / ../x"
    assert cache_key("11.4.0.106", GpuRecord(name, (9, 0))) == (
        "trt11.4.0.106-sm90-nvidia-h100-80gb-hbm3-mig-1g-10gb-x"
    )


@pytest.mark.parametrize("place", ["folder/", "timings.zip"])
def test_timings_of_each_key_are_apart(tmp_path: Path, place: str) -> None:
    one, other = CacheStore(f"{tmp_path}/{place}", "one"), CacheStore(f"{tmp_path}/{place}", "other")
    assert one.read() == b""
    assert one.merge(lambda stored: stored + b"1") == b"1"
    assert other.merge(lambda stored: stored + b"2") == b"2"
    assert one.merge(lambda stored: stored + b"3") == b"13"
    assert (one.read(), other.read()) == (b"13", b"2")


def test_a_folder_is_known_by_its_slash_or_by_being_there(tmp_path: Path) -> None:
    assert CacheStore(f"{tmp_path}/new/", KEY).file == tmp_path / "new" / f"{KEY}.cache"
    assert CacheStore(str(tmp_path), KEY).file == tmp_path / f"{KEY}.cache"
    assert CacheStore(f"{tmp_path}/new", KEY).file == tmp_path / "new"


def test_an_archive_is_the_same_for_the_same_timings(tmp_path: Path) -> None:
    for order, name in (("ab", "x"), ("ba", "y")):
        for key in order:
            CacheStore(f"{tmp_path}/{name}", key).merge(lambda _, key=key: key.encode())
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_what_is_no_archive_of_ours_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "timings"
    file.write_bytes(b"raw timings of trtexec")
    with pytest.raises(IntegrityError, match="no timing cache of deploycli") as caught:
        CacheStore(str(file), KEY).read()
    assert caught.value.exit_code == 8
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{KEY}.cache", b"0" * 10_000_000)  # an archive may be much larger inside
    with pytest.raises(IntegrityError, match="not written by deploycli"):
        CacheStore(str(file), KEY).merge(lambda stored: stored)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{KEY}.cache", b"timings")
    data = file.read_bytes().replace(b"timings", b"tamings")
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="Bad CRC-32"):
        CacheStore(str(file), KEY).read()
    assert file.read_bytes() == data


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_cache, "SIZE_LIMIT", 10)
    (tmp_path / f"{KEY}.cache").write_bytes(b"x" * 11)
    with pytest.raises(IntegrityError, match="too large"):
        CacheStore(str(tmp_path), KEY).read()


def test_a_failed_merge_leaves_the_file(tmp_path: Path) -> None:
    store = CacheStore(f"{tmp_path}/", KEY)
    store.merge(lambda _: b"old")
    with pytest.raises(ZeroDivisionError):
        store.merge(lambda _: bytes(1 // 0))
    assert store.read() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {f"{KEY}.cache", f".{KEY}.cache.lock"}


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "[a]*.cache"
    left, others = tmp_path / f".{file.name}.tmp-x", tmp_path / ".a.cache.tmp-x"
    left.touch()
    others.touch()
    with exclusive(file):
        assert not left.exists()
    assert others.exists()


def test_a_lock_that_is_held_is_not_waited_for_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_cache, "_LOCK_WAIT_S", 0.1)
    with exclusive(tmp_path / "x"), pytest.raises(EnvironmentUnsuitable, match="another process has held"):  # noqa: SIM117
        with exclusive(tmp_path / "x"):
            pass


MERGE = """
import json, sys
from deploycli.exporters.tensorrt.timing_cache import CacheStore
number = int(sys.argv[2])
for n in range(40):
    CacheStore(sys.argv[1], str(number % 2)).merge(lambda stored: stored + bytes([number]))
"""


@pytest.mark.parametrize("place", ["folder/", "timings.zip"])
def test_no_timing_is_lost_when_processes_merge_at_once(tmp_path: Path, place: str) -> None:
    path = f"{tmp_path}/{place}"
    command = [sys.executable, "-c", MERGE, path]
    processes = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    for key, numbers in (("0", (0, 2)), ("1", (1, 3))):
        assert sorted(CacheStore(path, key).read()) == sorted(numbers * 40)


def test_timings_that_tensorrt_does_not_give() -> None:
    nothing: Any = SimpleNamespace(serialize=lambda: None)
    with pytest.raises(BuildError, match="cannot serialise its timing cache"):
        timing_cache.cache_bytes(nothing)


def entries(data: bytes) -> dict[str, list[float]]:
    return dict(json.loads(data)["entries"])


def test_a_build_reads_and_merges(bench: Bench, tmp_path: Path) -> None:
    place = f"{tmp_path}/cache/"
    file = Path(place, f"{KEY}.cache")
    first = bench.build(timing_cache=place).timing_cache
    assert first is not None
    assert first["read_sha256"] == "" != first["sha256"]
    once = entries(file.read_bytes())
    bench.set(FAKE_FASTEST="2")  # another kernel would win now, but it is not measured again
    second = bench.build(timing_cache=place, error_on_timing_cache_miss=True).timing_cache
    assert second is not None
    assert second["read_sha256"] == second["sha256"] == first["sha256"]
    assert entries(file.read_bytes()) == once
    with pytest.raises(BuildError, match="timing cache miss") as caught:  # another level has other layers
        bench.build(timing_cache=place, error_on_timing_cache_miss=True, optimization_level=5)
    assert "--error-on-timing-cache-miss" in caught.value.hint
    bench.build(timing_cache=place, optimization_level=5)
    assert len(entries(file.read_bytes())) == 2 * len(once)
    bench.set(FAKE_GPU="NVIDIA T4|7|5")
    other = bench.build(timing_cache=place).timing_cache
    assert other is not None
    assert other["read_sha256"] == ""
    assert {path.name for path in Path(place).glob("[!.]*")} == {f"{KEY}.cache", "trt10.13.3.9-sm75-nvidia-t4.cache"}


@pytest.mark.parametrize("found", ["damaged", "of another GPU"])
def test_timings_that_tensorrt_refuses(bench: Bench, tmp_path: Path, found: str) -> None:
    file = tmp_path / f"{KEY}.cache"
    stored = {"of": ["10.13.3.9", "NVIDIA T4|7|5"], "entries": {}}
    file.write_bytes(b"{" if found == "damaged" else json.dumps(stored).encode())
    with pytest.raises(IntegrityError, match="TensorRT refuses the timing cache"):
        bench.build(timing_cache=f"{tmp_path}/")


def test_a_cache_that_cannot_be_merged_does_not_cost_the_engine(bench: Bench, tmp_path: Path) -> None:
    bench.set(FAKE_SPOILS=f"{tmp_path}/{KEY}.cache")  # while it builds, another program damages the file
    result = bench.build(timing_cache=f"{tmp_path}/")
    assert result.timing_cache is not None
    assert "cannot combine" in result.timing_cache["problem"]
    assert "the timing cache was not updated" in bench.log
    assert (tmp_path / f"{KEY}.cache").read_bytes() == b"{"


BUILD = """
import sys
from pathlib import Path
from deploycli.exporters.tensorrt.child import run_build
from deploycli.exporters.target.settings import BuildSettings
from tests.exporters.tensorrt.fakes import PROFILE
settings = BuildSettings(PROFILE, timing_cache=sys.argv[3], optimization_level=int(sys.argv[4]))
run_build(Path(sys.argv[1]), settings, Path(sys.argv[2]))
"""


def test_two_builds_at_once_lose_nothing(bench: Bench, tmp_path: Path) -> None:
    bench.set(FAKE_TENSORRT="succeed", FAKE_WAITS_FOR=str(tmp_path / "go"))
    place = str(tmp_path / "timings")
    command = [sys.executable, "-c", BUILD, str(bench.onnx)]
    builds = [
        subprocess.Popen([*command, str(tmp_path / level), place, level], cwd=ROOT, env=os.environ) for level in "45"
    ]
    logs = [tmp_path / level / "builder.log" for level in "45"]
    deadline = time.monotonic() + 30
    while not all(log.exists() and "building" in log.read_text() for log in logs):  # both have read the empty cache
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / "go").touch()
    assert [build.wait(timeout=60) for build in builds] == [0, 0]
    assert len(entries(CacheStore(place, KEY).read())) == 6
