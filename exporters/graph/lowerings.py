"""The operators that an index map can be lowered to, and what each lowering costs.

- identity: a Reshape, or nothing;
- strided view: Reshape, Slice or scalar Gather, Transpose, Reshape, each only where needed;
- rows: one Gather of whole rows on one axis, with a zero row appended where a row comes from nowhere.

A map that has none of these lowerings is left as it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np

from deploycli.exporters.graph.analysis import dynamic_axes, reshape_target
from deploycli.exporters.graph.movement_ops import NOWHERE
from deploycli.exporters.graph.shapes import BATCH, elements

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from deploycli.exporters.graph.index_map import IndexMap
    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.shapes import Dims

LAUNCH = 256 * 1024
"""Cost of one operator that copies, in bytes: a kernel launch ops about as much in its time."""

VIEW = 8 * 1024
"""Cost of one Reshape, in bytes: it copies nothing, but it is a node."""

OPAQUE = 2
"""Weight of the bytes of a Gather: a compiler reads a transposed operand in place, a gathered one it copies."""

MOST_ROWS = 2**16
"""A Gather of more rows than this is not considered: where rows are many, they are short, and their index is long."""

MOST_AXES = 6
"""A Transpose of more axes is not considered: kernels for many are slow, and TensorRT ends at 8."""

CACHE_LINE = 64
"""Rows shorter than this, in bytes, are gathered at the price of a whole line."""


@dataclass(frozen=True)
class MovementOp:
    """One operator of a lowering.

    Attributes:
        op_type: operator type.
        dims: shape of its result.
        axis: axis of a Gather, Slice, Split or Pad.
        values: permutation of a Transpose; ``(start, size)`` of a Slice.
        indices: indices of a Gather, flat, as the bytes of int64: quick to compare, however many there are.
        shape: shape of the Gather's indices.
        row: elements in a gathered row, of one sample.
    """

    op_type: Literal["Reshape", "Transpose", "Slice", "Gather", "Pad"]
    dims: Dims
    axis: int = 0
    values: tuple[int, ...] = ()
    indices: bytes = b""
    shape: tuple[int, ...] = ()
    row: int = 1

    @property
    def is_row_gather(self) -> bool:
        """A Gather of several rows; one of a single index is a strided view."""
        return self.op_type == "Gather" and self.shape != ()

    def cost(self, itemsize: int) -> int:
        """Return the cost in bytes, for one sample of a batch."""
        if self.op_type == "Reshape":
            return VIEW
        moved = elements(self.dims) * itemsize
        if self.is_row_gather:
            moved *= OPAQUE + CACHE_LINE // (self.row * itemsize)
        return LAUNCH + moved


Lowering = tuple[MovementOp, ...]


def find_lowerings(index_map: IndexMap, source: Dims, result: Dims) -> list[Lowering]:
    """Return every lowering that the map can be written in, from a source shape to a result shape."""
    if index_map.is_identity:
        return find_view_lowerings(index_map, source, result)
    return [*find_view_lowerings(index_map, source, result), *_written(_row_lowerings(index_map, source, result))]


def find_view_lowerings(index_map: IndexMap, source: Dims, result: Dims) -> list[Lowering]:
    """Return those of the lowerings that gather no rows."""
    if index_map.is_identity:
        return _written([_reshape(source, result)])
    return _written(_strided_lowerings(index_map, source, result))


def _written(lowerings: Iterable[Lowering]) -> list[Lowering]:
    """Leave out the lowerings with a shape that no Reshape can be told."""
    return [
        lowering
        for lowering in lowerings
        if all(reshape_target(m.dims) is not None for m in lowering if m.op_type == "Reshape")
    ]


def _reshape(source: Dims, result: Dims) -> Lowering:
    return () if source == result else (MovementOp("Reshape", result),)


# --- strided views ---------------------------------------------------------------------------------------------------

Digits = list[tuple[int, int]]


def _strided_lowerings(index_map: IndexMap, source: Dims, result: Dims) -> Iterator[Lowering]:
    digits, total = index_map.strides, index_map.source
    if digits is None or any(stride <= 0 for _, stride in digits):
        return
    # Finer digits may fit the shapes that are there already and so save a Reshape.
    for by_source, by_result in product((False, True), repeat=2):
        refined = _split_at_result(digits, _strides(result)) if by_result else digits
        refined = _split_at_source(refined, _strides(source)) if by_source else refined
        lowering = _strided_lowering(index_map.offset, refined, total, source, result)
        if lowering is not None and all(len(m.dims) <= MOST_AXES for m in lowering if m.op_type == "Transpose"):
            yield lowering


def _strides(dims: Dims) -> list[int]:
    return [math.prod(dims[i + 1 :]) for i in range(len(dims))]


def _split_at_source(digits: Digits, cuts: Iterable[int]) -> Digits:
    """Split the digits that span several source axes."""
    refined: Digits = []
    for digit in digits:
        parts = [digit]
        for cut in sorted(set(cuts), reverse=True):
            size, stride = parts[-1]
            if stride < cut < size * stride and cut % stride == 0 and (size * stride) % cut == 0:
                parts[-1:] = [(size * stride // cut, cut), (cut // stride, stride)]
        refined.extend(parts)
    return refined


def _split_at_result(digits: Digits, cuts: Iterable[int]) -> Digits:
    """Split the digits that span several result axes."""
    refined: Digits = []
    below = 1
    for size, stride in reversed(digits):
        parts = [(size, stride)]
        for cut in sorted(set(cuts), reverse=True):
            size, stride = parts[-1]
            if below < cut < size * below and cut % below == 0 and (size * below) % cut == 0:
                inner = cut // below
                parts[-1:] = [(size // inner, stride * inner), (inner, stride)]
        refined[:0] = parts
        below *= math.prod(size for size, _ in parts)
    return refined


def _strided_lowering(offset: int, digits: Digits, total: int, source: Dims, result: Dims) -> Lowering | None:
    """Write digits as Reshape, Slice or Gather, Transpose, Reshape; None where the source has no such axes."""
    by_stride = sorted(digits, key=lambda d: -d[1])
    axes, starts, above = list[int](), list[int](), total
    for size, stride in by_stride:
        if stride >= above or above % stride:
            return None  # two digits overlap
        axes.append(above // stride)
        starts.append(offset // stride % axes[-1])
        if starts[-1] + size > axes[-1]:
            return None
        above = stride
    if above > 1:  # one element of those below the last digit
        axes.append(above)
        starts.append(offset % above)
    sizes = [size for size, _ in by_stride] + [1] * (len(axes) - len(by_stride))
    order = [by_stride.index(d) for d in digits] + list(range(len(digits), len(axes)))

    ops: list[MovementOp] = []
    dims: Dims = tuple(axes)
    if [d for d in dims if d != 1] == [d for d in source if d != 1]:
        dims, sizes, starts, order = _with_unit_axes(source, sizes, starts, order)
    elif dims != source:
        ops.append(MovementOp("Reshape", dims))
    cut = [i for i, size in enumerate(sizes) if size != dims[i]]
    if dynamic_axes(tuple(dims[i] for i in cut)):
        return None  # how much is cut off would be a number of samples
    if len(cut) == 1 and sizes[cut[0]] == 1:
        axis = cut[0]
        dims = dims[:axis] + dims[axis + 1 :]
        ops.append(MovementOp("Gather", dims, axis, indices=np.int64(starts[axis]).tobytes()))
        order = [i - (i > axis) for i in order if i != axis]
    else:
        for axis in cut:
            dims = (*dims[:axis], sizes[axis], *dims[axis + 1 :])
            ops.append(MovementOp("Slice", dims, axis, (starts[axis], sizes[axis])))
    moved = [i for i in order if dims[i] != 1]
    if moved != sorted(moved):
        dims = tuple(dims[i] for i in order)
        ops.append(MovementOp("Transpose", dims, values=tuple(order)))
    return (*ops, *_reshape(dims, result))


def _with_unit_axes(
    source: Dims, sizes: list[int], starts: list[int], order: list[int]
) -> tuple[Dims, list[int], list[int], list[int]]:
    """Insert the source's axes of size 1, so that it needs no Reshape. They keep their place in the order."""
    places = [i for i, dim in enumerate(source) if dim != 1]
    all_sizes, all_starts = [1] * len(source), [0] * len(source)
    for i, place in enumerate(places):
        all_sizes[place], all_starts[place] = sizes[i], starts[i]
    rest = iter([places[i] for i in order])
    return source, all_sizes, all_starts, [next(rest) if dim != 1 else i for i, dim in enumerate(source)]


# --- rows ------------------------------------------------------------------------------------------------------------


def _row_lowerings(index_map: IndexMap, source: Dims, result: Dims) -> Iterator[Lowering]:
    """Write the map as one Gather on one axis, with every division into outer x rows x unit that the shapes suggest."""
    batch = BATCH if dynamic_axes(source) else 1
    divisions = {(batch, index_map.unit)}
    for dims in (source, result):
        strides, outers = _strides(dims), [math.prod(dims[:i]) for i in range(len(dims))]
        # Rows as long as can be, or else an axis that is there already.
        divisions |= {(outer, index_map.unit) for outer in outers}
        divisions |= {(outer, stride) for i, stride in enumerate(strides) for outer in outers[: i + 1]}
    for leading, unit in sorted(divisions):
        if math.prod(result) <= leading * unit * MOST_ROWS:
            rows = index_map.rows(leading, unit)
            if rows is not None:
                yield from _row_lowering(index_map, leading, unit, rows, source, result)


def _row_lowering(
    index_map: IndexMap, leading: int, unit: int, rows: Array, source: Dims, result: Dims
) -> Iterator[Lowering]:
    source_rows = index_map.source // (leading * unit)
    indices = np.where(rows == NOWHERE, source_rows, rows).astype(np.int64).tobytes()
    pads = NOWHERE in rows
    for view in dict.fromkeys(_row_views(leading, source_rows, unit, source, result)):
        axis = _axis_of(view, source_rows, unit)
        if axis is None:
            continue
        ops, dims = list(_reshape(source, view)), view
        if pads:
            dims = (*view[:axis], source_rows + 1, *view[axis + 1 :])
            ops.append(MovementOp("Pad", dims, axis))
        shape = _index_shape(dims, axis, rows.size, result)
        dims = (*dims[:axis], *shape, *dims[axis + 1 :])
        ops.append(MovementOp("Gather", dims, axis, indices=indices, shape=shape, row=elements((unit,))))
        yield (*ops, *_reshape(dims, result))


def _row_views(leading: int, rows: int, unit: int, source: Dims, result: Dims) -> Iterator[Dims]:
    """Yield shapes of the source that have the rows on an axis: its own, one that suits the result, the plain one."""
    yield source
    strides = _strides(result)
    for i, stride in enumerate(strides):
        if stride == unit:  # [*outer axes of the result, rows, *inner axes of the result]
            head = next((j for j in range(i + 1) if math.prod(result[:j]) == leading), None)
            if head is not None:
                yield (*result[:head], rows, *result[i + 1 :])
    yield tuple(d for d in (leading, rows, unit) if d != 1 or d == rows)


def _axis_of(view: Dims, rows: int, unit: int) -> int | None:
    return next((i for i, s in enumerate(_strides(view)) if s == unit and view[i] == rows), None)


def _index_shape(view: Dims, axis: int, count: int, result: Dims) -> tuple[int, ...]:
    """Shape the indices so that the Gather gives the result's shape at once, where that is possible."""
    head, tail = view[:axis], view[axis + 1 :]
    middle = result[len(head) : len(result) - len(tail)]
    if (*head, *middle, *tail) == result and math.prod(middle) == count and len(head) + len(tail) <= len(result):
        return middle
    return (count,)


def slice_bounds(op: MovementOp) -> tuple[int, int]:
    """Return start and end of a Slice."""
    start, size = op.values
    return start, start + size


def as_indices(op: MovementOp) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return the indices of a Gather; a scalar reops the axis."""
    return np.frombuffer(op.indices, np.int64).reshape(op.shape)
