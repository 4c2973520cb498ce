"""What a graph costs, against hand counts and against ONNX's own shape inference."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from onnx import TensorProto, helper, numpy_helper

from deploycli.exporters.graph import cost
from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.cost import graph_cost, refuse_what_is_too_large
from deploycli.exporters.graph.operators import COPIES
from deploycli.exporters.graph.steps import GraphCost, Step
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.models.codec import decode
from deploycli.models.errors import EnvironmentUnsuitable, IntegrityError
from tests.exporters.passes.graphs import load, parse
from tests.exporters.passes.programs import programs
from tests.exporters.passes.test_properties import examples


def cost_of(text: str, **constants: Any) -> GraphCost:
    model = load(parse(text, **constants))
    return graph_cost(model.graph, Analysis(model.graph))


def body(nodes: str, result: str = "float[batch, n] y", inputs: str = "float[batch, 6, 8] x") -> str:
    return f"g ({inputs}) => ({result}) {{ {nodes} }}"


@pytest.mark.parametrize(
    ("nodes", "written"),
    [
        ("y = Transpose <perm = [0, 2, 1]> (x)", 48 * 4),
        ("y = Transpose <perm = [2, 1, 0]> (x)", 48 * 4),
        ("y = Gather <axis = 1> (x, two)", 16 * 4),
        ("y, z = Split <axis = 2, num_outputs = 2> (x)", 48 * 4),
        ("h = Cast <to = 10> (x) y = Concat <axis = 1> (h, h)", 96 * 2),
        ("y = Slice (x, one, two_, one)", 8 * 4),
        ("y = Pad (x, pads)", 7 * 8 * 4),
        # Views.
        ("y = Reshape (x, shape)", 0),
        ("u = Unsqueeze (x, one) s = Squeeze (u, one) y = Flatten (s)", 0),
        ("u = Unsqueeze (x, one) y = Transpose <perm = [0, 2, 1, 3]> (u)", 0),
        # Twins that compute.
        ("y = Neg (x)", 0),
        ("y = Softmax (x)", 0),
        # What does not grow with the batch counts whole.
        ("c = Expand (value, shape_of_c) y = Add (x, c)", 48 * 4),
    ],
)
def test_movement(nodes: str, written: int) -> None:
    constants = {
        "two": [0, 3], "two_": [2], "one": [1], "pads": [0, 1, 0, 0, 0, 0], "shape": [-1, 48],
        "shape_of_c": [1, 6, 8], "value": np.ones((1, 1, 8), np.float32),
    }  # fmt: skip
    used = {name: value for name, value in constants.items() if name in set(re.findall(r"\w+", nodes))}
    rank = 4 if "perm = [0, 2, 1, 3]" in nodes else 2 if "Flatten" in nodes or "Reshape" in nodes else 3
    result = f"float{'16' if 'Cast' in nodes else ''}[{', '.join('abcd'[:rank])}] y"
    assert cost_of(body(nodes, result), **used).movement_bytes == written


def weight(*shape: int) -> np.ndarray:  # type: ignore[type-arg]  # of tests
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("nodes", "inputs", "constants", "products"),
    [
        ("y = MatMul (x, w)", "float[batch, 6, 8] x", {"w": weight(8, 5)}, 6 * 8 * 5),
        ("y = MatMul (x, w)", "float[batch, 6, 8] x", {"w": weight(8)}, 6 * 8),
        ("y = MatMul (x, z)", "float[batch, 3, 6, 8] x, float[batch, 3, 8, 6] z", {}, 3 * 6 * 8 * 6),
        ("y = Gemm <transA = 1> (x, w)", "float[8, 4] x", {"w": weight(8, 5)}, 4 * 8 * 5),
        ("y = Gemm <transB = 1> (x, w)", "float[batch, 8] x", {"w": weight(5, 8)}, 8 * 5),
        ("y = Conv (x, w)", "float[batch, 4, 9, 9] x", {"w": weight(6, 4, 3, 3)}, 7 * 7 * 6 * 4 * 9),
        ("y = Conv <group = 2> (x, w)", "float[batch, 4, 9, 9] x", {"w": weight(6, 2, 3, 3)}, 7 * 7 * 6 * 2 * 9),
        ("y = ConvTranspose (x, w)", "float[batch, 4, 5, 5] x", {"w": weight(4, 6, 3, 3)}, 25 * 4 * 6 * 9),
        ('y = Einsum <equation = "bij,jk->bik"> (x, w)', "float[batch, 6, 8] x", {"w": weight(8, 5)}, 6 * 8 * 5),
        ('y = Einsum <equation = "bij->bji"> (x)', "float[batch, 6, 8] x", {}, 0),
        ("y = Mul (x, x)", "float[batch, 8] x", {}, 0),
    ],
)
def test_multiply_adds(nodes: str, inputs: str, constants: Any, products: int) -> None:
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => (float y) {{ {nodes} }}'
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    loaded = load(model)
    assert graph_cost(loaded.graph, Analysis(loaded.graph)).multiply_adds == products


@pytest.mark.parametrize("flat", [False, True])
def test_the_attention_operator(flat: bool) -> None:
    """Three query heads of 8 channels on one key head, 6 queries, 10 keys; values of 5 channels."""
    shapes = ("batch, 6, 24", "batch, 10, 8", "batch, 10, 5") if flat else (
        "batch, 3, 6, 8", "batch, 1, 10, 8", "batch, 1, 10, 5"
    )  # fmt: skip
    heads = "<q_num_heads = 3, kv_num_heads = 1>" if flat else ""
    q, k, v = (f"float[{shape}] {name}" for shape, name in zip(shapes, "qkv", strict=True))
    graph = f"g ({q}, {k}, {v}) => (float y) {{ y = Attention {heads} (q, k, v) }}"
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]> {graph}')
    model.graph.output[0].type.tensor_type.ClearField("shape")
    loaded = ir.from_proto(model)
    assert graph_cost(loaded.graph, Analysis(loaded.graph)).multiply_adds == 3 * 6 * 10 * (8 + 5)


@pytest.mark.parametrize(
    ("nodes", "moved", "products"),
    [
        ("n = NonZero (x) y = Transpose (n)", False, True),  # as long as there are elements that are not zero
        ("n = NonZero (x) f = Cast <to = 1> (n) y = MatMul (f, f)", True, False),
        ('y = Einsum <equation = "bij,bij,bij->b"> (x, x, x)', True, False),
        ("y, h = GRU <hidden_size = 2> (x, w, r)", True, False),
        (
            "y = If (flag) <then_branch = a () => (float[batch, 8, 6] p) { p = Transpose <perm = [0, 2, 1]> (x) }, "
            "else_branch = b () => (float[batch, 6, 8] q) { q = Neg (x) }>",
            False,
            True,
        ),
        (
            "y = If (flag) <then_branch = a () => (float[batch, 6, 8] p) { p = Abs (x) }, "
            "else_branch = b () => (float[batch, 6, 8] q) { q = Neg (x) }>",
            True,
            True,
        ),
    ],
)
def test_what_is_not_known_is_not_guessed(nodes: str, moved: bool, products: bool) -> None:
    constants = {"w": weight(1, 6, 8), "r": weight(1, 6, 2)} if "GRU" in nodes else {}
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 6, 8] x, bool flag) => (float y) {{ {nodes} }}'
    model = onnx.parser.parse_model(text)
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    loaded = load(model)
    cost = graph_cost(loaded.graph, Analysis(loaded.graph))
    assert (cost.movement_bytes is not None, cost.multiply_adds is not None) == (moved, products)


def test_an_operator_of_another_domain_may_multiply() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20, "d" : 1]> g (float[2] x) => (float[2] y) { y = d.Product (x) }'
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert graph_cost(model.graph, Analysis(model.graph)) == GraphCost(0, None, 0)


def test_constants_are_counted_once_each_and_inner_ones_too() -> None:
    text = """g (float[4] x, bool flag) => (float[4] y) {
        a = Add (x, c) b = Mul (a, c) d = Gather (b, i)
        y = If (flag) <
            then_branch = p () => (float[4] s) { k = Constant <value: tensor = float[2] {1, 2}> () r = Add (k, k) s = Abs (x) },
            else_branch = q () => (float[4] t) { t = Neg (x) }
        >
    }"""  # noqa: E501 - the parser of ONNX text reads no line ends here
    model = ir.from_proto(parse(text, c=np.ones(4, np.float32), i=[0, 1]))
    assert graph_cost(model.graph, Analysis(model.graph)).constant_bytes == 4 * 4 + 2 * 8 + 2 * 4


@examples(80)
@given(programs())
def test_movement_agrees_with_the_shapes_that_onnx_infers(plain: onnx.ModelProto) -> None:
    """At batch 1, all transpositions counted: a program whose axes are 1 long differs in nothing else."""
    model = load(plain)
    counted = graph_cost(model.graph, Analysis(model.graph)).movement_bytes
    for value in (*plain.graph.input, *plain.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                factor = dim.dim_param.partition("*")[0]
                dim.dim_value = int(factor) if factor.isdigit() else 1
    inferred = onnx.shape_inference.infer_shapes(plain, strict_mode=True, data_prop=True).graph
    types = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.output, *inferred.input)}

    def size(name: str) -> int:
        tensor = types[name]
        return (
            math.prod(d.dim_value for d in tensor.shape.dim)
            * helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
        )

    def copied(free: bool) -> int:
        nodes = [node for node in plain.graph.node if node.op_type in COPIES - ({"Transpose"} if free else set())]
        return sum(size(name) for node in nodes for name in node.output)

    assert counted is not None
    assert copied(free=True) <= counted <= copied(free=False)


def test_every_step_of_the_pipeline_has_the_cost_of_the_graph_after_it() -> None:
    text = body("t = Transpose <perm = [0, 2, 1]> (x) y = Transpose <perm = [0, 2, 1]> (t)", "float[batch, 6, 8] y")
    model = load(parse(text))
    costs = {step.name: step.cost for step in rewrite(model)}
    assert costs.pop("tidy") is None
    assert costs["infer"] == GraphCost(2 * 48 * 4, 0, 0)
    assert costs["clean"] == GraphCost(0, 0, 0)
    assert None not in costs.values()


def test_a_step_is_rebuilt_from_json_with_and_without_a_cost() -> None:
    step = Step("fold-movement", 3, 0.5, (), GraphCost(1, None, 2))
    assert decode(json.dumps(step.to_json()), Step, where="it", what="a step") == step
    old = {"name": "trace", "nodes": 3, "seconds": 0.5, "refusals": []}
    assert decode(json.dumps(old), Step, where="it", what="a step") == Step("trace", 3, 0.5)


@pytest.mark.parametrize(
    "spoilt",
    [{"movement_bytes": -1}, {"multiply_adds": 1.5}, {"constant_bytes": None}, {"constant_bytes": True}],
)
def test_a_cost_that_is_none_is_refused(spoilt: dict[str, Any]) -> None:
    data = {"movement_bytes": 1, "multiply_adds": 2, "constant_bytes": 3}
    with pytest.raises(IntegrityError, match=re.escape(f"at $.{next(iter(spoilt))}")):
        decode(json.dumps(data | spoilt), GraphCost, where="it", what="a cost")


def graph(nodes: list[onnx.NodeProto], dims: list[int | str], **constants: np.ndarray) -> ir.Graph:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], stored), opset_imports=[helper.make_opsetid("", 20)]
    )
    return ir.from_proto(proto).graph


def node(kind: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def judge(which: ir.Graph) -> None:
    refuse_what_is_too_large(which, Analysis(which), batch=3, hint="hint")


FIRST = np.zeros(1, np.int64)
LARGE = {
    "doubling": [
        node("Concat", "a0 a0", "a1", axis=0),
        *(node("Concat", f"a{i} a{i}", f"a{i + 1}", axis=0) for i in range(1, 32)),
        node("Gather", "a32 first", "g"),
    ],
    "tile": [node("Tile", "a0 many", "t"), node("Gather", "t first", "g")],
    "expand": [node("Expand", "a0 many", "t"), node("Gather", "t first", "g")],
    "of shape": [node("ConstantOfShape", "many", "t"), node("Gather", "t first", "g")],
    "two halves": [
        node("ConstantOfShape", "half", "t"), node("Cos", "t", "u"), node("Gather", "u first", "g"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_constants_that_are_too_large(name: str) -> None:
    constants = {
        "a0": np.ones(1, np.float32),
        "many": np.array([2**32], np.int64),
        "half": np.array([2**27 + 2**26], np.int64),
        "first": FIRST,
    }
    which = graph([*LARGE[name], node("Add", "x g", "y")], ["batch", 4], **constants)
    with pytest.raises(EnvironmentUnsuitable, match=r"\w+ .* takes and makes [\d.]+ [GT]iB") as caught:
        judge(which)
    assert "of what follows from no input" in caught.value.expected


def test_what_a_file_stores_may_be_large_and_what_is_made_of_it_larger() -> None:
    stored = np.zeros((2**14, 2**12), np.float16)  # 128 MiB
    nodes = [node("Cast", "w", "f", to=TensorProto.FLOAT), node("Tile", "f four", "t"), node("ReduceMax", "t", "g")]
    judge(graph([*nodes, node("Add", "x g", "y")], ["batch", 4], w=stored, four=np.array([4, 1], np.int64)))


def test_activations_are_held_against_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    which = graph([node("Relu", "x", "r"), node("Relu", "r", "y")], ["batch", 2**20])
    monkeypatch.setattr(cost, "available", lambda: 30 * 2**20)
    judge(which)  # 3 x 4 MiB in, as many out
    monkeypatch.setattr(cost, "available", lambda: 20 * 2**20)
    with pytest.raises(EnvironmentUnsuitable, match=r"Relu x takes and makes 24\.0 MiB, 12\.0 MiB of them") as caught:
        judge(which)
    assert caught.value.expected == "less than the 20.0 MiB that are left"
    monkeypatch.setattr(cost, "available", lambda: None)
    judge(which)


def test_what_is_not_known_is_not_weighed() -> None:
    judge(graph([node("Relu", "x", "y")], ["batch", "height", "width"]))


def test_a_string_is_of_the_size_of_a_pointer() -> None:
    judge(graph([node("Cast", "x", "s", to=8), node("Cast", "s", "y", to=1)], ["batch", 4]))
