from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploycli.exporters.passes.common import opset
from deploycli.exporters.passes.common.opset import NEWEST, OLDEST, raise_opset
from tests.exporters.passes.graphs import differences
from tests.exporters.passes.written_out import parse_at


def raised(plain: onnx.ModelProto, target: int) -> tuple[onnx.ModelProto, str | None]:
    model = ir.from_proto(plain)
    reason = raise_opset(model, target)
    result = ir.to_proto(model)
    onnx.checker.check_model(result, full_check=True)
    return result, reason


@pytest.mark.parametrize("start", [13, 15, 17, 18])
@pytest.mark.parametrize("target", [18, 20, 23])
@pytest.mark.parametrize(
    ("node", "constants"),
    [
        ("y = Add (x, x)", {}),
        ("y = Reshape (x, s)", {"s": [-1, 2, 6]}),
        ("y = ReduceMean <axes = [2]> (x)", {}),
        ("y = ReduceMax <axes = [1, 2], keepdims = 0> (x)", {}),
        ("y = ReduceSum (x, a)", {"a": [1]}),
        ("y, z = Split <axis = 1> (x)", {}),
        ("y = Cast <to = 7> (x)", {}),
        ("y = Pad (x, p)", {"p": [0, 1, 0, 0, 0, 2]}),
        ("y = Softmax (x)", {}),
    ],
)
def test_operators_go_on_meaning_the_same(start: int, target: int, node: str, constants: dict[str, Any]) -> None:
    if start >= 18 and "axes =" in node:
        pytest.skip("axes are an operand from 18 on")
    if start >= 18 and "Split" in node:
        node = node.replace("axis = 1", "axis = 1, num_outputs = 2")
    dtype = "int64" if "Cast" in node else "float"
    outputs = f"{dtype}[a, b, c] y" if "keepdims = 0" not in node else "float[a] y"
    text = f"g (float[batch, 4, 3] x) => ({outputs}) {{ {node} }}"
    plain = parse_at(start, text, **constants)
    result, reason = raised(plain, target)
    assert (reason, result.opset_import[0].version) == (None, max(start, target))
    assert differences(plain, result) == []


@pytest.mark.parametrize("target", [18, 20, 23])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize(
    "place", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize"]
)
@pytest.mark.parametrize("by", ["scales", "sizes"])
def test_a_picture_is_resized_alike(target: int, mode: str, place: str, by: str) -> None:
    ways = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"] if mode == "nearest" else ["floor"]
    for way, factor in itertools.product(ways, (0.3, 0.5, 1.7, 3.0)):
        attributes = f'mode = "{mode}", coordinate_transformation_mode = "{place}", nearest_mode = "{way}"'
        operand = "roi, k" if by == "scales" else "roi, , k"
        k = np.float32([1, 1, factor, factor]) if by == "scales" else np.int64([2, 3, int(7 * factor), int(9 * factor)])
        text = f"g (float[2, 3, 7, 9] x) => (float[a, b, c, d] y) {{ y = Resize <{attributes}> (x, {operand}) }}"
        plain = parse_at(13, text, roi=np.float32([0, 0, 0.1, 0.2, 1, 1, 0.8, 0.9]), k=k)
        result, reason = raised(plain, target)
        assert reason is None
        assert differences(plain, result, (2,)) == []


def test_a_loop_is_raised_with_what_is_in_it() -> None:
    text = """g (float[batch, 4] x, bool c) => (float[rows, columns] y) {
        y = If (c) <
            then_branch = t () => (float[rows, 1] a) { a = ReduceMean <axes = [1]> (x) },
            else_branch = e () => (float[rows, columns] b) { b = Neg (x) }
        >
    }"""
    plain = parse_at(13, text)
    result, reason = raised(plain, 20)
    assert reason is None
    assert differences(plain, result, (1, 3)) == []


@pytest.mark.parametrize(
    ("start", "target", "node", "constants"),
    [
        (16, 20, "y = GridSample (x4, grid)", {}),
        (13, 20, "y = AveragePool <kernel_shape = [2], ceil_mode = 1> (x)", {}),
        (20, 23, "y = Dropout (x)", {}),
    ],
)
def test_an_operator_that_changes_is_a_reason(start: int, target: int, node: str, constants: dict[str, Any]) -> None:
    inputs = "float[batch, 4, 3] x"
    outputs = "float[a, b, c] y"
    if "GridSample" in node:
        inputs, outputs = "float[batch, 4, 3, 3] x4, float[batch, 2, 2, 2] grid", "float[a, b, c, d] y"
    plain = parse_at(start, f"g ({inputs}) => ({outputs}) {{ {node} }}", **constants)
    result, reason = raised(plain, target)
    op = plain.graph.node[0].op_type
    assert reason == f"{op} has another meaning in opset {target} than in {start}"
    assert result.opset_import[0].version == start
    assert [n.op_type for n in result.graph.node] == [op]


@pytest.mark.parametrize(("start", "target"), [(11, 20), (17, 24)])
def test_opsets_outside_of_the_tables_stay(start: int, target: int) -> None:
    plain = parse_at(start, "g (float[batch, 4] x) => (float[batch, 4] y) { y = Neg (x) }")
    assert raised(plain, target)[1] == f"opset {start} cannot be raised to {target}"


def test_a_function_of_another_opset_is_a_reason() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[batch, 4] x) => (float[batch, 4] y) { y = own.twice (x) }
    <opset_import: ["" : 17], domain: "own">
    twice (x) => (y) { y = Add (x, x) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert raise_opset(model, 20) == "a function of the model is of opset 17, not 20"


def attributes(schema: Any) -> dict[str, Any]:
    return {
        name: (attribute.type, attribute.default_value.SerializeToString() if attribute.default_value else b"")
        for name, attribute in schema.attributes.items()
    }


@pytest.mark.parametrize("name", sorted(opset._WIDENED))
def test_what_is_said_to_be_widened_has_kept_its_operands_and_attributes(name: str) -> None:
    """The table against ONNX's own definitions."""
    versions = [s for s in onnx.defs.get_all_schemas_with_history() if s.name == name and s.domain == ""]
    versions.sort(key=lambda schema: schema.since_version)
    start = max((s.since_version for s in versions if s.since_version <= OLDEST), default=versions[0].since_version)
    known = [schema for schema in versions if start <= schema.since_version <= NEWEST]
    assert known
    for before, after in itertools.pairwise(known):
        assert attributes(before).items() <= attributes(after).items()
        assert not any(a.required for n, a in after.attributes.items() if n not in before.attributes)
        assert [i.option for i in before.inputs] == [i.option for i in after.inputs][: len(before.inputs)]
        assert all(
            i.option == onnx.defs.OpSchema.FormalParameterOption.Optional for i in after.inputs[len(before.inputs) :]
        )
        assert len(before.outputs) == len(after.outputs)
