"""Random graphs of movement, projections, reductions and attention, through the passes, at several batches.

A graph is drawn from a seed alone. Its samples stand on any axis, a second axis may be symbolic too, and either may be
declared by name, without one, or as -1. The rewritten graph must answer as the original does, node by node in ONNX
Runtime, for every size of the symbolic axes; where it does not, the original in FP64 tells a wrong graph from one whose
own answer is little more than rounding.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from deploycli.exporters.passes.any_model import optimized
from tests.exporters.passes.graphs import session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Dims = tuple["int | str", ...]
"""A size, or a symbol: N for the samples, M for something else that is known only at run time."""

BATCHES = (1, 2, 3, 5, 7)
OPSETS = (13, 17, 18, 20, 21, 23)
ULP = 2.0**-23
"""Of 1 in FP32: where an answer is 0 exactly, as of a norm over one channel, that much is rounding."""

TOLERANCE = 2e-5
"""Error over the largest magnitude that other orders of additions explain in graphs of this size."""

_LARGEST = 20_000
"""Elements that a value may have where both symbols are 7."""


@dataclass
class Drawing:
    """A graph under construction: every value that may be read, with its shape."""

    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    values: dict[str, Dims] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.numbers = np.random.default_rng(self.seed)
        self.opset = self.random.choice(OPSETS)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def ints(self, values: Sequence[int]) -> str:
        return self._constant(np.array(values, np.int64))

    def table(self, *shape: int, scale: float = 1.0) -> str:
        return self._constant((scale * self.numbers.standard_normal(shape)).astype(np.float32))

    def _constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def op(self, kind: str, inputs: Sequence[str], dims: Dims | None, **attributes: Any) -> str:
        """Add a node of one output; values whose shape is None, such as indices, are not read again."""
        return self.ops(kind, inputs, [dims], **attributes)[0]

    def ops(self, kind: str, inputs: Sequence[str], dims: Sequence[Dims | None], **attributes: Any) -> list[str]:
        names = [f"v{len(self.nodes)}.{i}" for i in range(len(dims))]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        self.values.update((name, d) for name, d in zip(names, dims, strict=True) if d is not None)
        return names

    def pick(self, fits: Callable[[Dims], bool] = lambda _: True) -> tuple[str, Dims] | None:
        """Return a value that fits, a recent one rather than an early one."""
        fitting = [(name, dims) for name, dims in self.values.items() if fits(dims)]
        if not fitting:
            return None
        return fitting[max(self.random.randrange(len(fitting)), self.random.randrange(len(fitting)))]

    def axis(self, dims: Dims, least: int = 1) -> int | None:
        """Return an axis of known size, ``least`` or more."""
        axes = [i for i, d in enumerate(dims) if isinstance(d, int) and d >= least]
        return self.random.choice(axes) if axes else None

    def pick_axis(self, least: int = 1) -> tuple[str, Dims, int, int] | None:
        """Return a value, an axis of it of known size, ``least`` or more, and that size."""
        x, dims = self.pick(movable) or ("", ())
        axis = self.axis(dims, least)
        size = None if axis is None else dims[axis]
        return (x, dims, axis, size) if axis is not None and isinstance(size, int) else None

    def spelled(self, axis: int, rank: int) -> int:
        return axis - rank if self.chance(0.3) else axis


def elements(dims: Dims) -> int:
    return math.prod(d if isinstance(d, int) else max(BATCHES) for d in dims)


def movable(dims: Dims) -> bool:
    return 1 <= len(dims) <= 6


# --- movement --------------------------------------------------------------------------------------------------------


def transpose(d: Drawing) -> None:
    x, dims = d.pick(movable) or ("", ())
    if len(dims) < 2:
        return
    order = list(range(len(dims)))
    d.random.shuffle(order)
    d.op("Transpose", [x], tuple(dims[i] for i in order), perm=order)


def reshape(d: Drawing) -> None:
    """Merge neighbours or split an axis; a symbol moves along as 0 or as -1, or is computed as exporters do."""
    if (found := d.pick_axis()) is None:
        return
    x, dims, axis, size = found
    new: list[int | str] = list(dims)
    if axis + 1 < len(dims) and isinstance(dims[axis + 1], int) and d.chance(0.5):
        new[axis : axis + 2] = [size * int(dims[axis + 1])]
    else:
        factors = [f for f in range(1, size + 1) if size % f == 0]
        factor = d.random.choice(factors)
        new[axis : axis + 1] = [factor, size // factor]
    symbols = [i for i, s in enumerate(new) if isinstance(s, str)]
    way = d.random.choice(("copy", "infer", "compute"))
    shape = [s if isinstance(s, int) else 0 for s in new]
    if way == "infer" and len(symbols) == 1:
        shape[symbols[0]] = -1
    elif way == "compute" or any(i >= len(dims) or dims[i] != new[i] for i in symbols):
        parts = []
        read = d.op("Shape", [x], None)
        for s in new:
            if isinstance(s, str):
                parts.append(d.op("Gather", [read, d.ints([dims.index(s)])], None, axis=0))
            else:
                parts.append(d.ints([s]))
        d.op("Reshape", [x, d.op("Concat", parts, None, axis=0)], tuple(new))
        return
    elif not symbols and d.chance(0.3):
        shape[d.random.randrange(len(shape))] = -1
    d.op("Reshape", [x, d.ints(shape)], tuple(new))


def flatten_samples(d: Drawing) -> None:
    """Samples and a size become one axis, something happens to each row, and they part again (windows)."""
    found = d.pick(lambda s: 3 <= len(s) <= 5 and s[0] == "N" and all(isinstance(x, int) for x in s[1:]))
    if found is None:
        return
    x, dims = found
    rest = [int(s) for s in dims[1:]]
    flat = d.op("Reshape", [x, d.ints([-1, *rest[1:]])], None)
    for _ in range(d.random.randint(1, 2)):
        match d.random.randrange(4):
            case 0:
                flat = d.op("MatMul", [flat, d.table(rest[-1], rest[-1], scale=rest[-1] ** -0.5)], None)
            case 1:
                flat = d.op("Softmax", [flat], None, axis=-1)
            case 2 if len(rest) >= 3:
                order = [0, *np.roll(range(1, len(rest)), 1).tolist()]
                flat = d.op("Transpose", [flat], None, perm=order)
                rest[1:] = [rest[1:][i - 1] for i in order[1:]]
            case _:
                flat = d.op("Add", [flat, d.table(rest[-1])], None)
    d.op("Reshape", [flat, d.ints([-1, *rest])], ("N", *rest))


def roll(d: Drawing) -> None:
    if (found := d.pick_axis(2)) is None:
        return
    x, dims, axis, size = found
    cut = d.random.randrange(1, size)
    spelled = d.ints([d.spelled(axis, len(dims))])
    start = d.ints([cut if d.chance(0.5) else cut - size])
    tail = d.op("Slice", [x, start, d.ints([2**63 - 1]), spelled], (*dims[:axis], size - cut, *dims[axis + 1 :]))
    head = d.op("Slice", [x, d.ints([0]), start, spelled], (*dims[:axis], cut, *dims[axis + 1 :]))
    parts = [tail, head] if d.chance(0.8) else [head, tail]
    d.op("Concat", parts, dims, axis=d.spelled(axis, len(dims)))


def take(d: Drawing) -> None:
    """A Gather of indices in any order, of rank 0 to 2, or a Slice with a step of either sign."""
    if (found := d.pick_axis()) is None:
        return
    x, dims, axis, size = found
    before, after = dims[:axis], dims[axis + 1 :]
    if d.chance(0.3):
        start, end, step = d.random.choice(((0, size, 2), (1, size, 2), (size - 1, -size - 1, -1), (-1, -size - 1, -2)))
        taken = len(range(size)[slice(start, end if end >= 0 else None, step)])
        if taken:
            operands = [x, *(d.ints([v]) for v in (start, end, axis, step))]
            d.op("Slice", operands, (*before, taken, *after))
        return
    match d.random.randrange(4):
        case 0:
            indices: Any = d.random.randrange(-size, size)
        case 1:
            indices = d.random.sample(range(size), size)
        case 2:
            indices = [d.random.randrange(size) for _ in range(d.random.randint(1, 4))]
        case _:
            indices = [[d.random.randrange(size) for _ in range(2)] for _ in range(d.random.randint(1, 3))]
    array = np.array(indices, np.int64)
    if len(dims) - 1 + array.ndim <= 6:
        new = (*before, *array.shape, *after)
        d.op("Gather", [x, d._constant(array)], new, axis=d.spelled(axis, len(dims)))


def split(d: Drawing) -> None:
    if (found := d.pick_axis(2)) is None:
        return
    x, dims, axis, size = found
    cut = d.random.randrange(1, size)
    parts = [cut, size - cut] if d.chance(0.6) or size < 3 else [1] * size if size <= 4 else [1, 1, size - 2]
    new: list[Dims] = [(*dims[:axis], part, *dims[axis + 1 :]) for part in parts]
    if d.opset >= 18 and len(set(parts)) == 1 and d.chance(0.5):
        d.ops("Split", [x], new, axis=axis, num_outputs=len(parts))
    elif len(set(parts)) == 1 and d.opset < 18 and d.chance(0.5):
        d.ops("Split", [x], new, axis=axis)
    else:
        d.ops("Split", [x, d.ints(parts)], new, axis=d.spelled(axis, len(dims)))


def concat(d: Drawing) -> None:
    """Join values that are alike but for one axis, of any kind."""
    x, dims = d.pick(movable) or ("", ())
    if not dims:
        return
    axis = d.random.randrange(len(dims))
    if not isinstance(dims[axis], int):
        return
    alike = [
        (name, s)
        for name, s in d.values.items()
        if len(s) == len(dims)
        and isinstance(s[axis], int)
        and s[:axis] == dims[:axis]
        and s[axis + 1 :] == dims[axis + 1 :]
    ]
    chosen = [(x, dims), *d.random.choices(alike, k=d.random.randint(1, 2))]
    d.random.shuffle(chosen)
    total = sum(int(s[axis]) for _, s in chosen)
    d.op("Concat", [n for n, _ in chosen], (*dims[:axis], total, *dims[axis + 1 :]), axis=d.spelled(axis, len(dims)))


def pad(d: Drawing) -> None:
    if (found := d.pick_axis()) is None:
        return
    x, dims, axis, size = found
    before, after = d.random.choice(((0, 1), (1, 0), (2, 1), (0, -1)))
    if size + before + after < 1:
        return
    pads = [0] * (2 * len(dims))
    pads[axis], pads[axis + len(dims)] = before, after
    d.op("Pad", [x, d.ints(pads)], (*dims[:axis], size + before + after, *dims[axis + 1 :]), mode="constant")


def ones(d: Drawing) -> None:
    """Axes of one: more of them, fewer of them, or spread out."""
    x, dims = d.pick(movable) or ("", ())
    single = [i for i, s in enumerate(dims) if s == 1]
    match d.random.randrange(3):
        case 0 if single and len(dims) > 1:
            axis = d.random.choice(single)
            d.op("Squeeze", [x, d.ints([d.spelled(axis, len(dims))])], (*dims[:axis], *dims[axis + 1 :]))
        case 1 if single:
            axis = d.random.choice(single)
            count = d.random.randint(2, 3)
            shape = [count if i == axis else 1 for i in range(len(dims))]
            new = (*dims[:axis], count, *dims[axis + 1 :])
            if d.chance(0.5):
                d.op("Expand", [x, d.ints(shape)], new)
            else:
                d.op("Tile", [x, d.ints(shape)], new)
        case _ if len(dims) < 5:
            axis = d.random.randint(0, len(dims))
            d.op("Unsqueeze", [x, d.ints([axis])], (*dims[:axis], 1, *dims[axis:]))


def nothing(d: Drawing) -> None:
    """What does nothing, or undoes itself."""
    x, dims = d.pick(movable) or ("", ())
    if not dims:
        return
    match d.random.randrange(5):
        case 0:
            d.op("Identity", [x], dims)
        case 1:
            d.op("Dropout", [x], dims)
        case 2:
            d.op("Cast", [x], dims, to=TensorProto.FLOAT)
        case 3:
            zero_or_one = d._constant(np.float32(d.random.randrange(2)))
            d.op(d.random.choice(("Add", "Mul")), [x, zero_or_one], dims)
        case _:
            order = list(range(len(dims)))
            d.random.shuffle(order)
            moved = d.op("Transpose", [x], tuple(dims[i] for i in order), perm=order)
            d.op("Transpose", [moved], dims, perm=np.argsort(order).tolist())


# --- arithmetic ------------------------------------------------------------------------------------------------------


def each(d: Drawing) -> None:
    x, dims = d.pick() or ("", ())
    if not x:
        return
    match d.random.randrange(6):
        case 0:
            d.op(d.random.choice(("Relu", "Tanh", "Sigmoid", "Neg", "Abs", "Softplus")), [x], dims)
        case 1:  # GELU as exporters write it
            half = d._constant(np.float32(0.5))
            root = d._constant(np.float32(2**0.5))
            erf = d.op("Erf", [d.op("Div", [x, root], dims)], dims)
            d.op("Mul", [d.op("Mul", [x, half], dims), d.op("Add", [erf, d._constant(np.float32(1))], dims)], dims)
        case 2:
            d.op("Clip", [x, d._constant(np.float32(-0.5)), d._constant(np.float32(0.9))], dims)
        case 3:
            d.op("Mul", [x, d._constant(np.float32(d.random.choice((2.0, -1.0, 0.125))))], dims)
        case _:
            constant_operand(d, x, dims)


def constant_operand(d: Drawing, x: str, dims: Dims) -> None:
    """A table of any broadcast shape, on either side."""
    kept = [s if isinstance(s, int) and d.chance(0.6) else 1 for s in dims]
    shape = kept[d.random.randint(0, len(kept)) :]
    operands = [x, d.table(*shape)]
    kind = d.random.choice(("Add", "Add", "Sub", "Mul", "Max", "Where"))
    if kind == "Where":
        condition = d._constant(d.numbers.integers(0, 2, shape).astype(bool))
        d.op("Where", [condition, x, d._constant(np.float32(d.random.choice((0.0, -1.0))))], dims)
        return
    d.random.shuffle(operands)
    d.op(kind, operands, dims)


def two(d: Drawing) -> None:
    """Two values of the same shape, or one with axes of one (residuals, gates)."""
    x, dims = d.pick() or ("", ())
    if not x:
        return
    rank = len(dims)
    fits = [n for n, s in d.values.items() if len(s) == rank and all(b in (a, 1) for a, b in zip(dims, s, strict=True))]
    operands = [x, d.random.choice(fits)]
    d.random.shuffle(operands)
    d.op(d.random.choice(("Add", "Add", "Mul", "Sub", "Max")), operands, dims)


def normalise(d: Drawing) -> None:
    x, dims = d.pick(lambda s: len(s) >= 1 and isinstance(s[-1], int) and s[-1] > 1) or ("", ())
    if not dims:
        return
    size = int(dims[-1])
    gain, bias = d.table(size), d.table(size)
    if d.opset >= 17 and d.chance(0.5):
        d.op("LayerNormalization", [x, gain, bias], dims, axis=-1, epsilon=1e-5)
        return
    narrow = (*dims[:-1], 1)
    centred = d.op("Sub", [x, reduce_by(d, "ReduceMean", x, [-1], narrow)], dims)
    square = d.op("Pow", [centred, d._constant(np.float32(2))], dims)
    spread = d.op("Add", [reduce_by(d, "ReduceMean", square, [-1], narrow), d._constant(np.float32(1e-5))], narrow)
    scaled = d.op("Div", [centred, d.op("Sqrt", [spread], narrow)], dims)
    d.op("Add", [d.op("Mul", [scaled, gain], dims), bias], dims)


def reduce_by(d: Drawing, kind: str, x: str, axes: list[int], dims: Dims, *, keep: bool = True) -> str:
    operand = d.opset >= 18 or kind == "ReduceSum"
    inputs = [x, d.ints(axes)] if operand else [x]
    return d.op(kind, inputs, dims, keepdims=int(keep), **({} if operand else {"axes": axes}))


def reduce(d: Drawing) -> None:
    """Over one axis or two, known or symbolic, kept or not."""
    x, dims = d.pick(movable) or ("", ())
    if not dims:
        return
    axes = sorted(d.random.sample(range(len(dims)), min(len(dims), d.random.randint(1, 2))))
    if any(isinstance(dims[a], str) for a in axes) and d.chance(0.7):
        return
    keep = d.chance(0.5)
    new = tuple(1 if i in axes else s for i, s in enumerate(dims) if keep or i not in axes)
    kind = d.random.choice(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2"))
    reduce_by(d, kind, x, [d.spelled(a, len(dims)) for a in axes], new, keep=keep)


def softmax(d: Drawing) -> None:
    x, dims = d.pick(movable) or ("", ())
    if dims:
        d.op("Softmax", [x], dims, axis=d.spelled(d.random.randrange(len(dims)), len(dims)))


# --- projections and attention ---------------------------------------------------------------------------------------


def project(d: Drawing) -> None:
    """One to three projections of one value, with biases or without; what they give is joined at times."""
    x, dims = d.pick(lambda s: len(s) >= 2 and isinstance(s[-1], int)) or ("", ())
    if not dims:
        return
    inner, made = int(dims[-1]), []
    outer = d.random.choice((inner, 2, 4, 6))
    for _ in range(d.random.randint(1, 3)):
        new = (*dims[:-1], outer)
        weight = d.table(inner, outer, scale=inner**-0.5)
        if len(dims) == 2 and d.chance(0.4):
            if d.chance(0.5):
                y = d.op("Gemm", [x, d.table(outer, inner, scale=inner**-0.5), d.table(outer)], new, transB=1)
            else:
                y = d.op("Gemm", [x, weight, d.table(outer)], new, alpha=0.5, beta=2.0)
        else:
            y = d.op("MatMul", [x, weight], new)
            if d.chance(0.6):
                y = d.op("Add", [y, d.table(outer)] if d.chance(0.5) else [d.table(outer), y], new)
        made.append(y)
    if len(made) > 1 and d.chance(0.4):
        d.op("Add", made[:2], (*dims[:-1], outer))


def multiply(d: Drawing) -> None:
    """A product of two values: a value with its own transpose."""
    x, dims = d.pick(lambda s: 2 <= len(s) <= 4) or ("", ())
    if not dims:
        return
    order = [*range(len(dims) - 2), len(dims) - 1, len(dims) - 2]
    turned = d.op("Transpose", [x], tuple(dims[i] for i in order), perm=order)
    if d.chance(0.5) and isinstance(dims[-1], int):
        scores = d.op("MatMul", [x, turned], (*dims[:-1], dims[-2]))
    elif isinstance(dims[-2], int):
        scores = d.op("MatMul", [turned, x], (*dims[:-2], dims[-1], dims[-1]))
    else:
        return
    d.op("Mul", [scores, d._constant(np.float32(0.2))], d.values[scores])


def attention(d: Drawing) -> None:
    """Self-attention as one projection or three, over tokens on the axis before the last."""
    x, dims = d.pick(lambda s: len(s) == 3 and all(isinstance(v, int) for v in s[1:])) or ("", ())
    if not dims:
        return
    samples, tokens, channels = dims[0], int(dims[1]), int(dims[2])
    heads, each_ = d.random.choice(((1, 4), (2, 2), (2, 3)))
    width = heads * each_
    first = samples if isinstance(samples, int) else -1 if samples == "N" else 0
    rows: Dims = (samples, heads, tokens, each_)

    def linear(outer: int) -> str:
        y = d.op("MatMul", [x, d.table(channels, outer, scale=channels**-0.5)], (samples, tokens, outer))
        return d.op("Add", [d.table(outer), y], (samples, tokens, outer))

    if d.chance(0.5):
        whole = d.op(
            "Reshape", [linear(3 * width), d.ints([first, tokens, 3, heads, each_])], (samples, tokens, 3, heads, each_)
        )
        moved = d.op("Transpose", [whole], (3, samples, heads, tokens, each_), perm=[2, 0, 3, 1, 4])
        if d.chance(0.5):
            q, k, v = (d.op("Gather", [moved, d._constant(np.array(i))], rows, axis=0) for i in range(3))
        else:
            parts = d.ops("Split", [moved, d.ints([1, 1, 1])], [(1, *rows)] * 3, axis=0)
            q, k, v = (d.op("Squeeze", [part, d.ints([0])], rows) for part in parts)
    else:
        q, k, v = (
            d.op(
                "Transpose",
                [
                    d.op(
                        "Reshape",
                        [linear(width), d.ints([first, tokens, heads, each_])],
                        (samples, tokens, heads, each_),
                    )
                ],
                rows,
                perm=[0, 2, 1, 3],
            )
            for _ in range(3)
        )
    scale = d._constant(np.float32(each_**-0.5))
    keys: Dims = (samples, heads, each_, tokens)
    turned = d.op("Transpose", [k], keys, perm=[0, 1, 3, 2])
    square: Dims = (samples, heads, tokens, tokens)
    if d.chance(0.5):
        scores = d.op("Mul", [d.op("MatMul", [q, turned], square), scale], square)
    else:
        scores = d.op("MatMul", [d.op("Mul", [q, scale], rows), turned], square)
    if d.chance(0.5):
        scores = d.op("Add", [scores, d.table(1, d.random.choice((1, heads)), tokens, tokens)], square)
    weights = d.op("Softmax", [scores], square, axis=-1)
    out = d.op("Transpose", [d.op("MatMul", [weights, v], rows)], (samples, tokens, heads, each_), perm=[0, 2, 1, 3])
    d.op("Reshape", [out, d.ints([first, tokens, width])], (samples, tokens, width))


STEPS: dict[Callable[[Drawing], None], int] = {
    transpose: 5, reshape: 6, flatten_samples: 3, roll: 3, take: 5, split: 4, concat: 4, pad: 1, ones: 2, nothing: 2,
    each: 4, two: 4, normalise: 2, reduce: 3, softmax: 1, project: 5, multiply: 1, attention: 2,
}  # fmt: skip


# --- a whole graph ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A graph, and the shapes of its inputs with every symbol by its name."""

    model: onnx.ModelProto
    inputs: dict[str, Dims]

    def feeds(self, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
        numbers = np.random.default_rng(seed)
        return {
            name: numbers.standard_normal([sizes[s] if isinstance(s, str) else s for s in dims]).astype(np.float32)
            for name, dims in self.inputs.items()
        }


def draw(seed: int) -> Case:
    """Return the graph of a seed."""
    d = Drawing(seed)
    for i in range(1 + d.chance(0.3)):
        dims: list[int | str] = [d.random.choice((2, 3, 4, 6)) for _ in range(d.random.randint(1, 3))]
        if d.chance(0.9):
            dims.insert(d.random.choice((0, 0, 0, d.random.randint(0, len(dims)))), "N")
        if d.chance(0.25):
            dims.insert(d.random.randint(0, len(dims)), "M")
        d.values[f"x{i}"] = tuple(dims)
    inputs = dict(d.values)
    for _ in range(d.random.randint(3, 14)):
        step = d.random.choices(list(STEPS), list(STEPS.values()))[0]
        step(d)
        d.values = {name: dims for name, dims in d.values.items() if elements(dims) <= _LARGEST}
    read = {name for node in d.nodes for name in node.input}
    made = [n for node in d.nodes for n in node.output if n in d.values]
    leaves = [name for name in made if name not in read] or made[-1:]
    if made and d.chance(0.2):
        leaves.append(d.random.choice(made))  # an output that is read inside, too
    leaves = list(dict.fromkeys(leaves))[-4:] or [d.op("Relu", ["x0"], inputs["x0"])]
    used = {name for node in d.nodes for name in node.input}
    constants = [tensor for tensor in d.constants if tensor.name in used]
    graph = helper.make_graph(
        d.nodes,
        f"seed {seed}",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, d.values[name]) for name in leaves],
        constants,
    )
    if d.chance(0.1):  # a constant that may be fed
        graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in constants[:1])
    for value in (*graph.input, *graph.output):
        _declare(value, d)
    return Case(helper.make_model(graph, opset_imports=[helper.make_opsetid("", d.opset)], ir_version=8), inputs)


def _declare(value: onnx.ValueInfoProto, d: Drawing) -> None:
    """Let a symbol go without its name, or be -1; let an output go without its shape."""
    for dim in value.type.tensor_type.shape.dim:
        if dim.dim_param and d.chance(0.06):
            dim.ClearField("dim_param")
            if d.chance(0.5):
                dim.dim_value = -1
    if value.name.startswith("v") and d.chance(0.1):
        value.type.tensor_type.ClearField("shape")


# --- the judgement ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What became of a graph: ``equal``, ``rounding`` that it amplifies, ``unjudged``, or ``wrong`` and why."""

    kind: str
    why: str = ""
    nodes: tuple[int, int] = (0, 0)


def judge(case: Case, batches: Sequence[int] = BATCHES) -> Verdict:
    """Rewrite a graph and compare the answers at each batch."""
    try:
        original = session(case.model)
        runs = []
        for i, batch in enumerate(batches):
            feed = case.feeds({"N": batch, "M": batches[(2 * i + 1) % len(batches)]}, i)
            runs.append((batch, feed, original.run(None, feed)))
    except Exception as error:  # a drawing that ONNX Runtime does not run says nothing of the passes
        return Verdict("unjudged", str(error).splitlines()[0][:200])
    try:
        model, _ = optimized(ir.from_proto(onnx.ModelProto.FromString(case.model.SerializeToString())))
        written = ir.to_proto(model)
        if all(value.type.tensor_type.HasField("shape") for value in written.graph.output):  # as the checker asks
            onnx.checker.check_model(written, full_check=True)
        rewritten = session(written)
        nodes = (len(case.model.graph.node), len(written.graph.node))
        amplified = False
        for batch, feed, expected in runs:
            for value, a, b in zip(case.model.graph.output, expected, rewritten.run(None, feed), strict=True):
                if a.shape != b.shape or a.dtype != b.dtype:
                    return Verdict("wrong", f"{value.name} at batch {batch}: {a.shape} became {b.shape}", nodes)
                if (error := difference(a, b)) > TOLERANCE:
                    if not np.allclose(a, b, rtol=0, atol=ULP) and error > 10 * difference(
                        a, exact(case.model, feed)[value.name]
                    ):
                        return Verdict("wrong", f"{value.name} at batch {batch}: off by {error:.1e}", nodes)
                    amplified = True
        return Verdict("rounding" if amplified else "equal", "", nodes)
    except Exception:  # whatever a pass raises is what is looked for
        return Verdict("wrong", traceback.format_exc())


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest error over the largest magnitude; infinite where one is finite and the other is not."""
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return math.inf
    error = np.abs(a.astype(np.float64) - b)[finite].max(initial=0.0)
    return float(error / max(np.abs(a[finite]).max(initial=0.0), 1e-3))


def exact(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the answers of a graph in FP64, which say how much of an FP32 answer is rounding."""
    double = onnx.ModelProto.FromString(model.SerializeToString())
    graph = double.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for attribute in (a for node in graph.node if node.op_type == "Cast" for a in node.attribute):
        attribute.i = TensorProto.DOUBLE
    wide = {name: array.astype(np.float64) for name, array in feed.items()}
    try:
        found = session(double).run(None, wide)
    except NoKernel:  # ONNX Runtime has no Erf of FP64, among others
        found = ReferenceEvaluator(double).run(None, wide)
    return dict(zip((value.name for value in graph.output), found, strict=True))


def main() -> int:
    """Judge many graphs, save those that went wrong, print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first graph; the next ones follow")
    parser.add_argument("--save", type=Path, help="folder for the graphs that went wrong")
    arguments = parser.parse_args()
    found: Counter[str] = Counter()
    before = after = 0
    start = time.perf_counter()
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        case = draw(seed)
        verdict = judge(case)
        found[verdict.kind] += 1
        before, after = before + verdict.nodes[0], after + verdict.nodes[1]
        if verdict.kind == "wrong":
            print(f"seed {seed}: {verdict.why}", flush=True)
            if arguments.save:
                onnx.save(case.model, arguments.save / f"graph_{seed}.onnx")
        if (seed + 1 - arguments.seed) % 1000 == 0:
            print(f"{sum(found.values())} after {time.perf_counter() - start:.0f} s: {dict(found)}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{sum(found.values())} graphs, {before} nodes became {after}, {seconds:.0f} s: {dict(found)}")
    return int(found["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
