"""A lock on the kernels of an engine: the next build takes these and no others.

TensorRT measures its kernels and takes the fastest, so two builds may differ. Which kernel ("tactic") won is kept in
the timing cache, one entry per layer that was measured. With ``BuilderFlag.EDITABLE_TIMING_CACHE`` the entries can be
listed, read and set, which is what TensorRT 11 has in place of ``IAlgorithmSelector``. An entry can be set only where
the cache has it already, so a lock is two files:

    FILE         JSON: what it is valid for, and tactic by key, both as TensorRT writes them in its log
    FILE.cache   the timing cache that has these keys; its hash is in FILE

A tactic may be changed by hand in FILE, to one that a verbose log lists for its key; the build then takes that one.

Sources: NVIDIA/TensorRT, samples/sampleEditableTimingCache; ``ITimingCache.queryKeys``, ``query``, ``update``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from deploycli.exporters.bundle.atomic import write_whole
from deploycli.exporters.target.targets import dotted
from deploycli.exporters.tensorrt.timing_cache import SIZE_LIMIT, exclusive, sha256_of_bytes
from deploycli.models.codec import SomeSha256, load
from deploycli.models.errors import BuildError, EnvironmentUnsuitable, IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

    import tensorrt as trt

    from deploycli.exporters.bundle.engine import GpuRecord
    from deploycli.exporters.target.settings import BuildSettings

_SCHEMA_VERSION = 1
_SHOWN = 5
_ANEW = "delete the lock and build again, which writes it anew"
_IRRELEVANT = ("timing_cache", "error_on_timing_cache_miss", "locked")


@dataclass(frozen=True)
class LockScope:
    """What a lock is valid for: with anything else TensorRT has other layers to choose kernels for.

    Attributes:
        tensorrt: version, four parts.
        gpu: name.
        compute_capability: such as ``8.9``.
        onnx_sha256: of the model.
        settings: of the build, as JSON values.
    """

    tensorrt: str
    gpu: str
    compute_capability: str
    onnx_sha256: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, tensorrt: str, gpu: GpuRecord, onnx_sha256: str, settings: BuildSettings) -> LockScope:
        """Return the scope of a build."""
        values = json.loads(json.dumps(settings.to_json()))  # as they are read back: lists, no tuples
        kept = {name: value for name, value in values.items() if name not in _IRRELEVANT}
        if not kept["more_profiles"]:  # which locks of before do not know
            del kept["more_profiles"]
        return cls(tensorrt, gpu.name, dotted(gpu.compute_capability), onnx_sha256, kept)

    def check(self, wanted: LockScope, path: Path) -> None:
        """Compare with the scope of the build that is about to begin.

        Raises:
            IntegrityError: they differ.
        """
        found, here = _flat(self), _flat(wanted)
        for name in sorted(found.keys() | here.keys()):
            if found.get(name) != here.get(name):
                raise IntegrityError(
                    f"{path} was made with {name} {found.get(name)}, here it is {here.get(name)}",
                    expected="the same TensorRT, GPU, model and settings",
                    hint=f"another lock file for this one; or {_ANEW}",
                )


_Tactic = Annotated[str, Meta(pattern=r"^(0[xX])?[0-9a-fA-F]{1,16}\Z")]


@dataclass(frozen=True)
class _LockFile:
    scope: LockScope
    cache_sha256: SomeSha256
    tactics: Mapping[str, _Tactic]


@dataclass(frozen=True)
class Lock:
    """The kernels of an engine.

    Attributes:
        scope: what they are valid for.
        cache: the timing cache that has their keys.
        tactics: key of a layer -> hash of its kernel, both in hexadecimal.
    """

    scope: LockScope
    cache: bytes
    tactics: Mapping[str, str]

    @classmethod
    def read(cls, path: Path, scope: LockScope) -> Lock | None:
        """Read a lock, or None where there is no such file.

        Args:
            path: of the JSON file.
            scope: of the build that is about to begin.

        Raises:
            UsageError: the lock has another schema version.
            IntegrityError: the lock is for something else, malformed, or its timing cache is missing or another one.
            EnvironmentUnsuitable: it cannot be read.
        """
        try:
            if path.stat().st_size > SIZE_LIMIT:
                raise IntegrityError(f"{path} is too large for a lock", hint=_ANEW)
            found = load(path, _LockFile, what="a lock", hint=_ANEW, version=_SCHEMA_VERSION)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EnvironmentUnsuitable(f"cannot read {path}: {error.strerror or error}") from error
        found.scope.check(scope, path)
        tactics = {key: _hexadecimal(int(value, 16)) for key, value in found.tactics.items()}
        return cls(found.scope, _read_cache(path, found.cache_sha256), tactics)

    def write(self, path: Path) -> None:
        """Write both files, each whole; the cache first, so that a lock never lacks its own.

        Raises:
            EnvironmentUnsuitable: they cannot be written.
        """
        data = {
            "schema_version": _SCHEMA_VERSION,
            "scope": asdict(self.scope),
            "cache_sha256": sha256_of_bytes(self.cache),
            "tactics": dict(sorted(self.tactics.items())),
        }
        with exclusive(path):
            write_whole(_cache_of(path), self.cache)
            write_whole(path, json.dumps(data, indent=2).encode() + b"\n")

    def pin(self, cache: trt.ITimingCache) -> None:
        """Make the cache name the locked kernel for every key.

        Raises:
            IntegrityError: the cache does not know a key, or refuses a tactic.
        """
        import tensorrt as trt

        known = {str(key): key for key in _keys(cache)}
        _refuse("the timing cache beside the lock does not know", self.tactics.keys() - known.keys())
        _refuse("the lock does not know", known.keys() - self.tactics.keys())
        for text, tactic in self.tactics.items():
            value = cache.query(known[text])
            if _hexadecimal(value.tacticHash) == tactic:
                continue
            wanted = trt.TimingCacheValue(int(tactic, 16), value.timingMSec)
            if not cache.update(known[text], wanted):
                raise IntegrityError(f"TensorRT refuses the tactic {tactic} for the key {text}", hint=_ANEW)

    def check(self, cache: trt.ITimingCache) -> None:
        """See, after the build, that it measured nothing new and changed nothing.

        Raises:
            IntegrityError: it did: the engine has other kernels than the locked ones.
        """
        found = tactics_of(cache)
        _refuse("the build measured layers that the lock does not know,", found.keys() - self.tactics.keys())
        changed = {key for key, tactic in self.tactics.items() if found.get(key) != tactic}
        _refuse("the build took another tactic than the locked one for", changed)


def tactics_of(cache: trt.ITimingCache) -> dict[str, str]:
    """Return key -> tactic of all entries of an editable timing cache, in hexadecimal.

    Raises:
        BuildError: TensorRT does not list them.
    """
    return {str(key): _hexadecimal(cache.query(key).tacticHash) for key in _keys(cache)}


def _flat(scope: LockScope) -> dict[str, Any]:
    """Return the scope without its nesting, so that a difference has a name."""
    values = asdict(scope)
    return {**{f"setting {name}": value for name, value in values.pop("settings").items()}, **values}


def _keys(cache: trt.ITimingCache) -> list[trt.TimingCacheKey]:
    try:
        return list(cache.queryKeys())
    except RuntimeError as error:
        raise BuildError(f"TensorRT does not list the entries of its timing cache: {error}") from error


def _refuse(what: str, keys: set[str]) -> None:
    if keys:
        shown = ", ".join(sorted(keys)[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
        raise IntegrityError(f"{what} {shown}", expected="the keys and tactics of the lock", hint=_ANEW)


def _hexadecimal(number: int) -> str:
    return f"0x{int(number):x}"


def _cache_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.cache")


def _read_cache(path: Path, digest: str) -> bytes:
    file = _cache_of(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise IntegrityError(
            f"the lock {path} lacks its timing cache {file.name}: {error.strerror or error}",
            expected="both files of the lock",
            hint=f"restore it, or {_ANEW}",
        ) from error
    if len(data) > SIZE_LIMIT or (found := sha256_of_bytes(data)) != digest:
        raise IntegrityError(
            f"{file} is not the timing cache of the lock {path.name}",
            expected=f"sha256 {digest}",
            hint=f"restore it, or {_ANEW}; found: {found if len(data) <= SIZE_LIMIT else 'too large'}",
        )
    return data
