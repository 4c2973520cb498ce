"""What can be timed: a model in one runtime, in one precision, on one device.

A provider looks at a bundle and returns its candidates; nothing is loaded before `Candidate.open` is called::

    with candidate.open() as prepare:     # load the model, once
        prepared = prepare(inputs)        # once a batch size: copy to the device, compile, capture
        prepared.run()                    # what is timed
        prepared.outputs()                # of the last run, for the judge
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from deploycli.exporters.bundle.bundle import Bundle, ModelFile

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class FirstLoad:
    """How long it takes from the file to the first outputs, where kernels are finished on the way.

    Attributes:
        compiling: seconds with no kernels at hand; the driver may keep some of its own.
        cached: seconds with the kernels of that load.
    """

    compiling: float
    cached: float

    def __str__(self) -> str:
        return f"loaded to the first outputs in {self.compiling:.2f} s, and in {self.cached:.2f} s with kernels cached"

    def to_json(self) -> dict[str, Any]:
        """Return the seconds as JSON values."""
        return {"compiling_seconds": self.compiling, "cached_seconds": self.cached}


@dataclass(frozen=True)
class Prepared:
    """A model that stands ready with one batch.

    Attributes:
        run: infers once, and returns when the outputs are complete where they are made. It does nothing else: no
            conversion, no allocation that a server would not make, and no transfer unless ``transfers`` says so.
        outputs: what the last run gave, name -> [B, ...], on the host.
        transfers: of inputs and outputs, in what is timed: ``none`` where all memory is the host's.
        cuda_graph: whether a run replays a captured CUDA graph.
        threads: of one operator on the CPU; None where the runtime chooses, and does not say.
        notes: what else a reader of the figures must know.
        first_load: loads it anew, twice, to time that; None where loading compiles nothing.
    """

    run: Callable[[], object]
    outputs: Callable[[], Arrays]
    transfers: Literal["none", "excluded", "included"] = "none"
    cuda_graph: bool = False
    threads: int | None = None
    notes: tuple[str, ...] = ()
    first_load: Callable[[], FirstLoad] | None = None


Prepare = Callable[[Arrays], Prepared]
"""Takes inputs name -> [B, ...] as the bundle's golden file has them.

It raises DeployError where the model cannot run on them.
"""


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        name: the runtime, by which a user asks for it: ``eager``, ``compile``, ``ort-cpu``, ``ort-cuda``.
        precision: of `deploycli.exporters.bundle.manifest.PRECISIONS`; the key of the budget that its outputs are
            judged by.
        device: ``cpu`` or ``cuda``.
        open: loads it for as long as the context lasts; raises DeployError where this host cannot.
        file: the file of the bundle that it runs; None for the PyTorch module.
        emulated: why its arithmetic is not of its precision, or an empty string. What is emulated is timed and shown,
            and meets no requirement.
    """

    name: str
    precision: str
    device: str
    open: Callable[[], AbstractContextManager[Prepare]]
    file: ModelFile | None = None
    emulated: str = ""

    @property
    def label(self) -> str:
        """What it is called in messages: ``ort-cpu fp16``."""
        return f"{self.name} {self.precision}"

    @property
    def artifact(self) -> str:
        """Path of its file inside the bundle; empty for the PyTorch module."""
        return "" if self.file is None else self.file.name

    def refuses(self, batch: int) -> str:
        """Return why it cannot take a batch of this size, or an empty string."""
        batches = None if self.file is None else self.file.batches
        if batches is None or batches[0] <= batch <= batches[1]:
            return ""
        smallest, largest = batches
        return f"takes batch {smallest}" if smallest == largest else f"takes batches {smallest} to {largest}"

    def to_json(self) -> dict[str, Any]:
        """Return what identifies it as JSON values."""
        return {
            "name": self.name,
            "precision": self.precision,
            "device": self.device,
            "artifact": self.artifact,
            "emulated": self.emulated,
        }


@dataclass(frozen=True)
class BenchOptions:
    """What a user asks of a benchmark.

    Attributes:
        batches: batch sizes; empty means 1 and 8, or the bundle's own size where all its files have the same.
        only: names of the candidates; empty means all that the host can run. A named one that fails is an error.
        rounds: how often each candidate is timed at each batch size, or None: as often as ``seconds`` allow.
        seconds: how long one batch size is timed, warm-up apart.
        warmup_runs: untimed runs of each candidate at each batch size, unless ``warmup_seconds`` are over before.
        warmup_seconds: see there.
        threads: of one operator on the CPU, in every runtime; None leaves the choice to each.
        cuda_graph: let what can replay CUDA graphs do so.
        checkpoint: where the bundle's checkpoint is now, if not where the manifest says.
        trust_factory: run the function that the manifest names, whoever wrote it.
        baseline: name of the candidate that all others are compared with; empty means eager, or what else computes
            in FP32.
        seed: of the order within each round, and of the intervals.

    Raises:
        UsageError: a number that makes no benchmark.
    """

    batches: tuple[int, ...] = ()
    only: tuple[str, ...] = ()
    rounds: int | None = None
    seconds: float = 10.0
    warmup_runs: int = 10
    warmup_seconds: float = 1.0
    threads: int | None = None
    cuda_graph: bool = True
    checkpoint: Path | None = None
    trust_factory: bool = False
    baseline: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"a batch of": min(self.batches, default=1), "rounds:": self.rounds, "threads:": self.threads}
        for what, count in counts.items():
            if count is not None and count < 1:
                raise UsageError(f"{what} {count}", expected="1 or more")
        if not 0 < self.seconds < float("inf"):
            raise UsageError(f"a benchmark of {self.seconds} seconds", expected="a positive number")

    def to_json(self) -> dict[str, Any]:
        """Return how it was measured as JSON values."""
        return {
            "rounds": self.rounds,
            "seconds": self.seconds if self.rounds is None else None,
            "warmup_runs": self.warmup_runs,
            "warmup_seconds": self.warmup_seconds,
            "threads": self.threads,
            "cuda_graph": self.cuda_graph,
            "seed": self.seed,
        }


Provider = Callable[["Bundle", BenchOptions], Iterable[Candidate]]
"""Returns the candidates of a bundle, those that this host cannot open as well: their `Candidate.open` says why."""
