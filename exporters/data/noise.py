"""Samples that are made up."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from deploycli.exporters.bundle.golden import synthetic_inputs
from deploycli.exporters.data.base import Array, Reader, numbered
from deploycli.models.errors import UsageError
from deploycli.models.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from deploycli.models.spec import TensorSpec


class RandomSamples(Reader):
    """Seeded normal noise. Each sample has a seed of its own: any of them can be made without the others."""

    random = True

    def __init__(self, inputs: Sequence[TensorSpec], count: int, seed: int) -> None:
        if count < 1:
            raise UsageError(f"{count} random samples", expected="1 or more")
        super().__init__(numbered(range(count)), f"{count} random samples, seed {seed}", inputs, None)
        self._spec = ModelSpec("random", "random", {}, self._inputs)
        self._seed = seed

    def _read(self, start: int) -> Generator[dict[str, Array], None, None]:
        for index in range(start, len(self.names)):
            arrays = synthetic_inputs(self._spec, 1, (self._seed << 32) + index)
            yield {name: array[0] for name, array in arrays.items()}

    def _digests(self) -> Iterator[bytes]:
        for sample in self._read(0):
            yield hashlib.sha256(b"".join(array.tobytes() for array in sample.values())).digest()
