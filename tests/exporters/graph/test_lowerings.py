"""Every form of a map, run with numpy at batch sizes that the map was not made from, reproduces it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from hypothesis import assume, given, note
from hypothesis import strategies as st

from deploycli.exporters.graph.analysis import GROWTH, Analysis
from deploycli.exporters.graph.evaluate import evaluate
from deploycli.exporters.graph.index_map import IndexMap
from deploycli.exporters.graph.lowerings import Lowering, MovementOp, as_indices, find_lowerings, slice_bounds
from deploycli.exporters.graph.movement_ops import MOVEMENT, NOWHERE, move
from deploycli.exporters.graph.regions import RegionMaps, find_regions
from deploycli.exporters.graph.shapes import BATCH, substitute
from deploycli.exporters.passes.fold_movement import split_groups
from tests.exporters.passes.graphs import load
from tests.exporters.passes.programs import B, programs
from tests.exporters.passes.test_properties import examples

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
    following = {source}
    arrays |= {value: value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value}
    for node in model.graph:
        operands = [arrays.get(value) for value in node.inputs]
        moves = node.op_type in MOVEMENT and not following.isdisjoint(node.inputs)
        if node.op_type == "Concat" and moves:  # programs concatenate with zeros only, besides what they move
            values = zip(node.inputs, operands, strict=True)
            operands = [x if value in following else np.full_like(x, NOWHERE, int) for value, x in values]
        following.update(node.outputs if moves else ())
        if node.op_type in MOVEMENT:
            results: Any = move(node, operands, zero=NOWHERE)
        else:
            results = evaluate(node, operands, model.opset_imports, GROWTH)
        arrays.update(zip(node.outputs, results, strict=True))
    return arrays[model.graph.outputs[0]]


def map_of(model: ir.Model) -> IndexMap | str:
    """Return the map of a program of movement, or why it has none."""
    regions = [r for r in find_regions(model.graph, Analysis(model.graph)) if r.source is model.graph.inputs[0]]
    if not regions or model.graph.outputs[0] not in regions[0].sinks:
        return "no region"
    return RegionMaps(Analysis(model.graph))(regions[0])[model.graph.outputs[0]]


def execute(lowering: Lowering, data: Any, batch: int) -> Any:
    """Run a lowering, and check that every move makes the shape that it declares."""
    for step in lowering:
        shape = tuple(substitute(d, batch) for d in step.dims)
        if step.op_type == "Reshape":
            data = data.reshape(shape)
        elif step.op_type == "Transpose":
            data = data.transpose(step.values)
        elif step.op_type == "Gather":
            data = data.take(as_indices(step), step.axis)
        elif step.op_type == "Slice":
            start, end = slice_bounds(step)
            data = data.take(range(start, end), step.axis)
        else:
            data = np.pad(data, [(0, int(i == step.axis)) for i in range(data.ndim)], constant_values=NOWHERE)
        assert data.shape == shape, step
    return data


def wrong_lowerings(plain: onnx.ModelProto, *, batches: tuple[int, ...] = (1, 4)) -> list[Lowering] | None:
    """Return the lowerings of a program's map that do not reproduce it; None where it has no map."""
    model = load(plain)
    source, result = dims_of(model.graph.inputs[0]), dims_of(model.graph.outputs[0])
    index_map = map_of(model)
    if isinstance(index_map, str):
        return None
    found = find_lowerings(index_map, source, result)
    wrong = []
    for batch in batches:
        expected = moved(model, batch)
        shape = [substitute(d, batch) for d in source]
        data = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        wrong += [lowering for lowering in found if not np.array_equal(execute(lowering, data, batch), expected)]
    return wrong


@examples(80)
@given(programs(pure=True, chain=True))
def test_every_plan_reproduces_the_map(plain: onnx.ModelProto) -> None:
    note(onnx.printer.to_text(plain))
    found = wrong_lowerings(plain)
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
    return IndexMap.of(index.reshape(-1), 12)


@examples(60)
@given(maps())
def test_a_strided_reading_says_what_the_map_says(index_map: IndexMap) -> None:
    assume(index_map.strides is not None)
    total = np.zeros((), int) + index_map.offset
    for size, stride in index_map.strides or ():
        total = total[..., None] + np.arange(size) * stride
    assert np.array_equal(total.reshape(-1), index_map.dense())


@examples(60)
@given(maps(), st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_reading_as_rows_says_what_the_map_says(index_map: IndexMap, outer: int, unit: int) -> None:
    rows = index_map.rows(outer, unit)
    assume(rows is not None)
    assert rows is not None
    table = np.where(rows[:, None] == NOWHERE, NOWHERE, rows[:, None] * unit + np.arange(unit)).reshape(-1)
    span = np.arange(outer)[:, None] * (index_map.source // outer)
    assert np.array_equal(np.where(table == NOWHERE, NOWHERE, table + span).reshape(-1), index_map.dense())


@examples(60)
@given(maps())
def test_the_unit_is_the_longest_row(index_map: IndexMap) -> None:
    index = index_map.dense()

    def is_row(u: int) -> bool:
        if index.size % u or index_map.source % u:
            return False
        table = index.reshape(-1, u)
        starts = table[:, 0]
        runs = np.where(starts[:, None] == NOWHERE, NOWHERE, starts[:, None] + np.arange(u))
        return bool(np.array_equal(table, runs) and not (starts[starts != NOWHERE] % u).any())

    assert index_map.unit == max(u for u in range(1, 13) if is_row(u))


def test_slices_that_tile_an_axis_are_one_split() -> None:
    first, second, gap = (MovementOp("Slice", (BATCH, s), 1, (a, s)) for a, s in ((0, 2), (2, 4), (3, 3)))
    assert split_groups({(first,), (second,)}, (BATCH, 6)) == {((), 1): [first, second]}
    assert split_groups({(first,), (gap,)}, (BATCH, 6)) == {}
    assert split_groups({(first,), (second,)}, (BATCH, 7)) == {}
    assert split_groups({(second,)}, (BATCH, 4)) == {}


def test_the_drawing_uses_another_stand_in_than_the_code() -> None:
    assert B != BATCH
