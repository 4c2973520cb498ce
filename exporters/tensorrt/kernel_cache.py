"""The kernels that TensorRT for RTX finishes when it loads an engine, kept beside the engine for the next load.

They are for one engine, version, GPU and driver, whose key stands in the file; what does not fit it, or is damaged, is
as good as no file. They only save time: a cache that cannot be read or written is no error. The file is no part of what
a bundle vouches for, as the engine is not.

Source: TensorRT for RTX, "Working with runtime cache".
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from deploycli.exporters.bundle.engine import PLAN_SUFFIX
from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.tensorrt import library
from deploycli.models.errors import DeployError

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.bundle.engine import Sidecar

SUFFIX = ".kernels"

SIZE_LIMIT = 1 << 28
"""Largest file, bytes."""

_DIGEST_BYTES = hashlib.sha256().digest_size


class KernelCache(Protocol):
    """Keeps the kernels of one engine from one load to the next."""

    def read(self) -> bytes:
        """Return the kernels, or nothing."""

    def write(self, kernels: bytes) -> None:
        """Keep them."""


class InMemory:
    """No kernels at first, and no file."""

    def __init__(self) -> None:
        self._kernels = b""

    def read(self) -> bytes:
        """Return what was written last."""
        return self._kernels

    def write(self, kernels: bytes) -> None:
        """Keep them as long as this object lives."""
        self._kernels = kernels


@dataclass(frozen=True)
class OnDisk:
    """A file: the SHA-256 of the key and the kernels, and the kernels.

    Attributes:
        path: of the file.
        key: what the kernels are for.
    """

    path: Path
    key: str

    def read(self) -> bytes:
        """Return the kernels; nothing where there is no file, or one that is damaged or for something else."""
        if not self._is_ours():
            return b""
        try:
            with self.path.open("rb") as stream:
                content = stream.read(SIZE_LIMIT + 1)
        except OSError:
            return b""
        digest, kernels = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return kernels if len(content) <= SIZE_LIMIT and digest == self._digest(kernels) else b""

    def write(self, kernels: bytes) -> None:
        """Replace the file, whole or not at all, where that is possible."""
        if self._is_ours() and len(kernels) <= SIZE_LIMIT - _DIGEST_BYTES:
            with suppress(DeployError):
                write_whole(self.path, self._digest(kernels) + kernels)

    def _is_ours(self) -> bool:
        """Whether a file is here, or may be: a link, which is followed, may lead anywhere, and a pipe never ends."""
        return not self.path.is_symlink() and (self.path.is_file() or not self.path.exists())

    def _digest(self, kernels: bytes) -> bytes:
        return hashlib.sha256(self.key.encode() + b"\0" + kernels).digest()


def kernel_cache(folder: Path, sidecar: Sidecar) -> OnDisk:
    """Return where the kernels of an engine are kept: ``fp16-rtx1.7.1.116.sm89-nvidia-geforce-rtx-4090.kernels``.

    Args:
        folder: of the engine.
        sidecar: of the engine.

    Raises:
        EnvironmentUnsuitable: there is no GPU, or no TensorRT for RTX.
    """
    gpu = library.gpu()
    key = "\n".join((sidecar.sha256, library.version(sidecar.product), gpu.slug, gpu.driver))
    return OnDisk(folder / f"{sidecar.plan.removesuffix(PLAN_SUFFIX)}.{gpu.slug}{SUFFIX}", key)
