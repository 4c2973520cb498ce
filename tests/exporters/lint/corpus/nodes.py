"""The second corpus, which nobody here wrote: ONNX's own tests of its operators, ``onnx.backend.test.case.node``.

The graphs are those of the onnx that is installed; another version's may differ from the recorded ones. The seen half,
by a hash of the name, may be looked at while the lint is mended. The unseen half is only counted.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from tests.exporters.lint.corpus import Sample, records

if TYPE_CHECKING:
    import onnx

    from tests.exporters.lint.corpus.records import Record

FILE = records.FILE.with_name("nodes.txt")

_NOT_IN_RTX = frozenset({"DFT", "DeformConv", "NonMaxSuppression", "NonZero", "RoiAlign"})
"""TensorRT has them, most as plugins; TensorRT for RTX refuses each for its name alone."""


@cache
def samples() -> tuple[Sample, ...]:
    """Collect the graphs of the installed onnx; it computes what they should give as well, which takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers that overflow are what some tests are about
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases()
    return tuple(Sample(index, case.name, case.model) for index, case in enumerate(cases))


def is_seen(made: Sample) -> bool:
    """Say in which half a graph is."""
    return hashlib.sha256(made.name.encode()).digest()[0] % 2 == 0


def needs_more_than_rtx(model: onnx.ModelProto) -> bool:
    """Say whether a graph has an operator that TensorRT has and TensorRT for RTX lacks: no fault of the graph."""
    return any(
        node.op_type in _NOT_IN_RTX
        or (node.op_type == "ScatterElements" and any(a.name == "reduction" and a.s != b"none" for a in node.attribute))
        for node in model.graph.node
    )


@dataclass(frozen=True)
class Recorded:
    """The graphs with their verdicts.

    Attributes:
        judged: those that count.
        lacking: those that are refused since TensorRT for RTX lacks an operator of TensorRT's.
        changed: those of which there is no verdict: another version of onnx has other graphs.
    """

    judged: tuple[tuple[Sample, Record], ...]
    lacking: tuple[tuple[Sample, Record], ...]
    changed: tuple[Sample, ...]


@cache
def recorded() -> Recorded:
    """Sort the graphs by what is known of them."""
    verdicts = records.Records.load(FILE)
    known = [(made, record) for made in samples() if (record := verdicts.of(made)) is not None]
    found = {made.name for made, _ in known}
    return Recorded(
        tuple(pair for pair in known if not needs_more_than_rtx(pair[0].model)),
        tuple(pair for pair in known if needs_more_than_rtx(pair[0].model)),
        tuple(made for made in samples() if made.name not in found),
    )
