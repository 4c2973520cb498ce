"""What kernels are predicted, against counts by hand, by properties, and against NVIDIA's compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.kernels import predict
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from tests.benchmarks.rtx_layers import compiled_figures
from tests.exporters.lint.rtx import WHY
from tests.exporters.passes.graphs import load, parse
from tests.exporters.passes.networks import networks
from tests.exporters.passes.programs import programs
from tests.exporters.passes.test_properties import examples

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from deploycli.exporters.graph.kernels import KernelCost
    from deploycli.exporters.graph.steps import KernelFigures

TOKENS, CHANNELS, HEADS = 16, 32, 2
BYTES = TOKENS * CHANNELS * 2
"""Of a value of all tokens, in 16 bits."""


def weights(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "w": weights(32, 32), "w2": weights(32, 32), "w3": weights(32, 32), "wide": weights(32, 96), "b": weights(32),
    "bb": weights(96), "gain": weights(32), "bias": weights(32), "split": np.array([0, 16, 2, 16]),
    "five": np.array([0, 16, 3, 2, 16]), "four": np.array([0, 4, 4, 32]), "flat": np.array([0, 16, 32]),
    "first": np.array(0), "second": np.array(1), "third": np.array(2), "half": np.array(0.25, np.float32),
}  # fmt: skip

NORM = "n = LayerNormalization (x, gain, bias) "
ATTEND = """
    k_ = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, k_) p = Softmax (s) m = MatMul (p, v)
    t = Transpose <perm = [0, 2, 1, 3]> (m) r = Reshape (t, flat) l = MatMul (r, w) o = Add (l, b) y = Add (x, o)
"""
CUT = """
    f = Reshape (qkv, five) c = Transpose <perm = [2, 0, 3, 1, 4]> (f)
    q = Gather <axis = 0> (c, first) k = Gather <axis = 0> (c, second) v = Gather <axis = 0> (c, third)
"""
PACKED = f"{NORM} a = MatMul (n, wide) qkv = Add (a, bb) {CUT} {ATTEND}"
UNBIASED = f"{NORM} qkv = MatMul (n, wide) {CUT} {ATTEND}"


def graph(nodes: str) -> ir.Model:
    words = set(nodes.replace(",", " ").replace("(", " ").replace(")", " ").split())
    used = {name: value for name, value in CONSTANTS.items() if name in words}
    return load(parse(f"g (float[batch, 16, 32] x) => (float[batch, rows, channels] y) {{ {nodes} }}", **used))


def predicted(model: ir.Model) -> KernelCost:
    return predict(model.graph, Analysis(model.graph))


@pytest.mark.parametrize(
    ("nodes", "kinds"),
    [
        # What follows a product number by number is written with it.
        (f"{NORM} m = MatMul (n, w) a = Add (m, b) y = Relu (a)", ["generated", "product"]),
        (f"{NORM} m = MatMul (n, w) a = Add (m, b) y = Add (x, a)", ["generated", "product"]),
        (f"{NORM} m = MatMul (n, w) a = Add (m, b) e = Erf (a) y = Mul (a, e)", ["generated", "product"]),
        # Not if it has four axes, nor if it is normalised at once.
        (f"{NORM} f = Reshape (n, four) m = MatMul (f, w) a = Add (m, b) y = Reshape (a, flat)",
         ["generated", "product", "generated"]),
        (f"{NORM} m = MatMul (n, w) a = Add (m, b) y = LayerNormalization (a, gain, bias)",
         ["generated", "product", "generated"]),
        # Products of one value, with nothing to add, are one.
        (f"{NORM} i = MatMul (n, w) j = MatMul (n, w2) k = MatMul (n, w3) l = Mul (i, j) y = Mul (k, l)",
         ["generated", "product", "generated"]),
        # What is moved is normalised by the same kernel; what is normalised is moved by another one.
        ("t = Transpose <perm = [1, 0, 2]> (x) n = LayerNormalization (t, gain, bias) y = MatMul (n, w)",
         ["generated", "product"]),
        (f"{NORM} t = Transpose <perm = [1, 0, 2]> (n) y = MatMul (t, w)", ["generated", "generated", "product"]),
        # Views are nothing.
        ("f = Reshape (x, four) y = Reshape (f, flat)", []),
    ],
)  # fmt: skip
def test_kernels(nodes: str, kinds: list[str]) -> None:
    assert sorted(kernel.kind for kernel in predicted(graph(nodes)).kernels) == sorted(kinds)


def test_bytes_are_what_is_read_and_written() -> None:
    kernels = predicted(graph(f"{NORM} m = MatMul (n, w) a = Add (m, b) y = Add (n, a)")).kernels
    moved = {kernel.kind: kernel.moved for kernel in kernels}
    # The input and the result have 32 bits. The normalised value is read twice, as operand and as residual.
    assert moved == {"generated": 2 * BYTES + BYTES, "product": 2 * BYTES + 2 * BYTES}


def test_a_split_norm_writes_32_bits() -> None:
    kernels = predicted(graph(f"{NORM} t = Transpose <perm = [1, 0, 2]> (n) y = MatMul (t, w)")).kernels
    between = 2 * BYTES + TOKENS * 4
    assert sorted(k.moved for k in kernels) == sorted([2 * BYTES + between, between + BYTES, BYTES + 2 * BYTES])


@pytest.mark.parametrize(("nodes", "attentions"), [(PACKED, 1), (UNBIASED, 1), (f"{NORM} y = Softmax (n)", 0)])
def test_attentions(nodes: str, attentions: int) -> None:
    assert predicted(graph(nodes)).figures.attentions == attentions


def test_an_attention_whose_probabilities_are_read_is_not_one_kernel() -> None:
    nodes = PACKED.replace("y = Add (x, o)", "z = Add (x, o) u = ReduceSum <keepdims = 0> (p) y = Mul (z, u)")
    assert predicted(graph(nodes)).figures.attentions == 0


def test_the_passes_are_predicted_to_help() -> None:
    model = graph(PACKED)
    before = predicted(model).figures
    rewrite(model)
    after = predicted(model).figures
    assert (after.launches, after.moved_bytes) < (before.launches, before.moved_bytes)


# --- properties ------------------------------------------------------------------------------------------------------


@examples(150)
@given(model=st.one_of(programs(), networks()))
def test_figures_are_counts_and_hold_every_node_once(model: onnx.ModelProto) -> None:
    loaded = load(model)
    cost = predicted(loaded)
    assert all(kernel.moved >= 0 and kernel.nodes for kernel in cost.kernels)
    assert 0 <= cost.figures.attentions <= cost.figures.launches == len(cost.kernels)
    assert {node for kernel in cost.kernels for node in kernel.nodes} <= set(loaded.graph)


@examples(150)
@given(model=st.one_of(programs(), networks()), random=st.randoms(use_true_random=False))
def test_order_and_names_do_not_matter(model: onnx.ModelProto, random: Any) -> None:
    assert figures(renamed(shuffled(model, random))) == figures(model)


@pytest.mark.parametrize("nodes", [PACKED, UNBIASED])
@examples(20)
@given(random=st.randoms(use_true_random=False))
def test_order_and_names_of_an_attention_do_not_matter(nodes: str, random: Any) -> None:
    model = ir.to_proto(graph(nodes))
    assert figures(renamed(shuffled(model, random))) == figures(model)


def figures(model: onnx.ModelProto) -> KernelFigures:
    return predicted(load(model)).figures


def shuffled(model: onnx.ModelProto, random: Any) -> onnx.ModelProto:
    """Return a model whose nodes stand in another order that is sorted, too."""
    left, order = list(model.graph.node), list[Any]()
    while left:
        waited_for = {name for node in left for name in node.output}
        node = random.choice([node for node in left if waited_for.isdisjoint(node.input)])
        left.remove(node)
        order.append(node)
    result = type(model)()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(order)
    return result


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose inner values and nodes have other names."""
    border = {value.name for value in (*model.graph.input, *model.graph.output, *model.graph.initializer)}
    result = type(model)()
    result.CopyFrom(model)
    for i, node in enumerate(result.graph.node):
        node.name = f"node_{-i}"
        for names in (node.input, node.output):
            names[:] = [f"of_{name}" if name and name not in border else name for name in names]
    del result.graph.value_info[:]
    return result


# --- NVIDIA's compiler -----------------------------------------------------------------------------------------------

FEED_FORWARD = "e = MatMul (z, w2) g = Add (e, b) h = Gelu (g) i = MatMul (h, w3) j = Add (i, b) y = Add (z, j)"


@pytest.mark.parametrize(
    ("nodes", "passes"), [(PACKED, False), (PACKED, True), (f"{PACKED.replace('y = ', 'z = ')} {FEED_FORWARD}", True)]
)
def test_the_compiler_makes_what_is_predicted(nodes: str, passes: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason=WHY)
    model = graph(nodes)
    if passes:
        rewrite(model)
    expected = predicted(model).figures
    cast(model, Policy(REDUCED_TYPES["fp16"], frozenset({"softmax"})))
    ir.save(model, tmp_path / "model.onnx")
    found = compiled_figures(tmp_path / "model.onnx", batch=8)
    assert found.attentions == expected.attentions
    assert abs(found.launches - expected.launches) <= 1
    assert found.moved_bytes == pytest.approx(expected.moved_bytes, rel=0.15)
