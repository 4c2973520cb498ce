"""Q/DQ pairs: their scales, their numbers, what they stand before, and the graphs in which they are hard to place."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from deploycli.exporters.graph.onnx_file import load_model, write_model
from deploycli.exporters.passes.pipeline import tidy
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.insert_qdq import check_opset, insert, scales
from deploycli.exporters.precision.placement import place
from deploycli.exporters.precision.policy import Policy
from deploycli.exporters.precision.simulate import open_runtime
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.models.errors import UsageError
from tests.exporters.precision.networks import (
    FLOAT,
    HALF,
    assert_valid,
    block,
    graph,
    node,
    normal,
    proto_of,
    quantized,
    ranges,
    run,
    source,
    values,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Array = Any
X = {"x": normal(3, 8, 32)}
Q, DQ = "QuantizeLinear", "DequantizeLinear"


def constant(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def of_type(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type == op_type]


def operand(found: ir.Node, position: int) -> ir.Value:
    value = found.inputs[position]
    assert value is not None
    return value


def pair(found: ir.Node, position: int) -> tuple[ir.Node | None, ir.Node]:
    """The Q and the DQ that an operand comes from, nothing between them; no Q where INT8 is stored."""
    dq = operand(found, position).producer()
    assert dq is not None
    assert dq.op_type == DQ
    q = operand(dq, 0).producer()
    assert q is None or q.op_type == Q
    return q, dq


# Where pairs stand.


def test_pairs_stand_right_before_what_they_serve_and_nowhere_else() -> None:
    model, placement = quantized(block, X)
    assert_valid(model)
    plain = block()
    served = set()
    for site in placement.sites:
        for i in (*site.activations, *(() if site.axis is None else (1,))):
            q, dq = pair(site.node, i)
            before = operand(node(plain, site.node.name or ""), i).name
            name = before if q is not None else f"{before}.int8"
            assert operand(q if q is not None else dq, 0).name == name
            served.add((site.node.name, i))
    readers = {(n.name, i) for dq in of_type(model, DQ) for n, i in dq.outputs[0].uses()}
    assert readers == served
    assert all(n.op_type == DQ for q in of_type(model, Q) for n in q.outputs[0].consumers())
    for op_type in ("LayerNormalization", "Softmax", "Gelu", "Transpose", "Reshape", "Mul"):
        assert all(source(n, 0) not in (Q, DQ) for n in of_type(model, op_type))
    for n in of_type(model, "Add"):  # a bias, or a stream: never quantised
        assert [source(n, i) for i in (0, 1)].count(DQ) <= int(n.name in placement.groups)


def test_three_products_share_the_pair_of_their_normalisation() -> None:
    model, _ = quantized(block, X, scheme="gemm")
    assert len({pair(node(model, name), 0)[1] for name in ("MatMul", "MatMul_1", "MatMul_2")}) == 1
    assert Counter(q.inputs[0].name for q in of_type(model, Q)) == dict.fromkeys(("n1", "o2", "n2", "h2"), 1)  # type: ignore[union-attr]


def test_keys_are_quantised_behind_their_transpose() -> None:
    model, _ = quantized(block, X, scheme="attention")
    scores = node(model, "MatMul_3")
    for position, value in ((0, "q"), (1, "kt")):
        q, _ = pair(scores, position)
        assert q is not None
        assert operand(q, 0).name == value
        assert source(q, 0) == "Transpose"


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_probabilities_have_a_fixed_scale(dtype: ir.DataType) -> None:
    model, _ = quantized(block, X, scheme="attention", scale_type=dtype)
    q, dq = pair(node(model, "MatMul_4"), 0)
    assert q is not None
    assert q.inputs[1:] == dq.inputs[1:]
    scale = constant(model, operand(q, 1).name or "")
    assert scale == scales(np.array(1.0), dtype)
    np.testing.assert_allclose(scale, 1 / 127, rtol=2**-10 if dtype == HALF else 2**-23)
    assert ranges(block(), X)["p"] < 0.9  # by data it would have been another


def test_every_zero_point_is_written_out() -> None:
    model, _ = quantized(block, X)
    nodes = of_type(model, Q) + of_type(model, DQ)
    assert len(nodes) > 20
    for n in nodes:
        assert len(n.inputs) == 3
        zero, scale = (constant(model, operand(n, i).name or "") for i in (2, 1))
        assert zero.dtype == np.int8
        assert zero.shape == scale.shape
        assert not zero.any()


# Scales and numbers.

AMAX = st.floats(2.0**-30, 60000) | st.sampled_from([0.0, 1.0, 127.0, 2.0**-14 * 127, 1e-30, 65504.0])


@given(AMAX)
def test_scales_are_normal_and_reach_the_ends(amax: float) -> None:
    for dtype, smallest in ((FLOAT, 2.0**-126), (HALF, 2.0**-14), (ir.DataType.BFLOAT16, 2.0**-126)):
        (scale,) = scales(np.array([amax]), dtype)
        assert scale == np.float32(scale.astype(dtype.numpy()))  # a number of the type
        assert scale >= smallest
        assert 127 * float(scale) >= amax  # nothing is clipped
        if amax / 127 >= smallest:
            level = np.rint(np.float32(amax) / scale)
            assert level == 127 or (dtype == ir.DataType.BFLOAT16 and level == 126)


@given(st.lists(AMAX, min_size=1, max_size=5))
def test_scales_are_found_one_by_one(amax: list[float]) -> None:
    together = scales(np.array(amax), HALF)
    assert together.tolist() == [float(scales(np.array(value), HALF)) for value in amax]


LAYERS: dict[str, tuple[str, tuple[int, ...], int, tuple[int, ...]]] = {
    "MatMul": ("float[b,4,16] x", (16, 24), 1, (2, 4, 16)),
    "Gemm": ("float[b,16] x", (16, 24), 1, (2, 16)),
    "Gemm<transB=1>": ("float[b,16] x", (24, 16), 0, (2, 16)),
    "Gemm<transA=1>": ("float[16,b] x", (16, 24), 1, (16, 2)),
    "Conv": ("float[b,16,5,5] x", (24, 16, 3, 3), 0, (2, 16, 5, 5)),
    "Conv<strides=[2]>": ("float[b,16,5] x", (24, 16, 3), 0, (2, 16, 5)),
    "Conv<group=2>": ("float[b,32,5,5] x", (32, 16, 3, 3), 0, (2, 32, 5, 5)),
}


def layer(name: str, weight: Array) -> Callable[[], ir.Model]:
    """A layer behind a Relu, so that it is not the first."""
    return lambda: graph(f"({LAYERS[name][0]}) => (float[] y) {{ r = Tanh(x) y = {name}(r, w) }}", w=weight)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_has_a_scale_for_each_output_channel(name: str, dtype: ir.DataType) -> None:
    _, shape, axis, given_shape = LAYERS[name]
    others = tuple(i for i in range(len(shape)) if i != axis)
    spread = np.expand_dims(np.geomspace(0.02, 20, shape[axis]), others)
    weight = (normal(*shape) * spread).astype(np.float32)
    inputs = {"x": normal(*given_shape)}
    model, _ = quantized(layer(name, weight), inputs, scale_type=dtype)
    assert_valid(model)
    q, dq = pair(model.graph[-1], 1)
    assert q is None
    assert dq.attributes.get_int("axis") == axis
    stored, scale = constant(model, "w.int8"), constant(model, "w.scale")
    assert stored.shape == shape
    assert scale.shape == (shape[axis],)
    held = weight.astype(np.float16).astype(np.float32) if dtype == HALF else weight
    np.testing.assert_array_equal(scale, scales(np.abs(held).max(others), dtype))
    assert np.abs(stored).max(others).tolist() == [127] * shape[axis]  # of every channel the ends are used
    assert stored.min() >= -127
    rounded = stored * np.expand_dims(scale, others)
    assert (np.abs(rounded - held) <= np.expand_dims(scale, others) * 0.5001).all()
    assert "w" not in model.graph.initializers
    # The graph computes with those numbers, and with those of its activation.
    step = scales(np.array(ranges(layer(name, weight)(), inputs)["r"]), dtype)
    activation = np.rint(np.tanh(inputs["x"]) / step).clip(-128, 127) * step
    head = LAYERS[name][0].replace(" x", " r")
    exact = graph(f"({head}) => (float[] y) {{ y = {name}(r, w) }}", w=rounded.astype(np.float32))
    expected = run(exact, {"r": activation.astype(np.float32)})["y"]
    np.testing.assert_allclose(run(model, inputs)["y"], expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [FLOAT, HALF, ir.DataType.BFLOAT16])
def test_stored_as_int8_or_as_floats_the_numbers_are_the_same(dtype: ir.DataType, tmp_path: Path) -> None:
    results = []
    for float_weights in (False, True):
        model, _ = quantized(block, X, scale_type=dtype, float_weights=float_weights)
        if dtype != FLOAT:
            cast(model, Policy(dtype))
        assert_valid(model)
        stored = [n for n in of_type(model, DQ) if source(n, 0) == ""]
        assert len(stored) == (0 if float_weights else 6)
        write_model(model, tmp_path / "model.onnx")
        with open_runtime(tmp_path / "model.onnx") as runtime:
            results.append(runtime.run(X)["y"])
    assert results[0].tobytes() == results[1].tobytes()


def test_halves_are_rounded_to_even_as_the_runtime_does() -> None:
    weight = np.zeros((16, 16), np.float32)
    weight[:8, 3] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]
    for float_weights in (False, True):
        make = layer("Gemm", weight)
        model, _ = quantized(make, {"x": normal(2, 16)}, float_weights=float_weights)
        dq = pair(model.graph[-1], 1)[1].outputs[0]
        proto = proto_of(model)
        proto.graph.output.append(onnx.ValueInfoProto(name=dq.name))
        found = run(onnx.shape_inference.infer_shapes(proto), {"x": normal(2, 16)})[dq.name or ""]
        assert found[:8, 3].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_a_channel_of_zeros(dtype: ir.DataType) -> None:
    weight = normal(16, 24)
    weight[:, 5] = 0
    inputs = {"x": normal(2, 16)}
    model, _ = quantized(layer("Gemm", weight), inputs, scale_type=dtype)
    assert_valid(model)
    found = run(model, inputs)["y"]
    assert np.isfinite(found).all()
    assert not found[:, 5].any()
    if dtype == HALF:
        cast(model, Policy(HALF))
        assert_valid(model)


def test_extremes_of_an_activation_are_the_ends() -> None:
    model, _ = quantized(block, X)
    found = values(block(), X)
    amax = ranges(block(), X)
    for q in of_type(model, Q):
        name = operand(q, 0).name or ""
        scale = float(constant(model, operand(q, 1).name or ""))
        levels = np.rint(found[name] / scale)
        assert np.abs(levels).max() == 127 or name == "p"
        assert np.rint(np.float32(amax[name]) / np.float32(scale)) == 127 or name == "p"


def test_the_same_graph_gives_the_same_bytes() -> None:
    made = [proto_of(quantized(block, X, scale_type=HALF)[0]).SerializeToString(deterministic=True) for _ in range(2)]
    assert made[0] == made[1]


def test_no_opset_below_19() -> None:
    model = block()
    model.graph.opset_imports[""] = 18
    for refuse in (check_opset, lambda m: insert(m, [], {}, scale_type=FLOAT)):
        with pytest.raises(UsageError, match="the graph is of opset 18") as error:
            refuse(model)
        assert "19 or later" in error.value.expected


# Traps: what is shared, what leaves the graph, and what hides.

TRAPS: dict[str, tuple[str, dict[str, Array], dict[str, Array]]] = {
    "a weight of two products": (
        "(float[b,16] x) => (float[] y) { n = Relu(x) h = MatMul(n, w) r = Relu(h) y = MatMul(r, w) }",
        {"w": normal(16, 16)},
        {"x": normal(3, 16)},
    ),
    "a weight that is read along both axes": (
        "(float[b,16] x) => (float[] y) { n = Relu(x) h = MatMul(n, w) r = Relu(h) y = Gemm<transB=1>(r, w) }",
        {"w": normal(16, 16)},
        {"x": normal(3, 16)},
    ),
    "a weight that something else reads": (
        "(float[b,16] x) => (float[] y) { n = Relu(x) h = MatMul(n, w) y = Add(h, w) }",
        {"w": normal(16, 16)},
        {"x": normal(16, 16)},
    ),
    "a weight that is an output": (
        "(float[b,16] x) => (float[] y, float[16,24] w) { n = Relu(x) y = MatMul(n, w) }",
        {"w": normal(16, 24)},
        {"x": normal(3, 16)},
    ),
    "a graph input": (
        "(float[b,16] x) => (float[] y) { y = MatMul(x, w) }",
        {"w": normal(16, 24)},
        {"x": normal(3, 16)},
    ),
    "a graph input of two products": (
        "(float[b,16] x) => (float[] y) { h = MatMul(x, w) g = MatMul(x, v) y = Mul(h, g) }",
        {"w": normal(16, 24), "v": normal(16, 24, seed=1)},
        {"x": normal(3, 16)},
    ),
    "a value that is an output": (
        "(float[b,16] x) => (float[] n, float[] y) { n = Relu(x) y = MatMul(n, w) }",
        {"w": normal(16, 24)},
        {"x": normal(3, 16)},
    ),
    "both operands of one value": (
        "(float[b,16,16] x) => (float[] y) { s = MatMul(x, x) p = Softmax<axis=-1>(s) y = MatMul(p, x) }",
        {},
        {"x": normal(2, 16, 16)},
    ),
    "keys of two queries": (
        """(float[b,8,16] q, float[b,8,16] r, float[b,8,16] k) => (float[] y, float[] z) {
            t = Transpose<perm=[0,2,1]>(k)
            s = MatMul(q, t) p = Softmax<axis=-1>(s) y = MatMul(p, k)
            u = MatMul(r, t) o = Softmax<axis=-1>(u) z = MatMul(o, k)
        }""",
        {},
        {"q": normal(2, 8, 16), "r": normal(2, 8, 16, seed=1), "k": normal(2, 8, 16, seed=2)},
    ),
    "a part of a Split": (
        """(float[b,8,48] x) => (float[] y) {
            n = Relu(x) q, k, v = Split<axis=-1, num_outputs=3>(n) t = Transpose<perm=[0,2,1]>(k)
            s = MatMul(q, t) p = Softmax<axis=-1>(s) y = MatMul(p, v)
        }""",
        {},
        {"x": normal(2, 8, 48)},
    ),
    "a weight that a branch reads too": (
        """(float[b,16] x) => (float[] y, float[] z) {
            n = Relu(x) y = MatMul(n, w)
            c = ReduceMax<keepdims=0>(n) d = Cast<to=9>(c)
            z = If(d)<then_branch = t () => (float[] y1) { y1 = MatMul(n, w) },
                      else_branch = e () => (float[] y2) { y2 = Identity(n) }>
        }""",
        {"w": normal(16, 16)},
        {"x": normal(3, 16)},
    ),
    "names that are taken": (
        "(float[b,16] x) => (float[] y) { n = Relu(x) m = Add(n, w_int8) k = MatMul(m, w) y = Add(k, m_scale) }",
        {"w": normal(16, 16), "w_int8": normal(16), "m_scale": normal(16)},
        {"x": normal(3, 16)},
    ),
}


def trap(name: str) -> ir.Model:
    text, constants, _ = TRAPS[name]
    model = graph(text, **constants)
    if name == "names that are taken":
        model.graph.initializers["w_int8"].name = "w.int8"
        model.graph.initializers["m_scale"].name = "m.scale"
    return model


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str) -> None:
    inputs = TRAPS[name][2]
    model, placement = quantized(lambda: trap(name), inputs)
    assert placement.sites
    assert_valid(model)
    for q in of_type(model, Q):  # each value once
        assert sum(other.inputs[0] is q.inputs[0] for other in of_type(model, Q)) == 1
    exact, found = run(trap(name), inputs), run(model, inputs)
    for output, expected in exact.items():
        if output in ("w", "n"):  # what is not computed from INT8 is as it was
            assert found[output].tobytes() == expected.tobytes()
        error = np.linalg.norm(found[output] - expected) / np.linalg.norm(expected)
        assert error < 0.03, output
    counts = {"a weight of two products": 1, "a weight that is read along both axes": 2}
    if name in counts:
        assert sum(key.startswith("w.int8") for key in model.graph.initializers) == counts[name]
    kept = {"a weight that something else reads", "a weight that is an output", "a weight that a branch reads too"}
    assert ("w" in model.graph.initializers) is (name in kept)


def test_who_is_not_in_int8_reads_the_value_itself() -> None:
    """Of three readers of one pair two are in INT8."""
    model, placement = quantized(block, X, scheme="gemm", groups=("MatMul", "MatMul_2"))
    assert "MatMul_1" in placement.groups
    assert operand(node(model, "MatMul_1"), 0).name == "n1"
    assert operand(node(model, "MatMul_1"), 1).name == "wk"
    assert pair(node(model, "MatMul"), 0) == pair(node(model, "MatMul_2"), 0)
    assert_valid(model)
    proto = proto_of(model)
    proto.graph.output.append(onnx.ValueInfoProto(name="k0"))
    assert run(onnx.shape_inference.infer_shapes(proto), X)["k0"].tobytes() == values(block(), X)["k0"].tobytes()


def test_nothing_in_int8_is_the_graph_itself() -> None:
    model, _ = quantized(block, X, groups=())
    assert proto_of(model).SerializeToString(deterministic=True) == proto_of(block()).SerializeToString(
        deterministic=True
    )


def test_graphs_without_names() -> None:
    def nameless() -> ir.Model:
        model = block()
        for found in model.graph:
            found.name = None
        return model

    model, placement = quantized(nameless, X)
    assert len(placement.groups) == 9
    assert_valid(model)
    assert run(model, X)["y"].tobytes() == run(quantized(block, X)[0], X)["y"].tobytes()


def test_weights_in_external_data(tmp_path: Path) -> None:
    write_model(block(), tmp_path / "model.onnx", "always")
    model = load_model(tmp_path / "model.onnx")
    placement = place(model.graph, scheme="full", high_precision=frozenset())
    insert(model, placement.sites, ranges(block(), X), scale_type=FLOAT)
    write_model(model, tmp_path / "int8.onnx", "always")
    files = [path.name for path in tmp_path.iterdir()]
    assert sorted(files) == ["int8.onnx", "int8.onnx.data", "model.onnx", "model.onnx.data"]
    with OrtRuntime(tmp_path / "int8.onnx", optimize=False) as runtime:
        assert runtime.run(X)["y"].tobytes() == run(quantized(block, X)[0], X)["y"].tobytes()


def test_int8_weights_take_a_quarter_of_the_space() -> None:
    def wide() -> ir.Model:
        return graph("(float[b,512] x) => (float[] y) { n = Relu(x) y = MatMul(n, w) }", w=normal(512, 2048))

    sizes = {}
    for float_weights in (False, True):
        model, _ = quantized(wide, {"x": normal(1, 512)}, float_weights=float_weights)
        sizes[float_weights] = len(proto_of(model).SerializeToString())
    plain = len(proto_of(wide()).SerializeToString())
    assert 0.25 < sizes[False] / plain < 0.26
    assert 1 < sizes[True] / plain < 1.01


# Random networks.


@st.composite
def networks(draw: Any) -> tuple[str, dict[str, Array]]:
    """Layers in a row on 8 tokens of 32 channels, each of which may be residual."""
    lines, constants, last = [], {}, "x"

    def weight(*shape: int) -> str:
        name = f"w{len(constants)}"
        gain = draw(st.sampled_from([0.1, 1.0, 5.0]))
        constants[name] = (normal(*shape, seed=len(constants)) * gain / np.sqrt(shape[0])).astype(np.float32)
        return name

    for i in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["linear", "transposed", "mlp", "attention", "movement", "norm", "shared"]))
        out, n = f"o{i}", f"n{i}"
        lines.append(f"{n} = LayerNormalization({last}, g)")
        if kind == "linear":
            lines.append(f"{out} = MatMul({n}, {weight(32, 32)})")
        elif kind == "transposed":
            lines += [f"r{i} = Reshape({n}, flat)", f"m{i} = Gemm<transB=1>(r{i}, {weight(32, 32)}, g)"]
            lines.append(f"{out} = Reshape(m{i}, tokens)")
        elif kind == "mlp":
            lines += [f"h{i} = MatMul({n}, {weight(32, 48)})", f"a{i} = Gelu(h{i})"]
            lines.append(f"{out} = MatMul(a{i}, {weight(48, 32)})")
        elif kind == "attention":
            lines += [f"q{i} = MatMul({n}, {weight(32, 32)})", f"k{i} = MatMul({n}, {weight(32, 32)})"]
            lines += [f"t{i} = Transpose<perm=[0,2,1]>(k{i})", f"s{i} = MatMul(q{i}, t{i})"]
            lines += [f"b{i} = Mul(s{i}, scale)", f"p{i} = Softmax<axis=-1>(b{i})", f"{out} = MatMul(p{i}, {n})"]
        elif kind == "movement":
            lines += [f"r{i} = Transpose<perm=[0,2,1]>({n})", f"m{i} = MatMul(r{i}, {weight(8, 8)})"]
            lines.append(f"{out} = Transpose<perm=[0,2,1]>(m{i})")
        elif kind == "shared":
            name = weight(32, 32)
            lines += [f"h{i} = MatMul({n}, {name})", f"a{i} = Relu(h{i})", f"{out} = MatMul(a{i}, {name})"]
        else:
            lines.append(f"{out} = Tanh({n})")
        if draw(st.booleans()):
            lines.append(f"z{i} = Add({last}, {out})")
            out = f"z{i}"
        last = out
    text = "(float[b,8,32] x) => (float[] y) {\n" + "\n".join(lines) + f"\ny = LayerNormalization({last}, g) }}"
    return text, constants


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.sampled_from([FLOAT, HALF]), st.booleans())
def test_random_networks(network: tuple[str, dict[str, Array]], dtype: ir.DataType, float_weights: bool) -> None:
    text, constants = network
    fixed = {
        "g": 1 + 0.1 * normal(32), "scale": np.float32(0.2),
        "flat": np.array([-1, 32], np.int64), "tokens": np.array([-1, 8, 32], np.int64),
    }  # fmt: skip

    def make() -> ir.Model:
        model = graph(text, **constants, **fixed)
        tidy(model)
        return model

    model, placement = quantized(make, X, scale_type=dtype, float_weights=float_weights)
    assert_valid(model)
    exact, found = values(make(), X), values(model, X)
    for site in placement.sites:
        for i in site.activations:
            q, dq = pair(site.node, i)
            assert q is not None
            name, scale = operand(q, 0).name or "", constant(model, operand(q, 1).name or "")
            # What a pair returns is at most half a step from what it is given, up to the end of its range.
            given_values = np.clip(found[name], -128 * scale, 127 * scale)
            error = np.abs(found[dq.outputs[0].name or ""] - given_values)
            assert error.max() <= 0.5001 * scale
    assert np.linalg.norm(found["y"] - exact["y"]) <= 0.2 * np.linalg.norm(exact["y"])
    if dtype == HALF and placement.sites:
        cast(model, Policy(HALF))
        assert_valid(model)
    names = {tensor.name for tensor in proto_of(model).graph.initializer}
    read = {name for n in proto_of(model).graph.node for name in n.input}
    assert names <= read  # no weight is left over
    assert all(numpy_helper.to_array(t).size for t in proto_of(model).graph.initializer)
