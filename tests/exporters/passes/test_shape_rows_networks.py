from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.passes.fold_movement import FoldMovement
from deploycli.exporters.passes.shape_rows import ShapeRows
from tests.exporters.passes.graphs import apply, differences, load, ops, parse

if TYPE_CHECKING:
    import onnx

RNG = np.random.default_rng(0)


def numbers(*shape: int) -> Any:
    return RNG.integers(-2, 3, shape).astype(np.float32)


def settle(text: str, **constants: Any) -> tuple[dict[str, int], bool]:
    """Run the pass, and the folding of movement after it, which makes one Reshape of two."""
    plain = parse(text, **constants)
    rewritten, _, modified = apply(ShapeRows, plain)
    assert differences(plain, rewritten) == []
    folded, _, _ = apply(FoldMovement, rewritten)
    assert differences(plain, folded) == []
    _, _, once_more = apply(ShapeRows, folded)
    assert not once_more
    return ops(folded), modified


ATTENTION = """g (float[batch, 6, 4] x) => (float[batch, 6, 4] y) {
    n = LayerNormalization (x, gain, shift)
    w = Reshape (n, windows)
    m = MatMul (w, wq)
    q = Add (m, bq)
    h = Reshape (q, heads)
    t = Transpose <perm = [0, 2, 1, 3]> (h)
    s = Softmax (t)
    u = Transpose <perm = [0, 2, 1, 3]> (s)
    v = Reshape (u, windows)
    p = MatMul (v, wp)
    b = Reshape (p, image)
    y = Add (x, b)
}"""
CONSTANTS: dict[str, Any] = {
    "gain": numbers(4),
    "shift": numbers(4),
    "windows": np.array([-1, 3, 4]),
    "heads": np.array([-1, 3, 2, 2]),
    "image": np.array([-1, 6, 4]),
    "wq": numbers(4, 4),
    "bq": numbers(4),
    "wp": numbers(4, 4),
}


def test_projections_take_the_shape_of_the_residual_stream() -> None:
    counts, modified = settle(ATTENTION, **CONSTANTS)
    assert (counts.pop("Reshape"), modified) == (2, True)  # the heads, apart and together
    assert counts == {"LayerNormalization": 1, "MatMul": 2, "Add": 2, "Transpose": 2, "Softmax": 1}


def test_a_bias_of_several_axes_keeps_its_shape() -> None:
    counts, _ = settle(ATTENTION, **{**CONSTANTS, "bq": numbers(3, 4)})
    assert counts["Reshape"] == 3


AXES: tuple[str, dict[str, Any]] = (
    """g (float[batch, 6, 4] x) => (float[batch, 4, 6] y) {
        w = Reshape (x, windows)
        n = LayerNormalization <axis = 3> (w, gain, shift)
        f = Reshape (n, image)
        p = MatMul (f, wp)
        g = Reshape (p, windows)
        s = Softmax <axis = 3> (g)
        m = ReduceMax (s, three)
        d = Sub (s, m)
        b = Reshape (d, image)
        y = Transpose <perm = [0, 2, 1]> (b)
    }""",
    {
        "windows": np.array([-1, 2, 3, 4]),
        "image": np.array([-1, 6, 4]),
        "three": np.array([3]),
        "gain": numbers(4),
        "shift": numbers(4),
        "wp": numbers(4, 4),
    },
)


def test_axes_are_counted_from_the_end() -> None:
    text, constants = AXES
    counts, _ = settle(text, **constants)
    assert counts.pop("Reshape", 0) < 3
    assert counts == {"MatMul": 1, "LayerNormalization": 1, "Softmax": 1, "ReduceMax": 1, "Sub": 1, "Transpose": 1}


def test_what_is_read_outside_keeps_its_shape() -> None:
    text = """g (float[batch, 6, 4] x) => (float[two_batch, 3, 4] y, float[batch, 6, 4] z) {
        w = Reshape (x, windows)
        y = Relu (w)
        n = Neg (y)
        z = Reshape (n, image)
    }"""
    counts, modified = settle(text, windows=np.array([-1, 3, 4]), image=np.array([-1, 6, 4]))
    assert (counts, modified) == ({"Relu": 1, "Neg": 1, "Reshape": 2}, False)


def test_where_nothing_is_saved_nothing_changes() -> None:
    text = """g (float[batch, 6, 4] x) => (float[two_batch, 4, 3] y) {
        w = Reshape (x, windows)
        n = Relu (w)
        y = Transpose <perm = [0, 2, 1]> (n)
    }"""
    assert settle(text, windows=np.array([-1, 3, 4])) == ({"Relu": 1, "Reshape": 1, "Transpose": 1}, False)


def is_reported(plain: onnx.ModelProto) -> bool:
    model = load(plain)
    try:
        ShapeRows(Analysis(model.graph))(model)
        return differences(plain, ir.to_proto(model), (1, 2, 3)) != []
    except Exception:  # a shape that does not fit
        return True
