from __future__ import annotations

import hashlib
import sys
from typing import TYPE_CHECKING

import pytest

from tests.tensorrt_api import bindings, child, clients, names
from tests.tensorrt_api.bindings import ROOT, SYMBOLS, VERSIONS, Unavailable
from tests.tensorrt_api.names import ANY, Use, used_names

if TYPE_CHECKING:
    from pathlib import Path

each_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("DEPLOYCLI_TRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@each_version
def test_the_bindings_are_importable(version: str) -> None:
    assert child.call(version, clients.facts) == {
        "version": version,
        "typed": 2 if version.startswith("10.") else 1,
        "dims": [1, 3, 224],
        "has FP16 flag": version.startswith("10."),
    }


@each_version
def test_the_stub_library_has_what_the_bindings_call(version: str) -> None:
    child.require(version)
    package = bindings.prepare(version) / "tensorrt"
    assert bindings.unresolved(package / "tensorrt.so") == set(SYMBOLS)
    major = version.partition(".")[0]
    assert {path.name for path in package.glob("lib*")} == {f"{name}.so.{major}" for name in bindings.LIBRARIES}


def test_every_digest_is_another() -> None:
    digests = [digest for _, table in bindings.WHEELS.values() for digest in table.values()]
    assert len(set(digests)) == len(digests)
    assert {len(digest) for digest in digests} == {64}


def test_nothing_is_kept_in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not bindings.cache_folder().is_relative_to(ROOT)
    monkeypatch.setenv("DEPLOYCLI_TRT_CACHE", str(ROOT / "build"))
    with pytest.raises(ValueError, match="lies in the repository"):
        bindings.prepare(VERSIONS[0])


def test_a_wheel_that_is_not_the_pinned_one_is_no_reason_to_skip(fresh: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    digest = bindings.WHEELS[VERSIONS[0]][1].get(tag) or pytest.skip(f"no wheel for {tag}")
    (fresh / "wheels").mkdir(parents=True)
    (fresh / "wheels" / f"{digest}.whl").write_bytes(b"another wheel")
    with pytest.raises(ValueError, match=f"pinned is {digest}"):
        bindings._prepare(VERSIONS[0])


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INDEX": "0"}, "ERROR: "),
        ({"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}, "No matching distribution found for tensorrt-cu12-bindings"),
    ],
)
def test_what_cannot_be_fetched_is_unavailable_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], reason: str
) -> None:
    for name, value in {"PIP_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": "/dev/null", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable, match=reason) as first:
        bindings.prepare(VERSIONS[0])
    monkeypatch.setattr(bindings, "_prepare", None)  # not tried again
    with pytest.raises(Unavailable) as second:
        bindings.prepare(VERSIONS[0])
    assert str(first.value) == str(second.value)
    assert not list(fresh.glob("*-cp*"))


def test_a_test_is_skipped_with_the_reason_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(version: str) -> Path:
        raise Unavailable("no network")

    monkeypatch.setattr(child, "prepare", unavailable)
    monkeypatch.delenv("DEPLOYCLI_REQUIRE_TRT_BINDINGS", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no bindings of TensorRT 11\.0\.0\.114: no network"):
        child.require("11.0.0.114")
    monkeypatch.setenv("DEPLOYCLI_REQUIRE_TRT_BINDINGS", "1")
    with pytest.raises(Unavailable, match="no network"):
        child.require("11.0.0.114")


def test_the_table_of_names_is_that_of_the_bindings() -> None:
    for version in VERSIONS:
        child.require(version)
    assert names.generate() == names.TABLE.read_text("utf-8"), "python -m tests.tensorrt_api.names"


@each_version
def test_the_table_of_names_knows_both_majors(version: str) -> None:
    found, old = names.names(version), version.startswith("10.")
    assert ("FP16" in found["BuilderFlag"]) is old
    assert ("set_calibration_profile" in found["IBuilderConfig"]) is old
    assert ("IInt8Calibrator" in found[""]) is old
    assert {"STRONGLY_TYPED"} <= found["NetworkDefinitionCreationFlag"]
    assert {"name", "num_inputs", "kernel_size_nd"} <= found["IConvolutionLayer"]  # of its base, too


PROGRAM = """
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import tensorrt as trt
    from tensorrt import IInt8Calibrator, Runtime as R

def configure(config: "trt.QuantizationFlag", level: trt.Logger.Severity, r: R.platform):
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.TF32.name)
    if hasattr(trt.BuilderFlag, "FP16"):
        config.set_flag(trt.BuilderFlag.FP16)
    else:
        config.set_flag(trt.BuilderFlag.FP16)
    config.flag = trt.BuilderFlag.INT8 if hasattr(trt.BuilderFlag, "INT8") else 0
    if hasattr(config, "int8_calibrator") and config.int8_calibrator:
        config.int8_calibrator.precision
    config.set_calibration_profile(None)
    if not hasattr(trt, "IAlgorithmSelector"):
        return trt.__version__
    while True:
        trt.IAlgorithmSelector.select_algorithms
        trt.Logger.Severity.WARN
"""


def test_names_are_found_with_what_guards_them(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    found = used_names(tmp_path / "program.py")
    flag = ("BuilderFlag", "FP16")
    assert found == sorted(
        [
            Use(6, ("IInt8Calibrator",)),
            Use(6, ("Runtime",)),
            Use(1, ("QuantizationFlag",)),
            Use(8, ("Logger", "Severity")),
            Use(8, ("Runtime", "platform")),
            Use(9, flag),
            Use(10, ("BuilderFlag", "TF32", "name")),
            Use(11, ("BuilderFlag",)),
            Use(12, flag, True),
            Use(14, flag),
            Use(15, ("BuilderFlag",)),
            Use(15, ("BuilderFlag", "INT8"), True),
            Use(16, (ANY, "int8_calibrator"), True),
            Use(17, (ANY, "int8_calibrator"), True),
            Use(18, (ANY, "set_calibration_profile")),
            Use(20, ("__version__",)),
            Use(22, ("IAlgorithmSelector", "select_algorithms"), True),
            Use(23, ("Logger", "Severity", "WARN")),
        ]
    )
    shown = [problem.partition("program.py:")[2] for problem in names.problems([tmp_path / "program.py"])]
    new = "is missing in 11.0.0.114, 11.4.0.106"
    assert shown == [
        f"1: QuantizationFlag {new}",
        f"6: IInt8Calibrator {new}",
        f"8: Runtime.platform is missing in {', '.join(VERSIONS)}",
        f"9: BuilderFlag.FP16 {new}",
        f"14: BuilderFlag.FP16 {new}",
        f"18: ?.set_calibration_profile {new}",
        f"23: Logger.Severity.WARN is missing in {', '.join(VERSIONS)}",
    ]


@pytest.mark.parametrize(
    ("program", "lines"),
    [
        ("import tensorrt as trt\ntrt.Builder", []),
        ("trt = load()\ntrt.Builder", [1]),
        ("trt = load()\nassert trt.__version__", []),
        ("def build(trt):\n    return trt.Builder", [1]),
        ("import tensorrt\ntensorrt = load()\ntensorrt.Builder", [2]),
    ],
)
def test_a_module_in_a_variable_is_seen(tmp_path: Path, program: str, lines: list[int]) -> None:
    (tmp_path / "program.py").write_text(program)
    assert [int(found.split(":")[1]) for found in names.values([tmp_path / "program.py"])] == lines


def test_the_digest_is_of_the_whole_wheel(fresh: Path) -> None:
    (fresh / "wheels").mkdir(parents=True)
    content = b"not a wheel"
    kept = fresh / "wheels" / f"{hashlib.sha256(content).hexdigest()}.whl"
    kept.write_bytes(content)
    assert bindings._download(fresh / "wheels", "nothing==0", kept.stem) == kept


def test_a_warning_is_an_error_there() -> None:
    with pytest.raises(AssertionError, match="DeprecationWarning: old"):
        child.call(VERSIONS[-1], clients.warning)


def test_a_failure_carries_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)exit 1.*line \d+, in failing.*ZeroDivisionError"):
        child.call(VERSIONS[-1], clients.failing, 0)
