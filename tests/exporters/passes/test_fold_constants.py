from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from deploycli.exporters.passes.fold_constants import FoldConstants
from tests.exporters.passes.graphs import apply, differences, ops, parse, reasons, transform

fold = partial(transform, FoldConstants, batches=(1, 2, 5, 8, 16))


def test_a_looked_up_bias_is_one_initializer() -> None:
    text = """g (float[batch, 3, 4, 4] x) => (float[batch, 3, 4, 4] y) {
        flat = Reshape (index, minus)
        rows = Gather <axis: int = 0> (table, flat)
        square = Reshape (rows, s)
        heads = Transpose <perm: ints = [2, 0, 1]> (square)
        bias = Unsqueeze (heads, zero)
        y = Add (x, bias)
    }"""
    table = np.linspace(-1, 1, 49 * 3, dtype=np.float32).reshape(49, 3)
    index = np.arange(16).reshape(4, 4) * 3
    assert fold(text, table=table, index=index, minus=[-1], s=[4, 4, 3], zero=[0]) == ({"Add": 1}, [], True)


def test_a_bias_that_is_looked_up_by_an_input_is_not() -> None:
    text = """g (int64[batch] x) => (float[batch, 3] y) {
        y = Gather <axis: int = 0> (table, clipped) clipped = Min (x, last)
    }"""
    text = text.replace("y = Gather <axis: int = 0> (table, clipped) ", "").replace(
        "(x, last)", "(x, last) y = Gather <axis: int = 0> (table, clipped)"
    )
    table = np.arange(9, dtype=np.float32).reshape(3, 3)
    assert fold(text, table=table, last=2) == ({"Min": 1, "Gather": 1}, [], False)


def test_mask_arithmetic_is_one_initializer() -> None:
    """Regions of rows and columns, then -100 where two tokens are of different regions."""
    text = """g (float[batch, 16, 16] x) => (float[batch, 16, 16] y) {
        line = Range (zero, four, one)
        half = Div (line, two)
        row = Unsqueeze (half, a1)
        region = Add (row, half)
        flat = Reshape (region, minus)
        left = Unsqueeze (flat, a0)
        right = Unsqueeze (flat, a1)
        difference = Sub (left, right)
        same = Equal (difference, zero)
        other = Not (same)
        blank = ConstantOfShape <value: tensor = float[1] {0}> (s)
        mask = Where (other, hundred, blank)
        y = Add (x, mask)
    }"""
    constants = {"zero": 0, "four": 4, "one": 1, "two": 2, "a0": [0], "a1": [1], "minus": [-1], "s": [16, 16]}
    assert fold(text, **constants, hundred=np.float32(-100)) == ({"Add": 1}, [], True)


SHAPE = "g (float[batch, 6, 4] x) => (int64[k] y) { s = Shape (x) n = Neg (part) y = Abs (n) }"


def test_a_static_dimension_is_a_number() -> None:
    text = SHAPE.replace("n =", "part = Slice (s, one, end, zero) n =")
    assert fold(text, one=[1], end=[9], zero=[0]) == ({"Abs": 1}, [], True)


def test_the_batch_dimension_is_not() -> None:
    text = SHAPE.replace("n =", "part = Slice (s, zero, one, zero) n =")
    assert fold(text, one=[1], zero=[0])[0] == {"Shape": 1, "Slice": 1, "Neg": 1, "Abs": 1}


@pytest.mark.parametrize(
    "arithmetic",
    [
        "b = Div (size, eight) c = Identity (b)",  # 0 at every batch below 8
        "b = Min (size, eight) c = Sub (b, b)",
        "b = Equal (size, eight) c = Cast <to: int = 7> (b)",  # false at every other batch
        "b = Mod (size, eight) c = Sub (b, size)",
        "b = Mul (size, size) c = Sub (b, size)",
        "b = Sub (size, one) d = Div (b, eight) c = Abs (d)",
        "b = Less (size, eight) c = Where (b, size, eight)",
        "b = Max (size, eight) c = Sub (b, eight)",
        "b = Cast <to: int = 1> (size) d = Floor (b) c = Cast <to: int = 7> (d)",
    ],
)
def test_what_is_no_line_in_the_batch_size_is_not_a_constant(arithmetic: str) -> None:
    text = f"""g (float[batch, 6] x) => (int64[1] y) {{
        size = Shape <start: int = 0, end: int = 1> (x) {arithmetic} y = Abs (c)
    }}"""
    assert fold(text, eight=[8], one=[1])[2] is False


@pytest.mark.parametrize(
    "arithmetic",
    [
        "b = Sub (size, size) c = Add (b, eight)",
        "b = Mul (size, eight) d = Div (b, size) c = Identity (d)",
        "b = Greater (size, minus) c = Cast <to: int = 7> (b)",
        "b = Equal (size, minus) d = Where (b, eight, size) c = Sub (d, size)",
        "b = Mul (size, eight) d = Div (b, eight) c = Sub (d, size)",
        "b = Concat <axis: int = 0> (size, eight) c = Gather <axis: int = 0> (b, last)",
        "b = Max (size, minus) c = Sub (b, size)",
    ],
)
def test_what_comes_out_the_same_for_every_batch_is_a_constant(arithmetic: str) -> None:
    text = f"""g (float[batch, 6] x) => (int64[1] y) {{
        size = Shape <start: int = 0, end: int = 1> (x) {arithmetic} y = Abs (c)
    }}"""
    counts, _, modified = fold(text, eight=[8], minus=[-1], last=[1])
    if "Div (b, size)" in arithmetic:  # a quotient of two lines is not followed
        assert not modified
    else:
        assert counts == {"Abs": 1}


def test_the_target_of_a_reshape_needs_no_shape_arithmetic() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 4, 6] y) {
        shape = Shape (x)
        size = Gather <axis: int = 0> (shape, zero)
        long = Cast <to: int = 7> (size)
        b = Unsqueeze (long, first)
        target = Concat <axis: int = 0> (b, rest)
        n = Neg (x)
        y = Reshape (n, target)
    }"""
    counts, _, modified = fold(text, zero=np.int32(0), first=[0], rest=[4, 6])
    assert (counts, modified) == ({"Neg": 1, "Reshape": 1}, True)


@pytest.mark.parametrize("target", ["Mul (shape, swap)", "Concat <axis: int = 0> (b, b, rest)", "Identity (given)"])
def test_a_target_that_is_not_a_multiple_of_the_batch_is_left(target: str) -> None:
    """Two axes that grow, and a target that an input decides."""
    text = f"""g (float[batch, batch, 4] x, int64[3] given) => (float[p, q, r] y) {{
        shape = Shape (x) b = Slice (shape, zero, one, zero) target = {target} n = Neg (x) y = Reshape (n, target)
    }}"""
    plain = parse(text, swap=[1, 1, 1], zero=[0], one=[1], rest=[4])
    rewritten, _, modified = apply(FoldConstants, plain)
    assert ops(rewritten)["Reshape"] == 1
    assert not modified


@pytest.mark.parametrize("op", ["Mod", "Div", "Add", "Max"])
def test_scalars_stay_scalars(op: str) -> None:
    text = f"""g (float[batch, 3] x) => (float[batch, 3] y) {{
        r = {op} (a, b) f = Cast <to: int = 1> (r) u = Unsqueeze (f, zero) v = Concat <axis: int = 0> (u, one)
        s = ReduceSum <keepdims: int = 1> (v) y = Add (x, s)
    }}"""
    assert fold(text, a=7, b=4, zero=[0], one=np.float32([1]))[0] == {"Add": 1}


def test_a_constant_much_larger_than_what_it_is_made_of_is_refused() -> None:
    text = """g (float[batch, 1] x) => (float[batch, 5000000] y) {
        wide = Expand (one, s)
        more = Neg (wide)
        y = Mul (x, more)
    }"""
    plain = parse(text, one=np.ones(1, np.float32), s=[5_000_000])
    rewritten, graph_pass, modified = apply(FoldConstants, plain)
    assert (ops(rewritten), modified) == ({"Expand": 1, "Neg": 1, "Mul": 1}, False)
    assert reasons(graph_pass)[0] == "20000000 bytes of constants from 12"
    assert len(reasons(graph_pass)) == 2  # nor is what is computed from it


def test_a_small_result_of_a_large_one_is_folded() -> None:
    text = """g (float[batch, 1] x) => (float[batch, 1] y) {
        wide = Expand (one, s)
        sum = ReduceSum <keepdims: int = 1> (wide)
        y = Mul (x, sum)
    }"""
    assert fold(text, one=np.ones(1, np.float32), s=[5_000_000])[0] == {"Mul": 1}


@pytest.mark.parametrize(
    "maker",
    [
        "RandomNormalLike (zeros)", "RandomUniformLike (zeros)", "Bernoulli (zeros)",
        "RandomUniform <shape: ints = [3]> ()", "Dropout (zeros, half, yes)",
    ],
)  # fmt: skip
def test_random_numbers_are_not_folded(maker: str) -> None:
    plain = parse(
        f"g (float[batch, 3] x) => (float[batch, 3] y) {{ r = {maker} y = Add (x, r) }}",
        zeros=np.full(3, 0.5, np.float32), half=np.float32(0.5), yes=True,
    )  # fmt: skip
    _, _, modified = apply(FoldConstants, plain)
    assert not modified


def test_quantized_weights_stay_quantized() -> None:
    text = """g (float[batch, 2] x) => (float[batch, 2] y) {
        w = DequantizeLinear (q, scale)
        t = Transpose <perm: ints = [1, 0]> (w)
        y = MatMul (x, t)
    }"""
    counts, _, modified = fold(text, q=np.array([[1, 2], [3, 4]], np.int8), scale=np.float32(0.5))
    assert (counts, modified) == ({"DequantizeLinear": 1, "Transpose": 1, "MatMul": 1}, False)


def test_a_constant_graph_output_keeps_its_node_and_its_name() -> None:
    text = "g (float[batch] x) => (float[2] y, float[batch] z) { a = Neg (c) y = Abs (a) z = Neg (x) }"
    assert fold(text, c=np.float32([1, -2]))[0] == {"Abs": 1, "Neg": 1}


def test_a_graph_output_that_is_read_again_is_not_folded() -> None:
    text = "g (float[batch, 2] x) => (float[2] y, float[batch, 2] z) { y = Neg (c) b = Abs (y) z = Add (x, b) }"
    assert fold(text, c=np.float32([1, -2]))[0] == {"Neg": 1, "Add": 1}


def test_a_default_of_a_graph_input_is_no_constant() -> None:
    text = "g (float[batch, 2] x, float[2] c) => (float[batch, 2] y) { n = Neg (c) y = Add (x, n) }"
    plain = parse(text, c=np.float32([1, -2]))
    rewritten, _, modified = apply(FoldConstants, plain)
    assert (ops(rewritten), modified) == ({"Neg": 1, "Add": 1}, False)


def test_an_operator_that_cannot_be_evaluated_is_left() -> None:
    text = """g (float[batch, 2] x) => (float[batch, 2] y) {
        bad = Gather <axis: int = 0> (c, i) worse = Div (i, nothing) y = Neg (x)
    }"""
    plain = parse(text, c=np.float32([1, -2]), i=[7], nothing=[0])
    _, _, modified = apply(FoldConstants, plain)
    assert not modified


def test_optional_outputs_that_are_absent_do_not_shift_the_others() -> None:
    text = """g (float[batch, 3] x) => (float[batch, 3] y) {
        values, first, inverse = Unique <axis: int = 0> (c)
        f = Cast <to: int = 1> (inverse)
        y = Add (x, f)
    }"""
    plain = parse(text, c=np.float32([5, 1, 5]))
    plain.graph.node[0].output[1] = ""
    rewritten, _, _ = apply(FoldConstants, plain)
    assert differences(plain, rewritten) == []
    assert ops(rewritten) == {"Add": 1}


def test_sequences_are_not_taken_for_tensors() -> None:
    text = """g (float[batch, 2] x) => (float[batch, 2] y) {
        list = SplitToSequence <axis: int = 0, keepdims: int = 0> (c)
        first = SequenceAt (list, i)
        y = Add (x, first)
    }"""
    counts, _, _ = fold(text, c=np.float32([[1, -2], [3, 4]]), i=0)
    assert counts == {"SplitToSequence": 1, "SequenceAt": 1, "Add": 1}


def test_strings_are_left() -> None:
    text = """g (int64[batch] x) => (int64[batch] y, string[2] names) {
        t = Transpose (table) names = Gather <axis: int = 0> (t, i) y = Neg (x)
    }"""
    plain = parse(text, i=[0, 1], table=np.array(["cat", "dog"], object))
    rewritten, _, modified = apply(FoldConstants, plain)
    assert (ops(rewritten), modified) == ({"Transpose": 1, "Gather": 1, "Neg": 1}, False)


def test_a_constant_that_an_inner_graph_reads_is_stored() -> None:
    text = """g (float[2] x, bool flag) => (float[2] y) {
        n = Neg (c)
        y = If (flag) <
            then_branch = yes () => (float[2] p) { p = Add (x, n) },
            else_branch = no () => (float[2] q) { q = Sub (x, n) }
        >
    }"""
    assert fold(text, c=np.float32([1, -2]))[0] == {"If": 1}


def test_folded_numbers_are_those_of_onnx_runtime() -> None:
    text = """g (float[batch, 64] x) => (float[batch, 64] y) {
        a = MatMul (w, w) b = Erf (a) c = Softmax <axis: int = 1> (b) d = ReduceMean <keepdims: int = 0> (c, axis)
        y = Add (x, d)
    }"""
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    assert fold(text, w=w, axis=[0])[0] == {"Add": 1}


@pytest.mark.parametrize(
    ("op", "operands"),
    [
        *((op, (-7, 3)) for op in ("Add", "Div", "Mul", "Sub", "Max", "Min", "Equal", "Greater", "Less")),
        *((op, (-7, 3)) for op in ("GreaterOrEqual", "LessOrEqual", "Mod", "Pow")), ("BitShift", (7, 3)),
        *((op, (True, False)) for op in ("And", "Or", "Xor")),
        ("Abs", (-7,)), ("Neg", (-7,)), ("Not", (True,)), ("Where", (False, -7, 3)),
        ("Max", (-7, 3, 5)), ("Min", (-7,)), ("Max", (-7,)), ("Div", (7, -2)),
    ],
)  # fmt: skip
def test_integer_arithmetic_is_that_of_onnx_runtime(op: str, operands: tuple[Any, ...]) -> None:
    dtype = np.uint64 if op == "BitShift" else None
    made = {f"c{i}": np.array([x, x], dtype) for i, x in enumerate(operands)}
    direction = '<direction: string = "LEFT">' if op == "BitShift" else ""
    text = f"""g (float[batch, 2] x) => (float[batch, 2] y) {{
        r = {op} {direction} ({", ".join(made)}) f = Cast <to: int = 1> (r) y = Add (x, f)
    }}"""
    assert fold(text, **made)[0] == {"Add": 1}
