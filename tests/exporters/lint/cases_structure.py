"""Graphs that break rules 1, 2, 9 to 12, and 17 to 19."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.exporters.lint.cases import Case, fails, warns
from tests.exporters.lint.texts import F32, I64, Graph, pair, weight

RELU = Graph("(float[batch, 8] x) => (float[batch, 8] y) { y = Relu (x) }")
NORM = Graph("(float[batch, 8] x) => (float[batch, 8] y) { y = LayerNormalization (x, w) }", {"w": weight(8)})
IMAGE = "(float[batch, 3, 8, 8] x) => (float[batch, 3, 8, 8] y)"


def image(body: str, **constants: object) -> Graph:
    return Graph(f"{IMAGE} {{ {body} }}", constants)  # type: ignore[arg-type] # arrays, as every caller writes them


def vector(body: str, **constants: object) -> Graph:
    return Graph(f"(float[batch, 8] x) => (float[batch, 8] y) {{ {body} }}", constants)  # type: ignore[arg-type] # as above


HALF_PAIR = f"(float16[batch, 8] x) => (float16[batch, 8] y) {{ {pair('x', 'y')} }}"
TWO_TRANSPOSES = """(float[batch, 8, 4] x) => (float[batch, 8, 4] y)
    { h = Transpose <perm = [0, 2, 1]> (x) y = Transpose <perm = [0, 2, 1]> (h) }"""
RMS = Graph("(float[batch, 8] x) => (float[batch, 8] y) { y = RMSNormalization (x, w) }", {"w": weight(8)}, opset=23)
REDUCE = "(float[batch, 8, 4] x, int64[1] a) => (float[batch, 8] y)"

LOOP = """y = Loop (n, go, x) <body = b (int64 i, bool c, float[batch, 8] u) => (bool d, float[batch, 8] v) {
    [one] d = Identity (c) [two] v = Relu (u) }>"""
COLLECTING = """y, all = Loop (, go, x) <
    body = b (int64 i, bool c, float[batch, 8] u) => (bool d, float[batch, 8] v, float[batch, 8] w) {
        [one] d = Identity (c) [two] v = Relu (u) [three] w = Neg (u) }>"""
DECISION = """(float[batch, 8] x, bool c) => (float[batch, 8] y) { y = If (c) <
    then_branch = t () => (float[batch, 8] a) { [one] a = Relu (x) },
    else_branch = e () => (float[batch, 8] b) { [two] b = Neg (x) }> }"""

CASES: tuple[Case, ...] = (
    # --- 1: opset and IR version
    warns("an opset that is too old", 1, replace(RELU, opset=8), RELU, "opset 8"),
    fails("broadcasting before NumPy's", 1, replace(vector("y = Add (x, x)"), opset=6), None, "broadcasting"),
    warns("an opset that is too new", 1, replace(RELU, opset=25), RELU, "opset 25"),
    warns("an opset below the recommended ones", 1, replace(RELU, opset=18), RELU, "19 to 22"),
    warns("an IR version that old parsers refuse", 1, replace(RELU, ir_version=11), RELU, "IR version 11"),
    warns("an operator that its opset lacks", 1, replace(NORM, opset=16), NORM, "does not exist in opset 16"),
    warns(
        "Gelu before its opset",
        1,
        replace(vector("y = Gelu (x)"), opset=19),
        vector("y = Gelu (x)"),
        "Gelu does not exist in opset 19",
    ),
    warns(
        "FP16 scales before their opset",
        1,
        Graph(
            HALF_PAIR,
            {"s": np.float16(0.1), "z": np.int8(0)},
            opset=17,
        ),
        Graph(
            HALF_PAIR,
            {"s": np.float16(0.1), "z": np.int8(0)},
            opset=19,
        ),
        "a scale of type FLOAT16 in opset 17",
    ),
    # --- 2: operators
    fails(
        "an operator of another domain",
        2,
        vector("y = com.microsoft.FastGelu (x)"),
        vector('y = Gelu <approximate = "tanh"> (x)'),
        "com.microsoft",
    ),
    fails("an operator without support", 2, vector("y, i, j, c = Unique (x)"), None, "Unique", 10),
    fails("RMSNormalization before 10.15", 2, replace(RMS, version="10.14"), None, "from TensorRT 10.15 on", 1),
    fails(
        "Swish before 11.0",
        2,
        replace(vector("y = Swish (x)"), opset=24, version="10.16"),
        None,
        "from TensorRT 11.0 on",
        1,
    ),
    fails(
        "cubic Resize before TensorRT 10.15",
        2,
        replace(image('y = Resize <mode = "cubic"> (x, , r)', r=np.ones(4, F32)), version="10.14"),
        image('y = Resize <mode = "cubic"> (x, , r)', r=np.ones(4, F32)),
        "mode cubic",
    ),
    fails(
        "pooling with dilations",
        2,
        image("y = MaxPool <kernel_shape = [2, 2], dilations = [2, 2], pads = [1, 1, 1, 1]> (x)"),
        image("y = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)"),
        "dilations",
    ),
    fails(
        "ScatterND that adds",
        2,
        vector('y = ScatterND <reduction = "add"> (x, i, u)', i=np.zeros((1, 1), I64), u=weight(1, 8)),
        vector("y = ScatterND (x, i, u)", i=np.zeros((1, 1), I64), u=weight(1, 8)),
        "reduction add",
    ),
    fails(
        "Resize with coordinates that are not known",
        2,
        image('y = Resize <coordinate_transformation_mode = "half_pixel_symmetric"> (x, , r)', r=np.ones(4, F32)),
        image('y = Resize <coordinate_transformation_mode = "half_pixel"> (x, , r)', r=np.ones(4, F32)),
        "coordinates half_pixel_symmetric",
    ),
    fails(
        "a Split whose first part has no name",
        2,
        Graph("(float[batch, 8] x) => (float[batch, 4] y) { , y = Split <axis = 1, num_outputs = 2> (x) }"),
        Graph("(float[batch, 8] x) => (float[batch, 4] y) { z, y = Split <axis = 1, num_outputs = 2> (x) }"),
        "a result that has no name",
    ),
    fails(
        "operands in a circle",
        12,
        vector("h = Add (x, k) k = Relu (h) y = Neg (h)"),
        vector("h = Relu (x) k = Relu (h) y = Neg (h)"),
        "its own result",
    ),
    # --- 9: constants
    fails(
        "axes that are an input",
        9,
        Graph(f"{REDUCE} {{ y = ReduceMean <keepdims = 0> (x, a) }}"),
        Graph(
            "(float[batch, 8, 4] x) => (float[batch, 8] y) { y = ReduceMean <keepdims = 0> (x, a) }",
            {"a": np.array([2], I64)},
        ),
        "axes of ReduceMean",
        10,
    ),
    fails(
        "axes to squeeze that are an input",
        9,
        Graph("(float[batch, 1, 8] x, int64[1] a) => (float[batch, 8] y) { y = Squeeze (x, a) }"),
        Graph("(float[batch, 1, 8] x) => (float[batch, 8] y) { y = Squeeze (x, a) }", {"a": np.array([1], I64)}),
        "operand 1 of Squeeze",
        10,
    ),
    fails(
        "an axis to accumulate along that is an input",
        9,
        Graph("(float[batch, 8] x, int64 a) => (float[batch, 8] y) { y = CumSum (x, a) }"),
        vector("y = CumSum (x, a)", a=np.array(1, I64)),
        "operand 1 of CumSum",
    ),
    fails(
        "an axis to accumulate along that grows with the batch",
        9,
        Graph("(float[batch, 8] x) => (float[batch, 8] y) { s = Shape <end = 1> (x) y = CumSum (x, s) }"),
        None,
        "grows with the batch",
        11,
    ),
    fails(
        "more than the largest K",
        9,
        Graph("(float[batch, 5000] x) => (float[batch, 3841] y) { y, i = TopK (x, k) }", {"k": np.array([3841], I64)}),
        Graph("(float[batch, 5000] x) => (float[batch, 3840] y) { y, i = TopK (x, k) }", {"k": np.array([3840], I64)}),
        "K is 3841",
    ),
    # --- 10: shapes
    fails(
        "nine dimensions",
        10,
        Graph(
            "(float[batch, 8] x) => (float[1, 1, 1, 1, 1, 1, 1, batch, 8] y) { y = Unsqueeze (x, a) }",
            {"a": np.arange(7, dtype=I64)},
        ),
        Graph(
            "(float[batch, 8] x) => (float[1, 1, 1, 1, 1, 1, batch, 8] y) { y = Unsqueeze (x, a) }",
            {"a": np.arange(6, dtype=I64)},
        ),
        "9 dimensions",
    ),
    warns(
        "a second dynamic axis",
        10,
        Graph("(float[batch, tokens] x) => (float[batch, tokens] y) { y = Relu (x) }"),
        RELU,
        "axis 1 is dynamic (tokens)",
    ),
    warns(
        "an input of unknown rank",
        10,
        Graph("(float x) => (float[batch, 8] y) { y = Relu (x) }"),
        RELU,
        "declared shape is",
    ),
    fails(
        "shapes that do not fit",
        10,
        vector("y = Add (x, b)", b=weight(7)),
        vector("y = Add (x, b)", b=weight(8)),
        "ONNX refuses it",
    ),
    warns(
        "a declared shape that lies",
        10,
        Graph("(float[batch, 8] x) => (float[batch, 9] y) { y = Relu (x) }"),
        RELU,
        "its declared shape is",
    ),
    warns(
        "a declared batch that is frozen",
        10,
        Graph("(float[batch, 8] x) => (float[1, 8] y) { y = Relu (x) }"),
        RELU,
        "its declared shape is",
    ),
    # --- 11: what is left of shapes
    warns(
        "a data-dependent shape",
        11,
        Graph("(float[batch, 8] x) => (int64[2, n] y) { y = NonZero (x) }"),
        None,
        "NonZero is left",
        2,
        10,
    ),
    warns(
        "shape arithmetic",
        11,
        vector("h = Flatten (x) r = Shape (x) y = Reshape (h, r)"),
        vector("h = Flatten (x) y = Relu (h)"),
        "Shape is left",
    ),
    warns("a loop", 11, vector(LOOP, n=np.array(3, I64), go=np.array(True)), None, "Loop is left", 10),
    fails(
        "a loop that reads a condition that nobody gave",
        2,
        vector(LOOP.replace("go", ""), n=np.array(3, I64)),
        None,
        "Loop without a condition",
        10,
        11,
    ),
    fails("a loop that collects no end of results", 2, vector(COLLECTING, go=np.array(True)), None, "collects", 10, 11),
    fails(
        "a decision between shapes of other ranks",
        2,
        Graph(DECISION.replace("Neg (x)", "Flatten <axis = 1> (x)").replace("[batch, 8]", "[batch, 8, 1]")),
        None,
        "2 and 3 dimensions",
        11,
        10,
    ),
    fails("a decision that two values take", 2, Graph(DECISION.replace("bool c", "bool[2] c")), None, "conditions", 11),
    warns(
        "a decision",
        11,
        Graph(DECISION),
        None,
        "If is left",
    ),
    # --- 12: names and edges
    warns("nodes without names", 12, replace(RELU, is_named=False), RELU, "1 nodes have no name"),
    warns(
        "two nodes of one name",
        12,
        vector("[one] h = Relu (x) [one] y = Neg (h)"),
        vector("[one] h = Relu (x) [two] y = Neg (h)"),
        "2 nodes",
    ),
    warns(
        "a node before its operand",
        12,
        vector("y = Neg (h) h = Relu (x)"),
        vector("h = Relu (x) y = Neg (h)"),
        "before",
    ),
    fails(
        "an operand that nothing makes", 12, vector("y = Add (x, h)"), vector("y = Add (x, x)"), "which nothing makes"
    ),
    fails("an operand that is missing", 12, vector("y = Add (x, )"), vector("y = Add (x, x)"), "operand B is missing"),
    warns("an attribute that does not exist", 12, vector("y = Relu <slope = 1> (x)"), RELU, "checker refuses"),
    warns(
        "an output that is an input",
        12,
        Graph("(float[batch, 8] x) => (float[batch, 8] y, float[batch, 8] x) { y = Relu (x) }"),
        RELU,
        "is an input",
    ),
    warns(
        "an output that is stored",
        12,
        Graph("(float[batch, 8] x) => (float[batch, 8] y, float[8] w) { y = Add (x, w) }", {"w": weight(8)}),
        Graph("(float[batch, 8] x) => (float[batch, 8] y) { y = Add (x, w) }", {"w": weight(8)}),
        "is a constant",
    ),
    warns(
        "an output of constants alone",
        12,
        Graph(
            "(float[batch, 8] x) => (float[batch, 8] y, float[8] v) { y = Add (x, w) v = Neg (w) }", {"w": weight(8)}
        ),
        Graph("(float[batch, 8] x) => (float[batch, 8] y) { y = Add (x, w) }", {"w": weight(8)}),
        "does not depend",
    ),
    # --- 17: what undoes itself
    warns("a Cast there and back", 17, vector("h = Cast <to = 11> (x) y = Cast <to = 1> (h)"), RELU, "it undoes", 3),
    warns("a Cast to the same type", 17, vector("y = Cast <to = 1> (x)"), RELU, "to itself"),
    warns(
        "two Transposes",
        17,
        Graph(TWO_TRANSPOSES),
        Graph("(float[batch, 8, 4] x) => (float[batch, 4, 8] y) { y = Transpose <perm = [0, 2, 1]> (x) }"),
        "it undoes",
    ),
    warns(
        "two Reshapes",
        17,
        vector("h = Reshape (x, a) y = Reshape (h, b)", a=np.array([-1, 4, 2], I64), b=np.array([-1, 8], I64)),
        vector(
            "h = Reshape (x, a) r = Relu (h) y = Reshape (r, b)", a=np.array([-1, 4, 2], I64), b=np.array([-1, 8], I64)
        ),
        "has reshaped",
    ),
    # --- 18: what is there for nothing
    warns(
        "an initializer that nothing reads",
        18,
        replace(RELU, constants={"w": weight(8)}),
        RELU,
        "nothing reads this init",
    ),
    warns(
        "an input that nothing reads",
        18,
        Graph("(float[batch, 8] x, float[batch, 8] u) => (float[batch, 8] y) { y = Relu (x) }"),
        RELU,
        "nothing reads this input",
    ),
    warns(
        "two equal weights",
        18,
        Graph(
            "(float[batch, 32] x) => (float[batch, 32] y) { h = MatMul (x, a) y = MatMul (h, b) }",
            {"a": weight(32, 32), "b": weight(32, 32)},
        ),
        Graph(
            "(float[batch, 32] x) => (float[batch, 32] y) { h = MatMul (x, a) y = MatMul (h, b) }",
            {"a": weight(32, 32), "b": weight(32, 32, seed=1)},
        ),
        "2 tensors hold the same 4096 bytes: a, b",
    ),
    # --- 19: what fusions do not look for
    warns(
        "Einsum",
        19,
        Graph(
            '(float[batch, 8] x) => (float[batch, 4] y) { y = Einsum <equation = "bi,ij->bj"> (x, w) }',
            {"w": weight(8, 4)},
        ),
        Graph("(float[batch, 8] x) => (float[batch, 4] y) { y = MatMul (x, w) }", {"w": weight(8, 4)}),
        "Einsum",
    ),
    warns(
        "a bias that is looked up",
        19,
        Graph(
            "(float[batch, 72, 72] x) => (float[batch, 72, 72] y) { b = Gather (t, i) y = Add (x, b) }",
            {"t": weight(9), "i": np.arange(72 * 72).reshape(72, 72) % 9},
        ),
        Graph("(float[batch, 72, 72] x) => (float[batch, 72, 72] y) { y = Add (x, b) }", {"b": weight(72, 72)}),
        "looks up 5184 entries",
    ),
)
