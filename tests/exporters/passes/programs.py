"""Random programs of data movement, for properties.

A program is drawn operator by operator; the drawing keeps every shape, with the batch written as multiples of
:data:`B`, and never asks the code under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

B = 10_007
"""Stands for the batch in the drawing's own arithmetic."""

LIMIT = 360
"""No value has more elements a sample."""

Dims = tuple[int, ...]


def is_batch(dim: int) -> bool:
    return dim % B == 0


def samples(dims: Dims) -> int:
    return math.prod(d // B if is_batch(d) else d for d in dims)


def declared(dims: Dims) -> list[int | str]:
    return [("batch" if d == B else f"{d // B}*batch") if is_batch(d) else d for d in dims]


@dataclass
class Program:
    """A graph under construction: nodes, constants, and the shape of every value that may be read."""

    draw: Callable[[Any], Any]
    elem_type: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    pool: dict[str, Dims] = field(default_factory=dict)

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, op_type: str, inputs: Sequence[str], dims: Dims, **attributes: Any) -> str:
        return self.split_op(op_type, inputs, [dims], **attributes)[0]

    def split_op(self, op_type: str, inputs: Sequence[str], dims: Sequence[Dims], **attributes: Any) -> list[str]:
        outputs = [f"v{len(self.nodes)}.{i}" for i in range(len(dims))]
        self.nodes.append(helper.make_node(op_type, list(inputs), outputs, **attributes))
        self.pool.update(zip(outputs, dims, strict=True))
        return outputs

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def static_axis(self, dims: Dims) -> int | None:
        axes = [i for i, d in enumerate(dims) if not is_batch(d)]
        return self.pick(axes) if axes else None

    def spelled(self, axis: int, rank: int) -> int:
        """An axis, counted from the front or from the back."""
        return axis - rank if self.draw(st.booleans()) else axis


def reshape(p: Program, x: str) -> None:
    dims = p.pool[x]
    target = regroup(p, dims)
    spelled = [-1 if is_batch(d) else d for d in target]
    if not any(is_batch(d) for d in target) and target and p.draw(st.booleans()):
        spelled[p.integer(0, len(target) - 1)] = -1
    for i, d in enumerate(target[: len(dims)]):
        if d == dims[i] and p.draw(st.booleans()):
            spelled[i] = 0
    if spelled.count(-1) == 0 and any(map(is_batch, target)) and p.draw(st.booleans()):
        axis = next(i for i, d in enumerate(target) if is_batch(d))
        if len(dims) > axis and dims[axis] == target[axis]:
            return from_shape(p, x, target, axis)
    p.op("Reshape", [x, p.constant(spelled)], target)
    return None


def from_shape(p: Program, x: str, target: Dims, axis: int) -> None:
    """Reshape as TorchScript exports it: the batch is read from the input and concatenated with numbers."""
    hidden = dict(p.pool)
    shape = p.op("Shape", [x], (len(p.pool[x]),))
    size = p.op("Gather", [shape, p.constant(axis)], (), axis=0)
    parts = [p.constant([d]) for d in target]
    parts[axis] = p.op("Unsqueeze", [size, p.constant([0])], (1,))
    whole = p.op("Concat", parts, (len(target),), axis=0)
    p.pool = hidden  # shape arithmetic is no data
    p.op("Reshape", [x, whole], target)


def regroup(p: Program, dims: Dims) -> Dims:
    """Merge neighbours, then split some axes in two."""
    merged: list[int] = []
    for d in dims:
        if merged and not (is_batch(d) and is_batch(merged[-1])) and p.integer(0, 2) == 0:
            merged[-1] *= d
        else:
            merged.append(d)
    out: list[int] = []
    for d in merged:
        small = d // B if is_batch(d) else d
        divisors = [k for k in range(1, small + 1) if small % k == 0]
        k = p.pick(divisors)
        if len(merged) + len(out) >= 6 or p.draw(st.booleans()):
            out.append(d)
        elif p.draw(st.booleans()):
            out += [d // k, k]
        else:
            out += [k, d // k]
    while len(out) > 6:
        out[-2:] = [out[-2] * out[-1]]
    return tuple(out)


def transpose(p: Program, x: str) -> None:
    dims = p.pool[x]
    perm = p.draw(st.permutations(range(len(dims))))
    if perm:
        p.op("Transpose", [x], tuple(dims[i] for i in perm), perm=perm)


def slice_(p: Program, x: str) -> str | None:
    dims = p.pool[x]
    axis = p.static_axis(dims)
    if axis is None:
        return None
    size = dims[axis]
    start, end = p.integer(-size - 2, size + 2), p.pick([*range(-size - 2, size + 3), 2**63 - 1, -(2**63)])
    step = p.pick([1, 1, 1, 2, 3, -1, -2])
    kept = len(range(size)[onnx_slice(size, start, end, step)])
    if kept == 0:
        return None
    operands = [[start], [end], [p.spelled(axis, len(dims))], [step]]
    count = 4 if step != 1 else p.integer(3, 4)
    return p.op("Slice", [x, *map(p.constant, operands[:count])], (*dims[:axis], kept, *dims[axis + 1 :]))


def onnx_slice(size: int, start: int, end: int, step: int) -> slice:
    start, end = (i + size if i < 0 else i for i in (start, end))
    if step > 0:
        return slice(min(max(start, 0), size), min(max(end, 0), size), step)
    start, end = min(max(start, 0), size - 1), min(max(end, -1), size)
    return slice(start, None if end < 0 else end, step)


def roll(p: Program, x: str) -> None:
    """Concatenate two slices of one axis: torch.roll where they meet, an overlap or a gap where not."""
    dims = p.pool[x]
    axis = p.static_axis(dims)
    if axis is None or dims[axis] < 2:
        return
    size = dims[axis]
    cut, other = p.integer(1, size - 1), p.integer(1, size - 1)
    other = cut if p.draw(st.booleans()) else other
    at = p.constant([axis])
    low, high = p.constant([cut]), p.constant([other])
    tail = p.op("Slice", [x, low, p.constant([2**63 - 1]), at], (*dims[:axis], size - cut, *dims[axis + 1 :]))
    head = p.op("Slice", [x, p.constant([0]), high, at], (*dims[:axis], other, *dims[axis + 1 :]))
    p.op("Concat", [tail, head], (*dims[:axis], size - cut + other, *dims[axis + 1 :]), axis=axis)


def split(p: Program, x: str) -> None:
    dims = p.pool[x]
    axis = p.static_axis(dims)
    if axis is None or dims[axis] < 2:
        return
    first = p.integer(1, dims[axis] - 1)
    sizes = [first, dims[axis] - first]
    shapes = [(*dims[:axis], s, *dims[axis + 1 :]) for s in sizes]
    p.split_op("Split", [x, p.constant(sizes)], shapes, axis=p.spelled(axis, len(dims)))


def gather(p: Program, x: str) -> None:
    dims = p.pool[x]
    axis = p.static_axis(dims)
    if axis is None:
        return
    size = dims[axis]
    shape = p.pick([(), (1,), (2,), (size,), (2, 2)])
    indices = [p.integer(-size, size - 1) for _ in range(math.prod(shape))]
    if shape == (size,) and p.draw(st.booleans()):
        indices = p.draw(st.permutations(range(size)))
    result = (*dims[:axis], *shape, *dims[axis + 1 :])
    if len(result) <= 6 and samples(result) <= LIMIT:
        dtype = p.pick([np.int64, np.int32])
        operand = p.constant(np.reshape(indices, shape), dtype)
        p.op("Gather", [x, operand], result, axis=p.spelled(axis, len(dims)))


def unsqueeze(p: Program, x: str) -> None:
    dims = p.pool[x]
    if len(dims) < 6:
        axis = p.integer(0, len(dims))
        p.op("Unsqueeze", [x, p.constant([p.spelled(axis, len(dims) + 1)])], (*dims[:axis], 1, *dims[axis:]))


def squeeze(p: Program, x: str) -> None:
    dims = p.pool[x]
    ones = [i for i, d in enumerate(dims) if d == 1]
    if ones:
        axis = p.pick(ones)
        p.op("Squeeze", [x, p.constant([p.spelled(axis, len(dims))])], dims[:axis] + dims[axis + 1 :])


def flatten(p: Program, x: str) -> None:
    dims = p.pool[x]
    axis = p.integer(0, len(dims))
    p.op("Flatten", [x], (math.prod(dims[:axis]), math.prod(dims[axis:])), axis=axis)


def pad(p: Program, x: str) -> None:
    dims = p.pool[x]
    axis = p.static_axis(dims)
    if axis is None:
        return
    before, after = p.integer(0, 2), p.integer(0, 2)
    result = (*dims[:axis], dims[axis] + before + after, *dims[axis + 1 :])
    if samples(result) > LIMIT:
        return
    if p.draw(st.booleans()):  # opset 18: only the named axes
        p.op("Pad", [x, p.constant([before, after]), "", p.constant([axis])], result)
    else:
        pads = [0] * (2 * len(dims))
        pads[axis], pads[axis + len(dims)] = before, after
        p.op("Pad", [x, p.constant(pads)], result)


def expand(p: Program, x: str) -> None:
    dims = p.pool[x]
    ones = [i for i, d in enumerate(dims) if d == 1]
    if not ones:
        return
    target = [1] * len(dims)
    axis = p.pick(ones)
    target[axis] = p.integer(1, 3)
    result = (*dims[:axis], target[axis], *dims[axis + 1 :])
    if samples(result) <= LIMIT:
        p.op("Expand", [x, p.constant(target)], result)


def tile(p: Program, x: str) -> None:
    dims = p.pool[x]
    axis = p.static_axis(dims)
    repeats = [1] * len(dims)
    if axis is not None:
        repeats[axis] = p.integer(1, 2)
    result = tuple(d * r for d, r in zip(dims, repeats, strict=True))
    if samples(result) <= LIMIT and dims:
        p.op("Tile", [x, p.constant(repeats)], result)


def depth_to_space(p: Program, x: str) -> None:
    dims = p.pool[x]
    if len(dims) == 4 and not is_batch(dims[1]) and dims[1] % 4 == 0 and p.elem_type == TensorProto.FLOAT:
        b, c, h, w = dims
        p.op("DepthToSpace", [x], (b, c // 4, h * 2, w * 2), blocksize=2, mode=p.pick(["DCR", "CRD"]))


def space_to_depth(p: Program, x: str) -> None:
    dims = p.pool[x]
    even = len(dims) == 4 and all(not is_batch(d) and d % 2 == 0 for d in dims[2:])
    if even and p.elem_type == TensorProto.FLOAT:
        b, c, h, w = dims
        p.op("SpaceToDepth", [x], (b, c * 4, h // 2, w // 2), blocksize=2)


def identity(p: Program, x: str) -> None:
    p.op("Identity", [x], p.pool[x])


def boundary(p: Program, x: str) -> None:
    """An operator that computes: regions end at it."""
    p.op("Neg", [x], p.pool[x])


def join(p: Program, x: str) -> None:
    """Concatenate with another value of a fitting shape, or with zeros."""
    dims = p.pool[x]
    axis = p.static_axis(dims)
    if axis is None:
        return
    fits = [
        y
        for y, d in p.pool.items()
        if len(d) == len(dims)
        and all(i == axis or a == b for i, (a, b) in enumerate(zip(d, dims, strict=True)))
        and not is_batch(d[axis])
    ]
    y = p.pick(fits)
    size = p.pool[y][axis]
    if not any(map(is_batch, dims)) and p.draw(st.booleans()):
        y = p.constant(np.zeros((*dims[:axis], size, *dims[axis + 1 :])), helper.tensor_dtype_to_np_dtype(p.elem_type))
    result = (*dims[:axis], dims[axis] + size, *dims[axis + 1 :])
    if samples(result) <= LIMIT:
        p.op("Concat", p.draw(st.permutations([x, y])), result, axis=p.spelled(axis, len(dims)))


OPERATORS = [
    reshape, reshape, reshape, transpose, transpose, transpose, slice_, roll, roll, split, gather, gather, unsqueeze,
    squeeze, flatten, pad, expand, tile, depth_to_space, space_to_depth, identity, boundary, join, join,
]  # fmt: skip


@st.composite
def programs(draw: Any, *, chain: bool = False, pure: bool = False, whole: bool = False) -> onnx.ModelProto:
    """Draw a program.

    Args:
        draw: given by hypothesis.
        chain: each operator reads what the last one made.
        pure: nothing but movement of the input.
        whole: every value is an output.
    """
    p = Program(draw, draw(st.sampled_from([TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64])))
    dynamic = draw(st.booleans())
    rank = draw(st.integers(1, 5))
    body = [draw(st.sampled_from([1, 2, 3, 4, 6, 8])) for _ in range(rank - 1)]
    while samples(tuple(body)) > LIMIT // 2:
        body[body.index(max(body))] //= 2
    lead = B if dynamic else draw(st.sampled_from([1, 2, 3]))
    place = draw(st.integers(0, rank - 1)) if draw(st.booleans()) else 0
    dims = (*body[:place], lead, *body[place:])
    p.pool["x"] = dims
    inputs = [helper.make_tensor_value_info("x", p.elem_type, declared(dims))]
    for _ in range(draw(st.integers(1, 8))):
        names = list(p.pool)
        source = names[-1] if chain or draw(st.booleans()) else draw(st.sampled_from(names))
        draw(st.sampled_from([op for op in OPERATORS if op is not boundary] if pure else OPERATORS))(p, source)
    made = [name for name in p.pool if name != "x"] or [p.op("Identity", ["x"], dims)]
    more = made if whole else [] if chain else draw(st.lists(st.sampled_from(made), max_size=2))
    names = dict.fromkeys([made[-1], *more])
    outputs = [helper.make_tensor_value_info(name, p.elem_type, declared(p.pool[name])) for name in names]
    graph = helper.make_graph(p.nodes, "program", inputs, outputs, p.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model
