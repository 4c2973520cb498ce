"""What runs an engine in place of a GPU: the graph that it was compiled from, on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploycli.exporters.precision.simulate import open_runtime

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deploycli.exporters.bundle.engine import Sidecar


class Engine:
    """Takes the place of what `deploycli.exporters.tensorrt.runtime.open_engine` returns.

    Attributes:
        opened: the plans that were loaded, in turn.
        wrong: whether batches above 1 are answered with zeros.
    """

    opened: list[str]
    wrong: bool

    def __init__(self, folder: Path, sidecar: Sidecar, **_: object) -> None:
        sidecar.read_plan(folder)
        self.opened.append(sidecar.plan)
        self.product, self.name = sidecar.product, f"{sidecar.product.title} {sidecar.tensorrt}"
        self._runtime = open_runtime(folder.parent / sidecar.onnx)

    def run(self, inputs: Any) -> dict[str, Any]:
        found = self._runtime.run(inputs)
        return {name: 0 * array if self.wrong and len(array) > 1 else array for name, array in found.items()}

    def prepare(self, inputs: Any) -> None:
        self._inputs = inputs

    def enqueue(self) -> None:
        self._found = self.run(self._inputs)

    def capture(self) -> Callable[[], None]:
        return self.enqueue

    def synchronize(self) -> None: ...

    def outputs(self) -> dict[str, Any]:
        return self._found

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None: ...
