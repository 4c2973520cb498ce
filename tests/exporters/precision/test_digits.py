"""What reduced precision costs trained models, on pictures by writers that neither training nor calibration saw."""

from itertools import islice
from pathlib import Path

import pytest

from tests.digits import NAMES
from tests.digits.precision import exported, rows


@pytest.mark.parametrize("name", NAMES)
def test_reduced_precision_keeps_the_accuracy(name: str, tmp_path: Path) -> None:
    quantized = ("INT8, auto", "INT8, gemm", "FP8, auto", "FP8, auto for Ada")
    found = rows(exported(name, tmp_path), tmp_path, names=quantized)
    fp32, fp16, *eight_bits = islice(found, 2 + len(quantized))
    points = 100 / fp32.samples  # a picture's worth
    assert fp32.samples == 540
    assert fp32.correct >= 0.97 * fp32.samples
    assert points * (fp32.correct - fp16.correct) <= 0.1
    for row in eight_bits:
        assert points * (fp32.correct - row.correct) <= 0.5, row
    assert min(row.agree for row in (fp16, *eight_bits)) >= 0.99 * fp32.samples
    if name == "digits_vit":
        (naive,) = found
        assert naive.agree <= eight_bits[0].agree  # for contrast
