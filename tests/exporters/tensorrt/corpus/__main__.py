"""Record what the compiler says of every graph of the corpus that has no record yet, or a stale one.

Usage::

    python -m tests.exporters.tensorrt.corpus --record [--size N]
"""

from __future__ import annotations

import argparse

from exporters.tensorrt import library
from exporters.tensorrt.product import RTX
from tests.exporters.tensorrt.corpus import SIZE, TARGETS, sample
from tests.exporters.tensorrt.corpus.records import FILE, Record, Records
from tests.exporters.tensorrt.judge import Judge


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", required=True, help="judge and write")
    parser.add_argument("--size", type=int, default=SIZE, help=f"number of graphs, {SIZE}")
    size: int = parser.parse_args().size
    version = library.version(RTX)
    known = Records.load(FILE) if FILE.exists() else Records(version, {})
    if known.library != version:
        known = Records(version, {})
    records: dict[str, Record] = {}
    try:
        with Judge(TARGETS) as judge:
            for index in range(size):
                made = sample(index)
                old = known.of(made)
                records[made.name] = old or Record.of(made, judge(made.model))
    finally:  # what is done is done
        Records(version, records).save(FILE)


if __name__ == "__main__":
    main()
