from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from deploycli.exporters.export import ExportOptions, export
from deploycli.exporters.passes import emit_attention as onnx_attention
from deploycli.exporters.passes.emit_attention import EmitAttention
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.models.errors import UsageError
from tests.exporters.passes.graphs import apply, differences, load, ops, parse, reasons

if TYPE_CHECKING:
    import onnx

RNG = np.random.default_rng(0)

ATTENTION = """g (float[batch, 2, 3, 5] x) => (float[batch, 2, 3, 5] y) {
    q = Mul (x, small)
    k = Sub (x, small)
    v = Neg (x)
    t = Transpose <perm = [0, 1, 3, 2]> (k)
    scores = MatMul (q, t)
    shifted = Add (scores, mask)
    p = Softmax <axis = -1> (shifted)
    y = MatMul (p, v)
}"""
SMALL = np.float32(0.01)
READ_TWICE = "its probabilities are read elsewhere too"


def mask(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def emit(text: str, **constants: Any) -> tuple[onnx.ModelProto, list[str], bool]:
    used = {name: value for name, value in constants.items() if f"{name})" in text}
    plain = parse(text, small=SMALL, **used)
    rewritten, graph_pass, modified = apply(EmitAttention, plain)
    assert differences(plain, rewritten, rtol=1e-5) == []
    return rewritten, reasons(graph_pass), modified


@pytest.mark.parametrize("shape", [(1, 2, 3, 3), (2, 3, 3), (1, 1, 3, 3), (3, 3), (1, 3), (2, 1, 1), (1,)])
def test_attention_is_one_operator(shape: tuple[int, ...]) -> None:
    rewritten, refusals, modified = emit(ATTENTION, mask=mask(*shape))
    assert ops(rewritten) == {"Mul": 1, "Sub": 1, "Neg": 1, "Attention": 1}
    assert (refusals, modified, rewritten.opset_import[0].version) == ([], True, 23)


def test_without_a_mask() -> None:
    text = ATTENTION.replace("shifted = Add (scores, mask)", "").replace("(shifted)", "(scores)")
    rewritten, _, modified = emit(text)
    assert (ops(rewritten)["Attention"], modified) == (1, True)


def test_a_key_that_is_transposed_otherwise_is_transposed_back() -> None:
    text = ATTENTION.replace("k = Sub (x, small)", "k = Transpose <perm = [0, 1, 3, 2]> (x)")
    text = text.replace("t = Transpose <perm = [0, 1, 3, 2]> (k)", "t = Neg (k)")
    rewritten, _, _ = emit(text, mask=mask(3, 3))
    assert (ops(rewritten)["Transpose"], ops(rewritten)["Attention"]) == (2, 1)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Softmax <axis = -1>", "Softmax <axis = 2>", "its axis is not that of the keys"),
        ("Add (scores, mask)", "Add (scores, n)", "its mask is no constant"),
        ("Add (scores, mask)", "Sub (scores, mask)", "its scores are no product, or something stands between"),
        ("y = MatMul (p, v)", "z = MatMul (p, v) r = ReduceMax (p) y = Add (z, r)", READ_TWICE),
    ],
)  # fmt: skip
def test_another_form_is_refused(old: str, new: str, reason: str) -> None:
    text = ATTENTION.replace(old, new).replace(
        "shifted =", "n = Neg (scores) shifted =" if "n)" in new else "shifted ="
    )
    rewritten, refusals, modified = emit(text, mask=mask(3, 3))
    assert (refusals, modified, "Attention" in ops(rewritten)) == ([reason], False, False)


def test_scores_of_five_dimensions_are_refused() -> None:
    text = ATTENTION.replace("[batch, 2", "[batch, 4, 2").replace("[0, 1, 3, 2]", "[0, 1, 2, 4, 3]")
    _, refusals, modified = emit(text, mask=mask(3, 3))
    assert (refusals, modified) == (["its scores have 5 dimensions, not 4"], False)


def test_a_softmax_that_is_no_attention_is_left_alone() -> None:
    text = "g (float[batch, 4] x) => (float[batch, 4] y) { h = Mul (x, small) y = Softmax (h) }"
    assert emit(text)[1:] == ([], False)


def test_an_operator_that_would_change_its_meaning_is_a_reason() -> None:
    text = ATTENTION.replace("v = Neg (x)", "v = Round (x)")
    _, refusals, modified = emit(text, mask=mask(3, 3))
    assert (refusals, modified) == (["Round has another meaning in opset 23 than in 20"], False)


def test_it_is_off_by_default() -> None:
    model = load(parse(ATTENTION, mask=mask(3, 3), small=SMALL))
    assert "emit-attention" not in [step.name for step in rewrite(model)]
    assert "Attention" not in ops(model)
    assert rewrite(model, also=frozenset({"emit-attention"}))[-2].name == "emit-attention"
    assert ops(model)["Attention"] == 1


def test_a_lost_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the mask is not among the operands."""
    plain = parse(ATTENTION, mask=mask(2, 3, 3), small=SMALL)
    real = onnx_attention._read
    monkeypatch.setattr(
        onnx_attention, "_read",
        lambda *a: onnx_attention._Attention(f.query, f.keys, f.values, None, f.scores, f.mix)
        if isinstance(f := real(*a), onnx_attention._Attention) else f,
    )  # fmt: skip
    rewritten, _, _ = apply(EmitAttention, plain)
    assert differences(plain, rewritten, rtol=1e-5) != []


def test_swapped_keys_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: every Transpose is taken for one of the last two axes."""
    text = ATTENTION.replace(
        "t = Transpose <perm = [0, 1, 3, 2]> (k)", "k4 = Transpose <perm = [0, 3, 2, 1]> (k) t = Reshape (k4, s)"
    )
    text = text.replace("t = Reshape (k4, s)", "t5 = Reshape (k4, s) t = Transpose <perm = [0, 2, 1, 3]> (t5)")
    plain = parse(text, mask=mask(3, 3), small=SMALL, s=[-1, 5, 2, 3])
    assert differences(plain, apply(EmitAttention, plain)[0], rtol=1e-5) == []
    monkeypatch.setattr(onnx_attention, "swaps_last_axes", lambda _: True)
    try:
        found = differences(plain, apply(EmitAttention, plain)[0], rtol=1e-5)
    except Exception:  # a graph that no checker takes is a report, too
        found = ["invalid"]
    assert found != []


@pytest.mark.parametrize(("opset", "rewritten", "message"), [(20, True, "opset 20"), (23, False, "--no-rewrite")])
def test_an_export_that_cannot_have_it_is_a_usage_error(
    opset: int, rewritten: bool, message: str, tmp_path: Any
) -> None:
    request = ExportOptions("swin_t", tmp_path, opset=opset, rewrite=rewritten, attention="onnx")
    with pytest.raises(UsageError, match=message):
        export(request)


def test_graphs_of_old_opsets_are_raised() -> None:
    model = load(parse(ATTENTION, mask=mask(3, 3), small=SMALL))
    model.opset_imports[""] = 17
    EmitAttention()(model)
    assert (model.opset_imports[""], model.ir_version >= 11) == (23, True)
    assert isinstance(model, ir.Model)


@pytest.mark.parametrize("lowest", [float(np.finfo(np.float32).min), -1e32])
def test_a_row_that_a_mask_hides_stays_written_out(lowest: float) -> None:
    """Kernels answer 0 there, or the mean of the values."""
    hidden = np.zeros((1, 2, 3, 3), np.float32)
    hidden[0, 1, 2] = lowest
    rewritten, refusals, modified = emit(ATTENTION, mask=hidden)
    assert ("Attention" in ops(rewritten), modified) == (False, False)
    assert refusals == ["its mask hides all keys from a query: a kernel may answer 0 there"]
