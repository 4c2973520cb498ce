"""Kernel timings that are kept from build to build, so that the next one measures less.

Timings are those of one TensorRT version on one GPU, and TensorRT takes no others. So they are kept under a key of
both: in a folder as one file per key, ``<key>.cache``, which trtexec reads as well; or in one file, which is a ZIP
archive with an entry of that name per key. Another version's or GPU's timings are thus neither loaded nor lost.

When a build is done, its timings are merged with those that other builds have written meanwhile: under a lock, read,
combine, replace whole. A cache is untrusted input, for it also holds compiled kernels: only TensorRT's own check of it
is relied on, sizes are limited, nothing is unpickled.

Sources: TensorRT, "Timing Cache" and "Security"; ``IBuilderConfig.set_timing_cache``, ``ITimingCache.combine``.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import io
import os
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from deploycli.exporters.bundle.atomic import write_whole
from deploycli.models.errors import BuildError, EnvironmentUnsuitable, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import tensorrt as trt

    from deploycli.exporters.bundle.engine import GpuRecord

SIZE_LIMIT = 1 << 28
"""Largest cache of one version and GPU, bytes. Those of vision transformers have a few megabytes."""

_ENTRY_LIMIT = 256
_SUFFIX = ".cache"
_LOCK_WAIT_S = 60.0
_DELETE = "delete it, the next build makes it anew"


def cache_key(tensorrt: str, gpu: GpuRecord) -> str:
    """Return what timings are kept under: ``trt10.13.3.9-sm89-nvidia-l4``."""
    return f"trt{tensorrt}-{gpu.slug}"


class CacheStore:
    """Timings on disk.

    Args:
        path: a folder if it is one or ends with a slash, else a file; either may not exist yet.
        key: see `cache_key`.
    """

    def __init__(self, path: str, key: str) -> None:
        place = Path(path)
        self._entry = f"{key}{_SUFFIX}"
        self._is_folder = place.is_dir() or path.endswith(("/", os.sep))
        self.file = place / self._entry if self._is_folder else place

    def read(self) -> bytes:
        """Return the timings of the key, empty where there are none.

        Raises:
            IntegrityError: the file is too large or no archive of ours.
            EnvironmentUnsuitable: it cannot be read.
        """
        if self._is_folder:
            return _read_file(self.file)
        return self._entries().get(self._entry, b"")

    def merge(self, combine: Callable[[bytes], bytes]) -> bytes:
        """Replace the timings of the key, with no other writer in between; return what was written.

        Args:
            combine: is given the timings that are there now, and returns those to write.

        Raises:
            IntegrityError: see `read`; the file is as it was.
            EnvironmentUnsuitable: it cannot be read or written, or another process does not let go of it.
        """
        with exclusive(self.file):
            if self._is_folder:
                data = combine(_read_file(self.file))
                write_whole(self.file, data)
                return data
            entries = self._entries()
            data = entries[self._entry] = combine(entries.get(self._entry, b""))
            write_whole(self.file, _archive(entries))
        return data

    def _entries(self) -> dict[str, bytes]:
        data = _read_file(self.file)
        if not data:
            return {}
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                entries = archive.infolist()
                # Stored, not compressed: an entry cannot be larger than the file.
                if len(entries) > _ENTRY_LIMIT or any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                    raise zipfile.BadZipFile("not written by deploycli")
                return {entry.filename: archive.read(entry) for entry in entries}
        except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, NotImplementedError) as error:
            raise IntegrityError(
                f"{self.file} is no timing cache of deploycli: {error}",
                expected="a folder, or a file that an earlier build wrote",
                hint=f"{_DELETE}; a cache of trtexec is not read from a file, but from a folder, as {self._entry}",
            ) from error


def load_cache(config: trt.IBuilderConfig, data: bytes, where: Path) -> trt.ITimingCache:
    """Make a timing cache of its bytes and let the build use it.

    Args:
        config: of the build.
        data: the bytes; empty for a new cache.
        where: they come from.

    Raises:
        IntegrityError: TensorRT does not take them: damaged, or of another version or GPU after all.
    """
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):  # False: do not ignore another GPU
        raise IntegrityError(
            f"TensorRT refuses the timing cache in {where}",
            expected="timings of this TensorRT and this GPU, undamaged",
            hint=_DELETE,
        )
    return cache


def cache_bytes(cache: trt.ITimingCache) -> bytes:
    """Return a timing cache as bytes.

    Raises:
        BuildError: TensorRT gives none, or more than `SIZE_LIMIT`.
    """
    memory = cache.serialize()
    if memory is None:
        raise BuildError("TensorRT cannot serialise its timing cache")
    data = bytes(memory)
    if len(data) > SIZE_LIMIT:
        raise BuildError(f"the timing cache has {len(data)} bytes", expected=f"at most {SIZE_LIMIT}", hint=_DELETE)
    return data


def merged(config: trt.IBuilderConfig, cache: trt.ITimingCache, stored: bytes, where: Path) -> bytes:
    """Return what is stored, with what this build has measured in addition.

    Where both know a kernel the stored timing stays: else the fastest one would change with every build.

    Raises:
        IntegrityError: what is stored is not of this TensorRT and GPU; it was, when the build began.
    """
    if not stored:
        return cache_bytes(cache)
    whole = config.create_timing_cache(stored)
    if whole is None or not whole.combine(cache, False):
        raise IntegrityError(
            f"TensorRT cannot combine its timings with those in {where}",
            expected="timings of this TensorRT and this GPU, undamaged",
            hint=_DELETE,
        )
    return cache_bytes(whole)


def sha256_of_bytes(data: bytes) -> str:
    """Return the SHA-256 of bytes, 64 hexadecimal digits; empty for no bytes."""
    return hashlib.sha256(data).hexdigest() if data else ""


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the only right to replace ``path``; its folder is created where it is missing.

    The lock is on a file of its own, ``.<name>.lock``, for the file itself is replaced. It dies with its process.

    Raises:
        EnvironmentUnsuitable: it cannot be had within a minute, or not at all.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise EnvironmentUnsuitable(
            f"cannot write {lock}: {error.strerror or error}", expected="a place with write permission"
        ) from error
    try:
        _wait_for(descriptor, lock)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
            stale.unlink(missing_ok=True)  # of a writer that was killed: the living one has the lock
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, lock: Path) -> None:
    deadline = time.monotonic() + _LOCK_WAIT_S
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise EnvironmentUnsuitable(
                    f"another process has held {lock} for {_LOCK_WAIT_S:.0f} s", hint="end it, and build again"
                )
            time.sleep(0.05)
    except OSError as error:
        raise EnvironmentUnsuitable(
            f"cannot lock {lock}: {error.strerror or error}", expected="a file system with locks"
        ) from error


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise EnvironmentUnsuitable(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > SIZE_LIMIT:
        raise IntegrityError(f"{path} is too large for a timing cache", expected=f"at most {SIZE_LIMIT} bytes")
    return data


def _archive(entries: dict[str, bytes]) -> bytes:
    """Return the archive; the same entries always give the same bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(entries.items()):
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue()
