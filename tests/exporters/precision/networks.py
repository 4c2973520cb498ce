"""Small networks to quantise: parts of transformers as ONNX text, and whole ones as they are exported."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from deploycli.exporters.lint import lint
from deploycli.exporters.passes.common.names import name_nodes
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.precision.insert_qdq import insert
from deploycli.exporters.precision.number_format import INT8, NumberFormat
from deploycli.exporters.precision.placement import Placement, place
from deploycli.exporters.trace import MODULE_KEY, trace
from deploycli.models.outputs import output_names
from deploycli.models.spec import TensorSpec
from tests.exporters.passes.graphs import session
from tests.exporters.passes.test_foreign_export import hf, randomized, timm_swin, torchvision_swin
from tests.models.crossformers import tiny_crossformer, tiny_crossformer_pp
from tests.models.swins import tiny_swin
from tests.models.vits import tiny_vit
from tests.peers import import_timm
from tests.shared import shared

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

Array = Any  # arrays of any type, in tests

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

LINT_RULES = (4, 6, 15)
"""Rules of the TensorRT lint on element types, on Q/DQ pairs, and on their places."""


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph(text: str, **constants: Any) -> ir.Model:
    """Parse a graph without its header; nodes are called after their operators where they have no name."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\ng {text}')
    for name, value in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    seen: dict[str, int] = {}
    for node in proto.graph.node:
        count = seen[node.op_type] = seen.get(node.op_type, 0) + 1
        node.name = node.name or (node.op_type if count == 1 else f"{node.op_type}_{count - 1}")
    proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)  # and the shapes of outputs
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


# Of every part that has rules of its own one: a normalisation that three products read, an attention, residual
# additions, and an MLP. 8 tokens of 32 channels, two heads of 16.
BLOCK_TEXT = """(float[b,8,32] x) => (float[b,8,32] y) {
    n1 = LayerNormalization<axis=-1>(x, g1, z1)
    q0 = MatMul(n1, wq)   k0 = MatMul(n1, wk)   v0 = MatMul(n1, wv)
    q1 = Add(q0, bq)   q2 = Mul(q1, scale)
    q3 = Reshape(q2, heads)   k3 = Reshape(k0, heads)   v3 = Reshape(v0, heads)
    q = Transpose<perm=[0,2,1,3]>(q3)   kt = Transpose<perm=[0,2,3,1]>(k3)   v = Transpose<perm=[0,2,1,3]>(v3)
    s0 = MatMul(q, kt)   s = Add(s0, bias)   p = Softmax<axis=-1>(s)   o = MatMul(p, v)
    o1 = Transpose<perm=[0,2,1,3]>(o)   o2 = Reshape(o1, tokens)   o3 = MatMul(o2, wo)   o4 = Add(o3, bo)
    r = Add(x, o4)
    n2 = LayerNormalization<axis=-1>(r, g2, z2)
    h0 = MatMul(n2, w1)   h1 = Add(h0, b1)   h2 = Gelu(h1)   h3 = MatMul(h2, w2)   h4 = Add(h3, b2)
    y = Add(r, h4)
}"""


def block() -> ir.Model:
    """A transformer block of which no weight is zero."""
    shapes = {
        **dict.fromkeys(("wq", "wk", "wv", "wo"), (32, 32)),
        **dict.fromkeys(("bq", "bo", "b2", "z1", "z2"), (32,)),
        **{"w1": (32, 64), "w2": (64, 32), "b1": (64,), "bias": (1, 2, 8, 8)},
    }
    constants: dict[str, Any] = {
        name: 0.3 * normal(*shape, seed=i) for i, (name, shape) in enumerate(sorted(shapes.items()))
    }
    constants |= {"g1": 1 + 0.1 * normal(32), "g2": 1 + 0.1 * normal(32, seed=1), "scale": np.float32(0.1)}
    constants |= {"heads": np.array([0, 8, 2, 16], np.int64), "tokens": np.array([0, 8, 32], np.int64)}
    return graph(BLOCK_TEXT, **constants)


# An attention that reads its query, key and value in place, and an MLP: 8 tokens first, two heads of 16.
IN_PLACE_TEXT = """(float[8,b,32] x) => (float[8,b,32] y) {
    n1 = LayerNormalization<axis=-1>(x, g1, z1)
    q0 = MatMul(n1, wq)   k0 = MatMul(n1, wk)   v0 = MatMul(n1, wv)
    q1 = Reshape(q0, heads)   k1 = Reshape(k0, heads)   v1 = Reshape(v0, heads)
    q = Transpose<perm=[1,2,0,3]>(q1)   kt = Transpose<perm=[1,2,3,0]>(k1)   v = Transpose<perm=[1,2,0,3]>(v1)
    s = MatMul(q, kt)   p = Softmax<axis=-1>(s)   o = MatMul(p, v)
    o1 = Transpose<perm=[2,0,1,3]>(o)   o2 = Reshape(o1, tokens)   o3 = MatMul(o2, wo)   o4 = Add(o3, bo)
    r = Add(x, o4)
    n2 = LayerNormalization<axis=-1>(r, g2, z2)
    h0 = MatMul(n2, w1)   h1 = Add(h0, b1)   h2 = Gelu(h1)   h3 = MatMul(h2, w2)   h4 = Add(h3, b2)
    y = Add(r, h4)
}"""


def in_place(text: str = IN_PLACE_TEXT, *, scale: float = 0.3, **weights: Any) -> ir.Model:
    """A transformer block whose projections have no bias and stand tokens first; some weights may be others."""
    shapes = {
        **dict.fromkeys(("wq", "wk", "wv", "wo"), (32, 32)),
        **dict.fromkeys(("bo", "b2", "z1", "z2"), (32,)),
        **{"w1": (32, 64), "w2": (64, 32), "b1": (64,)},
    }
    constants: dict[str, Any] = {
        name: scale * normal(*shape, seed=i) for i, (name, shape) in enumerate(sorted(shapes.items()))
    }
    constants |= {"g1": 1 + 0.1 * normal(32), "g2": 1 + 0.1 * normal(32, seed=1)}
    constants |= {"heads": np.array([8, -1, 2, 16], np.int64), "tokens": np.array([8, -1, 32], np.int64)}
    return graph(text, **constants | weights)


def node(model: ir.Model, name: str) -> ir.Node:
    """Return the operator of this name."""
    return next(found for found in model.graph if found.name == name)


def producer(model: ir.Model, value: str) -> ir.Node:
    """Return the operator that makes a value."""
    return next(found for found in model.graph if any(output.name == value for output in found.outputs))


def source(found: ir.Node, position: int) -> str:
    """Return the operator type that makes an operand; empty for a graph input or a constant."""
    value = found.inputs[position]
    made = None if value is None else value.producer()
    return "" if made is None else made.op_type


def proto_of(model: ir.Model) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    assert isinstance(proto, onnx.ModelProto)
    return proto


def run(model: ir.Model | onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph operator by operator."""
    proto = model if isinstance(model, onnx.ModelProto) else proto_of(model)
    names = [value.name for value in proto.graph.output]
    return dict(zip(names, session(proto).run(names, dict(inputs)), strict=True))


def values(model: ir.Model, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return every FP32 value of a graph that is computed or given."""
    proto = proto_of(model)
    known = {value.name for value in proto.graph.output}
    made = [v.name or "" for n in model.graph for v in n.outputs if v.dtype == FLOAT and v.name not in known]
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made)
    return {**inputs, **run(proto, inputs)}


def ranges(model: ir.Model, inputs: Mapping[str, Array]) -> dict[str, float]:
    """Return the largest magnitude of every value."""
    return {name: float(np.abs(array).max()) for name, array in values(model, inputs).items()}


def quantized(
    make: Callable[[], ir.Model],
    inputs: Mapping[str, Array],
    *,
    scheme: str = "full",
    scale_type: ir.DataType = FLOAT,
    number_format: NumberFormat = INT8,
    float_weights: bool = False,
    groups: tuple[str, ...] | None = None,
    **choices: Any,
) -> tuple[ir.Model, Placement]:
    """Quantise by the extremes of some inputs, stages in high precision included unless ``choices`` names some."""
    model = make()
    found = ranges(model, inputs)
    placement = place(
        model.graph, scheme=scheme, number_format=number_format, **{"high_precision": frozenset(), **choices}
    )
    sites = [site for site in placement.sites if groups is None or site.group in groups]
    insert(model, sites, found, scale_type=scale_type, number_format=number_format, float_weights=float_weights)
    return model, placement


def assert_valid(model: ir.Model) -> None:
    """The checker, strict shape inference and the TensorRT lint have nothing against a graph."""
    proto = proto_of(model)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    report = lint(ir.from_proto(proto), rules=LINT_RULES)
    assert not report.findings, report.findings[0]


def shares(model: ir.Model, op_type: str) -> dict[str, list[str]]:
    """Return, for every operator of a type, what reads its result: name of the first operand -> names of readers."""
    return {
        found.inputs[0].name or "": [reader.name or "" for reader in found.outputs[0].consumers()]  # type: ignore[union-attr]
        for found in model.graph
        if found.op_type == op_type
    }


def timm_vit() -> nn.Module:
    found: nn.Module = import_timm().create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=20
    )
    return found


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "swin": (lambda: tiny_swin(embed_dim=32, depths=[2, 1], num_heads=[2, 4], num_classes=20), (64, 64)),
    "vit": (lambda: tiny_vit(embed_dim=32, depth=1, num_heads=2, num_classes=20), (32, 32)),
    "deit distilled": (lambda: tiny_vit(embed_dim=32, depth=1, num_heads=2, distilled=True), (32, 32)),
    "crossformer": (lambda: tiny_crossformer(depths=[2, 1], num_heads=[1, 2], num_classes=20), (64, 64)),
    "crossformer++": (
        lambda: tiny_crossformer_pp(depths=[1, 3], num_heads=[1, 2], group_size=[4, 3], interval=[6, 2]),
        (40, 56),
    ),
    "timm ViT": (lambda: randomized(timm_vit()), (32, 32)),
    "timm Swin backbone": (
        lambda: randomized(
            timm_swin(
                img_size=32, window_size=2, embed_dim=16, depths=(1, 2), num_heads=(1, 2), features_only=True,
                out_indices=(0, 1),
            )
        ),
        (32, 32),
    ),
    "torchvision Swin": (
        lambda: randomized(
            torchvision_swin(embed_dim=16, window_size=[4, 4], depths=[2, 1], num_heads=[1, 2], num_classes=20)
        ),
        (40, 40),
    ),
    "transformers Swin V2": (
        lambda: randomized(
            hf("Swinv2", image_size=32, window_size=4, embed_dim=16, depths=[2, 1], num_heads=[1, 2], num_labels=20)
        ),
        (32, 32),
    ),
    "transformers DeiT": (
        lambda: randomized(
            hf(
                "DeiT", image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=64,
            )
        ),
        (32, 32),
    ),
}  # fmt: skip
"""Name -> what makes it, and its images' height and width."""


@cache
def _exported(name: str) -> bytes:
    return shared(f"{name}.onnx", lambda: _export(name))


def _export(name: str) -> bytes:
    make, size = FAMILIES[name]
    module, inputs = make(), [TensorSpec("images", (3, *size))]
    model = trace(module, inputs, output_names(module, inputs), opset=20)
    rewrite(model)
    name_nodes(model, MODULE_KEY)
    return proto_of(model).SerializeToString()


def family(name: str) -> ir.Model:
    """Return a network as it is exported, rewritten and named."""
    return ir.from_proto(onnx.load_from_string(_exported(name)))


def images(name: str, count: int = 2) -> dict[str, Array]:
    return {"images": normal(count, 3, *FAMILIES[name][1])}
