"""The Python bindings of several TensorRT versions, importable without TensorRT's libraries.

The wheels ``tensorrt-cu*-bindings`` need three shared libraries, of which they call nine functions. Libraries that
answer null to all nine are enough to import the module: its enums, value classes, loggers and every signature are then
real; only what would need the libraries (a builder, a runtime) cannot be made.

    python -m tests.tensorrt_api.bindings [VERSION...]

fetches and builds them, into a folder of the user's cache (or ``$DEPLOYCLI_TRT_CACHE``), never into the repository.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[2]

# version -> distribution, and the sha256 of its wheel for each Python, manylinux_2_28_x86_64
WHEELS = {
    "10.13.3.9": (
        "tensorrt-cu12-bindings",
        {
            "cp310": "3ca2635394789dd62346ff5ee3f02def53cee2cd21247cc342461dc721893a1e",
            "cp311": "33aa9d104c04b008871645a97bd8a1a02279cf498d251df5e767d9d5183e0646",
            "cp312": "193174cd0aa5ec7d63943d8d3f84ca9ec525477a9db3a9100bf2f77071b3fae8",
            "cp313": "90c7d502682d868a918665f1035b4acb07254bcd76cc551febea9a7009ee6269",
        },
    ),
    "10.16.1.11": (
        "tensorrt-cu12-bindings",
        {
            "cp310": "c1b6a156db4eab526360f5dba375e5c33e1275e3f36b0a7d375febb3db6202fc",
            "cp311": "150ef2b672487e29a8ea916353467c3e199994fb33589167e3641a928e243aa7",
            "cp312": "8e339335e7255b3fb3954eca61b4acbbdfcf7b28505bd711914519647ba310c8",
            "cp313": "f2a08cedfa48e300720e5bed070a45e390ea67dbcf475ffce725d10e0a2b3ba7",
        },
    ),
    "11.0.0.114": (
        "tensorrt-cu13-bindings",
        {
            "cp310": "f0582f1d2b4e21d2a7b9ea0edd1f828d6caed6303ce3fbe64ff8029bc9a60832",
            "cp311": "af42b7a12813d4615e1a3c7defea86d5223b902f6f209abe540d822d94eb2da7",
            "cp312": "9ad9c94e15899660e4d755339733655c7e61bc3ee1fb68f9c44d21217e2dacd9",
            "cp313": "9e69f5d6377612f182b0d73042df9d46bdc3eb47285f709e9ca4bd16eddcb36f",
        },
    ),
    "11.4.0.106": (
        "tensorrt-cu13-bindings",
        {
            "cp310": "1d17853da33a186c4d4d39995c1186bb59f643689aabac9c3e33ae5f0ba402f5",
            "cp311": "d072ac2a095e2be749fefc847adfb25d5ebe70303401df62ede8fe67a59f27fc",
            "cp312": "5fc7a6c412881f7212030893bd5531b1a0ff415c72c7678dfe4ead7a7765b38d",
            "cp313": "bac9a362c9189b5f5dd0444213913846e4b46003237834958e890eff57d86ed5",
        },
    ),
}
VERSIONS = tuple(WHEELS)

LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# Null pointer, false and zero are the same register on x86-64.
SOURCE = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS)


class Unavailable(RuntimeError):  # noqa: N818 - it describes the machine, not a mistake
    """The bindings cannot be had on this machine, and why."""


def cache_folder() -> Path:
    """Where wheels, unpacked bindings and generated stubs are kept."""
    chosen = os.environ.get("DEPLOYCLI_TRT_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(chosen).resolve() if chosen else Path(user, "deploycli", "tensorrt-bindings").resolve()
    if folder.is_relative_to(ROOT):
        raise ValueError(f"{folder} lies in the repository: the bindings are NVIDIA's and do not belong there")
    return folder


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """Hold a lock of this name among all processes; gives the cache folder."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / f"{name}.lock").open("w")
    except OSError as error:
        raise Unavailable(f"the cache folder cannot be written: {error}") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder


def prepare(version: str) -> Path:
    """Fetch and build the bindings of a version, if they are not there yet.

    Returns:
        A folder for ``PYTHONPATH``: it holds the package ``tensorrt``.

    Raises:
        Unavailable: they cannot be had here.
        ValueError: the wheel is not the one that is pinned.
    """
    result = _prepared(version, os.environ.get("DEPLOYCLI_TRT_CACHE"))
    if isinstance(result, Unavailable):
        raise Unavailable(*result.args)
    return result


@cache
def _prepared(version: str, _cache: str | None) -> Path | Unavailable:
    """Prepare once in a process; a failure counts as once, too: without a network each attempt takes its time."""
    try:
        return _prepare(version)
    except Unavailable as error:
        return error


def _prepare(version: str) -> Path:
    distribution, digests = WHEELS[version]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise Unavailable("the wheels are pinned for Linux on x86-64 only")
    if sys.implementation.name != "cpython" or tag not in digests:
        raise Unavailable(f"TensorRT {version} has no pinned wheel for {sys.implementation.name} {tag[2:]}")
    recipe = hashlib.sha256(f"{digests[tag]}{SOURCE}".encode()).hexdigest()[:8]
    with locked("bindings") as folder:
        site = folder / f"{version}-{tag}-{recipe}"
        if not site.is_dir():
            wheel = _download(folder / "wheels", f"{distribution}=={version}", digests[tag])
            with tempfile.TemporaryDirectory(dir=folder) as name:
                built = Path(name, "site")
                _unpack(wheel, built)
                _build_libraries(built / "tensorrt", version)
                built.rename(site)
    return site


def _download(folder: Path, requirement: str, digest: str) -> Path:
    kept = folder / f"{digest}.whl"
    if not kept.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            arguments = ["--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=15", "--quiet", f"--dest={name}"]
            _run([sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *arguments, requirement])
            (wheel,) = Path(name).glob("*.whl")
            _check(wheel, digest)
            wheel.rename(kept)
    _check(kept, digest)
    return kept


def _check(wheel: Path, digest: str) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != digest:
        raise ValueError(f"{wheel.name} has sha256 {found}, pinned is {digest}")


def _unpack(wheel: Path, site: Path) -> None:
    """Unpack as the package ``tensorrt``, which the distribution of that name would only forward."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site, [name for name in archive.namelist() if name.startswith("tensorrt_bindings/")])
    (site / "tensorrt_bindings").rename(site / "tensorrt")
    (site / "tensorrt_libs.py").touch()  # shadows the real libraries where they are installed


def _build_libraries(package: Path, version: str) -> None:
    missing = unresolved(package / "tensorrt.so") - set(SYMBOLS)
    if missing:
        raise RuntimeError(f"TensorRT {version} needs more than SYMBOLS has: {', '.join(sorted(missing))}")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "cc", "clang"))), None)
    if compiler is None:
        raise Unavailable("there is no C compiler (gcc, cc or clang)")
    source = package / "stub.c"
    source.write_text(SOURCE)
    for library in LIBRARIES:
        soname = f"{library}.so.{version.partition('.')[0]}"
        content = [str(source)] if library == LIBRARIES[0] else ["-xc", os.devnull]
        _run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(package / soname), *content])


def unresolved(library: Path) -> set[str]:
    """Symbols that a shared library needs and that neither this process nor the C libraries have."""
    nm = shutil.which("nm")
    if nm is None:
        raise Unavailable("there is no nm (binutils)")
    fields = [line.split() for line in _run([nm, "-D", "--undefined-only", str(library)]).splitlines()]
    process = ctypes.CDLL(None)
    needed = {name for kind, name in fields if kind == "U" and "@" not in name}  # a version names its library
    return {name for name in needed if not hasattr(process, name)}


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        message = next((line for line in reversed(lines) if "ERROR:" in line), lines[-1])
        raise Unavailable(f"{' '.join(command[:5])} ...: {message}")
    return result.stdout


def environment(version: str) -> dict[str, str]:
    """Environment of a subprocess in which ``import tensorrt`` gives this version: one version per process."""
    site = prepare(version)

    def prefixed(name: str, *folders: Path) -> str:
        return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(name)])])

    return {
        **os.environ,
        "PYTHONPATH": prefixed("PYTHONPATH", site, ROOT),
        "LD_LIBRARY_PATH": prefixed("LD_LIBRARY_PATH", site / "tensorrt"),
    }


def main(arguments: Sequence[str]) -> int:
    """Prepare the given versions, or all."""
    for version in arguments or VERSIONS:
        if version not in WHEELS:
            print(f"{version} is not pinned; these are: {', '.join(VERSIONS)}", file=sys.stderr)
            return 2
        try:
            print(version, prepare(version), flush=True)
        except (Unavailable, ValueError) as error:
            print(f"{version}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
