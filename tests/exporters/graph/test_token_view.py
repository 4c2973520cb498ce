from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.token_view import row_wise
from tests.exporters.passes.graphs import load

CONSTANTS: dict[str, Any] = {
    "w": np.ones((4, 6), np.float32), "ws": np.ones((5, 4, 6), np.float32), "square": np.ones((5, 5, 5), np.float32),
    "gain": np.ones(4, np.float32), "rows": np.ones((1, 5, 4), np.float32), "few": np.ones((5, 4), np.float32),
    "window": np.ones((1, 1, 4), np.float32), "low": np.float32(0), "last": np.array([2]), "middle": np.array([1]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("y = Add (x, z)", ((0, 1), ())),
        ("y = Greater (x, z)", ((0, 1), ())),
        ("y = Where (c, x, z)", ((0, 1, 2), ())),
        ("y = Clip (x, low)", ((0,), ())),
        ("y = Mul (x, gain)", ((0,), ())),
        ("y = Mul (x, window)", ((0,), ())),
        ("y = Mul (rows, x)", ((1,), (0,))),
        ("y = Mul (x, few)", ((0,), (1,))),
        ("y = Mul (x, row)", None),  # which is no constant, and of fewer rows
        ("y = MatMul (x, w)", ((0,), ())),
        ("y = MatMul (x5, square)", None),  # a weight for each row of a window: rows are not told apart by order
        ("y = MatMul (x, t)", None),  # scores mix the tokens
        ("y = LayerNormalization (x, gain)", ((0,), ())),
        ("y = LayerNormalization <axis = 1> (x, few)", None),
        ("y = Softmax (x)", ((0,), ())),
        ("y = Softmax <axis = 1> (x)", None),
        ("y = Hardmax (x)", ((0,), ())),
        ("y = ReduceMean (x, last)", ((0,), ())),
        ("y = ReduceMean <keepdims = 0> (x, last)", None),
        ("y = ReduceMean (x, middle)", None),
        ("y = ArgMax <axis = 2> (x)", ((0,), ())),
        ("y = Transpose <perm = [0, 1, 2]> (x)", None),  # movement is no computing
        ("y = Identity (x)", None),
        ("y = CumSum (x, middle)", None),
    ],
)
def test_row_wise_operators(line: str, expected: tuple[tuple[int, ...], tuple[int, ...]] | None) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 5, 4] x, float[batch, 5, 4] z, bool[batch, 5, 4] c, float[batch, 1, 4] row,
           float[batch, 4, 5] t, float[batch, 5, 5, 5] x5) => (float[] y) {{ {line} }}"""
    plain = onnx.parser.parse_model(text)
    plain.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in CONSTANTS.items())
    model = load(plain)
    found = row_wise(next(iter(model.graph)), Analysis(model.graph))
    assert (None if found is None else (found.operands, found.varying)) == expected
