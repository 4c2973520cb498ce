from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from deploycli.exporters.verification.compare import BUDGETS, Budget, Comparison, Judge, Top1, compare

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((8, 10)).astype(np.float32)
FP32 = BUDGETS["fp32"]


def judge_one(candidate: object, reference: np.ndarray = LOGITS, budget: Budget = FP32) -> Comparison:
    (comparison,) = compare({"out": reference}, {"out": np.asarray(candidate)}, budget)
    json.dumps(comparison.to_json(), allow_nan=False)
    assert comparison.passed is comparison.to_json()["passed"] is not bool(comparison.reasons)
    return comparison


def spoiled(index: object, value: float) -> np.ndarray:
    copy = LOGITS.copy()
    copy[index] = value
    return copy


def test_equal_outputs_pass_with_exact_figures() -> None:
    found = judge_one(LOGITS.copy())
    assert found.passed
    assert (found.max_abs_error, found.max_rel_error) == (0, 0)
    assert found.cosine == pytest.approx(1)
    assert found.top1 == Top1(8, 8, 8)


def test_figures_are_those_of_their_definition() -> None:
    reference = np.array([[1.0, 0.0], [0.0, -4.0]])
    candidate = np.array([[1.0, 0.5], [0.0, -4.0]])
    found = judge_one(candidate, reference)
    assert found.max_abs_error == 0.5
    assert found.max_rel_error == 0.125
    assert found.cosine == pytest.approx(1 / np.sqrt(1.25))


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (3 * LOGITS, "relative error"),
        (0 * LOGITS, "constant"),
        (-LOGITS, "relative error"),
        (spoiled((2, 3), np.nan), "1 NaN"),
        (spoiled((2, 3), np.inf), "1 Inf"),
        (spoiled((2, 3), -np.inf), "1 Inf"),
        (spoiled(4, 0.5), "constant over a whole sample"),
        (np.full_like(LOGITS, 0.5), "constant over a whole sample"),
        (np.broadcast_to(LOGITS[:1], LOGITS.shape), "every sample the same values"),
        (LOGITS[::-1], "relative error"),
        (LOGITS[:, ::-1], "relative error"),
        (LOGITS[:7], "shape [7, 10], expected [8, 10]"),
        (LOGITS.T, "shape [10, 8]"),
        (LOGITS[..., None], "shape [8, 10, 1]"),
        (LOGITS[:0], "empty"),
        (LOGITS[:, :0], "empty"),
        (LOGITS[0, 0], "no batch axis"),
        (LOGITS.astype(np.int64), "element type int64"),
        (LOGITS.astype(np.complex64), "complex64"),
        (LOGITS.astype(str), "no number"),
        (LOGITS.astype(object), "no number"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_spoiled_output_fails_in_every_budget(candidate: np.ndarray, reason: str, budget: Budget) -> None:
    found = judge_one(candidate, budget=budget)
    assert not found.passed
    assert any(reason in r for r in found.reasons), found.reasons


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (np.zeros((3, 4)), "the reference is all zero"),
        (np.zeros((3, 1)), "the reference is all zero"),
        (np.full((3, 4), 2.0), "the reference is constant"),
        (np.where(np.eye(3, 4) > 0, np.nan, 1.0), "the reference has NaN or Inf"),
        (np.full((3, 4), np.inf), "the reference has NaN or Inf"),
        (np.zeros((0, 4)), "the reference is empty"),
        (np.float32(1), "the reference has no batch axis"),
    ],
)
def test_agreement_with_a_reference_that_proves_nothing_fails(reference: np.ndarray, reason: str) -> None:
    reasons = judge_one(reference, np.asarray(reference)).reasons
    assert any(reason in r for r in reasons), reasons


def test_nan_is_not_reported_as_zero_or_frozen() -> None:
    reasons = judge_one(np.full_like(LOGITS, np.nan), np.full_like(LOGITS, np.nan)).reasons
    assert len(reasons) == 2
    assert all("NaN" in reason for reason in reasons)


def test_missing_and_extra_outputs_fail_by_name() -> None:
    missing, extra = compare({"a": LOGITS}, {"b": LOGITS}, FP32)
    assert (missing.name, missing.candidate_shape) == ("a", None)
    assert "missing" in missing.reasons[0]
    assert (extra.name, extra.reference_shape) == ("b", None)
    assert "extra" in extra.reasons[0]


def test_swapped_outputs_fail_both() -> None:
    other = RNG.standard_normal(LOGITS.shape)
    assert not any(c.passed for c in compare({"a": LOGITS, "b": other}, {"a": other, "b": LOGITS}, FP32))


def test_nothing_compared_fails() -> None:
    assert [c.passed for c in compare({}, {}, FP32)] == [False]
    assert [c.passed for c in Judge(FP32).verdict()] == [False]


def test_scalar_per_sample_is_judged() -> None:
    reference = np.array([[1.0], [2.0], [3.0]])
    assert judge_one(reference.copy(), reference).passed
    assert not judge_one(np.ones((3, 1)), reference).passed
    assert not judge_one(np.zeros((3, 1)), reference, BUDGETS["int8"]).passed


def test_half_precision_is_the_same_kind() -> None:
    assert judge_one(LOGITS.astype(np.float16), budget=BUDGETS["fp16"]).passed
    assert not judge_one(LOGITS.astype(np.float16)).passed


def test_magnitudes_at_the_ends_of_float64_do_not_pass_as_nan() -> None:
    huge = np.array([[1e308, -1e308], [-1e308, 1e307]])
    assert judge_one(huge, huge).passed
    assert "more than float64" in judge_one(-huge, huge).reasons[0]
    tiny = np.array([[5e-324, 0.0], [0.0, 1e-320]])
    assert judge_one(tiny, tiny).passed
    assert not judge_one(tiny[::-1], tiny).passed
    assert not judge_one(huge, tiny).passed


def test_near_tie_is_not_a_disagreement_but_a_decided_sample_is() -> None:
    reference = np.array([[1.0, 0.99999, 0.0], [1.0, 0.5, 0.0]])
    budget = Budget(1e-4, None, 1.0)
    flipped_tie = judge_one(reference[:, [1, 0, 2]] * [[1], [0]] + reference * [[0], [1]], reference, budget)
    assert flipped_tie.passed
    assert flipped_tie.top1 == Top1(2, 1, 1)
    flipped = judge_one(reference[:, [1, 0, 2]], reference, replace(budget, max_rel_error=0.4))
    assert flipped.top1 == Top1(2, 1, 0)
    assert "top-1 agrees on 0 of 1" in flipped.reasons[-1]


def test_agreement_is_a_share_of_the_decided_samples() -> None:
    reference = np.tile(np.eye(10), (20, 1))
    candidate = reference.copy()
    candidate[:4] = candidate[:4, ::-1]
    found = judge_one(candidate, reference, Budget(10, None, 0.98, tie_margin=0.1))
    assert found.top1 == Top1(200, 200, 196)
    assert found.passed
    assert not judge_one(candidate, reference, Budget(10, None, 0.981, tie_margin=0.1)).passed


def test_agreement_on_a_near_tie_does_not_make_up_for_a_decided_sample() -> None:
    reference = np.array([[1.0, 0.99999, 0.0], [1.0, 0.5, 0.0]])
    candidate = np.array([[1.0, 0.99999, 0.0], [0.5, 1.0, 0.0]])
    found = judge_one(candidate, reference, Budget(10, None, 1.0, tie_margin=0.01))
    assert found.top1 == Top1(2, 1, 0)
    assert not found.passed


def test_direction_is_judged_even_where_error_and_classes_are_in_budget() -> None:
    reference = np.array([[1.0, 0.0, 0.0, 0.0]])
    candidate = np.array([[1.0, 0.2, -0.2, 0.2]])
    found = judge_one(candidate, reference, BUDGETS["int8"])
    assert found.reasons == ("cosine 0.944911 is below 0.99",)


def test_figures_that_were_not_measured_never_pass() -> None:
    blank = Comparison("out", (1, 2), (1, 2), None, None, None, None, BUDGETS["int8"])
    assert len(blank.reasons) == 2
    assert not replace(blank, max_rel_error=float("nan"), cosine=float("nan")).passed


def test_top1_needs_classes() -> None:
    for shape in [(8, 1), (8, 5, 2), (8,)]:
        array = RNG.standard_normal(shape)
        assert judge_one(array, array).top1 is None


def test_batches_give_the_same_verdict_as_one_array() -> None:
    noisy = LOGITS + RNG.normal(0, 0.05, LOGITS.shape).astype(np.float32)
    judge = Judge(BUDGETS["int8"])
    for start in (0, 3, 6):
        judge.add({"out": LOGITS[start : start + 3]}, {"out": noisy[start : start + 3]})
    assert judge.verdict() == (judge_one(noisy, budget=BUDGETS["int8"]),)


def test_a_frozen_output_is_seen_across_batches_of_one() -> None:
    judge = Judge(Budget(100, None, 0))
    for row in LOGITS:
        judge.add({"out": row[None]}, {"out": LOGITS[:1]})
    assert "every sample the same values" in judge.verdict()[0].reasons[0]


def test_output_missing_from_one_batch_fails() -> None:
    judge = Judge(FP32)
    judge.add({"out": LOGITS}, {"out": LOGITS})
    judge.add({"out": LOGITS}, {})
    judge.fail({"out": LOGITS}, "was not computed")
    assert judge.verdict()[0].reasons == ("is missing", "was not computed")


def test_override_applies_to_its_output_only() -> None:
    near = LOGITS * np.float32(1.001)
    loose, strict = compare({"a": LOGITS, "b": LOGITS}, {"a": near, "b": near}, FP32, {"a": Budget(1e-2, None, 1)})
    assert loose.passed
    assert not strict.passed


FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)
OUTPUTS = arrays(np.float64, array_shapes(min_dims=2, max_dims=3, min_side=2, max_side=5), elements=FINITE)


def varied(rows: np.ndarray) -> bool:
    flat = rows.reshape(len(rows), -1)
    return bool((flat != flat[:, :1]).any())


def test_a_sample_that_is_zero_by_right_agrees() -> None:
    hidden = LOGITS.copy()
    hidden[1] = 0  # a mask hid all of it
    assert judge_one(hidden.copy(), hidden, BUDGETS["fp16"]).passed
    assert not judge_one(LOGITS, hidden, BUDGETS["fp16"]).passed
    assert not judge_one(hidden, LOGITS, BUDGETS["fp16"]).passed


@given(OUTPUTS)
def test_equality_passes_exactly_where_a_sample_varies(output: np.ndarray) -> None:
    assert judge_one(output.copy(), output, BUDGETS["fp16"]).passed is varied(output)


@given(OUTPUTS, st.floats(0.02, 10), st.sampled_from([-1, 1]))
def test_scaling_fails(output: np.ndarray, factor: float, sign: int) -> None:
    assume(abs(factor * sign - 1) > 0.02)
    assert not judge_one(factor * sign * output, output, BUDGETS["fp16"]).passed


@given(OUTPUTS, st.randoms(use_true_random=False), st.floats(0, 1e-3))
def test_order_of_the_samples_does_not_matter(output: np.ndarray, random: object, noise: float) -> None:
    order = random.sample(range(len(output)), len(output))  # type: ignore[attr-defined] # random.Random
    candidate = output + noise * np.cos(np.arange(output.size)).reshape(output.shape)
    straight, shuffled = judge_one(candidate, output), judge_one(candidate[order], output[order])
    assert straight.max_abs_error == shuffled.max_abs_error
    assert straight.cosine == pytest.approx(shuffled.cosine)
    assert straight.top1 == shuffled.top1
    assert straight.passed is shuffled.passed


@given(OUTPUTS, st.data())
def test_one_value_that_is_not_finite_fails(output: np.ndarray, data: st.DataObject) -> None:
    candidate = output.copy()
    candidate.flat[data.draw(st.integers(0, output.size - 1))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    for budget in BUDGETS.values():
        assert not judge_one(candidate, output, budget).passed
