"""The check at the end of an export: a file that disagrees with the model, and a model that disagrees with itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploycli.exporters.bundle.golden import load_golden
from deploycli.exporters.export import ExportOptions, _check, _exact
from deploycli.exporters.runtime.runtimes import EagerRuntime
from deploycli.models.build import build
from deploycli.models.describe import describe
from deploycli.models.errors import ExportError
from deploycli.models.sources import Source
from deploycli.models.spec import ModelSpec, TensorSpec
from tests.exporters.bundle.bundles import make

if TYPE_CHECKING:
    from pathlib import Path

Arrays = dict[str, Any]

SPEC = ModelSpec("linear", "linear", {}, (TensorSpec("images", (3, 4, 4)),))
"""Of a model that ends in logits: its outputs are compared as they are."""


@pytest.fixture
def linear(tmp_path: Path) -> tuple[Path, Arrays, Arrays]:
    """A file, inputs, and what it answers."""
    bundle = make(tmp_path)
    inputs, outputs = load_golden(bundle.golden)
    return bundle.path / "model.onnx", dict(inputs), dict(outputs)


def moved(arrays: Arrays, share: float) -> Arrays:
    """Answers that are off by a share of the largest one."""
    return {name: (value + share * np.abs(value).max()).astype(np.float32) for name, value in arrays.items()}


def test_a_file_within_the_budget_is_all_right(linear: tuple[Path, Arrays, Arrays]) -> None:
    path, inputs, outputs = linear
    assert _check(path, SPEC, inputs, moved(outputs, 5e-5), lambda: pytest.fail("asked for nothing")) == ""


@pytest.mark.parametrize(
    ("eager", "exact", "accepted"),
    [
        (3e-4, 0.0, True),  # the file has the exact answers, PyTorch has not
        (3e-4, 1e-4, True),  # both are off, the file less
        (1.5e-4, -0.4e-4, True),  # the file is within the budget of the exact ones
        (3e-4, 3e-4, False),  # it is the file that is off
        (3e-4, 2.7e-4, False),  # PyTorch is off as well, but the file far more
        (0.5, 0.3, False),  # neither answers anything
    ],
)
def test_the_exact_answers_decide_who_is_wrong(
    eager: float, exact: float, accepted: bool, linear: tuple[Path, Arrays, Arrays]
) -> None:
    path, inputs, outputs = linear
    truth, best = moved(outputs, eager), moved(outputs, exact)
    if accepted:
        assert "with these weights float32 is inexact" in _check(path, SPEC, inputs, truth, lambda: best)
        return
    with pytest.raises(ExportError, match="the exported graph disagrees with the model"):
        _check(path, SPEC, inputs, truth, lambda: best)


def test_a_model_that_has_no_exact_answers(linear: tuple[Path, Arrays, Arrays]) -> None:
    path, inputs, outputs = linear
    with pytest.raises(ExportError, match="the exported graph disagrees"):
        _check(path, SPEC, inputs, moved(outputs, 3e-4), lambda: None)


def test_the_exact_answers_are_the_models_in_double(tmp_path: Path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n"
        "def net():\n    return nn.Linear(8, 4)\n\n"
        "class Single(nn.Linear):\n    def __init__(self):\n        super().__init__(8, 4)\n"
        "    def forward(self, x):\n        return super().forward(x.float())\n"
    )
    feed = {"x": np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)}
    for name in ("net", "Single"):
        variant = describe(Source("factory", f"{file}:{name}"), {}, inputs=(TensorSpec("x", (8,)),))
        request = ExportOptions(f"{file}:{name}", tmp_path)
        found = _exact(request, variant, feed)
        if name == "Single":
            assert found is None
            continue
        with EagerRuntime(build(variant.spec), ["x"], variant.spec.outputs) as eager:
            expected = eager.run(feed)["logits"]
        assert found is not None
        assert found["logits"].dtype == np.float64
        np.testing.assert_allclose(found["logits"], expected, rtol=1e-5, atol=1e-6)
