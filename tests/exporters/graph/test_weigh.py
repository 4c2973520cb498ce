"""What a graph computes is weighed by its shapes, before anything runs it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycli.exporters.graph import weigh
from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.weigh import refuse_what_is_too_large
from deploycli.models.errors import EnvironmentUnsuitable


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
    monkeypatch.setattr(weigh, "available", lambda: 30 * 2**20)
    judge(which)  # 3 x 4 MiB in, as many out
    monkeypatch.setattr(weigh, "available", lambda: 20 * 2**20)
    with pytest.raises(EnvironmentUnsuitable, match=r"Relu x takes and makes 24\.0 MiB, 12\.0 MiB of them") as caught:
        judge(which)
    assert caught.value.expected == "less than the 20.0 MiB that are left"
    monkeypatch.setattr(weigh, "available", lambda: None)
    judge(which)


def test_what_is_not_known_is_not_weighed() -> None:
    judge(graph([node("Relu", "x", "y")], ["batch", "height", "width"]))


def test_a_string_is_of_the_size_of_a_pointer() -> None:
    judge(graph([node("Cast", "x", "s", to=8), node("Cast", "s", "y", to=1)], ["batch", 4]))
