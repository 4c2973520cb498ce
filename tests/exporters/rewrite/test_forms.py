"""Every form of a map, run with numpy at batch sizes that the map was not made from, reproduces it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, note
from hypothesis import strategies as st

from exporters.rewrite.affine import BATCH
from exporters.rewrite.evaluate import evaluate
from exporters.rewrite.facts import substitute
from exporters.rewrite.forms import Move, Plan, as_indices, plans, slice_bounds
from exporters.rewrite.index_map import RUNS, IndexMap, per_sample
from exporters.rewrite.movement_ops import MOVEMENT, NOWHERE, move
from exporters.rewrite.splits import split_groups
from tests.exporters.rewrite.graphs import load
from tests.exporters.rewrite.programs import B, programs
from tests.exporters.rewrite.test_properties import examples

if TYPE_CHECKING:
    import onnx_ir as ir


def dims_of(value: ir.Value) -> tuple[int, ...]:
    """Read the declared shape of a program's value, ``6*batch`` or a number."""
    assert value.shape is not None
    texts = [str(dim) for dim in value.shape]
    return tuple(int(t) if t.isdigit() else int(t.removesuffix("batch").rstrip("*") or 1) * BATCH for t in texts)


def moved(model: ir.Model, batch: int) -> Any:
    """Run a program of movement on arange."""
    (source,) = model.graph.inputs
    shape = [substitute(d, batch) for d in dims_of(source)]
    arrays: dict[Any, Any] = {source: np.arange(np.prod(shape, dtype=int)).reshape(shape)}
    arrays |= {value: value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value}
    for node in model.graph:
        operands = [arrays.get(value) for value in node.inputs]
        if node.op_type == "Concat":  # programs concatenate with zeros only, besides what they move
            operands = [np.full_like(x, NOWHERE, int) if x is not None and x.dtype.kind == "f" else x for x in operands]
        if node.op_type in MOVEMENT:
            results: Any = move(node, operands, zero=NOWHERE)
        else:
            results = evaluate(node, operands, model.opset_imports)
        arrays.update(zip(node.outputs, results, strict=True))
    return arrays[model.graph.outputs[0]]


def execute(plan: Plan, data: Any, batch: int) -> Any:
    """Run a plan, and check that every move makes the shape that it declares."""
    for step in plan:
        shape = tuple(substitute(d, batch) for d in step.dims)
        if step.op == "Reshape":
            data = data.reshape(shape)
        elif step.op == "Transpose":
            data = data.transpose(step.values)
        elif step.op == "Gather":
            data = data.take(as_indices(step), step.axis)
        elif step.op == "Slice":
            start, end = slice_bounds(step)
            data = data.take(range(start, end), step.axis)
        else:
            data = np.pad(data, [(0, int(i == step.axis)) for i in range(data.ndim)], constant_values=NOWHERE)
        assert data.shape == shape, step
    return data


def wrong_plans(plain: onnx.ModelProto, *, batches: tuple[int, ...] = (1, 4)) -> list[Plan] | None:
    """Return the plans of a program's map that do not reproduce it; None where it has no map."""
    model = load(plain)
    source, result = dims_of(model.graph.inputs[0]), dims_of(model.graph.outputs[0])
    index_map = per_sample([moved(model, batch) for batch in RUNS], source, result)
    if isinstance(index_map, str):
        return None
    found = plans(index_map, source, result)
    wrong = []
    for batch in batches:
        expected = moved(model, batch)
        shape = [substitute(d, batch) for d in source]
        data = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        wrong += [plan for plan in found if not np.array_equal(execute(plan, data, batch), expected)]
    return wrong


@examples(300)
@given(programs(pure=True, chain=True))
def test_every_plan_reproduces_the_map(plain: onnx.ModelProto) -> None:
    note(onnx.printer.to_text(plain))
    found = wrong_plans(plain)
    assume(found is not None)
    assert found == []


INDICES = st.lists(st.integers(-1, 11), min_size=1, max_size=12)


@st.composite
def maps(draw: Any) -> IndexMap:
    """Arbitrary maps, and ones with the structure that the methods look for."""
    kind = draw(st.sampled_from(["any", "rows", "strided"]))
    if kind == "any":
        index = np.array(draw(INDICES))
    elif kind == "rows":
        unit = draw(st.sampled_from([1, 2, 3, 4, 6]))
        picked = np.array(draw(st.lists(st.integers(-1, 12 // unit - 1), min_size=1, max_size=6)))
        index = np.where(picked[:, None] == NOWHERE, NOWHERE, picked[:, None] * unit + np.arange(unit))
    else:
        index = np.array(draw(st.integers(0, 11)))
        for size, stride in draw(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=3)):
            index = index[..., None] + np.arange(size) * stride
        index = index % 12
    return IndexMap(index.reshape(-1), 12, 1)


@examples(150)
@given(maps())
def test_a_strided_reading_says_what_the_map_says(index_map: IndexMap) -> None:
    read = index_map.digits()
    assume(read is not None)
    assert read is not None
    offset, digits = read
    total = np.zeros((), int) + offset
    for size, stride in digits:
        total = total[..., None] + np.arange(size) * stride
    assert np.array_equal(total.reshape(-1), index_map.index)


@examples(150)
@given(maps(), st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_reading_as_rows_says_what_the_map_says(index_map: IndexMap, outer: int, unit: int) -> None:
    rows = index_map.rows(outer, unit)
    assume(rows is not None)
    assert rows is not None
    table = np.where(rows[:, None] == NOWHERE, NOWHERE, rows[:, None] * unit + np.arange(unit)).reshape(-1)
    span = np.arange(outer)[:, None] * (index_map.source // outer)
    assert np.array_equal(np.where(table == NOWHERE, NOWHERE, table + span).reshape(-1), index_map.index)


@examples(150)
@given(maps())
def test_the_unit_is_the_longest_row(index_map: IndexMap) -> None:
    def is_row(u: int) -> bool:
        if index_map.index.size % u or index_map.source % u:
            return False
        table = index_map.index.reshape(-1, u)
        starts = table[:, 0]
        runs = np.where(starts[:, None] == NOWHERE, NOWHERE, starts[:, None] + np.arange(u))
        return bool(np.array_equal(table, runs) and not (starts[starts != NOWHERE] % u).any())

    assert index_map.unit == max(u for u in range(1, 13) if is_row(u))


def test_a_proof_needs_both_runs() -> None:
    """The same at batch 2, another at batch 3."""
    two, three = np.arange(8).reshape(2, 4), np.arange(12).reshape(3, 4)
    assert isinstance(per_sample([two, three], (BATCH, 4), (BATCH, 4)), IndexMap)
    assert isinstance(per_sample([two, three[::-1]], (BATCH, 4), (BATCH, 4)), str)
    assert isinstance(per_sample([two[::-1], three], (BATCH, 4), (BATCH, 4)), str)


@pytest.mark.parametrize(
    ("source", "result", "reason"),
    [
        ((BATCH, 0), (BATCH, 0), "holds no elements"),
        ((BATCH, 4, BATCH), (BATCH, 4), "grows with the batch on two axes"),
        ((BATCH, 4), (4,), "reads one sample of the batch"),
        ((4,), (BATCH, 4), "depends on the batch size, but its source does not"),
    ],
)
def test_what_has_no_map_says_why(source: tuple[int, ...], result: tuple[int, ...], reason: str) -> None:
    runs = [np.zeros([substitute(d, batch) for d in result], int) for batch in RUNS]
    assert per_sample(runs, source, result) == reason


def test_slices_that_tile_an_axis_are_one_split() -> None:
    first, second, gap = (Move("Slice", (BATCH, s), 1, (a, s)) for a, s in ((0, 2), (2, 4), (3, 3)))
    assert split_groups({(first,), (second,)}, (BATCH, 6)) == {((), 1): [first, second]}
    assert split_groups({(first,), (gap,)}, (BATCH, 6)) == {}
    assert split_groups({(first,), (second,)}, (BATCH, 7)) == {}
    assert split_groups({(second,)}, (BATCH, 4)) == {}


def test_the_drawing_uses_another_stand_in_than_the_code() -> None:
    assert B != BATCH
