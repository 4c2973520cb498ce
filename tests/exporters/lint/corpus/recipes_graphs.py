"""Recipes of whole graphs: attention, parts of vision models, control flow, and what is odd about a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper

from tests.exporters.lint.corpus.draft import ANY, BATCH, BF16, BOOL, F16, F32, F64, FLOATS, I32, I64, Draft

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    from tests.exporters.lint.corpus.draft import Dim


def attention(d: Draft) -> None:
    """The operator Attention in its variants."""
    d.since(23, 0.97)
    dtype = d.dtype({F16: 5, F32: 4, BF16: 1.5}, 0.04)
    heads, keys, width = d.pick((1, 2, 4)), d.pick((1, 8, 16)), d.pick((8, 16, 20, 32))
    queries = keys if d.chance(0.6) else d.pick((1, 4))
    own_heads = heads if d.chance(0.85) else 1
    value = width if d.chance(0.9) else d.pick((8, 48))
    batch: Dim = BATCH if d.chance(0.4) else 2
    given: dict[str, Any] = {}
    packed = d.chance(0.3)
    shapes: list[list[Dim]]
    if packed:
        shapes = [[batch, queries, heads * width], [batch, keys, own_heads * width], [batch, keys, own_heads * value]]
        if d.chance(0.95):
            given |= {"q_num_heads": heads, "kv_num_heads": own_heads}
    else:
        shapes = [[batch, heads, queries, width], [batch, own_heads, keys, width], [batch, own_heads, keys, value]]
        if d.chance(0.05):
            shapes[0] = shapes[0][1:]
    for name, draw, often in (
        ("scale", lambda: 0.25, 0.3),
        ("is_causal", lambda: d.pick((0, 1)), 0.25),
        ("softcap", lambda: d.pick((0.0, 5.0)), 0.08),
        ("softmax_precision", lambda: d.pick((F32, F16, BF16)), 0.1),
        ("qk_matmul_output_mode", lambda: d.pick((0, 1, 2)), 0.06),
        ("TRT_decomposable", lambda: 1, 0.02),
    ):
        if d.chance(often):
            given[name] = draw()
    operands = [d.data(dtype if d.chance(0.97) else d.pick(FLOATS), shape, stored=0.02) for shape in shapes]
    if d.chance(0.45):
        kind = BOOL if d.chance(0.3) else dtype if d.chance(0.9) else d.pick(FLOATS)
        mask = d.pick(([queries, keys], [1, 1, queries, keys], [1, heads, queries, keys], [heads, queries, keys],
                       [1, 1, 1, keys], [queries, keys + 1], [1, 1, 1, queries, keys], [2, queries, keys],
                       [keys]))  # fmt: skip
        operands.append(d.weight(mask, kind, computed=0.3))
    if d.chance(0.06):
        operands += [""] * (4 - len(operands))
        operands += [d.input(dtype, [2, own_heads, 4, width]) for _ in range(2)]
    results = [d.name("y")]
    if d.chance(0.06):
        results += d.pick(([d.name("k"), d.name("v")], [""], ["", "", "", d.name("qk")]))
    d.add("Attention", operands, results, **given)
    d.output(*(r for r in results if r), dtype=dtype)


def rotary(d: Draft) -> None:
    op = d.pick(("RotaryEmbedding", "TensorScatter", "Swish", "RMSNormalization"))
    d.tags.append(op)
    dtype = d.dtype()
    if op == "RotaryEmbedding":
        d.since(23, 0.97)
        packed = d.chance(0.3)
        x = d.data(dtype, [2, 4, 16] if packed else [BATCH if d.chance(0.3) else 2, 2, 4, 8])
        half = 4 if d.chance(0.9) else 2
        indexed = d.chance(0.5)
        cache = [16, half] if indexed else [2, 4, half]
        operands = [x, d.weight(cache, dtype), d.weight(cache, dtype if d.chance(0.9) else d.dtype())]
        if indexed:
            operands.append(d.constant(np.tile(np.arange(4), (2, 1))) if d.chance(0.7) else d.input(I64, [2, 4]))
        given = {"num_heads": 2} if packed and d.chance(0.9) else {}
        if d.chance(0.3):
            given["interleaved"] = d.pick((0, 1))
        if half == 2 and d.chance(0.8):
            given["rotary_embedding_dim"] = 4
        d.output(d.node(op, operands, **given), dtype=dtype)
    elif op == "TensorScatter":
        d.since(24, 0.97)
        operands = [d.data(dtype, [2, 2, 16, 8]), d.data(dtype, [2, 2, 4, 8])]
        if d.chance(0.6):
            operands.append(d.input(I64, [2]))
        d.output(d.node(op, operands, mode=d.pick((None, "linear", "circular"))), dtype=dtype)
    elif op == "Swish":
        d.since(24, 0.97)
        d.output(d.node(op, [d.data(dtype, d.shape())], alpha=d.pick((None, 1.702))))
    else:
        d.since(23, 0.97)
        d.output(
            d.node(
                op,
                [d.data(dtype, [BATCH, 4, 8]), d.weight(d.pick(([8], [4, 8], [1], [4])), dtype)],
                axis=d.pick((None, -1, 1)),
            )
        )


def transformer(d: Draft) -> None:
    """Attention from primitive operators, with casts, masks and forms that differ."""
    d.since(13)
    dtype = d.pick(FLOATS)
    batch: Dim = BATCH if d.chance(0.5) else 2
    tokens, heads, width = d.pick((4, 9, 16)), d.pick((1, 2, 3)), d.pick((8, 16))
    x = d.input(dtype, [batch, tokens, heads * width])
    h = x
    if d.chance(0.5):
        d.since(17)
        sizes = [heads * width]
        h = d.node("LayerNormalization", [h, d.weight(sizes, dtype if d.chance(0.95) else F32), d.weight(sizes, dtype)])
    qkv = d.node("MatMul", [h, d.weight([heads * width, 3 * heads * width], dtype if d.chance(0.96) else F32)])
    if d.chance(0.7):
        qkv = d.node("Add", [qkv, d.weight([3 * heads * width], dtype if d.chance(0.97) else F32)])
    goal = d.pick(
        (
            [0, tokens, 3, heads, width],
            [-1, tokens, 3, heads, width],
            [0, 0, 3, heads, width],
            [2, tokens, 3, heads, width],
        )
    )
    r = d.node("Reshape", [qkv, d.integers(goal, computed=0.08)])
    t = d.node("Transpose", [r], perm=[2, 0, 3, 1, 4])
    if d.chance(0.6):
        given = {"num_outputs": 3} if d.opset >= 18 else {}
        parts = d.nodes_of("Split", [t], 3, axis=0, **given)
        q, k, v = (d.node("Squeeze", [p, d.integers([0], computed=0.02)]) for p in parts)
    else:
        q, k, v = (d.node("Gather", [t, d.constant(np.asarray(i))], axis=0) for i in range(3))
    kt = d.node("Transpose", [k], perm=[0, 1, 3, 2])
    scale = d.constant(np.asarray(width**-0.5), dtype if d.chance(0.95) else F32)
    if d.chance(0.5):
        q = d.node("Mul", [q, scale])
        s = d.node("MatMul", [q, kt])
    else:
        s = d.node(d.pick(("Mul", "Div")), [d.node("MatMul", [q, kt]), scale])
    if d.chance(0.5):
        s = d.node(
            "Add", [s, d.weight(d.pick(([heads, tokens, tokens], [tokens, tokens], [1, 1, tokens, tokens])), dtype)]
        )
    if d.chance(0.3):
        p = d.node(
            "Cast", [d.node("Softmax", [d.node("Cast", [s], to=F32)], axis=-1)], to=dtype if d.chance(0.93) else F32
        )
    else:
        p = d.node("Softmax", [s], axis=d.pick((-1, 3)))
    o = d.node("Transpose", [d.node("MatMul", [p, v])], perm=[0, 2, 1, 3])
    o = d.node("Reshape", [o, d.integers([0, tokens, heads * width], computed=0.05)])
    d.output(d.node("Add", [o, x]) if d.chance(0.5) else o)


def convolutions(d: Draft) -> None:
    """A patch embedding or a block of a convolutional network, with a head."""
    d.since(13)
    dtype = d.pick(FLOATS)
    batch: Dim = BATCH if d.chance(0.5) else 2
    x = d.input(dtype, [batch, 3, 16, 16])
    h = d.node(
        "Conv", [x, d.weight([8, 3, 4, 4], dtype if d.chance(0.96) else F32), d.weight([8], dtype)], strides=[4, 4]
    )
    if d.chance(0.4):
        ps = [d.weight([8], dtype if d.chance(0.95) else F32, low=0.5, high=1.5) for _ in range(4)]
        h = d.node("BatchNormalization", [h, *ps])
    act = d.pick(("Relu", "Sigmoid", "gelu", "clip", "silu", "none"))
    if act == "gelu":
        e = d.node("Erf", [d.node("Div", [h, d.constant(np.asarray(1.4142), dtype)])])
        one = d.constant(np.asarray(1.0), dtype if d.chance(0.9) else F32)
        h = d.node("Mul", [d.node("Mul", [h, d.node("Add", [e, one])]), d.constant(np.asarray(0.5), dtype)])
    elif act == "clip":
        h = d.node("Clip", [h, d.constant(np.asarray(0.0), dtype), d.constant(np.asarray(6.0), dtype)])
    elif act == "silu":
        h = d.node("Mul", [h, d.node("Sigmoid", [h])])
    elif act != "none":
        h = d.node(act, [h])
    end = d.pick(("tokens", "pool", "mean", "up", "window"))
    d.tags.append(end)
    if end == "tokens":
        flat = d.node("Reshape", [h, d.integers([0, 8, -1])])
        tokens = d.node("Transpose", [flat], perm=[0, 2, 1])
        if d.chance(0.5) and batch != BATCH:
            tokens = d.node(
                "Concat", [d.node("Expand", [d.weight([1, 1, 8], dtype), d.integers([2, 1, 1])]), tokens], axis=1
            )
        d.output(tokens)
    elif end == "pool":
        flat = d.node("Flatten", [d.node("GlobalAveragePool", [h])], axis=1)
        d.output(d.node("Gemm", [flat, d.weight([10, 8], dtype), d.weight([10], dtype)], transB=1))
    elif end == "mean":
        m = d.node("ReduceMean", [h, d.integers([2, 3])]) if d.opset >= 18 else d.node("ReduceMean", [h], axes=[2, 3])
        d.output(d.node("Softmax", [m], axis=1))
    elif end == "up":
        sized = d.chance(0.4)
        operands = [h, "", *(["", d.integers([2, 8, 8, 8])] if sized else [d.constant(np.float32([1, 1, 2, 2]))])]
        d.output(d.node("Resize", operands, mode=d.pick(("nearest", "linear"))))
    else:
        w = d.node("Transpose", [d.node("Reshape", [h, d.integers([-1, 8, 2, 2, 2, 2])])], perm=[0, 2, 4, 3, 5, 1])
        d.output(d.node("Reshape", [w, d.integers([-1, 4, 8])]))


def shapes(d: Draft) -> None:
    """Shape arithmetic as exporters write it."""
    d.since(13)
    dtype = d.dtype(FLOATS, 0.1)
    batch: Dim = BATCH if d.chance(0.6) else 2
    x = d.input(dtype, [batch, 4, 6])
    shape = d.node("Shape", [x])
    first = d.node("Gather", [shape, d.constant(np.asarray(0))], axis=0)
    row = d.node("Unsqueeze", [first, d.constant(np.array([0]))])
    if d.chance(0.2):
        row = d.node(d.pick(("Mul", "Div", "Add")), [row, d.constant(np.array([1]))])
    kind = d.pick(("reshape", "expand", "zeros", "range", "slice", "resize", "output", "tile", "topk", "pad"))
    d.tags.append(kind)
    if kind == "reshape":
        d.output(d.node("Reshape", [x, d.node("Concat", [row, d.constant(np.array([-1]))], axis=0)]))
    elif kind == "expand":
        goal = d.node("Concat", [row, d.constant(np.array([1, 6]))], axis=0)
        d.output(d.node("Concat", [d.node("Expand", [d.weight([1, 1, 6], dtype), goal]), x], axis=1))
    elif kind == "zeros":
        z = d.node("ConstantOfShape", [d.node("Concat", [row, d.constant(np.array([4, 6]))], axis=0)])
        d.output(d.node("Add", [x, d.node("Cast", [z], to=dtype)]))
    elif kind == "range":
        r = d.node("Range", [d.constant(np.asarray(0)), first, d.constant(np.asarray(1))])
        d.output(d.node("Cast", [r], to=d.pick((F32, I32))))
    elif kind == "slice":
        d.output(d.node("Slice", [x, d.constant(np.array([0])), row, d.constant(np.array([0]))]))
    elif kind == "resize":
        goal = d.node("Concat", [row, d.constant(np.array([4, 12]))], axis=0)
        d.output(d.node("Resize", [x, "", "", goal], mode=d.pick(("nearest", "linear"))))
    elif kind == "tile":
        d.output(
            d.node("Tile", [d.weight([1, 6], dtype), d.node("Concat", [row, d.constant(np.array([1]))], axis=0)]), x
        )
    elif kind == "topk":
        d.output(*d.nodes_of("TopK", [x, row], 2))
    elif kind == "pad":
        zero = d.constant(np.array([0]))
        d.output(d.node("Pad", [x, d.node("Concat", [zero, zero, zero, zero, row, zero], axis=0)]))
    else:
        d.output(shape if d.chance(0.5) else row)


def _body(d: Draft, dtype: int, dims: list[Dim], name: str, captured: str, op: str) -> onnx.GraphProto:
    y = d.name("b")
    node = helper.make_node(op, [captured] * (2 if op in ("Add", "Mul") else 1), [y], name=f"{name}.{op}")
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(y, dtype, dims)])


def branches(d: Draft) -> None:
    """An If."""
    dtype = d.dtype(ANY, 0.05)
    dims = d.shape(d.pick((1, 2, 3)))
    x = d.input(dtype, dims)
    condition = d.pick({"input": 5, "constant": 2, "vector": 0.7, "computed": 2, "float": 0.4})
    d.tags.append(condition)
    c = {
        "input": lambda: d.input(BOOL, []),
        "constant": lambda: d.constant(np.array(True)),
        "vector": lambda: d.input(BOOL, [1] if d.chance(0.6) else [2]),
        "computed": lambda: d.node("Greater", [d.node("Size", [x]), d.constant(np.asarray(3))]),
        "float": lambda: d.input(F32, []),
    }[condition]()
    ops = ("Identity", "Abs", "Neg", "Relu", "Add", "Mul", "Add")
    then_dims, else_dims = list(dims), list(dims)
    then = _body(d, dtype, then_dims, "then", x, d.pick(ops))
    other = _body(d, dtype, else_dims, "else", x, d.pick(ops))
    if d.chance(0.12):
        y = d.name("b")
        cast = helper.make_node("Cast", [x], [y], to=F32 if dtype != F32 else F16)
        other = helper.make_graph(
            [cast], "else", [], [helper.make_tensor_value_info(y, F32 if dtype != F32 else F16, else_dims)]
        )
    elif d.chance(0.12):
        y = d.name("b")
        flat = helper.make_node("Flatten", [x], [y], axis=0)
        other = helper.make_graph([flat], "else", [], [helper.make_tensor_value_info(y, dtype, None)])
    d.output(d.node("If", [c], then_branch=then, else_branch=other), dtype=dtype)


def loops(d: Draft) -> None:
    """A Loop or a Scan."""
    dtype = d.dtype(FLOATS, 0.15)
    op = d.pick(("Loop", "Loop", "Scan"))
    d.tags.append(op)
    dims = d.shape(d.pick((1, 2)), batch=0.2)
    scans = d.chance(0.4)
    x = d.input(dtype, dims)
    step = d.pick(("Add", "Mul", "Relu"))
    if op == "Scan":
        d.since(9, 1)
        info = helper.make_tensor_value_info
        a, b, s, y = (d.name("b") for _ in range(4))
        nodes = [helper.make_node("Add", [a, b], [s]), helper.make_node("Identity", [s], [y])]
        body = helper.make_graph(
            nodes, "body", [info(a, dtype, [4]), info(b, dtype, [4])], [info(s, dtype, [4]), info(y, dtype, [4])]
        )
        given = {"scan_input_directions": [1]} if d.chance(0.2) else {}
        if d.chance(0.15):
            given["scan_input_axes"] = [1]
        d.output(
            *d.nodes_of(
                "Scan", [d.weight([4], dtype), d.data(dtype, [4, 4])], 2, body=body, num_scan_inputs=1, **given
            ),
            dtype=dtype,
        )
        return
    i, c, v, c2, v2, out = (d.name("b") for _ in range(6))
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Identity", [c], [c2]), helper.make_node(step, [v, x] if step != "Relu" else [v], [v2])]
    results = [info(c2, BOOL, []), info(v2, dtype, dims)]
    if scans:
        nodes.append(helper.make_node("Identity", [v2], [out]))
        results.append(info(out, dtype, dims))
    body = helper.make_graph(nodes, "body", [info(i, I64, []), info(c, BOOL, []), info(v, dtype, dims)], results)
    trips = d.pick({"constant": 5, "input": 2, "none": 0.7, "int32": 0.4, "vector": 0.6})
    d.tags.append(trips)
    count = {
        "constant": lambda: d.constant(np.asarray(3)),
        "input": lambda: d.input(I64, []),
        "none": lambda: "",
        "int32": lambda: d.constant(np.asarray(3), I32),
        "vector": lambda: d.constant(np.array([3])),
    }[trips]()
    keep = d.pick((lambda: d.constant(np.array(True)), lambda: "", lambda: d.input(BOOL, [])))()
    d.output(*d.nodes_of("Loop", [count, keep, d.data(dtype, dims)], 2 if scans else 1, body=body), dtype=dtype)


def constants(d: Draft) -> None:
    """Stored values of every type and form, read by something, or not."""
    kind = d.pick(("attribute", "attribute", "initializer", "initializer", "initializer", "output", "default", "rank"))
    d.tags.append(kind)
    if kind == "attribute":
        d.since(12, 0.97)
        name = d.pick(("value_float", "value_floats", "value_int", "value_ints", "value_string", "value_strings"))
        value = {
            "value_float": 1.5, "value_floats": [1.5, 2.5], "value_int": 3, "value_ints": [3, 4],
            "value_string": "a", "value_strings": ["a", "b"],
        }.get(name)  # fmt: skip
        c = d.node("Constant", [], **{name: value})
        if name.startswith("value_string"):
            d.output(c, dtype=TensorProto.STRING)
            return
        y = d.node("Cast", [c], to=F32)
        d.output(d.node("Add", [y, d.input(F32, [2] if name.endswith("s") else [3])]))
        return
    dtype = d.dtype(ANY, 0.4)
    dims = [d.pick((1, 2, 3)) for _ in range(d.pick((0, 1, 2, 3)))]
    if kind == "rank":
        dims = [1] * d.pick((6, 7, 8, 9, 10))
        x = d.input(F32, [2])
        c = d.constant(d.array(dims, F32))
        y = d.node("Reshape", [c, d.constant(np.array([1]))])
        d.output(d.node("Add", [x, y]))
        return
    if kind == "output":
        x = d.input(F32, [2])
        d.output(d.node("Relu", [x]))
        c = d.constant(d.array(dims, dtype))
        d.output(c if d.chance(0.6) else d.node("Identity", [c]), dtype=dtype)
        return
    if kind == "default":
        name = d.constant(d.array(dims, dtype), node=0)
        d.inputs.append(helper.make_tensor_value_info(name, dtype, dims))
        d.output(d.node("Add", [d.input(dtype, dims), name]))
        return
    c = d.constant(d.array(dims, dtype))
    reader = d.pick(("Add", "Cast", "Identity", "Concat", "Reshape", "unread", "Mul"))
    d.tags.append(reader)
    x = d.input(dtype if d.chance(0.8) else F32, dims)
    if reader == "Cast":
        d.output(d.node("Add", [d.node("Cast", [c], to=F32), d.input(F32, dims)]))
    elif reader == "Concat":
        d.output(d.node("Concat", [x, c], axis=0))
    elif reader == "Reshape":
        d.output(d.node("Reshape", [c, d.constant(np.array([-1]))]), d.node("Identity", [x]))
    elif reader == "unread":
        d.output(d.node("Identity", [x]))
    elif reader == "Identity":
        d.output(d.node("Identity", [c]), d.node("Identity", [x]))
    else:
        d.output(d.node(reader, [x, c]))


def files(d: Draft) -> None:
    """A sound graph in a file that is odd."""
    dtype, dims = d.pick(FLOATS), d.shape(d.pick((1, 2, 3)))
    x = d.input(dtype, dims)
    kind = d.pick((
        "opset", "opset", "ir", "nameless", "twins", "unsorted", "circle", "nothing", "input-output", "twice", "domain",
        "unknown", "extra", "missing", "unread-input", "unread-node", "attribute", "batch", "no-shape", "empty-name",
        "many", "function", "uint8", "double", "lie", "rank", "trailing",
    ))  # fmt: skip
    d.tags.append(kind)
    y = d.node("Relu", [x])
    z = d.node("Add", [y, x])
    if kind == "opset":
        d.opset = d.pick((1, 3, 5, 6, 7, 8, 9, 10, 24, 25, 26, 27))
    elif kind == "ir":
        d.ir_version = d.pick((1, 2, 3, 4, 7, 8, 9, 11, 12, 13))
    elif kind == "nameless":
        for node in d.nodes:
            node.name = ""
    elif kind == "twins":
        for node in d.nodes:
            node.name = "n"
    elif kind == "unsorted":
        d.nodes.reverse()
    elif kind == "circle":
        d.nodes[0].input[0] = z
    elif kind == "nothing":
        d.nodes[0].input[0] = "nowhere"
    elif kind == "input-output":
        d.output(x, dtype=dtype)
    elif kind == "twice":
        d.output(z)
    elif kind == "domain":
        z = d.node(
            d.pick(("FastGelu", "Gelu", "FusedMatMul", "QuickGelu", "Relu")),
            [z],
            domain=d.pick(("com.microsoft", "own", "ai.onnx.ml")),
        )
    elif kind == "unknown":
        z = d.node(
            d.pick(("Nonsense", "relu", "ImageScaler", "ScaledTanh", "ParametricSoftplus", "CausalConvWithState")), [z]
        )
    elif kind == "extra":
        d.nodes[0].input.append(x)
    elif kind == "missing":
        d.nodes[1].input.pop()
    elif kind == "unread-input":
        d.input(d.dtype(ANY, 0.3), d.shape())
    elif kind == "unread-node":
        d.node(d.pick(("Sigmoid", "Nonsense", "BitShift")), [z])
    elif kind == "attribute":
        d.nodes[0].attribute.append(helper.make_attribute(d.pick(("alpha", "axis", "TRT_own")), 1))
    elif kind == "batch":
        z = d.node("Relu", [d.input(dtype, ["m", "n", "k"])])
    elif kind == "no-shape":
        d.inputs[0].type.tensor_type.ClearField("shape")
    elif kind == "empty-name":
        z = d.node("Relu", [d.node("Dropout", [z])])
        d.nodes[-2].output.append("")
    elif kind == "many":
        d.output(y)
    elif kind == "uint8":
        u = d.input(TensorProto.UINT8, dims)
        z = d.node("Add", [x, d.node("Cast", [u], to=dtype)]) if d.chance(0.6) else d.node("Transpose", [u])
    elif kind == "double":
        z = d.node(d.pick(("Add", "Sigmoid", "MatMul")), [d.input(F64, [2, 2])] * (2 if d.chance(0.6) else 1))
    elif kind == "lie":
        d.output(z, dtype=F32 if dtype != F32 else F16)
        return
    elif kind == "rank":
        z = d.node("Relu", [d.input(dtype, [1] * d.pick((7, 8, 9, 10)))])
    elif kind == "trailing":
        d.nodes[-1].input.append("")
    d.output(z)


GRAPHS: dict[Callable[[Draft], None], float] = {
    attention: 9, rotary: 2.5, transformer: 5, convolutions: 5, shapes: 5, branches: 2.5, loops: 2.5, constants: 5,
    files: 8,
}  # fmt: skip
