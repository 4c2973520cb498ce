"""Samples in memory, some of which cannot be read, and which may be interrupted."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycli.exporters.data.samples import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class InMemory:
    """The rows of one array as samples of the input ``x``.

    Args:
        rows: [N, ...].
        unreadable: indices of samples that are skipped.
        before: called with the index of the first sample of each batch before it is read; it may raise.
    """

    description = "rows"
    random = False

    def __init__(
        self, rows: Any, unreadable: tuple[int, ...] = (), before: Callable[[int], None] = lambda start: None
    ) -> None:
        self.rows = np.asarray(rows, np.float32)
        self.names = tuple(f"row{i}" for i in range(len(self.rows)))
        self.unreadable = unreadable
        self.before = before
        self.started_at: list[int] = []
        self.sizes: list[int] = []

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.rows.tobytes()).hexdigest()

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        self.started_at.append(start)
        self.sizes.append(size)
        for first in range(start, len(self.rows), size):
            self.before(first)
            stop = min(first + size, len(self.rows))
            kept = [i for i in range(first, stop) if i not in self.unreadable]
            skipped = tuple(self.names[i] for i in range(first, stop) if i in self.unreadable)
            yield Batch({"x": self.rows[kept]}, None, stop, skipped)
