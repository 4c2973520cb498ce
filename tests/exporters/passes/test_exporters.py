"""Whatever exporter a graph comes from, it ends the same."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from deploycli.exporters import trace as trace_module
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.trace import trace
from deploycli.models.spec import TensorSpec
from tests.exporters.passes.graphs import ops, session
from tests.models.swins import tiny_swin

if TYPE_CHECKING:
    from deploycli.models.swin import SwinTransformer

GONE = {
    "Cast",
    "Concat",
    "Expand",
    "Identity",
    "Mod",
    "Pad",
    "Shape",
    "Slice",
    "Unsqueeze",
    "Where",
    "Mul",
    "Div",
    "Erf",
}


@pytest.fixture(scope="module")
def swin() -> SwinTransformer:
    return tiny_swin(depths=[2, 2], num_heads=[1, 2])


def by_trace(module: SwinTransformer) -> ir.Model:
    return trace(module, [TensorSpec("images", (3, 64, 64))], ["logits"])


def by_torchscript(module: SwinTransformer) -> ir.Model:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so in many words
        axes = {name: {0: "batch"} for name in ("images", "logits")}
        torch.onnx.export(
            module, (torch.zeros(2, 3, 64, 64),), buffer, dynamo=False, opset_version=17,
            input_names=["images"], output_names=["logits"], dynamic_axes=axes,
        )  # fmt: skip
    return ir.from_proto(onnx.load_model_from_string(buffer.getvalue()))


def test_the_exporters_of_pytorch_end_in_the_same_graph(swin: SwinTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [by_trace(swin), by_torchscript(swin)]
    monkeypatch.setattr(trace_module, "_translates_directly", lambda *_: False)
    made.append(by_trace(swin))
    plain = [ir.to_proto(model) for model in made]
    for model in made:
        rewrite(model)
    direct, torchscript, decomposed = map(ops, made)
    assert direct == decomposed == torchscript
    assert direct["Gather"] == 3  # two shifted blocks: to shift and to shift back, but the last goes with the pooling
    assert not set(direct) & GONE
    x = np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32)
    for before, after in zip(plain, made, strict=True):
        (a,), (b,) = (session(m).run(None, {"images": x}) for m in (before, ir.to_proto(after)))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # additive constants are summed
