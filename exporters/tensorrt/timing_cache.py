"""Kernel timings that are kept from build to build, so that the next one measures less.

Timings are those of one TensorRT version on one GPU, and TensorRT takes no others: a folder holds one file for each,
``trt10.13.3.9-sm89-nvidia-l4.cache``, which trtexec reads as well. When a build is done it replaces its file whole. Of
two builds at once the later one's timings stay; what is lost is measured again. A cache is untrusted input, for it also
holds compiled kernels: only TensorRT's own check of it is relied on.

Sources: TensorRT, "Timing Cache" and "Security"; ``IBuilderConfig.set_timing_cache``.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from deploycli.exporters.bundle.files import write_whole
from deploycli.models.errors import BuildError, DeployError, EnvironmentUnsuitable, IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

    import tensorrt as trt

    from deploycli.exporters.bundle.engine import GpuRecord
    from deploycli.exporters.tensorrt.messages import Messages

SIZE_LIMIT = 1 << 28
"""Largest file, bytes. Those of vision transformers have a few megabytes."""

_DELETE = "delete it, the next build makes it anew"


class TimingCache:
    """The timings of one build: those that it is given, and those that it adds.

    Args:
        folder: of the timings; it may not exist yet.
        tensorrt: version, four parts.
        gpu: where kernels are measured.
        config: of the build, which is given what is stored.

    Raises:
        IntegrityError: the file is too large, or TensorRT does not take it.
        EnvironmentUnsuitable: it cannot be read.
    """

    def __init__(self, folder: Path, tensorrt: str, gpu: GpuRecord, config: trt.IBuilderConfig) -> None:
        self.file = folder / f"trt{tensorrt}-{gpu.slug}.cache"
        self._stored = _read(self.file)
        cache = config.create_timing_cache(self._stored)
        if cache is None or not config.set_timing_cache(cache, False):  # False: do not ignore another GPU
            raise IntegrityError(
                f"TensorRT refuses the timing cache in {self.file}",
                expected="timings of this TensorRT and this GPU, undamaged",
                hint=_DELETE,
            )
        self._cache = cache

    def keep(self, log: Messages) -> str:
        """Write all timings; return the hash of the file. The engine is not lost for its timings: the log tells why."""
        try:
            stored = self._bytes()
            write_whole(self.file, stored)
        except DeployError as error:
            log.write(f"the timing cache was not updated: {error.found}")
            stored = self._stored
        return hashlib.sha256(stored).hexdigest() if stored else ""

    def _bytes(self) -> bytes:
        memory = self._cache.serialize()
        if memory is None:
            raise BuildError("TensorRT cannot serialise its timing cache")
        data = bytes(memory)
        if len(data) > SIZE_LIMIT:
            raise BuildError(f"the timing cache has {len(data)} bytes", expected=f"at most {SIZE_LIMIT}", hint=_DELETE)
        return data


def _read(path: Path) -> bytes:
    """Return what a file holds, nothing where there is none."""
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
