"""Record what the compiler says of every graph of a corpus that has no record yet, or a stale one.

Usage::

    python -m tests.exporters.lint.corpus --record generated|nodes|attentions
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING

from deploycli.exporters.target.product import RTX
from deploycli.exporters.tensorrt import library
from tests.exporters.lint.corpus import SIZE, TARGETS, attentions, nodes, records, sample
from tests.exporters.lint.corpus.records import Record, Records
from tests.exporters.lint.judge import Judge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from deploycli.exporters.target.targets import Capability
    from tests.exporters.lint.corpus import Sample
    from tests.exporters.lint.judge import Verdict


def record(
    samples: Iterable[Sample],
    file: Path,
    note: Callable[[Sample, Verdict], Record] = Record.of,
    targets: Callable[[Sample], tuple[Capability, ...]] = lambda _: TARGETS,
) -> None:
    """Judge what is not known, and write all verdicts."""
    version = library.version(RTX)
    known = Records.load(file) if file.exists() else Records(version, {})
    if known.library != version:
        known = Records(version, {})
    found: dict[str, Record] = {}
    try:
        with ExitStack() as stack:
            judges: dict[tuple[Capability, ...], Judge] = {}
            for made in samples:
                if (old := known.of(made)) is not None:
                    found[made.name] = old
                    continue
                gpus = targets(made)
                if gpus not in judges:
                    judges[gpus] = stack.enter_context(Judge(gpus))
                found[made.name] = note(made, judges[gpus](made.model))
    finally:  # what is done is done
        Records(version, found).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--record", choices=("generated", "nodes", "attentions"), required=True, help="judge this corpus and write"
    )
    corpus = parser.parse_args().record
    if corpus == "generated":
        record(map(sample, range(SIZE)), records.FILE)
    elif corpus == "nodes":
        record(nodes.samples(), nodes.FILE)
    else:
        record(attentions.samples(), attentions.FILE, attentions.record_of, attentions.targets_of)


if __name__ == "__main__":
    main()
