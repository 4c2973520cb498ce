"""An accuracy budget: what is returned was evaluated and fits, after few evaluations, and no more goes than must. The
graph with a switch for every group: the same numbers as the graphs that it stands for, bit for bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.exporters.data.samples import Batch
from deploycli.exporters.precision.budget import GatedRuntime, Search, accuracy_of, fit, harm_of
from deploycli.exporters.precision.options import Labelled
from deploycli.exporters.precision.placement import place
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.exporters.verification.accuracy import Accuracy
from deploycli.models.errors import NumericsError, UsageError
from deploycli.models.spec import ModelSpec, TensorSpec
from tests.exporters.precision.networks import FLOAT, HALF, block, graph, normal, proto_of, quantized, ranges, run

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    import onnx_ir as ir


SAMPLES = 1000


class Trial:
    """Evaluations of made-up accuracies, counted."""

    def __init__(self, correct: Callable[[frozenset[str]], int], samples: int = SAMPLES) -> None:
        self.correct = correct
        self.samples = samples
        self.evaluated: dict[frozenset[str], Accuracy] = {}
        self.count = self.ranked = 0

    def evaluate(self, groups: Collection[str]) -> Accuracy:
        self.count += 1
        self.evaluated[frozenset(groups)] = found = Accuracy(self.samples, self.correct(frozenset(groups)), None)
        return found

    def search(self, harm: Mapping[str, float], max_drop: float) -> Search:
        def ranks() -> Mapping[str, float]:
            self.ranked += 1
            return harm

        return fit(tuple(harm), max_drop, evaluate=self.evaluate, harm=ranks)


def assert_sound(search: Search, trial: Trial, harm: Mapping[str, float], max_drop: float) -> None:
    """Whatever is returned was evaluated and fits, and is made of the most harmful."""
    groups = tuple(harm)
    assert set(search.kept) | set(search.reverted) == set(groups)
    assert len(search.kept) + len(search.reverted) == len(groups)
    assert list(search.kept) == [group for group in groups if group in search.kept]
    assert search.kept
    assert trial.evaluated[frozenset(search.kept)] == search.result
    assert trial.evaluated[frozenset()] == search.fp32
    assert trial.evaluated[frozenset(groups)] == search.quantized
    assert (search.fp32.top1_correct - search.result.top1_correct) / SAMPLES <= max_drop + 1e-9
    assert trial.count <= 2 * math.floor(math.log2(len(groups))) + 3
    assert trial.ranked == bool(search.reverted)
    assert all(harm[a] >= harm[b] for a in search.reverted for b in search.kept)
    assert [harm[group] for group in search.reverted] == sorted((harm[g] for g in search.reverted), reverse=True)
    assert search.harm == (harm if search.reverted else {})


HARMS = st.lists(st.integers(0, 50), min_size=1, max_size=70).map(
    lambda costs: {f"g{i}": float(cost) for i, cost in enumerate(costs)}
)


@given(HARMS, st.integers(0, 600))
def test_where_every_group_costs_the_fewest_go(costs: dict[str, float], allowed: int) -> None:
    trial = Trial(lambda groups: max(0, 900 - int(sum(costs[group] for group in groups))))
    max_drop = allowed / SAMPLES
    worst = sorted(costs, key=lambda group: -costs[group])
    lost = [min(900, sum(costs[group] for group in worst[count:])) for count in range(len(worst) + 1)]
    fewest = next(count for count, points in enumerate(lost) if points <= allowed)
    if fewest == len(worst):
        with pytest.raises(NumericsError, match=f"{worst[-1]}, which hurts least of {len(worst)}, alone"):
            trial.search(costs, max_drop)
        return
    search = trial.search(costs, max_drop)
    assert_sound(search, trial, costs, max_drop)
    assert search.reverted == tuple(worst[:fewest])


@given(HARMS, st.integers(0, 600), st.randoms(use_true_random=False))
def test_whatever_the_accuracies_are_what_is_returned_fits(costs: dict[str, float], allowed: int, rng: Any) -> None:
    known: dict[frozenset[str], int] = {frozenset(): 700}

    def correct(groups: frozenset[str]) -> int:
        return known.setdefault(groups, rng.randrange(SAMPLES))

    trial = Trial(correct)
    max_drop = allowed / SAMPLES
    try:
        search = trial.search(costs, max_drop)
    except NumericsError:
        least = min(costs, key=lambda group: (costs[group], -list(costs).index(group)))
        alone = trial.evaluated[frozenset({least})]  # it says so because it was tried
        assert (700 - alone.top1_correct) / SAMPLES > max_drop
        return
    assert_sound(search, trial, costs, max_drop)
    if search.reverted:  # one group more in INT8 was tried, and does not fit
        more = frozenset({*search.kept, search.reverted[-1]})
        assert (700 - trial.evaluated[more].top1_correct) / SAMPLES > max_drop


@given(st.integers(1, 900), st.integers(1, 5))
def test_a_loss_of_exactly_the_budget_fits(tenths: int, thousands: int) -> None:
    """``--max-drop 0.7`` is less than 7 of 1000 by a rounding."""
    samples, lost, max_drop = 1000 * thousands, tenths * thousands, tenths / 10 / 100
    trial = Trial(lambda groups: samples - lost * len(groups), samples)
    assert trial.search({"only": 1.0}, max_drop).kept == ("only",)
    trial = Trial(lambda groups: samples - (lost + 1) * len(groups), samples)
    with pytest.raises(NumericsError):
        trial.search({"only": 1.0}, max_drop)


def test_nothing_is_ranked_where_all_fits() -> None:
    trial = Trial(lambda groups: 900)
    search = trial.search({"a": 1.0, "b": 2.0}, 0.0)
    assert (search.kept, search.reverted, trial.count, trial.ranked) == (("a", "b"), (), 2, 0)


def test_one_ruinous_group_is_found_in_three_evaluations() -> None:
    harm = {f"g{i}": float(i == 17) + i / 1000 for i in range(40)}
    trial = Trial(lambda groups: 900 - 500 * ("g17" in groups))
    search = trial.search(harm, 0.005)
    assert search.reverted == ("g17",)
    assert trial.count == 3
    assert search.to_json() == {
        "fp32": search.fp32.to_json(),
        "quantized": search.quantized.to_json(),
        "result": search.result.to_json(),
        "kept": list(search.kept),
        "reverted": ["g17"],
        "harm": harm,
    }


# The two measurements.


class Counting:
    """Samples 0, 1, 2, ... of class ``i % 3``; some cannot be read."""

    description, random, sha256 = "counted", False, "0" * 64

    def __init__(self, count: int, unreadable: tuple[int, ...] = ()) -> None:
        self.names = tuple(map(str, range(count)))
        self.unreadable = unreadable

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        for first in range(start, len(self.names), size):
            stop = min(first + size, len(self.names))
            kept = np.array([i for i in range(first, stop) if i not in self.unreadable], np.int64)
            yield Batch({"x": kept[:, None].astype(np.float32)}, kept % 3, stop, ())


class Answers:
    """Names the class rightly up to ``limit``; a group in INT8 adds its number to every logit. Notes its batches."""

    name, groups = "answers", {"a": 0.0, "b": 3.0, "c": -1.0}

    def __init__(self, limit: int = 10**6, batch: int | None = None) -> None:
        self.limit, self.batch, self.sizes = limit, batch, list[int]()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        rows = inputs["x"][:, 0].astype(int)
        self.sizes.append(len(rows))
        assert self.batch in (None, len(rows))
        return {"other": rows, "logits": np.eye(3)[(rows + (rows >= self.limit)) % 3]}

    def logits(self, inputs: Mapping[str, Any], groups: Collection[str]) -> Any:
        return self.run(inputs)["logits"] + sum(self.groups[group] for group in groups)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def labelled(count: int, unreadable: tuple[int, ...] = ()) -> Labelled:
    samples = Counting(count, unreadable)
    return Labelled(samples, samples, "logits", 3, ModelSpec("tiny", "tiny", {}, (TensorSpec("x", (3,)),)))


@pytest.mark.parametrize("batch", [None, 1, 4, 5, 100])
def test_accuracy_at_any_batch_size(batch: int | None) -> None:
    runtime = Answers(limit=15, batch=batch)
    steps: list[tuple[str, int, int]] = []
    found = accuracy_of(
        runtime, labelled(20, (3, 4)), batch=batch, label="trying", progress=lambda *step: steps.append(step)
    )
    assert (found.samples, found.top1_correct) == (18, 13)
    starts = range(0, 20, batch or 8)
    assert steps == [("trying", start, 20) for start in starts]


def test_no_readable_sample() -> None:
    with pytest.raises(UsageError, match="none of the labelled samples can be read"):
        accuracy_of(Answers(), labelled(2, (0, 1)), batch=None, label="", progress=lambda *_: None)


@pytest.mark.parametrize("batch", [None, 1, 8])
def test_harm_is_the_movement_of_the_logits(batch: int | None) -> None:
    steps: list[tuple[str, int, int]] = []
    runtime: Any = Answers(batch=batch)
    found = harm_of(
        runtime, ("a", "b", "c"), labelled(20, (7,)), batch=batch, progress=lambda *step: steps.append(step)
    )
    # Of each sample one logit is 1; a group adds its number to all three.
    assert found == pytest.approx({"a": 0, "b": 3 * 9, "c": 3})
    assert {total for _, _, total in steps} == {60}
    assert [done for _, done, _ in steps] == sorted({done for _, done, _ in steps})
    assert all(0 <= done < 60 for _, done, _ in steps)


def test_harm_to_logits_that_are_zero() -> None:
    class Zeros(Answers):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            return {"logits": np.zeros((len(inputs["x"]), 3))}

    runtime: Any = Zeros()
    found = harm_of(runtime, ("a", "b"), labelled(2), batch=None, progress=lambda *_: None)
    assert found["a"] == 0 < found["b"]


X = {"x": normal(3, 8, 32)}
GROUPS = place(block().graph, scheme="full", high_precision=frozenset()).groups


def gated(model: ir.Model, dtype: ir.DataType = FLOAT, **options: Any) -> GatedRuntime:
    placement = place(model.graph, scheme="full", high_precision=frozenset())
    return GatedRuntime(model, placement, ranges(block(), X), scale_type=dtype, output="y", **options)


@pytest.fixture(scope="module")
def runtime() -> Iterator[GatedRuntime]:
    with gated(block(), optimize=False) as runtime:
        yield runtime


def written(groups: tuple[str, ...], dtype: ir.DataType = FLOAT) -> bytes:
    found: bytes = run(quantized(block, X, groups=groups, scale_type=dtype)[0], X)["y"].tobytes()
    return found


def test_all_off_is_the_graph_itself(runtime: GatedRuntime) -> None:
    for batch in (1, 3):
        inputs = {"x": X["x"][:batch]}
        assert runtime.logits(inputs, ()).tobytes() == run(block(), inputs)["y"].tobytes()


def test_all_on_is_the_graph_that_is_written(runtime: GatedRuntime) -> None:
    assert runtime.logits(X, GROUPS).tobytes() == written(GROUPS)
    assert written(GROUPS) != written(())


@pytest.mark.parametrize("group", GROUPS)
def test_one_on_is_the_graph_with_this_one_in_int8(runtime: GatedRuntime, group: str) -> None:
    found = runtime.logits(X, (group,)).tobytes()
    assert found == written((group,))
    assert found != written(())


@settings(max_examples=10, deadline=None)
@given(st.sets(st.sampled_from(GROUPS)))
def test_any_of_them(groups: set[str]) -> None:
    with gated(block(), optimize=False) as runtime:
        assert runtime.logits(X, groups).tobytes() == written(tuple(groups))


def test_scales_of_another_type() -> None:
    with gated(block(), HALF, optimize=False) as runtime:
        assert runtime.logits(X, GROUPS).tobytes() == written(GROUPS, HALF)
    assert written(GROUPS, HALF) != written(GROUPS)


def test_optimised_it_differs_by_rounding(tmp_path: Path) -> None:
    """A sum in another order may move a value to the next level; all levels together make no more than this."""
    (tmp_path / "model.onnx").write_bytes(proto_of(block()).SerializeToString())
    with gated(block()) as fast, OrtRuntime(tmp_path / "model.onnx") as plain:
        truth = plain.run(X)["y"]
        np.testing.assert_allclose(fast.logits(X, ()), truth, atol=1e-5 * np.abs(truth).max())
        exact = run(quantized(block, X)[0], X)["y"]
        np.testing.assert_allclose(fast.logits(X, GROUPS), exact, atol=1e-2 * np.abs(truth).max())


def test_names_that_are_taken() -> None:
    model = graph("(float[b,16] gate_0) => (float[] gated) { n = Relu(gate_0) gated = MatMul(n, w) }", w=normal(16, 16))
    placement = place(model.graph, scheme="gemm", high_precision=frozenset())
    with GatedRuntime(model, placement, {"n": 3.0}, scale_type=FLOAT, output="gated") as runtime:
        inputs = {"gate_0": normal(2, 16)}
        expected = np.maximum(inputs["gate_0"], 0) @ normal(16, 16)
        np.testing.assert_allclose(runtime.logits(inputs, ()), expected, rtol=1e-5, atol=1e-5)
        assert (runtime.logits(inputs, ("MatMul",)) != expected).any()
