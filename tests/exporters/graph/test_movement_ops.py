"""What numpy does for an operator is what ONNX Runtime does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from onnx import helper

from deploycli.exporters.graph.analysis import GROWTH
from deploycli.exporters.graph.evaluate import evaluate
from deploycli.exporters.graph.movement_ops import is_movement, move
from tests.exporters.passes.graphs import feeds, load, session
from tests.exporters.passes.programs import programs
from tests.exporters.passes.test_properties import examples

if TYPE_CHECKING:
    import onnx_ir as ir


@examples(150)
@given(programs(pure=True, whole=True))
def test_random_programs(plain: onnx.ModelProto) -> None:
    inputs = feeds(plain, 3)
    names = [value.name for value in plain.graph.output]
    expected = dict(zip(names, session(plain).run(names, inputs), strict=True))
    model = load(plain)
    arrays: dict[ir.Value | None, Any] = {value: inputs[value.name or ""] for value in model.graph.inputs}
    arrays |= {value: value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value}
    for node in model.graph:
        results = evaluate(node, [arrays.get(value) for value in node.inputs], model.opset_imports, GROWTH)
        arrays.update(zip(node.outputs, results, strict=True))
        for value, array in zip(node.outputs, results, strict=True):
            want = expected.get(value.name or "")
            assert want is None or (
                array is not None and array.shape == want.shape and array.tobytes() == want.tobytes()
            )


X = np.arange(1, 1 + 2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
END, BEGIN = 2**63 - 1, -(2**63)


def compare(op: str, operands: list[Any], opset: int = 20, outputs: int = 1, **attributes: Any) -> None:
    """Run one operator in ONNX Runtime and in numpy. Operands after the first are constants; None is absent."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(operands)]
    made = [f"y{i}" for i in range(outputs)]
    given_ = {name: np.asarray(x) for name, x in zip(names, operands, strict=True) if x is not None}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in given_.items()
    ]
    node = helper.make_node(op, names, made, **attributes)
    graph = helper.make_graph([node], "one", inputs, [onnx.ValueInfoProto(name=name) for name in made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    expected = session(model).run(made, given_)
    (loaded,) = load(model).graph
    arrays = [given_.get(name) for name in names]
    assert is_movement(loaded, arrays)
    found = move(loaded, arrays)
    assert [y.shape for y in found] == [y.shape for y in expected]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("start", "end", "step"),
    [
        (0, END, 1), (-2, END, 1), (BEGIN, END, 1), (1, -1, 1), (9, END, 1), (2, 1, 1), (0, END, 3), (-9, 9, 2),
        (END, BEGIN, -1), (-1, BEGIN, -1), (-1, -9, -2), (2, 0, -1), (9, 0, -1), (-9, BEGIN, -1), (1, -9, -1),
        (0, 3, -1), (2, -1, -1),
    ],
)  # fmt: skip
def test_slice(start: int, end: int, step: int) -> None:
    compare("Slice", [X, [start], [end], [-1], [step]])


def test_slice_without_axes() -> None:
    compare("Slice", [X, [0, 1], [2, 3]])
    compare("Slice", [X, [0, 1], [2, 3], None, [1, 2]])
    compare("Slice", [X], opset=9, starts=[0, 1], ends=[2, 3])
    compare("Slice", [X], opset=9, starts=[1], ends=[END], axes=[2])


def test_slice_of_nothing() -> None:
    compare("Slice", [X[:, :0], [-1], [BEGIN], [1], [-1]])


def test_axes_as_attributes() -> None:
    compare("Squeeze", [X[:, None]], opset=11, axes=[1])
    compare("Unsqueeze", [X], opset=11, axes=[0, 2])
    compare("Split", [X], opset=11, outputs=2, axis=1, split=[1, 2])
    compare("Split", [X], opset=11, outputs=2, axis=2)
    compare("Pad", [X], opset=9, pads=[0, 1, 0, 0, 0, 2])


def test_squeeze_of_all_axes() -> None:
    compare("Squeeze", [X[:1, :1]])


@pytest.mark.parametrize("axis", [-3, -1, 0, 1, 2, 3])
def test_flatten(axis: int) -> None:
    compare("Flatten", [X], axis=axis)


@pytest.mark.parametrize(("outputs", "axis"), [(2, 1), (4, 2), (2, -1), (3, 1), (1, 0)])
def test_split_into_a_number_of_parts(outputs: int, axis: int) -> None:
    compare("Split", [X], outputs=outputs, axis=axis, num_outputs=outputs)


def test_transpose_without_a_permutation() -> None:
    compare("Transpose", [X])


def test_reshape_copies_zeros_or_takes_them_at_their_word() -> None:
    compare("Reshape", [X, [0, -1]])
    compare("Reshape", [X, [-1, 0, 2]])
    compare("Reshape", [X[:0], [0, 7]], allowzero=1)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gathers(dtype: type, axis: int) -> None:
    compare("Gather", [X, dtype(1)], axis=axis)
    compare("Gather", [X, np.array([[0, -1], [1, 1]], dtype)], axis=axis)
    compare("GatherElements", [X, np.zeros((1, 2, 3), dtype) - 1], axis=axis)


def test_gather_nd() -> None:
    compare("GatherND", [X, [[0, 1], [-1, 2]]])
    compare("GatherND", [X, [[[0], [1]]]])


def test_pads() -> None:
    compare("Pad", [X, [1, 0, 0, 2], None, [0, -1]])
    compare("Pad", [X, [0, 0, 1, 1, 0, 0]])
    compare("Pad", [X, [0] * 6], mode="reflect")


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space(mode: str) -> None:
    image = np.arange(1 * 8 * 2 * 6, dtype=np.float32).reshape(1, 8, 2, 6)
    compare("DepthToSpace", [image], blocksize=2, mode=mode)
    compare("SpaceToDepth", [image], blocksize=2)


def test_expand_and_tile() -> None:
    compare("Expand", [X[:, :1], [5, 2, 1, 1]])
    compare("Expand", [X[:, :1], [7, 1]])
    compare("Tile", [X, [2, 1, 3]])


@pytest.mark.parametrize(
    ("op", "operands", "attributes"),
    [
        ("Pad", [X, [0, 1, 0, 0, 0, 0], np.float32(1)], {}),
        ("Pad", [X, [0, 1, 0, 0, 0, 0], np.float32(-0.0)], {}),
        ("Pad", [X, [0, -1, 0, 0, 0, 0]], {}),
        ("Pad", [X, [0, 1, 0, 0, 0, 0]], {"mode": "edge"}),
        ("Pad", [X, None], {}),
        ("GatherND", [X, [[0]]], {"batch_dims": 1}),
        ("Relu", [X], {}),
    ],
)
def test_what_does_more_than_move_is_no_movement(op: str, operands: list[Any], attributes: dict[str, Any]) -> None:
    node = helper.make_node(op, [f"x{i}" for i in range(len(operands))], ["y"], **attributes)
    inputs = [helper.make_tensor_value_info(name, 1, None) for name in node.input]
    model = helper.make_model(helper.make_graph([node], "one", inputs, [helper.make_tensor_value_info("y", 1, None)]))
    (loaded,) = load(model).graph
    assert not is_movement(loaded, [None if x is None else np.asarray(x) for x in operands])


def test_an_operator_of_another_domain_is_no_movement() -> None:
    node = helper.make_node("Reshape", ["x0", "x1"], ["y"], domain="other")
    inputs = [helper.make_tensor_value_info(name, 1, None) for name in node.input]
    model = helper.make_model(helper.make_graph([node], "one", inputs, [helper.make_tensor_value_info("y", 1, None)]))
    (loaded,) = load(model).graph
    assert not is_movement(loaded, [X, np.array([-1])])


@pytest.mark.parametrize(
    ("op", "operands"),
    [("Gather", [X, [9]]), ("Reshape", [X, [5, 5]]), ("Reshape", [X, [1, 1, 1, 0]]), ("Squeeze", [X, [1]])],
)
def test_operands_that_do_not_fit_are_a_value_error(op: str, operands: list[Any]) -> None:
    node = helper.make_node(op, ["x0", "x1"], ["y"])
    inputs = [helper.make_tensor_value_info(name, 1, None) for name in node.input]
    model = helper.make_model(helper.make_graph([node], "one", inputs, [helper.make_tensor_value_info("y", 1, None)]))
    (loaded,) = load(model).graph
    with pytest.raises(ValueError, match=r".+"):
        move(loaded, [np.asarray(x) for x in operands])
