"""What graphs are made of: a recipe draws one small graph around an operator or a few that belong together.

Element types, opsets, ranks, attributes and the way an operand comes about are drawn; what is likely legal and what is
likely not lie side by side, as near to the border as the dice have it. No recipe knows what the compiler says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.exporters.lint.corpus.draft import ANY, BATCH, BF16, BOOL, F16, F32, FLOATS, I32, I64, NUMBERS, U8

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.exporters.lint.corpus.draft import Dim, Draft

UNARY = (
    *(
        "Abs",
        "Acos",
        "Acosh",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "Ceil",
        "Cos",
        "Cosh",
        "Erf",
        "Exp",
        "Floor",
        "Identity",
    ),
    *("IsInf", "IsNaN", "Log", "Neg", "Not", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sinh"),
    *("Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "BitwiseNot"),
)
ACTIVATIONS = {
    "Celu": ("alpha",),
    "Elu": ("alpha",),
    "Gelu": ("approximate",),
    "HardSigmoid": ("alpha", "beta"),
    "HardSwish": (),
    "LeakyRelu": ("alpha",),
    "Mish": (),
    "Relu": (),
    "Selu": ("alpha", "gamma"),
    "Shrink": ("bias", "lambd"),
    "Swish": ("alpha",),
    "ThresholdedRelu": ("alpha",),
}
_SINCE = {
    **{"Gelu": 20, "HardSwish": 14, "Mish": 18, "Celu": 12, "Swish": 24, "BitwiseNot": 18, "Shrink": 9, "Round": 11},
    **{"IsNaN": 9, "IsInf": 10, "Erf": 9, "Sign": 9, "Acosh": 9, "Asinh": 9, "Atanh": 9, "Cosh": 9, "Sinh": 9},
    **{"ThresholdedRelu": 10, "GreaterOrEqual": 12, "LessOrEqual": 12, "Mod": 10, "BitShift": 11},
    **{"BitwiseAnd": 18, "BitwiseOr": 18, "BitwiseXor": 18, "RMSNormalization": 23, "LayerNormalization": 17},
    **{"GroupNormalization": 18, "MeanVarianceNormalization": 9},
}


def unary(d: Draft) -> None:
    op = d.pick(UNARY)
    d.since(_SINCE.get(op, 7), 0.97)
    usual = {BOOL: 1} if op == "Not" else ANY if op == "Identity" else NUMBERS if d.chance(0.5) else FLOATS
    d.tags.append(op)
    d.output(d.node(op, [d.data(d.dtype(usual, 0.2), d.shape())]))


def activation(d: Draft) -> None:
    op = d.pick(tuple(ACTIVATIONS))
    d.since(_SINCE.get(op, 7), 0.97)
    d.tags.append(op)
    given = {}
    for name in ACTIVATIONS[op]:
        if d.chance(0.5):
            given[name] = d.pick(("tanh", "none")) if name == "approximate" else round(d.dice.uniform(0.01, 2), 3)
    d.output(d.node(op, [d.data(d.dtype(FLOATS, 0.25), d.shape())], **given))


BINARY = {
    **{"Add": 3, "Sub": 2, "Mul": 3, "Div": 2, "Pow": 2.5, "Mod": 2, "PRelu": 1.5},
    **{"Equal": 1.5, "Greater": 1, "Less": 1, "GreaterOrEqual": 0.7, "LessOrEqual": 0.7},
    **{"And": 0.8, "Or": 0.5, "Xor": 0.7, "BitwiseAnd": 0.3, "BitwiseXor": 0.2, "BitShift": 0.2},
}


def binary(d: Draft) -> None:
    op = d.pick(BINARY)
    d.since(_SINCE.get(op, 7), 0.97)
    d.tags.append(op)
    usual = {BOOL: 1} if op in ("And", "Or", "Xor") else {I32: 1, I64: 1} if op.startswith("Bit") else NUMBERS
    first = d.dtype(usual, 0.15)
    second = first if d.chance(0.85) else d.dtype(usual, 0.2)
    a = d.shape()
    b: list[Dim] = list(a)
    if d.chance(0.4):
        b = [1 if d.chance(0.5) else dim for dim in a[d.dice.randint(0, len(a)) :]]
    if d.chance(0.05) and b:
        b[-1] = 5
    given = {}
    if op == "Mod" and d.chance(0.6):
        given["fmod"] = d.pick((0, 1))
    if op == "BitShift":
        given["direction"] = "LEFT"
    static = [dim if isinstance(dim, int) else 1 for dim in b]
    x = d.data(first, a)
    y = d.weight(static, second, low=0.5, high=2) if d.chance(0.5) else d.data(second, b)
    operands = [x, y] if d.chance(0.75) else [y, x]
    d.output(d.node(op, operands, **given))


def variadic(d: Draft) -> None:
    op = d.pick(("Max", "Min", "Sum", "Mean", "Max", "Min"))
    d.since(8)
    d.tags.append(op)
    dtype, dims = d.dtype(NUMBERS, 0.2), d.shape()
    count = d.pick({1: 1, 2: 4, 3: 2, 5: 0.5})
    operands = [d.data(dtype if d.chance(0.93) else d.dtype(NUMBERS), dims)]
    operands += [
        d.weight([], dtype) if d.chance(0.25) else d.data(dtype, [] if d.chance(0.1) else dims)
        for _ in range(count - 1)
    ]
    d.output(d.node(op, operands))


def where(d: Draft) -> None:
    d.since(9)
    dims = d.shape()
    condition = d.data(BOOL if d.chance(0.93) else d.dtype(ANY), dims if d.chance(0.6) else dims[-1:])
    dtype = d.dtype(ANY, 0.1)
    a = d.data(dtype, dims)
    other = dtype if d.chance(0.9) else d.dtype(ANY)
    d.output(d.node("Where", [condition, a, d.weight([], other) if d.chance(0.5) else d.data(other, dims)]))


def clip(d: Draft) -> None:
    dtype, dims = d.dtype(NUMBERS, 0.15), d.shape()
    x = d.data(dtype, dims)
    if d.opset < 11:
        limits = {"min": -0.5, "max": 0.5}
        d.output(d.node("Clip", [x], **{k: v for k, v in limits.items() if d.chance(0.7)}))
        return
    other = dtype if d.chance(0.9) else d.dtype(NUMBERS)
    bound = [] if d.chance(0.9) else [1]
    low, high = (d.weight(bound, other, low=v, high=v + 0.1) if d.chance(0.75) else "" for v in (-1, 1))
    operands = [x, low, high]
    while not operands[-1] and d.chance(0.7):
        operands.pop()
    d.output(d.node("Clip", operands))


def reduce(d: Draft) -> None:
    kinds = ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
    op = "Reduce" + d.pick({kind: 3 if i < 4 else 1 for i, kind in enumerate(kinds)})
    d.tags.append(op)
    dims = d.shape()
    x = d.data(d.dtype(NUMBERS, 0.2), dims)
    count = d.pick({0: 0.4, 1: 4, 2: 2, 3: 0.5})
    axes = [d.axis(len(dims)) for _ in range(count)]
    if d.chance(0.93):
        axes = list(dict.fromkeys(a % max(len(dims), 1) for a in axes))
    given = {"keepdims": d.pick((0, 1))} if d.chance(0.8) else {}
    if d.opset >= (13 if op == "ReduceSum" else 18):
        operands = [x]
        if d.chance(0.85):
            operands.append(d.integers(axes, I64 if d.chance(0.95) else I32, computed=0.15))
        if d.chance(0.25):
            given["noop_with_empty_axes"] = d.pick((0, 1))
        d.output(d.node(op, operands, **given))
        return
    d.output(d.node(op, [x], axes=axes if axes and d.chance(0.85) else None, **given))


def arg(d: Draft) -> None:
    op = d.pick(("ArgMax", "ArgMin"))
    dims = d.shape()
    given = {"axis": d.axis(len(dims))} if d.chance(0.85) else {}
    if d.chance(0.6):
        given["keepdims"] = d.pick((0, 1))
    if d.opset >= 12 and d.chance(0.3):
        given["select_last_index"] = d.pick((0, 1))
    d.tags.append(op)
    d.output(d.node(op, [d.data(d.dtype(NUMBERS, 0.15), dims)], **given))


def top_k(d: Draft) -> None:
    size = d.pick({8: 4, 3839: 0.4, 3840: 0.6, 3841: 0.8, 5000: 0.8, 16: 2})
    dims: list[Dim] = [*d.shape(d.pick((0, 1, 2))), size]
    k = size if d.chance(0.3) else d.pick((1, 3, 5, 8, 9, 20))
    given: dict[str, int] = {}
    if d.chance(0.6):
        given["axis"] = -1 if d.opset >= 10 and d.chance(0.7) else d.axis(len(dims))
    x = d.data(d.dtype(NUMBERS, 0.15), dims)
    if d.opset < 10:
        d.output(*d.nodes_of("TopK", [x], 2, k=k, **given))
        return
    if d.opset >= 11:
        given |= {name: d.pick((0, 1)) for name in ("largest", "sorted") if d.chance(0.5)}
    results = d.nodes_of("TopK", [x, d.integers([k], computed=0.15)], 2, **given)
    d.output(*results if d.chance(0.6) else [d.pick(results)])


def softmax(d: Draft) -> None:
    op = d.pick({"Softmax": 4, "LogSoftmax": 2, "Hardmax": 1})
    d.tags.append(op)
    dims = d.shape()
    given = {"axis": d.axis(len(dims))} if d.chance(0.8) else {}
    d.output(d.node(op, [d.data(d.dtype(), dims)], **given))


def cum_sum(d: Draft) -> None:
    d.since(11)
    dims = d.shape()
    given = {name: d.pick((0, 1)) for name in ("exclusive", "reverse") if d.chance(0.4)}
    axis = d.integers(d.axis(len(dims)), d.pick((I32, I64)))
    d.output(d.node("CumSum", [d.data(d.dtype(NUMBERS, 0.15), dims), axis], **given))


def layer_norm(d: Draft) -> None:
    op = d.pick({"LayerNormalization": 4, "RMSNormalization": 1.5})
    d.since(_SINCE[op], 0.95)
    d.tags.append(op)
    dims = d.shape(d.pick({1: 0.5, 2: 2, 3: 4, 4: 3, 5: 0.5}), sizes=(2, 4, 8))
    dtype, axis = d.dtype(), d.pick({-1: 6, 1: 1, len(dims) - 1: 1, -2: 1, 0: 0.3, len(dims): 0.2})
    given = {"axis": axis} if axis != -1 or d.chance(0.5) else {}
    if d.chance(0.4):
        given["epsilon"] = 1e-6
    if d.chance(0.2):
        given["stash_type"] = d.pick((F32, F16, BF16))
    tail = [dim if isinstance(dim, int) else 2 for dim in dims[axis if -len(dims) <= axis < len(dims) else -1 :]]
    if d.chance(0.1):
        tail = d.pick(([], [1], [3], [1, *tail], [*tail, 1]))
    other = dtype if d.chance(0.9) else d.dtype()
    operands = [d.data(dtype, dims), d.weight(tail, other)]
    if op == "LayerNormalization" and d.chance(0.8):
        operands.append(d.weight(tail if d.chance(0.95) else [1], other if d.chance(0.95) else d.dtype()))
    elif d.chance(0.04):
        operands.append("")
    results = [d.name("y")]
    if op == "LayerNormalization" and d.chance(0.12):
        results += d.pick(([""], ["", ""], [d.name("mean")], [d.name("mean"), d.name("dev")], ["", d.name("dev")]))
    d.add(op, operands, results, **given)
    d.output(results[0], *(r for r in results[1:] if r and d.chance(0.5)))


def batch_norm(d: Draft) -> None:
    dims = d.shape(d.pick({1: 0.2, 2: 1, 3: 1, 4: 4, 5: 1}), sizes=(2, 3, 4, 8))
    dtype = d.dtype()
    channels = dims[1] if len(dims) > 1 and isinstance(dims[1], int) else 2
    sizes = [channels] if d.chance(0.95) else [3]
    other = dtype if d.chance(0.85) else d.dtype()
    parameters = [d.weight(sizes, other, low=0.5, high=1.5, computed=0.03) for _ in range(4)]
    given: dict[str, float] = {"epsilon": 1e-5} if d.chance(0.5) else {}
    if d.chance(0.1):
        given["training_mode" if d.opset >= 14 else "momentum"] = d.pick((0, 1)) if d.opset >= 14 else 0.9
    results = [d.name("y")]
    if given.get("training_mode") == 1 or d.chance(0.05):
        results += [d.name("mean"), d.name("var")] + ([d.name("m2"), d.name("v2")] if d.opset < 14 else [])
    d.add("BatchNormalization", [d.data(dtype, dims), *parameters], results, **given)
    d.output(results[0])


def group_norm(d: Draft) -> None:
    op = d.pick(("InstanceNormalization", "GroupNormalization", "GroupNormalization", "LpNormalization", "LRN",
                 "MeanVarianceNormalization"))  # fmt: skip
    d.since(_SINCE.get(op, 7), 0.97)
    d.tags.append(op)
    dims = d.shape(d.pick({2: 1, 3: 2, 4: 5, 5: 2, 6: 0.3}), sizes=(2, 4, 8))
    dtype = d.dtype()
    x = d.data(dtype, dims)
    channels = int(dims[1]) if isinstance(dims[1], int) else 4
    if op == "LpNormalization":
        d.output(d.node(op, [x], axis=d.axis(len(dims)) if d.chance(0.8) else None, p=d.pick((None, 1, 2))))
    elif op == "LRN":
        d.output(d.node(op, [x], size=d.pick((1, 2, 3, 5)), alpha=d.pick((None, 0.01)), bias=d.pick((None, 2.0))))
    elif op == "MeanVarianceNormalization":
        d.output(d.node(op, [x], axes=d.pick((None, [0, 2, 3], [1], [-1]))))
    else:
        other = dtype if d.chance(0.9) else d.dtype()
        groups = d.pick((1, 2, channels, 3))
        grouped = op == "GroupNormalization" and (d.opset < 21) != d.chance(0.1)
        sizes = [groups if grouped else channels if d.chance(0.95) else 3]
        given = {"num_groups": groups} if op == "GroupNormalization" else {}
        if d.chance(0.4):
            given["epsilon"] = 1e-4
        d.output(d.node(op, [x, d.weight(sizes, other), d.weight(sizes, other)], **given))


def _window(d: Draft, spatial: int, *, dilate: bool = True) -> dict[str, object]:
    """Draw the attributes that convolutions and poolings share."""
    given: dict[str, object] = {}
    if d.chance(0.5):
        given["strides"] = [d.pick((1, 2, 3)) for _ in range(spatial)]
    if d.chance(0.15):
        given["auto_pad"] = d.pick(("SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"))
    elif d.chance(0.5):
        given["pads"] = [d.pick({0: 2, 1: 4, 2: 1, -1: 0.05}) for _ in range(2 * spatial)]
    if dilate and d.chance(0.2):
        given["dilations"] = [d.pick((1, 2)) for _ in range(spatial)]
    return given


def conv(d: Draft) -> None:
    op = d.pick({"Conv": 3, "ConvTranspose": 1.5})
    d.tags.append(op)
    spatial = d.pick({1: 2, 2: 6, 3: 1.2, 4: 0.5, 0: 0.15})
    dtype = d.dtype()
    group, width, kernel = d.pick({1: 5, 2: 1, 4: 1, 3: 0.2}), 4, [d.pick((1, 2, 3)) for _ in range(spatial)]
    dims = d.shape(1, sizes=(1, 2)) + [width] + [d.pick((5, 8)) for _ in range(spatial)]
    if d.chance(0.06) and spatial:
        dims[-1] = "w"
    out = d.pick((4, 8))
    sizes = [out, width // group, *kernel] if op == "Conv" else [width, out // group, *kernel]
    if d.chance(0.03):
        sizes[1] += 1
    given = _window(d, spatial)
    if d.chance(0.7):
        given["kernel_shape"] = kernel
    if group != 1 or d.chance(0.2):
        given["group"] = group
    if op == "ConvTranspose" and d.chance(0.35):
        if d.chance(0.7):
            given["output_padding"] = [d.pick((0, 1)) for _ in range(spatial)]
        else:
            given["output_shape"] = [d.pick((10, 16)) for _ in range(spatial)]
    other = dtype if d.chance(0.93) else d.dtype()
    operands = [d.data(dtype, dims), d.weight(sizes, other, computed=0.15)]
    if d.chance(0.5):
        operands.append(d.weight([out] if d.chance(0.95) else [out, 1], other if d.chance(0.95) else d.dtype()))
    d.output(d.node(op, operands, **given))


def pool(d: Draft) -> None:
    op = d.pick({"MaxPool": 3, "AveragePool": 3, "LpPool": 1.5, "GlobalAveragePool": 1.5, "GlobalMaxPool": 1,
                 "GlobalLpPool": 0.6})  # fmt: skip
    d.tags.append(op)
    spatial = d.pick({1: 2, 2: 6, 3: 1.2, 4: 0.4})
    dims = d.shape(1, sizes=(1, 2)) + [4] + [d.pick((5, 8)) for _ in range(spatial)]
    if d.chance(0.06):
        dims[-1] = "w"
    x = d.data(d.dtype(FLOATS, 0.15), dims)
    if op.startswith("Global"):
        d.output(d.node(op, [x], p=d.pick((1, 2, 3)) if op == "GlobalLpPool" and d.chance(0.5) else None))
        return
    given = _window(d, spatial, dilate=d.opset >= {"MaxPool": 10, "AveragePool": 19, "LpPool": 18}[op])
    if d.chance(0.25) and d.opset >= 10:
        given["ceil_mode"] = d.pick((0, 1))
    if op == "AveragePool" and d.chance(0.3):
        given["count_include_pad"] = d.pick((0, 1))
    if op == "LpPool" and d.chance(0.5):
        given["p"] = d.pick((1, 2, 3))
    if op == "MaxPool" and d.chance(0.2):
        given["storage_order"] = d.pick((0, 1))
    results = [d.name("y")] + ([d.name("i")] if op == "MaxPool" and d.chance(0.1) else [])
    d.add(op, [x], results, kernel_shape=[d.pick((1, 2, 3)) for _ in range(spatial)], **given)
    d.output(*results)


def mat_mul(d: Draft) -> None:
    batches = d.shape(d.pick({0: 3, 1: 3, 2: 3, 3: 0.5, 6: 0.1}))
    inner = d.pick((4, 8))
    dtype = d.dtype(FLOATS, 0.15)
    other = dtype if d.chance(0.93) else d.dtype()
    a: list[Dim] = [*batches, d.pick((1, 3, 8)), inner]
    b: list[Dim] = [inner if d.chance(0.97) else 5, d.pick((1, 4, 8))]
    if d.chance(0.1):
        a = a[:-2] + a[-1:] if d.chance(0.5) else [inner]
    if d.chance(0.08):
        b = [inner]
    if len(batches) and d.chance(0.35) and len(b) == 2:
        b = [*(1 if d.chance(0.2) else dim for dim in batches[d.dice.randint(0, len(batches) - 1) :]), *b]
    static = all(isinstance(dim, int) for dim in b)
    y = d.weight([int(dim) for dim in b], other) if static and d.chance(0.6) else d.data(other, b)
    d.output(d.node("MatMul", [d.data(dtype, a), y]))


def gemm(d: Draft) -> None:
    dtype = d.dtype(FLOATS, 0.15)
    other = dtype if d.chance(0.93) else d.dtype()
    trans_a, trans_b = d.pick((None, 0, 1)), d.pick((None, 0, 1))
    m: Dim = BATCH if d.chance(0.3) else 3
    a: list[Dim] = [8, m] if trans_a else [m, 8]
    if d.chance(0.08):
        a = d.pick(([3, 2, 8], [8], [BATCH, 3, 8]))
    given: dict[str, float | None] = {"transA": trans_a, "transB": trans_b}
    for name in ("alpha", "beta"):
        if d.chance(0.3):
            given[name] = d.pick((1.0, 0.5, 2.0, 0.0))
    operands = [d.data(dtype, a), d.weight([4, 8] if trans_b else [8, 4], other, computed=0.2)]
    if d.chance(0.7) or d.opset < 11:
        last = dtype if d.chance(0.95) else d.dtype()
        operands.append(d.weight(d.pick({(4,): 5, (1, 4): 1, (): 0.7, (1,): 0.5, (3, 1): 0.4, (5,): 0.2}), last))
    d.output(d.node("Gemm", operands, **given))


def einsum(d: Draft) -> None:
    d.since(12)
    equations = {
        "bij,bjk->bik": 3, "ij,jk->ik": 2, "bhid,bhjd->bhij": 3, "bhij,bhjd->bhid": 3, "bij,bjk": 1, "ij->ji": 1,
        "ii->i": 0.7, "bii->bi": 0.3, "ij,ij->": 1, "ij->i": 1, "...ij,...jk->...ik": 1, "i,j->ij": 1,
        "BIJ,BJK->BIK": 0.7,
        "bij,bjk,bkl->bil": 0.7, "ij,kj->ik": 1, "b i j , b j k -> b i k": 0.5, "bqhd,bkhd->bhqk": 1, "ijk->kji": 0.6,
        "ij,j->i": 1, "ijkl,ijkl->ij": 0.6,
    }  # fmt: skip
    equation = d.pick(equations)
    sizes: dict[str, Dim] = {}
    operands = []
    dtype = d.dtype(FLOATS, 0.15)
    for term in equation.replace(" ", "").partition("->")[0].split(","):
        dims: list[Dim] = []
        for letter in term.replace("...", "."):
            size = BATCH if letter == "b" and d.chance(0.4) else d.pick((3, 4, 8))
            dims += [2, 3] if letter == "." else [sizes.setdefault(letter, size)]
        other = dtype if d.chance(0.96) else d.dtype()
        operands.append(d.data(other, dims))
    d.output(d.node("Einsum", operands, equation=equation))


def transpose(d: Draft) -> None:
    dims = d.shape()
    perm = d.dice.sample(range(len(dims)), len(dims))
    if d.chance(0.05) and perm:
        perm[0] = perm[-1]
    d.output(d.node("Transpose", [d.data(d.dtype(ANY), dims)], perm=perm if d.chance(0.85) and perm else None))


def reshape(d: Draft) -> None:
    dims = d.shape(d.pick({1: 1, 2: 2, 3: 3, 4: 3, 5: 1, 7: 0.2}), sizes=(2, 4, 8))
    fixed = [dim for dim in dims if isinstance(dim, int)]
    size = int(np.prod(fixed[:], dtype=int))
    goal = d.pick(([-1], [0, -1], [0, size], [size], [-1, 2], [0, 2, -1], [0, 0, -1], [1, *[0] * 2, -1], [-1, -1],
                   [size, 2], [0, -1, 1, 1], [1] * 8 + [-1], [1] * 6 + [-1]))  # fmt: skip
    given = {"allowzero": d.pick((0, 1))} if d.opset >= 14 and d.chance(0.2) else {}
    x = d.data(d.dtype(ANY), dims)
    dtype = I64 if d.chance(0.97) else I32
    d.output(d.node("Reshape", [x, d.integers(goal, dtype, computed=0.2)], **given))


def squeeze(d: Draft) -> None:
    op = d.pick(("Squeeze", "Unsqueeze", "Unsqueeze"))
    d.tags.append(op)
    dims = d.shape(d.pick({0: 0.3, 1: 1, 2: 2, 3: 3, 4: 2, 7: 0.5, 8: 0.4}), sizes=(1, 1, 2, 4))
    ones = [i for i, dim in enumerate(dims) if dim == 1]
    axes = ones[: d.pick((1, 2))] if op == "Squeeze" else [d.dice.randint(-len(dims) - 1, len(dims))]
    if op == "Unsqueeze" and d.chance(0.3):
        axes = list(dict.fromkeys([*axes, 0]))
    if d.chance(0.08):
        axes = [d.axis(len(dims))]
    x = d.data(d.dtype(ANY), dims)
    if op == "Squeeze" and (not axes or d.chance(0.2)):
        d.output(d.node(op, [x]))
    elif d.opset >= 13:
        d.output(d.node(op, [x, d.integers(axes)]))
    else:
        d.output(d.node(op, [x], axes=axes))


def flatten(d: Draft) -> None:
    dims = d.shape()
    d.output(d.node("Flatten", [d.data(d.dtype(ANY), dims)], axis=d.pick((None, *range(-len(dims), len(dims) + 1)))))


def expand(d: Draft) -> None:
    op = d.pick(("Expand", "Tile"))
    d.since(8)
    d.tags.append(op)
    dims = d.shape(d.pick({0: 0.3, 1: 1, 2: 2, 3: 3, 4: 2}), sizes=(1, 1, 2, 4))
    x = d.data(d.dtype(ANY), dims)
    if op == "Tile":
        repeats = [d.pick((1, 2, 3)) for _ in dims] + ([1] if d.chance(0.04) else [])
        d.output(d.node(op, [x, d.integers(repeats, computed=0.2)]))
        return
    goal = [1 if isinstance(dim, str) else d.pick((1, 3)) if dim == 1 else d.pick((dim, 1)) for dim in dims]
    if d.chance(0.3):
        goal = [2, *goal]
    if d.chance(0.05):
        goal = [5] * len(goal)
    d.output(d.node(op, [x, d.integers(goal, computed=0.2)]))


def concat(d: Draft) -> None:
    dims = d.shape(d.pick({0: 0.1, 1: 1, 2: 2, 3: 3, 4: 2}))
    dtype = d.dtype(ANY)
    axis = d.axis(len(dims))
    operands = []
    for _ in range(d.pick({1: 1, 2: 4, 3: 2})):
        own = list(dims)
        if d.chance(0.4) and own and -len(own) <= axis < len(own):
            own[axis] = d.pick((1, 3))
        if d.chance(0.03) and own:
            own[0] = 7
        operands.append(d.data(dtype if d.chance(0.95) else d.dtype(ANY), own))
    if d.opset < 11 or d.chance(0.99):
        d.output(d.node("Concat", operands, axis=axis))


def split(d: Draft) -> None:
    dims = d.shape(d.pick({1: 1, 2: 2, 3: 3, 4: 2}), sizes=(4, 6, 8))
    axis = d.axis(len(dims))
    x = d.data(d.dtype(ANY), dims)
    size = dims[axis] if -len(dims) <= axis < len(dims) else 4
    parts = d.pick((1, 2, 2, 3, 4))
    length = size if isinstance(size, int) else 4
    sizes = [length // parts] * (parts - 1)
    sizes.append(length - sum(sizes) + (1 if d.chance(0.05) else 0))
    results = [d.name("y") if d.chance(0.97) else "" for _ in range(parts)]
    given: dict[str, object] = {"axis": axis} if axis or d.chance(0.5) else {}
    operands, explicit = [x], d.chance(0.6)
    if d.opset >= 13 and explicit:
        operands.append(d.integers(sizes))
    elif d.opset >= 18:
        given["num_outputs"] = parts
    elif d.opset < 13 and explicit:
        given["split"] = sizes
    d.add("Split", operands, results, **given)
    d.output(*(r for r in results if r))


def slice_(d: Draft) -> None:
    dims = d.shape(d.pick({0: 0.1, 1: 1, 2: 2, 3: 3, 4: 2}), sizes=(3, 4, 8))
    count = d.pick((1, 1, 2))
    axes = list(dict.fromkeys(d.axis(len(dims)) for _ in range(count)))
    starts = [d.pick((0, 1, -2, 0)) for _ in axes]
    ends = [d.pick((2, -1, 2**31, 2**63 - 1, 3, -100)) for _ in axes]
    x = d.data(d.dtype(ANY), dims)
    if d.opset < 10:
        d.output(d.node("Slice", [x], starts=starts, ends=ends, axes=axes if d.chance(0.8) else None))
        return
    dtype = I64 if d.chance(0.85) else I32
    ends = [min(end, 2**31 - 1) for end in ends] if dtype == I32 else ends
    operands = [x, d.integers(starts, dtype), d.integers(ends, dtype)]
    if d.chance(0.85):
        operands.append(d.integers(axes, dtype))
        if d.chance(0.5):
            operands.append(d.integers([d.pick({1: 4, 2: 2, -1: 1.5, 0: 0.2}) for _ in axes], dtype))
    d.output(d.node("Slice", operands))


def gather(d: Draft) -> None:
    op = d.pick({"Gather": 4, "GatherElements": 2, "GatherND": 2})
    d.since({"Gather": 7, "GatherElements": 11, "GatherND": 11}[op])
    d.tags.append(op)
    dims = d.shape(d.pick({0: 0.1, 1: 1, 2: 2, 3: 3, 4: 2}), sizes=(3, 4, 8))
    x = d.data(d.dtype(ANY), dims, stored=0.25)
    itype = d.pick({I64: 6, I32: 2, F32: 0.2, BOOL: 0.1, U8: 0.1})
    given: dict[str, int] = {}
    if op == "GatherND":
        batch = d.pick({0: 5, 1: 1, 2: 0.3})
        if batch and d.opset >= 12:
            given["batch_dims"] = batch
        shape: list[Dim] = [*dims[:batch], 2, min(len(dims), d.pick((1, 2)))]
    else:
        given = {"axis": d.axis(len(dims))} if d.chance(0.8) else {}
        shape = list(dims) if op == "GatherElements" else d.shape(d.pick({0: 1, 1: 3, 2: 1}), batch=0.1)
    static = all(isinstance(dim, int) for dim in shape)
    if static and d.chance(0.7):
        indices = d.constant(np.abs(d.array([int(s) for s in shape], I64)) % 3, itype)
    else:
        indices = d.input(itype, shape)
    d.output(d.node(op, [x, indices], **given))


def scatter(d: Draft) -> None:
    op = d.pick({"ScatterElements": 2, "ScatterND": 3, "Scatter": 0.4})
    d.since({"ScatterElements": 11, "ScatterND": 11, "Scatter": 9}[op])
    d.tags.append(op)
    dims = d.shape(d.pick({1: 1, 2: 2, 3: 3}), sizes=(3, 4, 8))
    dtype = d.dtype(NUMBERS)
    other = dtype if d.chance(0.95) else d.dtype(NUMBERS)
    itype = d.pick({I64: 6, I32: 1})
    given: dict[str, object] = {}
    if op == "ScatterND" and d.opset >= 16 and d.chance(0.3):  # that of ScatterElements is a plugin
        given["reduction"] = d.pick(("none", "add", "mul", *(("max", "min") if d.opset >= 18 else ())))
    if op == "ScatterND":
        indices = d.constant(np.abs(d.array([2, 1], I64)) % 3, itype)
        updates: list[Dim] = [2, *dims[1:]]
    else:
        shape = [dim if isinstance(dim, int) else 1 for dim in dims]
        indices = d.constant(np.abs(d.array(shape, I64)) % 3, itype)
        updates = list(shape)
        if d.chance(0.5):
            given["axis"] = d.axis(len(dims))
    d.output(d.node(op, [d.data(dtype, dims), indices, d.data(other, updates)], **given))


def pad(d: Draft) -> None:
    dims = d.shape(d.pick({1: 1, 2: 2, 3: 3, 4: 3}), sizes=(3, 4, 8))
    mode = d.pick({None: 3, "constant": 2, "reflect": 2, "edge": 2, "wrap": 0.6})
    if mode == "wrap":
        d.since(19, 0.9)
    pads = [0 if d.chance(0.5) else d.pick({1: 3, 2: 1, -1: 0.4}) for _ in range(2 * len(dims))]
    if d.chance(0.04):
        pads.append(0)
    x = d.data(dtype := d.dtype(ANY), dims)
    if d.opset < 11:
        d.output(d.node("Pad", [x], mode=mode, pads=pads, value=0.5 if d.chance(0.3) else None))
        return
    operands = [x, d.integers(pads, computed=0.15)]
    if d.chance(0.5):
        other = dtype if d.chance(0.9) else d.dtype(ANY)
        operands.append(d.weight([] if d.chance(0.8) else [1], other))
        if d.opset >= 18 and d.chance(0.3):
            axes = d.dice.sample(range(len(dims)), d.dice.randint(1, len(dims)))
            operands = [x, d.integers([0, 1] * len(axes)), operands[2], d.integers(axes)]
    d.output(d.node("Pad", operands, mode=mode))


def space(d: Draft) -> None:
    op = d.pick(("DepthToSpace", "SpaceToDepth"))
    d.tags.append(op)
    dims = d.shape(1) + d.pick(([4, 4, 4], [8, 2, 6], [4, 3, 4], [12, 4, 4], [4, 4]))
    mode = d.pick((None, "DCR", "CRD")) if op == "DepthToSpace" and d.opset >= 11 else None
    d.output(d.node(op, [d.data(d.dtype(NUMBERS), dims)], blocksize=d.pick((1, 2, 2, 3)), mode=mode))


def miscellaneous(d: Draft) -> None:
    op = d.pick(("OneHot", "EyeLike", "Trilu", "Range", "ConstantOfShape", "Shape", "Size", "ReverseSequence",
                 "Compress", "Unique", "Dropout", "Bernoulli", "RandomNormal", "RandomUniformLike", "RandomNormalLike",
                 "Det", "Hann",
                 "CenterCropPad", "Col2Im", "AffineGrid", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear",
                 "SequenceConstruct", "SplitToSequence", "OptionalHasElement", "StringNormalizer", "MaxUnpool",
                 "Upsample", "Dropout", "Range", "OneHot", "Trilu", "ConstantOfShape", "EyeLike", "Shape"))  # fmt: skip
    d.tags.append(op)
    dims = d.shape(d.pick({1: 1, 2: 3, 3: 3, 4: 2}), sizes=(2, 4, 8))
    dtype = d.dtype(ANY)
    if op == "OneHot":
        d.since(9)
        indices = d.data(d.pick((I64, I64, I32, F32)), dims)
        depth = d.integers([8] if d.chance(0.5) else 8, d.pick((I64, I64, I32)))
        d.output(d.node(op, [indices, depth, d.weight([2], d.dtype(NUMBERS))], axis=d.pick((None, -1, 0, 1))))
    elif op == "EyeLike":
        d.since(9)
        wanted = d.pick((None, F32, F16, I32, BOOL))
        shape = d.shape(2, batch=0.25) if d.chance(0.9) else dims
        d.output(d.node(op, [d.data(dtype, shape)], dtype=wanted, k=d.pick((None, 0, 1, -1))))
    elif op == "Trilu":
        d.since(14)
        operands = [d.data(dtype, dims)] + ([d.integers(d.pick((0, 1, -1)))] if d.chance(0.5) else [])
        d.output(d.node(op, operands, upper=d.pick((None, 0, 1))))
    elif op == "Range":
        d.since(11)
        kind = d.pick({I64: 3, I32: 1, F32: 2, F16: 1})
        ends = [d.constant(np.array(v), kind) for v in (0, d.pick((4, 10)), d.pick((1, 2)))]
        if d.chance(0.25):
            ends[1] = d.input(kind, [])
        d.output(d.node(op, ends))
    elif op == "ConstantOfShape":
        d.since(9)
        from onnx import numpy_helper

        value = numpy_helper.from_array(np.ones(1).astype(d.array([1], dtype).dtype), "v")
        y = d.node(op, [d.integers([2, 3], computed=0.3)], value=value if d.chance(0.8) else None)
        d.output(y if d.chance(0.5) else d.node("Identity", [y]))
    elif op in ("Shape", "Size"):
        given = {"start": d.pick((0, 1, -1)), "end": d.pick((2, -1, 9))} if op == "Shape" and d.opset >= 15 else {}
        d.output(d.node(op, [d.data(dtype, dims)], **(given if d.chance(0.4) else {})))
    elif op == "ReverseSequence":
        d.since(10)
        lengths = d.constant(np.full(int(dims[1]) if len(dims) > 1 and dims[1] != "n" else 1, 2), I64)
        d.output(d.node(op, [d.data(dtype, dims), lengths], batch_axis=1, time_axis=0))
    elif op == "Dropout":
        x = d.data(d.dtype(), dims)
        if d.opset < 12:
            d.output(d.node(op, [x], ratio=0.5 if d.chance(0.5) else None))
        else:
            operands = [x] + ([d.constant(np.float32(0.5))] if d.chance(0.6) else [])
            if len(operands) == 2 and d.chance(0.5):
                operands.append(d.constant(np.array(d.chance(0.3))) if d.chance(0.8) else d.input(BOOL, []))
            results = d.nodes_of(op, operands, d.pick((1, 1, 2)))
            d.output(*results[: d.pick((1, 2))])
    elif op == "Bernoulli":
        d.since(15)
        d.output(d.node(op, [d.data(F32, dims)]))
    elif op == "RandomNormal":
        d.output(d.node("Add", [d.node(op, [], shape=[2, 3], dtype=d.pick((F32, F32, F16))), d.data(F32, [2, 3])]))
    elif op.startswith("Random"):
        d.output(d.node(op, [d.data(d.dtype(), dims)], dtype=d.pick((None, F32, F16))))
    elif op == "Hann":
        d.since(17)
        d.output(d.node("HannWindow", [d.integers(8)], periodic=d.pick((None, 0, 1))))
    elif op == "Upsample":
        if d.opset > 9 and d.chance(0.8):
            d.opset = d.pick((7, 8, 9))
        x, factors = d.data(d.dtype(), [1, 2, 4, 4]), [1.0, 1.0, 2.0, d.pick((2.0, 1.5))]
        mode = d.pick((None, "nearest", "linear"))
        if d.opset == 9:
            d.output(d.node(op, [x, d.constant(np.float32(factors))], mode=mode))
        else:
            d.output(d.node(op, [x], mode=mode, scales=factors))
    elif op == "Compress":
        d.since(9)
        d.output(d.node(op, [d.data(dtype, dims), d.constant(np.array([True, False]))], axis=0))
    elif op == "Unique":
        d.since(11)
        d.output(d.node(op, [d.data(d.dtype(), dims)]))
    elif op == "CenterCropPad":
        d.since(18)
        d.output(d.node(op, [d.data(dtype, [8, 8]), d.integers([4, 4])]))
    elif op == "Col2Im":
        d.since(18)
        d.output(d.node(op, [d.data(d.dtype(), [1, 8, 9]), d.integers([4, 4]), d.integers([2, 2])]))
    elif op == "AffineGrid":
        d.since(20)
        d.output(d.node(op, [d.data(d.dtype(), [1, 2, 3]), d.integers([1, 3, 4, 4])]))
    elif op in ("MatMulInteger", "ConvInteger"):
        d.since(10)
        sizes = ([4, 8], [8, 2]) if op[0] == "M" else ([1, 2, 5, 5], [2, 2, 3, 3])
        d.output(d.node(op, [d.input(U8, sizes[0]), d.constant(np.ones(sizes[1], np.uint8))]))
    elif op == "DynamicQuantizeLinear":
        d.since(11)
        d.output(*d.nodes_of(op, [d.data(F32, dims)], 3))
    elif op == "SequenceConstruct":
        d.since(11)
        seq = d.node(op, [d.data(F32, [2, 3]), d.data(F32, [2, 3])])
        d.output(
            d.node("SequenceAt", [seq, d.integers(0)]) if d.chance(0.5) else d.node("ConcatFromSequence", [seq], axis=0)
        )
    elif op == "SplitToSequence":
        d.since(11)
        seq = d.node(op, [d.data(F32, [4, 3])], axis=0, keepdims=1)
        d.output(d.node("SequenceAt", [seq, d.integers(0)]))
    elif op == "OptionalHasElement":
        d.since(18)
        d.output(d.node(op, [d.data(F32, [2])]))
    elif op == "StringNormalizer":
        d.since(10)
        d.output(d.node(op, [d.input(8, [2])]))
    elif op == "MaxUnpool":
        d.since(9)
        x = d.data(F32, [1, 1, 2, 2])
        d.output(d.node(op, [x, d.input(I64, [1, 1, 2, 2])], kernel_shape=[2, 2], strides=[2, 2]))
    else:  # Det
        d.since(11)
        d.output(d.node(op, [d.data(F32, [3, 3])]))


def cast(d: Draft) -> None:
    d.since(9, 0.9)
    dtype, to = d.dtype(ANY, 0.25), d.dtype(ANY, 0.25)
    x = d.data(dtype, d.shape())
    if d.opset >= 15 and d.chance(0.2):
        y = d.node("CastLike", [x, d.weight([1], to)])
    else:
        given = {"saturate": d.pick((0, 1))} if d.opset >= 19 and d.chance(0.1) else {}
        y = d.node("Cast", [x], to=to, **given)
    d.output(d.node("Identity", [y]) if d.chance(0.25) else y)


RESIZE_COORDINATES = {
    **{"half_pixel": 3, "pytorch_half_pixel": 1.5, "align_corners": 2, "asymmetric": 3},
    **{"tf_crop_and_resize": 0.7, "tf_half_pixel_for_nn": 0.7, "half_pixel_symmetric": 0.7},
}


def resize(d: Draft) -> None:
    d.since(10)
    dims = [*d.shape(1, batch=0.4, sizes=(1, 2)), 2, *(d.pick((4, 8)) for _ in range(d.pick({1: 1, 2: 6, 3: 1.5})))]
    if d.chance(0.05):
        dims[-1] = "w"
    x = d.data(d.dtype(FLOATS, 0.15), dims)
    given: dict[str, object] = {"mode": d.pick({"nearest": 3, "linear": 3, "cubic": 2})} if d.chance(0.9) else {}
    factors = [1.0, 1.0, *(d.pick((2.0, 0.5, 1.0, 1.5)) for _ in dims[2:])]
    if d.chance(0.08):
        factors[1] = 2.0
    if d.opset < 11:
        d.output(d.node("Resize", [x, d.constant(np.float32(factors))], **given))
        return
    coordinates = d.pick(RESIZE_COORDINATES) if d.chance(0.8) else None
    given["coordinate_transformation_mode"] = coordinates
    if d.chance(0.3):
        given["nearest_mode"] = d.pick(("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"))
    rare = {"cubic_coeff_a": -0.5, "exclude_outside": 1, "extrapolation_value": 1.0}
    if d.opset >= 18:
        rare |= {"antialias": 1, "keep_aspect_ratio_policy": "not_larger"}
    given |= {name: value for name, value in rare.items() if d.chance(0.06)}
    roi = ""
    if coordinates == "tf_crop_and_resize":
        roi = d.constant(np.float32([0] * len(dims) + [1] * len(dims)))
    some = d.opset >= 18 and d.chance(0.2)
    if some:
        given["axes"] = list(range(2, len(dims)))
        factors = factors[2:]
    if d.chance(0.45):
        sizes = [
            max(1, int((s if isinstance(s, int) else 1) * f))
            for s, f in zip(dims[-len(factors) :], factors, strict=True)
        ]
        d.output(d.node("Resize", [x, roi, "", d.integers(sizes, computed=0.15)], **given))
    elif d.chance(0.12):
        d.output(d.node("Resize", [x, roi, d.input(F32, [len(factors)])], **given))
    else:
        d.output(d.node("Resize", [x, roi, d.constant(np.float32(factors))], **given))


def grid_sample(d: Draft) -> None:
    d.since(16)
    spatial = d.pick({2: 5, 3: 1.5, 1: 0.3})
    batch = d.shape(1, sizes=(1, 2))
    dtype = d.dtype()
    modes = ("linear", "cubic", "nearest") if d.opset >= 20 else ("bilinear", "bicubic", "nearest")
    other = dtype if d.chance(0.9) else d.dtype()
    grid = d.data(other, [*batch, *[4] * spatial, spatial])
    given = {"mode": d.pick((None, *modes)), "padding_mode": d.pick((None, "zeros", "border", "reflection"))}
    x = d.data(dtype, [*batch, 2, *[5] * spatial])
    d.output(d.node("GridSample", [x, grid], align_corners=d.pick((None, 0, 1)), **given))


def recurrent(d: Draft) -> None:
    op = d.pick(("LSTM", "GRU", "RNN"))
    d.tags.append(op)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    dtype, hidden = d.dtype(), 4
    direction = d.pick({None: 4, "forward": 1, "reverse": 1, "bidirectional": 2})
    both = 2 if direction == "bidirectional" else 1
    other = dtype if d.chance(0.93) else d.dtype()
    operands = [d.data(dtype, [3, BATCH if d.chance(0.3) else 2, 8])]
    operands += [d.weight([both, gates * hidden, n], other) for n in (8, hidden)]
    if d.chance(0.6):
        operands.append(d.weight([both, 2 * gates * hidden], other))
        if d.chance(0.2):
            operands.append(d.constant(np.full(2, 2), I32))
    given: dict[str, object] = {"hidden_size": hidden, "direction": direction}
    if d.opset >= 14 and d.chance(0.15):
        given["layout"] = d.pick((0, 1))
    if op == "LSTM" and d.chance(0.12):
        given["input_forget"] = d.pick((0, 1))
    if op == "GRU" and d.chance(0.4):
        given["linear_before_reset"] = d.pick((0, 1))
    if d.chance(0.15):
        given["clip"] = 3.0
    if d.chance(0.2):
        given["activations"] = (
            [d.pick(("Sigmoid", "Tanh", "Relu", "HardSigmoid", "Softsign"))]
            * {"LSTM": 3, "GRU": 2, "RNN": 1}[op]
            * both
        )
    d.output(*d.nodes_of(op, operands, d.pick((1, 2)), **given), dtype=dtype)


BASIC: dict[Callable[[Draft], None], float] = {
    unary: 7, activation: 4, binary: 9, variadic: 3, where: 2.5, clip: 3, reduce: 7, arg: 2.5, top_k: 3.5, softmax: 4,
    cum_sum: 1.5, layer_norm: 5, batch_norm: 2.5, group_norm: 4, conv: 7, pool: 5, mat_mul: 5, gemm: 4, einsum: 3,
    transpose: 2.5, reshape: 5, squeeze: 3, flatten: 1.5, expand: 3, concat: 3, split: 4, slice_: 4.5, gather: 4,
    scatter: 2.5, pad: 4, space: 1.5, miscellaneous: 9, cast: 4, resize: 6, grid_sample: 2, recurrent: 2,
}  # fmt: skip
