from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.exporters.graph import shapes
from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.shapes import BATCH, BATCHES, NodeShapes, Operand
from deploycli.exporters.passes.common.tidy import LiftConstants
from tests.benchmarks.growth import deep_swin

if TYPE_CHECKING:
    from collections.abc import Callable

OPSETS = {"": 20}
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64

# Few numbers, so that two nodes are often alike, or alike but for one thing.
sizes = st.sampled_from([1, 2, 4, BATCH, 2 * BATCH])
dims = st.lists(sizes, min_size=1, max_size=3).map(tuple)
dtypes = st.sampled_from([FLOAT, ir.DataType.FLOAT16])


def tensor(shape: tuple[int, ...], dtype: ir.DataType = FLOAT) -> Operand:
    return Operand(dtype, shape, None)


def ints(*values: int, high: tuple[int, ...] | None = None) -> Operand:
    low = np.array(values, np.int64)
    return Operand(INT64, low.shape, (low, low if high is None else np.array(high, np.int64)))


def node(op_type: str, operands: list[Any], outputs: int = 1, **attributes: Any) -> tuple[ir.Node, list[Any]]:
    inputs = [None if x is None else ir.Value(name=f"v{i}") for i, x in enumerate(operands)]
    attrs = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
    made = ir.Node("", op_type, inputs, attrs, num_outputs=outputs)
    for i, output in enumerate(made.outputs):
        output.name = f"o{i}"
    return made, operands


@st.composite
def nodes(draw: st.DrawFn) -> tuple[ir.Node, list[Any]]:
    """Operators of which inference reads attributes, types, shapes, values, absent operands or absent outputs."""
    x = tensor(draw(dims), draw(dtypes))
    rank = len(x.axes)
    axis = draw(st.integers(-rank, rank - 1))
    ends = draw(st.sampled_from([{"high": None}, {"high": (3 * BATCH,)}]))
    makers: list[Callable[[], tuple[ir.Node, list[Any]]]] = [
        lambda: node("Add", [x, tensor(draw(dims), x.dtype)]),
        lambda: node("MatMul", [x, tensor(draw(dims), x.dtype)]),
        lambda: node("Softmax", [x], axis=axis),
        lambda: node("Gelu", [x], approximate=draw(st.sampled_from(["none", "tanh"]))),
        lambda: node("LayerNormalization", [x, tensor(x.axes[-1:], x.dtype)], axis=axis, outputs=3),
        lambda: node("Transpose", [x], perm=list(draw(st.permutations(range(rank))))),
        lambda: node("Concat", [x, tensor(x.axes, x.dtype)], axis=axis),
        lambda: node("Cast", [x], to=draw(st.sampled_from([1, 7, 10]))),
        lambda: node("Reshape", [x, ints(*draw(st.sampled_from([(-1,), (-1, 2), (0, -1), (1, -1, 2)])))]),
        lambda: node("Slice", [x, ints(0), ints(draw(st.integers(1, 4))), ints(axis)]),
        lambda: node("Slice", [x, ints(0), ints(3, **ends), ints(axis)]),
        lambda: node("Pad", [x, ints(*draw(st.permutations([0] * (2 * rank - 1) + [1])))]),
        lambda: node("ReduceMean", [x, ints(axis)], keepdims=draw(st.integers(0, 1))),
        lambda: node("Clip", [x, draw(st.sampled_from([None, tensor((), x.dtype)])), tensor((), x.dtype)]),
        lambda: node("Split", [x], axis=axis, num_outputs=2, outputs=2),
        lambda: node("Gather", [x, tensor(draw(dims), INT64)], axis=axis),
    ]
    made, operands = draw(st.sampled_from(makers))()
    if len(made.outputs) == 3 and draw(st.booleans()):
        made.outputs[1].name = ""
    return made, operands


def asked_anew(made: ir.Node, operands: list[Any]) -> Any:
    """What ONNX's inference says at both ends, with nothing remembered."""
    ends = [shapes._infer_at(end, made, operands, OPSETS[""], OPSETS) for end in range(len(BATCHES))]
    if ends[0] is None or ends[1] is None:
        return None
    return [None if a is None or b is None else (*a, b[1]) for a, b in zip(*ends, strict=True)]


def what_is_remembered_is_what_onnx_says(alike: list[tuple[ir.Node, list[Any]]]) -> None:
    shapes._KNOWN.clear()
    inference = NodeShapes(OPSETS)
    for made, operands in alike:
        assert inference.infer(made, operands) == asked_anew(made, operands), str(made)


@settings(max_examples=60, deadline=None)
@given(st.lists(nodes(), min_size=1, max_size=12))
def test_what_is_remembered_is_what_onnx_says(made: list[tuple[ir.Node, list[Any]]]) -> None:
    what_is_remembered_is_what_onnx_says(made)


PAIRS = {
    "operator": [node("Shape", [tensor((2, 4))]), node("Relu", [tensor((2, 4))])],
    "attributes": [node("Transpose", [tensor((2, 4, 8))], perm=p) for p in ([0, 2, 1], [2, 0, 1])],
    "types": [node("Relu", [tensor((2, 4), dtype)]) for dtype in (FLOAT, ir.DataType.FLOAT16)],
    "shapes": [node("Relu", [tensor(shape)]) for shape in ((2, 4), (4, 2))],
    "values": [node("Reshape", [tensor((BATCH, 4)), ints(*target)]) for target in ((-1, 2), (2, -1))],
    "values at the other end": [
        node("Slice", [tensor((4 * BATCH, 4)), ints(0), ints(3, high=high), ints(0)]) for high in ((3,), (3 * BATCH,))
    ],
    "outputs": [
        node("LayerNormalization", [tensor((2, 4)), tensor((4,))], outputs=n, axis=-1) for n in (1, 3)
    ],
}  # fmt: skip


@pytest.mark.parametrize("differs", PAIRS)
def test_nodes_that_differ_in_one_thing_are_told_apart(differs: str) -> None:
    first, second = (asked_anew(*made) for made in PAIRS[differs])
    assert first != second
    what_is_remembered_is_what_onnx_says(PAIRS[differs])


@pytest.mark.parametrize("dropped", [0, 2, 3, 4])
def test_a_key_that_forgets_something_is_noticed(dropped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = shapes._key

    def wrong(made: ir.Node, operands: Any) -> object:
        key: Any = right(made, operands)
        return (*key[:dropped], *key[dropped + 1 :])

    monkeypatch.setattr(shapes, "_key", wrong)
    with pytest.raises(AssertionError):
        what_is_remembered_is_what_onnx_says([made for pair in PAIRS.values() for made in pair])


def test_a_value_that_is_not_looked_at_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_value_key", lambda _operand: None)
    with pytest.raises(AssertionError):
        what_is_remembered_is_what_onnx_says(PAIRS["values"])


def test_a_deep_network_asks_no_more_than_one_of_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask = onnx.shape_inference.infer_node_outputs
    monkeypatch.setattr(onnx.shape_inference, "infer_node_outputs", lambda *a: asked.append(a[1].op_type) or ask(*a))
    counts = []
    for size in (300, 1200):
        shapes._KNOWN.clear()
        asked.clear()
        Analysis(deep_swin(size, scripted=False).graph)
        counts.append(len(asked))
    assert counts[0] > 0
    assert counts[0] == counts[1]


def test_facts_are_the_same_where_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep_swin(300, scripted=True)
    LiftConstants()(model)
    values = [output for node in model.graph for output in node.outputs]
    remembered = Analysis(model.graph)
    monkeypatch.setattr(shapes, "_key", lambda *_: None)
    anew = Analysis(model.graph)
    assert all(remembered.dims(value) is not None for value in values)
    for value in values:
        one, other = remembered[value], anew[value]
        assert (one and (one.dtype, one.dims, one.zero)) == (other and (other.dtype, other.dims, other.zero))


def test_no_more_is_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_MOST", 3)
    shapes._KNOWN.clear()
    inference = NodeShapes(OPSETS)
    for size in range(1, 9):
        assert inference.infer(*node("Relu", [tensor((size,))])) == [(FLOAT, (size,), (size,))]
    assert len(inference._known) <= 3
