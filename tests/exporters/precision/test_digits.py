"""What reduced precision costs trained models, on pictures by writers that neither training nor calibration saw."""

from itertools import islice
from pathlib import Path

import pytest

from tests.digits import NAMES
from tests.digits.precision import exported, rows


@pytest.mark.parametrize("name", NAMES)
def test_reduced_precision_keeps_the_accuracy(name: str, tmp_path: Path) -> None:
    found = rows(exported(name, tmp_path), tmp_path, schemes=("gemm",))
    fp32, fp16, int8 = islice(found, 3)
    points = 100 / fp32.samples  # a picture's worth
    assert fp32.samples == 540
    assert fp32.correct >= 0.97 * fp32.samples
    assert points * (fp32.correct - fp16.correct) <= 0.1
    assert points * (fp32.correct - int8.correct) <= 0.5
    assert min(fp16.agree, int8.agree) >= 0.99 * fp32.samples
    if name == "digits_vit":
        (naive,) = found
        assert naive.agree <= int8.agree  # for contrast
