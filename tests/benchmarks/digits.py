"""Top-1 of FP32, FP16 and INT8 on scikit-learn's digits, for the trained models of tests/digits: a Markdown table.

python -m tests.benchmarks.digits [--write]

The test pictures are by writers of whom no picture was seen in training or calibration. FP16 is simulated: every FP16
value is rounded. The naive row is onnxruntime.quantization's default for every operator that it can quantise.
"""

import argparse
import tempfile
from pathlib import Path

from deploycli.exporters.verification.accuracy import wilson_interval
from tests.benchmarks.measure import Printed, write_block
from tests.digits import NAMES
from tests.digits.precision import exported, rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    write = parser.parse_args().write
    table = Printed()
    table.line("| model | graph | top-1 | 95 % interval | lost, points | agrees with FP32 |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            fp32 = None
            for row in rows(exported(name, Path(folder)), Path(folder)):
                fp32 = fp32 or row
                low, high = wilson_interval(row.correct, row.samples)
                lost = 100 * (fp32.correct - row.correct) / row.samples
                table.line(
                    f"| {name} | {row.graph} | {row.correct / row.samples:.2%} | {low:.1%} to {high:.1%} "
                    f"| {lost:.2f} | {row.agree / row.samples:.2%} |"
                )
    if write:
        write_block("digits", table)


if __name__ == "__main__":
    main()
