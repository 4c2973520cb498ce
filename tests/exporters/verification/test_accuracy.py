"""Accuracy, counted batch by batch, and its confidence interval."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deploycli.exporters.verification.accuracy import Accuracy, AccuracyMeter, Evaluation, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    [
        # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (1 - 0.1611, 1.0)),
    ],
)
def test_wilson_interval_against_published_values(successes: int, trials: int, interval: tuple[float, float]) -> None:
    assert wilson_interval(successes, trials) == pytest.approx(interval, abs=5e-5)


@given(st.integers(1, 10**6), st.data())
def test_wilson_interval_holds_the_share(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1
    assert low < high


def counted(logits: np.ndarray, labels: np.ndarray, size: int = 4) -> Accuracy:
    meter = AccuracyMeter(logits.shape[1])
    for start in range(0, len(labels), size):
        meter.add(logits[start : start + size], labels[start : start + size])
    accuracy = meter.accuracy()
    assert accuracy is not None
    return accuracy


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_top1_and_top5_as_pytorch_ranks(dtype: type, size: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.permuted(np.tile(np.arange(12), (50, 1)), axis=1).astype(dtype)  # no ties
    labels = rng.integers(0, 12, 50)
    top5 = torch.tensor(logits).topk(5).indices == torch.tensor(labels)[:, None]
    accuracy = counted(logits, labels, size)
    assert accuracy == Accuracy(50, int(top5[:, 0].sum()), int(top5.sum()))
    assert (accuracy.top1, accuracy.top5) == (accuracy.top1_correct / 50, int(top5.sum()) / 50)


def test_five_classes_have_no_top5() -> None:
    accuracy = counted(np.eye(5, dtype=np.float32), np.arange(5))
    assert accuracy == Accuracy(5, 5, None)
    assert (accuracy.top5, accuracy.top5_interval) == (None, None)
    assert counted(np.eye(6, dtype=np.float32), np.arange(6)).top5 == 1


def test_of_equal_logits_the_first_stands_before_the_others() -> None:
    accuracy = counted(np.zeros((10, 10), np.float32), np.arange(10))
    assert accuracy == Accuracy(10, 1, 5)


def test_nan_is_wrong() -> None:
    logits = np.eye(6, dtype=np.float32)
    logits[2, 2] = logits[4, 0] = np.nan
    assert counted(logits, np.arange(6)) == Accuracy(6, 4, 4)
    assert counted(np.full((6, 6), np.nan, np.float32), np.arange(6)) == Accuracy(6, 0, 0)
    assert counted(np.where(np.eye(6) == 1, np.inf, -np.inf), np.arange(6)).top1 == 1


def test_a_model_that_fails_is_wrong() -> None:
    meter = AccuracyMeter(6)
    assert meter.accuracy() is None
    meter.add(np.eye(6), np.arange(6))
    meter.add(None, np.arange(3))
    meter.add(np.eye(6)[:2], np.arange(3))
    meter.add(np.eye(6)[:3, :5], np.arange(3))
    assert meter.accuracy() == Accuracy(15, 6, 6)


@pytest.mark.parametrize(
    ("lost", "allowed", "passed"),
    [(0.006, 0.005, False), (0.005, 0.005, True), (-0.1, 0.005, True), (0.9, None, True), (None, None, True)],
)
def test_what_may_be_lost(lost: float | None, allowed: float | None, passed: bool) -> None:
    evaluation = Evaluation("int8.onnx", "int8", "ONNX Runtime", Accuracy(1000, 700, 900), lost, allowed)
    assert (not evaluation.reasons) is passed
    found = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert found["top1"] == 0.7
    assert found["top1_interval"] == pytest.approx([0.6709, 0.7276], abs=1e-4)
    assert found["reasons"] == list(evaluation.reasons)
    if not passed:
        assert "top-1 lost 0.60 points" in found["reasons"][0]
        assert "0.50 points" in found["reasons"][0]


def test_a_loss_of_exactly_the_budget_is_within_it() -> None:
    for samples in range(200, 20_001, 200):
        eager, less = Accuracy(samples, samples // 2, None), Accuracy(samples, samples // 2 - samples // 200, None)
        assert Evaluation("x", "int8", "", less, eager.top1 - less.top1, 0.005).reasons == ()
        worse = Accuracy(samples, less.top1_correct - 1, None)
        assert Evaluation("x", "int8", "", worse, eager.top1 - worse.top1, 0.005).reasons != ()
