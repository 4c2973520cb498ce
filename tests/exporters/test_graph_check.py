"""What is a difference, and what is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from deploycli.exporters.graph_check import check_graphs
from deploycli.models.errors import NumericsError, UsageError
from tests.exporters.passes.graphs import parse

if TYPE_CHECKING:
    from pathlib import Path

NAN, INF = float("nan"), float("inf")


def constant(values: Any, folder: Path, name: str) -> Path:
    """A graph that answers with these values, whatever its input is."""
    array = np.asarray(values)
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    info = [onnx.helper.make_tensor_value_info("y", kind, array.shape)]
    x = [onnx.helper.make_tensor_value_info("x", 1, ["batch"])]
    node = onnx.helper.make_node("Identity", ["c"], ["y"])
    graph = onnx.helper.make_graph([node], "g", x, info, [onnx.numpy_helper.from_array(array, "c")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("left", "right", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, -4.0], [1.0, -4.0002], 5e-5),
        ([0.0, 0.0], [0.0, -0.0], 0.0),
        ([NAN, INF, 1.0], [NAN, INF, 1.0], 0.0),
        ([1, 2], [1, 2], 0.0),
        ([True], [True], 0.0),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), 0.0),
    ],
)
def test_what_agrees(tmp_path: Path, left: Any, right: Any, error: float) -> None:
    check = check_graphs(constant(left, tmp_path, "a.onnx"), constant(right, tmp_path, "b.onnx"), samples=2)
    (output,) = check.outputs
    assert output.max_rel_error == pytest.approx(error, rel=1e-3)
    assert output.identical == (np.asarray(left).tobytes() == np.asarray(right).tobytes())
    assert bool(output.vacuous) == (not np.asarray(left).size or not np.asarray(left).any())


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ([1.0, -4.0], [1.0, -4.001], "relative error 0.00025 exceeds 0.0001"),
        ([0.0, 0.0], [0.0, 1e-30], "relative error inf"),
        ([NAN, 1.0], [1.0, NAN], "NaN or infinity in other places"),
        ([INF, 1.0], [-INF, 1.0], "NaN or infinity in other places"),
        ([1, 2, 3], [1, 2, 4], "1 of 3 values differ"),
        ([True, False], [True, True], "1 of 2 values differ"),
        ([1.0], [1], "int64"),
        ([[1.0]], [1.0], "instead of float64"),
    ],
)
def test_what_differs(tmp_path: Path, left: Any, right: Any, message: str) -> None:
    with pytest.raises(NumericsError, match=message):
        check_graphs(constant(left, tmp_path, "a.onnx"), constant(right, tmp_path, "b.onnx"), samples=1)


def test_the_budget_is_that_of_the_arithmetic(tmp_path: Path) -> None:
    one, other = constant([1.0, 2.0], tmp_path, "a.onnx"), constant([1.0, 2.01], tmp_path, "b.onnx")
    assert check_graphs(one, other, samples=1, budget="fp16").budget == "fp16"
    with pytest.raises(NumericsError):
        check_graphs(one, other, samples=1, budget="fp32")


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def test_a_difference_at_one_batch_size_only_is_found(tmp_path: Path) -> None:
    """The first sample for every sample: at batch 1 there is no other."""
    text = "g (float[batch, 4] x) => (float[batch, 4] y) { y = Add (x, c) }"
    frozen = "g (float[batch, 4] x) => (float[batch, 4] y) { f = Gather (x, i) y = Expand (f, s) s = Shape (x) }"
    one = saved(parse(text, c=np.zeros(1, np.float32)), tmp_path / "a.onnx")
    other = parse(frozen.replace("y = Expand (f, s) s = Shape (x)", "s = Shape (x) y = Expand (f, s)"), i=[0])
    with pytest.raises(NumericsError, match="output y: relative error"):
        check_graphs(one, saved(other, tmp_path / "b.onnx"), samples=1)


def test_a_candidate_that_does_not_run(tmp_path: Path) -> None:
    one = saved(parse("g (float[batch, 4] x) => (float[n, 4] y) { y = Neg (x) }"), tmp_path / "a.onnx")
    other = parse("g (float[batch, 4] x) => (float[n, 4] y) { y = Reshape (x, s) }", s=[7, 4])
    with pytest.raises(NumericsError, match="the optimized graph does not run, the original does"):
        check_graphs(one, saved(other, tmp_path / "b.onnx"), samples=1)


def test_two_sizes_for_one_axis(tmp_path: Path) -> None:
    text = "g (float[n] x, float[n] y) => (float[n] z) { z = Add (x, y) }"
    path = saved(parse(text), tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="--shape makes the axis n both 3 and 4"):
        check_graphs(path, path, samples=1, shapes={"x": (3,), "y": (4,)})


def test_inputs_are_the_same_for_the_same_seed_only(tmp_path: Path) -> None:
    """The error depends on the numbers drawn."""
    text = "g (float[batch, 64] x) => (float[batch, 64] y) { y = Min (x, c) }"
    one = saved(parse(text, c=np.float32([100])), tmp_path / "a.onnx")
    other = saved(parse(text, c=np.float32([1])), tmp_path / "b.onnx")

    def seen(seed: int) -> str:
        with pytest.raises(NumericsError) as raised:
            check_graphs(one, other, samples=1, seed=seed)
        return raised.value.found

    assert seen(0) == seen(0)
    assert seen(0) != seen(1)


# --- rounding --------------------------------------------------------------------------------------------------------


def steep(operator: str, factors: list[float], path: Path) -> Path:
    """A function of a large multiple of its input: the input's last place is a visible part of a turn."""
    rest = " ".join(f"x{i + 1} = Mul (x{i}, f{i})" for i in range(len(factors)))
    text = f"g (float[batch, 64] x0) => (float[batch, 64] y) {{ {rest} y = {operator} (x{len(factors)}) }}"
    onnx.save(parse(text, **{f"f{i}": np.float32(factor) for i, factor in enumerate(factors)}), path)
    return path


def test_rounding_that_a_graph_amplifies_is_no_difference(tmp_path: Path) -> None:
    reference = steep("Sin", [37.0, 1013.0], tmp_path / "a.onnx")
    check = check_graphs(reference, steep("Sin", [37.0 * 1013.0], tmp_path / "b.onnx"), samples=3)
    (output,) = check.outputs
    assert 1e-4 < output.max_rel_error < 4 * output.own_error < 0.1
    for operator, factor in (("Cos", 37.0 * 1013.0), ("Sin", 37.0 * 1013.01)):
        with pytest.raises(NumericsError, match=r"the original's own by 0\.0"):
            check_graphs(reference, steep(operator, [factor], tmp_path / "c.onnx"), samples=3)


def test_noise_is_no_answer(tmp_path: Path) -> None:
    reference = steep("Sin", [1013.0, 1013.0], tmp_path / "a.onnx")
    with pytest.raises(NumericsError, match=r"the original's own by 0\.[1-9]"):
        check_graphs(reference, steep("Sin", [1013.0 * 1013.0], tmp_path / "b.onnx"), samples=3)


def test_a_reference_that_does_not_amplify_excuses_nothing(tmp_path: Path) -> None:
    reference = steep("Relu", [1000.0], tmp_path / "a.onnx")
    with pytest.raises(NumericsError, match="relative error"):
        check_graphs(reference, steep("Relu", [1000.5], tmp_path / "b.onnx"), samples=2)


def test_within_the_budget_nothing_is_measured(tmp_path: Path) -> None:
    path = steep("Relu", [1000.0], tmp_path / "a.onnx")
    assert [output.own_error for output in check_graphs(path, path, samples=1).outputs] == [0.0]
