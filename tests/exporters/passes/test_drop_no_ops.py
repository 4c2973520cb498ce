from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploycli.exporters.passes.drop_no_ops import DropNoOps
from deploycli.exporters.passes.pipeline import rewrite
from tests.exporters.passes.graphs import apply, differences, load, parse, proto, transform

HALF = np.float32(0.5)


def drop(text: str, **constants: Any) -> tuple[dict[str, int], bool]:
    counts, _, modified = transform(DropNoOps, text, **constants)
    return counts, modified


@pytest.mark.parametrize(
    "node", ["Dropout (n)", "Dropout (n, half)", "Dropout (n, half, no)", "Cast <to: int = 1> (n)", "Identity (n)"]
)
@pytest.mark.parametrize("rest", ["y = Abs (d)", "y = Identity (d)"])
def test_what_returns_its_operand_is_dropped(node: str, rest: str) -> None:
    text = f"g (float[batch, 2] x) => (float[batch, 2] y) {{ n = Neg (x) d = {node} {rest} }}"
    counts, modified = drop(text, half=HALF, no=False)
    assert modified
    assert set(counts) == ({"Neg", "Abs"} if "Abs" in rest else {"Neg"})


@pytest.mark.parametrize("node", ["d, mask = Dropout (n) m = Not (mask)", "d = Cast <to: int = 10> (n) m = Not (t)"])
def test_what_does_more_stays(node: str) -> None:
    text = f"g (float[2] x, bool[2] t) => (TYPE[2] y, bool[2] m) {{ n = Neg (x) {node} y = Abs (d) }}"
    _, modified = drop(text.replace("TYPE", "float16" if "Cast" in node else "float"))
    assert not modified


def test_a_dropout_that_trains_stays() -> None:
    plain = parse("g (float[2] x) => (float[2] y) { d = Dropout (x, half, yes) y = Abs (d) }", half=HALF, yes=True)
    assert apply(DropNoOps, plain)[2] is False


def test_an_input_that_is_an_output_keeps_its_identity() -> None:
    assert drop("g (float[2] x) => (float[2] y) { y = Identity (x) }") == ({"Identity": 1}, False)


def test_a_value_that_is_two_outputs_keeps_an_identity() -> None:
    text = "g (float[2] x) => (float[2] y, float[2] z) { y = Neg (x) z = Identity (y) }"
    assert drop(text) == ({"Neg": 1, "Identity": 1}, False)


def test_an_initializer_that_is_an_output_keeps_its_identity() -> None:
    text = "g (float[2] x) => (float[2] y, float z) { y = Neg (x) z = Identity (half) }"
    assert drop(text, half=HALF) == ({"Neg": 1, "Identity": 1}, False)


def test_identities_of_an_inner_graph_stay() -> None:
    """There, an outer value cannot be an output."""
    text = """g (float[2] x, bool flag) => (float[2] y) {
        a = Identity (x)
        y = If (flag) <
            then_branch = yes () => (float[2] p) { p = Identity (a) },
            else_branch = no () => (float[2] q) { q = Neg (x) }
        >
    }"""
    assert drop(text) == ({"If": 1}, True)


@pytest.mark.parametrize("given", ["axes", "copy"])
def test_a_squeeze_with_an_empty_list_squeezes_all_as_onnxruntime_does(given: str) -> None:
    text = f"""g (float[1, 3, 1] x) => (float[a] y) {{
        copy = Identity (axes) n = Neg (x) s = Squeeze (n, {given}) y = Abs (s)
    }}"""
    plain = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')  # ONNX would complain
    plain.graph.initializer.append(numpy_helper.from_array(np.zeros(0, np.int64), "axes"))
    model = load(plain)
    rewrite(model)
    assert differences(plain, proto(model)) == []
    (squeeze,) = [node for node in model.graph if node.op_type == "Squeeze"]
    assert len(squeeze.inputs) == 1
