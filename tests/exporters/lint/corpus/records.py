"""Verdicts, recorded once: a line for each graph, with its hash, so that a stale one is noticed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx

    from tests.exporters.lint.corpus import Sample
    from tests.exporters.lint.judge import Verdict

FILE = Path(__file__).parents[1] / "data" / "corpus.txt"

_HASH = 10  # hexadecimal digits


@dataclass(frozen=True)
class Record:
    """The verdict on one graph.

    Attributes:
        kind: of the verdict.
        digest: of the graph.
    """

    kind: str
    digest: str

    @classmethod
    def of(cls, made: Sample, verdict: Verdict) -> Record:
        """Note a verdict."""
        return cls(verdict.kind, digest_of(made.model))

    @property
    def refused(self) -> bool:
        """Whether there is no engine."""
        return self.kind != "accepted"


def digest_of(model: onnx.ModelProto) -> str:
    """Return a hash of what a graph computes: what it declares of its results is ONNX's, whose inference grows."""
    bare = type(model)()
    bare.CopyFrom(model)
    for value in bare.graph.output:
        value.ClearField("type")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()[:_HASH]


@dataclass(frozen=True)
class Records:
    """What is recorded.

    Attributes:
        library: version of TensorRT for RTX.
        by_name: the verdicts.
    """

    library: str
    by_name: Mapping[str, Record]

    def of(self, made: Sample) -> Record | None:
        """Return the verdict on a graph; None where there is none, or on another graph of that name."""
        found = self.by_name.get(made.name)
        return found if found is not None and found.digest == digest_of(made.model) else None

    @classmethod
    def load(cls, path: Path) -> Records:
        """Read a file of records."""
        head, *lines = path.read_text("utf-8").splitlines()
        rows = [line.rsplit(maxsplit=2) for line in lines]
        return cls(head.split()[-1], {name: Record(kind, digest) for name, kind, digest in rows})

    def save(self, path: Path) -> None:
        """Write it."""
        lines = [f"{name} {record.kind} {record.digest}" for name, record in self.by_name.items()]
        path.write_text("\n".join([f"TensorRT for RTX {self.library}", *lines, ""]), "utf-8")
