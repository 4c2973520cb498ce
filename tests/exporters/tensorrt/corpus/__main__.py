"""Record what the compiler says of every graph of a corpus that has no record yet, or a stale one.

Usage::

    python -m tests.exporters.tensorrt.corpus --record generated|nodes
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from exporters.tensorrt import library
from exporters.tensorrt.product import RTX
from tests.exporters.tensorrt.corpus import SIZE, TARGETS, nodes, records, sample
from tests.exporters.tensorrt.corpus.records import Record, Records
from tests.exporters.tensorrt.judge import Judge

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.exporters.tensorrt.corpus import Sample


def record(samples: Iterable[Sample], file: Path) -> None:
    """Judge what is not known, and write all verdicts."""
    version = library.version(RTX)
    known = Records.load(file) if file.exists() else Records(version, {})
    if known.library != version:
        known = Records(version, {})
    found: dict[str, Record] = {}
    try:
        with Judge(TARGETS) as judge:
            for made in samples:
                found[made.name] = known.of(made) or Record.of(made, judge(made.model))
    finally:  # what is done is done
        Records(version, found).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__.partition("\n")[0])
    parser.add_argument("--record", choices=("generated", "nodes"), required=True, help="judge this corpus and write")
    if parser.parse_args().record == "generated":
        record(map(sample, range(SIZE)), records.FILE)
    else:
        record(nodes.samples(), nodes.FILE)


if __name__ == "__main__":
    main()
