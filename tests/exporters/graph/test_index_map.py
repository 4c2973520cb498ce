"""A map says of every element what running the movement on arange says, at batch sizes that it was not made at."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, event, given, note
from hypothesis import strategies as st

from deploycli.exporters.graph import index_map as index_map_module
from deploycli.exporters.graph.index_map import MIXES, MOST_ENTRIES, Digit, IndexMap, Table, concatenate
from deploycli.exporters.graph.movement_ops import NOWHERE
from deploycli.exporters.graph.shapes import BATCH, substitute
from tests.exporters.graph.test_lowerings import map_of, moved
from tests.exporters.passes.graphs import load
from tests.exporters.passes.programs import programs
from tests.exporters.passes.test_properties import examples

if TYPE_CHECKING:
    from numpy.typing import NDArray


def at_batch(index_map: IndexMap, batch: int) -> NDArray[np.int64]:
    """Spell a map out at a batch size."""

    def at(number: Any) -> Any:  # a * BATCH + b, and b is small
        return number + np.round(number / BATCH).astype(np.int64) * (batch - BATCH)

    digits = {d: Digit(substitute(d.size, batch), int(at(np.array(d.stride)))) for axis in index_map.axes for d in axis}
    void = index_map_module._VOID
    tables = tuple(
        Table(tuple(digits[d] for d in t.digits), np.where(t.index == void, void, at(t.index)))
        for t in index_map.tables
    )
    axes = tuple(tuple(digits[d] for d in axis) for axis in index_map.axes)
    return replace(index_map, axes=axes, tables=tables, offset=int(at(np.array(index_map.offset)))).dense()


@examples(100)
@given(programs(pure=True, chain=True))
def test_a_map_says_what_arange_says(plain: onnx.ModelProto) -> None:
    note(onnx.printer.to_text(plain))
    model = load(plain)
    index_map = map_of(model)
    event(index_map if isinstance(index_map, str) else "map")
    assume(not isinstance(index_map, str))
    assert isinstance(index_map, IndexMap)
    for batch in (1, 2, 5):
        assert np.array_equal(at_batch(index_map, batch), moved(model, batch))


# --- the part of NumPy's interface ---

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def numbers(dims: Any) -> NDArray[np.int64]:
    return np.arange(np.prod(dims, dtype=int)).reshape(dims)


@examples(50)
@given(SHAPES, st.data())
def test_any_entries_of_any_axis_are_taken(dims: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(dims), len(dims) - 1))
    shape = data.draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    size = dims[axis]
    entries = st.integers(-size, size - 1)
    indices = np.reshape(data.draw(st.lists(entries, min_size=4, max_size=4))[: int(np.prod(shape))], shape)
    assert np.array_equal(IndexMap.identity(dims).take(indices, axis).dense(), numbers(dims).take(indices, axis))


@examples(50)
@given(SHAPES, st.data())
def test_parts_that_follow_each_other(dims: tuple[int, ...], data: st.DataObject) -> None:
    """Reversed, shifted and empty parts, of which any may agree in some of their axes."""
    axis = data.draw(st.integers(0, len(dims) - 1))
    maps, arrays = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["same", "nowhere", "flipped", "rolled", "turned"]))
        index = numbers(dims)
        other = data.draw(st.integers(0, len(dims) - 1))
        if kind == "nowhere":
            index = np.full(dims, NOWHERE)
        elif kind == "flipped":
            index = np.flip(index, other)
        elif kind == "rolled":
            index = np.roll(index, 1, other)
        elif kind == "turned":
            index = index.reshape(dims[::-1]).transpose()
        maps.append(IndexMap.nowhere(dims) if kind == "nowhere" and maps else IndexMap.of(index, index.size))
        arrays.append(index)
    whole = concatenate(maps, axis)
    assert (whole.source, whole.dense().tolist()) == (index.size, np.concatenate(arrays, axis).tolist())


@examples(50)
@given(SHAPES, st.data())
def test_single_elements_are_read(dims: tuple[int, ...], data: st.DataObject) -> None:
    index_map = IndexMap.identity(dims).transpose()
    place = tuple(data.draw(st.integers(0, size - 1)) for size in dims[::-1])
    assert index_map.at(*place) == numbers(dims).transpose()[place]
    arrays = tuple(np.array(p) for p in place)
    assert index_map[arrays].dense() == numbers(dims).transpose()[place]


def test_equal_maps_have_equal_keys() -> None:
    moved = IndexMap.identity((4, 6)).reshape((2, 2, 6)).transpose(1, 0, 2)
    again = IndexMap.identity((2, 2, 6)).swapaxes(0, 1)
    assert moved.key == again.key
    assert moved.key != again.swapaxes(0, 1).key
    rolled = IndexMap.identity((5, 4)).take(np.array([1, 2, 3, 4, 0]), 0)
    assert rolled.key == rolled.take(np.arange(5), 0).key
    assert rolled.key != rolled.take(np.arange(5)[::-1], 0).key


def test_a_roll_and_its_opposite_leave_no_table() -> None:
    index_map = IndexMap.identity((BATCH, 7, 3)).take(np.roll(np.arange(7), 2), 1)
    assert index_map.strides is None
    assert index_map.take(np.roll(np.arange(7), -2), 1).is_identity


def test_what_a_map_reaches() -> None:
    index_map = IndexMap.coordinate((BATCH, 5, 7), 2)[(slice(None), slice(1, 2), slice(1, 6, 2))]
    assert list(index_map.reached(7)) == [1, 3, 5]  # type: ignore[arg-type]
    assert index_map.reached(2) is None
    assert index_map.line(2).dense().tolist() == [1, 3, 5]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_batch_may_stand_anywhere(axis: int) -> None:
    """It is a digit like any other; nothing of it is ever spelled out."""
    dims = [3, 4]
    dims.insert(axis, BATCH)
    index_map = IndexMap.identity(tuple(dims)).transpose()
    expected = np.arange(24).reshape([2 if d == BATCH else d for d in dims]).transpose()
    assert np.array_equal(at_batch(index_map, 2), expected)


def test_what_would_spell_the_batch_out_is_refused() -> None:
    columns = IndexMap.identity((BATCH, 4)).transpose()  # neighbours are of different samples
    with pytest.raises(ValueError, match=MIXES):
        columns.reshape((2 * BATCH, 2))


def test_only_so_much_is_spelled_out() -> None:
    side = 2 * MOST_ENTRIES
    assert IndexMap.identity((side, side)).transpose().strides == [(side, 1), (side, side)]
    with pytest.raises(ValueError, match="one by one"):
        IndexMap.identity((side, side)).transpose().dense()
