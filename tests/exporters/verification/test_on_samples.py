from __future__ import annotations

import numpy as np
import pytest

from deploycli.exporters.verification.on_samples import LoadedFile, budgets
from tests.exporters.bundle.bundles import model_file


def loaded(batches: tuple[int, int] | None) -> LoadedFile:
    return LoadedFile(model_file("model.onnx", batches=batches), None, *budgets("fp32", {}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batches", "sizes"),
    [(None, [1, 3, 8]), ((1, 8), [1, 3, 8]), ((2, 4), [3]), ((4, 4), [4]), ((16, 32), [16])],
)
def test_sizes(batches: tuple[int, int] | None, sizes: list[int]) -> None:
    assert loaded(batches).sizes((8, 3, 1, 3)) == sizes


@pytest.mark.parametrize("batches", [None, (1, 4), (2, 4), (3, 3), (16, 32), (1, 1)])
@pytest.mark.parametrize("held", [1, 5, 9])
def test_portions(batches: tuple[int, int] | None, held: int) -> None:
    portions = list(loaded(batches).portions(held))
    assert np.concatenate([wanted for wanted, _ in portions]).tolist() == list(range(held))
    low, high = batches or (1, held)
    for wanted, filled in portions:
        assert low <= len(filled) <= high
        assert filled[: len(wanted)].tolist() == wanted.tolist()
        assert set(filled[len(wanted) :].tolist()) <= {held - 1}
