"""What an operator is, read from the graph: whole networks, ours and others, and small ones that must not be taken."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from deploycli.exporters.graph.attention import Attention
from deploycli.exporters.graph.operators import PRODUCTS
from deploycli.exporters.passes.pipeline import tidy
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.insert_qdq import insert
from deploycli.exporters.precision.placement import SCHEMES, place
from deploycli.exporters.precision.policy import Policy
from deploycli.exporters.precision.roles import Roles, Stage, Weight
from tests.exporters.precision.networks import (
    FAMILIES,
    HALF,
    assert_valid,
    block,
    family,
    graph,
    images,
    node,
    normal,
    producer,
    proto_of,
    ranges,
)

# What the authors' own names say, in the order in which it is asked.
NAMES = {
    Stage.PATCH_EMBED: r"patch_embed\.|patch_embeddings\.|^features\.0\.0/",
    Stage.HEAD: r"^(head|head_dist|head\.fc|classifier)/",
    Stage.MLP_FC2: r"mlp\.fc2/|mlp\.3/|[01]\.output\.dense/",
    Stage.PATCH_MERGING: r"downsample\.reduction|features\.2\.reduction/",
}
# Blocks, tokens of each stage's windows, and channels of a head.
ATTENTIONS = {
    "swin": (3, {64}, {16}),
    "vit": (1, {17}, {16}),
    "deit distilled": (1, {18}, {16}),
    "crossformer": (3, {64}, {32}),
    "crossformer++": (4, {9, 16}, {32}),
    "timm ViT": (1, {17}, {16}),
    "timm Swin backbone": (3, {4}, {16}),
    "torchvision Swin": (3, {16}, {16}),
    "transformers Swin V2": (3, {16}, {16}),
    "transformers DeiT": (1, {18}, {16}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_are_those_that_the_names_say(name: str) -> None:
    model = family(name)
    roles = Roles(model.graph)
    products = [n for n in model.graph if n.op_type in PRODUCTS and roles.weight(n) is not None]
    found = {n.name or "": roles.stage(n) for n in products}
    expected = {
        module: next((stage for stage, pattern in NAMES.items() if re.search(pattern, module)), None)
        for module in found
    }
    assert found == expected
    counts = Counter(found.values())
    heads = {"deit distilled": 2, "timm Swin backbone": 0}.get(name, 1)
    merges = {
        "vit": 0,
        "deit distilled": 0,
        "timm ViT": 0,
        "transformers DeiT": 0,
        "crossformer": 2,
        "crossformer++": 2,
    }
    assert counts[Stage.HEAD] == heads
    assert counts[Stage.PATCH_EMBED] == (2 if name.startswith("crossformer") else 1)
    assert counts[Stage.PATCH_MERGING] == merges.get(name, 1)
    assert counts[Stage.MLP_FC2] == ATTENTIONS[name][0]


@pytest.mark.parametrize("name", FAMILIES)
def test_attentions_and_residual_additions(name: str) -> None:
    model = family(name)
    roles = Roles(model.graph)
    found = [roles.attention(n) for n in model.graph if n.op_type == "Softmax"]
    attentions = [a for a in found if isinstance(a, Attention)]
    blocks, tokens, sizes = ATTENTIONS[name]
    assert len(attentions) == len(found) == blocks
    found_sizes = [roles.sizes(a) for a in attentions]
    assert {s.queries for s in found_sizes} | {s.keys for s in found_sizes} == tokens
    assert {s.head_size for s in found_sizes} == sizes
    assert {a.probability for a in attentions} == {0}
    pairs = [n for n in model.graph if n.op_type in PRODUCTS and roles.weight(n) is None]
    assert pairs == [n for a in attentions for n in (a.scores, a.mix)]
    branches = {
        n: branch for n in model.graph if n.op_type == "Add" and (branch := roles.residual_branch(n)) is not None
    }
    # Swin V2 normalises what a block adds: no branch there ends in a product. A CrossFormer++ adds a convolution too.
    more = {"transformers Swin V2": -2 * blocks, "crossformer++": 1}.get(name, 0)
    assert len(branches) == 2 * blocks + more - (name == "crossformer++")
    for add, branch in branches.items():
        (last,) = _products_behind(add.inputs[branch])
        assert re.search(r"proj|mlp\.fc2|mlp\.3|MatMul_3|dense|ex_conv", last.name or ""), (add.name, last.name)


def _products_behind(value: ir.Value | None) -> set[ir.Node]:
    """The nearest products that a value is made of."""
    maker = None if value is None else value.producer()
    if maker is None:
        return set()
    if maker.op_type in PRODUCTS:
        return {maker}
    return set[ir.Node]().union(*(_products_behind(v) for v in maker.inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_in_every_scheme(name: str) -> None:
    """The checker, strict shape inference and the lint have nothing to say; inputs and outputs are as they were."""
    found = ranges(family(name), images(name, 1))
    before = proto_of(family(name)).graph
    blocks = ATTENTIONS[name][0]
    for scheme in SCHEMES if name in ("swin", "deit distilled", "transformers DeiT") else ("full",):
        model = family(name)
        sites = place(model.graph, scheme=scheme).sites
        assert sum(site.known == {0: 1.0} for site in sites) == (0 if scheme in ("auto", "gemm") else blocks)
        weights = sum(site.node.op_type in ("MatMul", "Conv") and site.axis is not None for site in sites)
        assert weights == 3 * blocks if scheme == "auto" else weights >= 4 * blocks
        insert(model, sites, found, scale_type=HALF)
        assert_valid(model)
        cast(model, Policy(HALF))
        assert_valid(model)
        after = proto_of(model).graph
        assert (list(after.input), list(after.output)) == (list(before.input), list(before.output))
        pairs = [n for n in model.graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        for scale in {n.inputs[1] for n in pairs}:
            assert scale is not None
            assert scale.const_value is not None
            array = scale.const_value.numpy()
            assert array.dtype == np.float16
            assert (array >= 2.0**-14).all()


def test_the_first_product_reads_pixels_that_the_graph_may_normalise() -> None:
    model = graph(
        """(uint8[b,8,8,3] pixels) => (float[b,16,4,4] y) {
            a = Cast<to=1>(pixels)   s = Sub(a, mean)   d = Div(s, std)   t = Transpose<perm=[0,3,1,2]>(d)
            c = Conv<strides=[2,2]>(t, w)   r = Relu(c)   y = Conv<pads=[1,1,1,1]>(r, w2)
        }""",
        mean=normal(3), std=np.full(3, 2, np.float32), w=normal(16, 3, 2, 2), w2=normal(16, 16, 3, 3),
    )  # fmt: skip
    roles = Roles(model.graph)
    assert [roles.stage(n) for n in model.graph if n.op_type == "Conv"] == [Stage.PATCH_EMBED, Stage.HEAD]


@pytest.mark.parametrize("ending", ["Softmax<axis=-1>", "Sigmoid", "LogSoftmax<axis=-1>", "Identity"])
def test_a_head_may_answer_with_probabilities(ending: str) -> None:
    model = graph(
        f"(float[b,16] x) => (float[b,16] y) {{ l = LayerNormalization(x, g) h = MatMul(l, w) y = {ending}(h) }}",
        g=normal(16), w=normal(16, 16),
    )  # fmt: skip
    assert Roles(model.graph).stage(node(model, "MatMul")) == Stage.HEAD


def test_an_output_that_is_read_on_is_no_head() -> None:
    model = graph(
        """(float[b,16] x) => (float[b,16] features, float[b,16] y) {
            l = LayerNormalization(x, g) features = MatMul(l, w) n = LayerNormalization(features, g) y = MatMul(n, w)
        }""",
        g=normal(16), w=normal(16, 16),
    )  # fmt: skip
    roles = Roles(model.graph)
    assert [roles.stage(node(model, name)) for name in ("MatMul", "MatMul_1")] == [None, Stage.HEAD]


GELU_BY_HAND = "a = Div(h, root)\ne = Erf(a)\nf = Add(e, one)\nc = Mul(h, f)\nd = Mul(c, half)"
ACTIVATIONS = {
    "Gelu": "d = Gelu(h)",
    "GELU by hand": GELU_BY_HAND,
    "GELU, half first": "a = Div(h, root)\ne = Erf(a)\nf = Add(e, one)\nc = Mul(h, half)\nd = Mul(c, f)",
    "GELU by tanh": "i = Mul(h, half)\na = Mul(h, root)\ne = Tanh(a)\nf = Add(e, one)\nd = Mul(i, f)",
    "SiLU": "e = Sigmoid(h)\nd = Mul(h, e)",
    "Relu": "d = Relu(h)",
    "moved": "c = Gelu(h)\nd = Identity(c)",
}
NO_ACTIVATIONS = {
    "scaled": "d = Mul(h, half)",
    "normalised": "c = Gelu(h)\nd = LayerNormalization(c, g)",
    "gated": "d = Mul(h, x)",
}


@pytest.mark.parametrize("text", [*ACTIVATIONS.values(), *NO_ACTIVATIONS.values()])
def test_the_second_mlp_layer_reads_an_activation(text: str) -> None:
    """A normalisation between the two, as some large models have, is not taken for that of a patch merging either."""
    model = graph(
        f"""(float[b,4,32] x) => (float[b,4,32] y) {{
            n = LayerNormalization(x, g) h = MatMul(n, w1) {text} k = MatMul(d, w2) y = Add(x, k)
        }}""",
        g=normal(32), w1=normal(32, 32), w2=normal(32, 32),
        root=np.float32(1.4), one=np.float32(1), half=np.float32(0.5),
    )  # fmt: skip
    expected = Stage.MLP_FC2 if text in ACTIVATIONS.values() else None
    assert Roles(model.graph).stage(node(model, "MatMul_1")) == expected


MERGINGS = {  # text before the product, its weight's shape, whether it is one
    "norm, then product": ("m = Reshape(s, four)\nt = LayerNormalization(m, g)", (64, 32), True),
    "product, then norm": ("t = Reshape(s, four)", (64, 32), True),
    "as wide as it was": ("t = Reshape(s, four)", (64, 64), False),
    "nothing merged": ("t = LayerNormalization(s, g16)", (16, 8), False),
}


@pytest.mark.parametrize("name", MERGINGS)
def test_patch_merging(name: str) -> None:
    text, shape, expected = MERGINGS[name]
    model = graph(
        f"""(float[b,8,16] x) => (float[b,n,m] y) {{
            s = LayerNormalization(x, g16) {text} k = MatMul(t, w) y = LayerNormalization(k, gout)
        }}""",
        four=np.array([0, -1, 64], np.int64), g=normal(64), g16=normal(16), w=normal(*shape), gout=normal(shape[1]),
    )  # fmt: skip
    assert (Roles(model.graph).stage(node(model, "MatMul")) == Stage.PATCH_MERGING) is expected


def test_the_narrow_projection_of_an_attention_merges_heads_not_tokens() -> None:
    model = graph(
        """(float[b,2,8,16] q, float[b,2,16,8] k, float[b,2,8,16] v) => (float[b,8,16] y) {
            s = MatMul(q, k) p = Softmax<axis=-1>(s) o = MatMul(p, v)
            t = Transpose<perm=[0,2,1,3]>(o) r = Reshape(t, tokens) z = MatMul(r, w) y = LayerNormalization(z, g)
        }""",
        tokens=np.array([0, 8, 32], np.int64), w=normal(32, 16), g=normal(16),
    )  # fmt: skip
    assert Roles(model.graph).stage(node(model, "MatMul_2")) is None


WEIGHTS = {
    "MatMul": ("float[b,16] x", "MatMul(x, w)", normal(16, 24), Weight(1, 16, 24)),
    "Gemm": ("float[b,16] x", "Gemm(x, w)", normal(16, 24), Weight(1, 16, 24)),
    "Gemm transB": ("float[b,16] x", "Gemm<transB=1>(x, w)", normal(24, 16), Weight(0, 16, 24)),
    "Gemm transA": ("float[16,b] x", "Gemm<transA=1>(x, w)", normal(16, 24), Weight(1, 16, 24)),
    "Conv": ("float[b,16,4,4] x", "Conv(x, w)", normal(24, 16, 2, 2), Weight(0, 16, 24)),
    "Conv1d": ("float[b,16,4] x", "Conv(x, w)", normal(24, 16, 3), Weight(0, 16, 24)),
    "grouped Conv": ("float[b,16,4,4] x", "Conv<group=4>(x, w)", normal(32, 4, 2, 2), Weight(0, 4, 8)),
    "depthwise Conv": ("float[b,16,4,4] x", "Conv<group=16>(x, w)", normal(16, 1, 2, 2), Weight(0, 1, 1)),
    "on the left": ("float[b,16,8] x", "MatMul(w, x)", normal(24, 16), "its weight stands on the left"),
    "batch of one": ("float[b,16,16] x", "MatMul(x, w)", normal(1, 16, 24), "its weight has 3 dimensions"),
    "batched": ("float[3,16,16] x", "MatMul(x, w)", normal(3, 16, 24), "its weight has 3 dimensions"),
    "vector": ("float[b,16] x", "MatMul(x, w)", normal(16), "its weight has 1 dimensions"),
    "alpha": ("float[b,16] x", "Gemm<alpha=0.5>(x, w)", normal(16, 24), "TensorRT makes FP32 constants"),
    "beta": ("float[b,16] x", "Gemm<beta=2.0>(x, w, c)", normal(16, 24), "TensorRT makes FP32 constants"),
    "double": ("double[b,16] x", "MatMul(x, w)", normal(16, 24).astype(np.float64), "its weight is DOUBLE"),
    "constants": ("float[b,16] x", "MatMul(c2, w)", normal(16, 24), "it multiplies constants"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str) -> None:
    declared, text, weight, expected = WEIGHTS[name]
    output = "double[]" if name == "double" else "float[]"
    model = graph(f"({declared}) => ({output} y) {{ y = {text} }}", w=weight, c=normal(24), c2=normal(2, 16))
    found = Roles(model.graph).weight(model.graph[0])
    assert found == expected if isinstance(expected, Weight) else str(found).startswith(expected)


def test_a_default_value_of_an_input_is_no_weight() -> None:
    model = graph("(float[b,16] x, float[16,24] w) => (float[b,24] y) { y = MatMul(x, w) }", w=normal(16, 24))
    roles = Roles(model.graph)
    assert roles.weight(model.graph[0]) is None
    assert roles.constants(model.graph[0]) == ()


def test_a_weight_that_is_transposed_at_run_time_is_computed() -> None:
    model = graph("(float[b,16] x) => (float[b,24] y) { t = Transpose(w) y = MatMul(x, t) }", w=normal(24, 16))
    tidy(model)
    assert str(Roles(model.graph).weight(node(model, "MatMul"))).startswith("its weight is computed")


HEADS = "(float[b,2,8,16] q, float[b,2,16,8] k, float[b,2,8,16] v, bool[b,1,1,8] m) => (float[] y)"
SCORES = {
    "plain": ("p = Softmax<axis=-1>(s)", "y = MatMul(p, v)"),
    "scaled by a division, axis counted from the front": (
        "a = Div(s, four) p = Softmax<axis=3>(a)",
        "y = MatMul(p, v)",
    ),
    "masked": ("a = Where(m, s, low) p = Softmax<axis=-1>(a)", "y = MatMul(p, v)"),
    "computed mask first": (
        "c = Cast<to=1>(m) d = Mul(c, low) a = Add(d, s) p = Softmax<axis=-1>(a)",
        "y = MatMul(p, v)",
    ),
    "windows in 5-D": (
        "r = Reshape(s, five) a = Add(r, bias) i = Reshape(a, back) p = Softmax<axis=-1>(i)",
        "y = MatMul(p, v)",
    ),
    "values first": (
        "p = Softmax<axis=-1>(s)",
        "vt = Transpose<perm=[0,1,3,2]>(v) pt = Transpose<perm=[0,1,3,2]>(p) y = MatMul(vt, pt)",
    ),
    "also an output": ("p = Softmax<axis=-1>(s)", "y = MatMul(p, v) z = Identity(p)"),
}
NO_SCORES = {
    "two products": (
        "s2 = MatMul(q, k) a = Add(s, s2) p = Softmax<axis=-1>(a)",
        "y = MatMul(p, v)",
        "reads 2 products",
    ),
    "no product": ("a = Cast<to=1>(m) p = Softmax<axis=-1>(a)", "y = MatMul(p, v)", "reads 0 products"),
    "a weight": ("a = MatMul(s, w) p = Softmax<axis=-1>(a)", "y = MatMul(p, v)", "reads 0 products"),
    "read twice": ("p = Softmax<axis=-1>(s)", "o = MatMul(p, v) z = MatMul(p, v) y = Add(o, z)", "alone"),
    "read by a weight": ("p = Softmax<axis=-1>(s)", "y = MatMul(p, w)", "alone"),
    "not a product": ("p = Softmax<axis=-1>(s)", "y = Mul(p, s)", "alone"),
    "another axis": ("p = Softmax<axis=2>(s)", "y = MatMul(p, v)", "its axis is 2"),
    "another axis, from behind": ("p = Softmax<axis=-2>(s)", "y = MatMul(p, v)", "its axis is -2"),
}


def attention(before: str, after: str) -> tuple[Attention | str, Roles]:
    outputs = "(float[] y, float[] z)" if " z = Identity" in after else "(float[] y)"
    model = graph(
        HEADS.replace("(float[] y)", outputs) + f" {{ s = MatMul(q, k) {before} {after} }}",
        four=np.float32(4), low=np.float32(-100), bias=normal(1, 1, 2, 8, 8), w=normal(8, 8),
        five=np.array([-1, 1, 2, 8, 8], np.int64), back=np.array([-1, 2, 8, 8], np.int64),
    )  # fmt: skip
    roles = Roles(model.graph)
    return roles.attention(node(model, "Softmax")), roles


@pytest.mark.parametrize("name", SCORES)
def test_attention(name: str) -> None:
    found, roles = attention(*SCORES[name])
    assert isinstance(found, Attention), found
    assert (found.scores.name, found.mix.name) == ("MatMul", "MatMul_1")
    assert found.probability == int(name == "values first")
    assert roles.sizes(found) == (8, 8, 16)


@pytest.mark.parametrize("name", NO_SCORES)
def test_no_attention(name: str) -> None:
    before, after, reason = NO_SCORES[name]
    found, _ = attention(before, after)
    assert isinstance(found, str)
    assert reason in found


def test_queries_and_keys_may_differ_and_grow_with_the_batch() -> None:
    model = graph(
        """(float[b,16] q, float[16,8] k, float[8,16] v) => (float[b,16] y) {
            s = MatMul(q, k) p = Softmax<axis=-1>(s) y = MatMul(p, v)
        }"""
    )
    roles = Roles(model.graph)
    found = roles.attention(node(model, "Softmax"))
    assert isinstance(found, Attention)
    assert roles.sizes(found) == (None, 8, 16)


def test_residual_additions_of_a_block() -> None:
    model = block()
    roles = Roles(model.graph)
    branches = {n.outputs[0].name: roles.residual_branch(n) for n in model.graph if n.op_type == "Add"}
    assert {name: branch for name, branch in branches.items() if branch is not None} == {"r": 1, "y": 1}


RESIDUALS = {
    "branch first": ("a = MatMul(n, w) y = Add(a, x)", 0),
    "layer scale and movement": ("a = MatMul(n, w) c = Mul(a, g) d = Identity(c) y = Add(x, d)", 1),
    "the stream is a product too": (
        "x1 = MatMul(x, w) n1 = LayerNormalization(x1, g) a = MatMul(n1, w) y = Add(x1, a)",
        1,
    ),
    "two heads": ("a = MatMul(n, w) c = MatMul(n, w) y = Add(a, c)", None),
    "a bias": ("a = MatMul(n, w) y = Add(a, g)", None),
    "no product": ("a = Relu(n) y = Add(x, a)", None),
    "the same twice": ("a = MatMul(n, w) y = Add(a, a)", None),
    "another shape": ("a = MatMul(n, w) c = ReduceMean<keepdims=1>(x) y = Add(a, c)", None),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_branch(name: str) -> None:
    text, expected = RESIDUALS[name]
    model = graph(
        f"(float[b,16] x) => (float[] y) {{ n = LayerNormalization(x, g) {text} }}", g=normal(16), w=normal(16, 16)
    )
    assert Roles(model.graph).residual_branch(producer(model, "y")) == expected
