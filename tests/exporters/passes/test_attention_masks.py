"""Attention with masks: a query that sees no key is 0, as in PyTorch; what hides none is translated as before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from deploycli.exporters import traced_program
from deploycli.exporters.lint import lint
from deploycli.exporters.passes.common.names import name_nodes
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.exporters.trace import MODULE_KEY, trace
from deploycli.models.spec import TensorSpec
from tests.exporters.passes.test_properties import examples
from tests.exporters.test_trace import run

if TYPE_CHECKING:
    import onnx_ir as ir

HEADS, QUERIES, KEYS, CHANNELS = 4, 5, 6, 8
LOWEST = torch.finfo(torch.float32).min


class Attention(nn.Module):
    """One attention: x [N, 5, 16], memory [N, 6, 16], hide [N, 6] with 1 at keys that are not seen."""

    def __init__(self, kind: str, shape: str = "keys", constant: Tensor | None = None, **arguments: Any) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(16, HEADS * CHANNELS), nn.Linear(16, HEADS * CHANNELS)
        self.kind, self.shape, self.arguments = kind, shape, arguments
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor, memory: Tensor, hide: Tensor) -> Tensor:
        batch, kv_heads = x.shape[0], HEADS // 2 if self.arguments.get("enable_gqa") else HEADS
        q = self.q(x).reshape(batch, QUERIES, HEADS, CHANNELS).transpose(1, 2)
        kv = self.kv(memory).reshape(batch, KEYS, HEADS, CHANNELS).transpose(1, 2)[:, :kv_heads]
        seen: Tensor | None = (hide < 0.5)[:, None, None, :]
        if self.shape == "queries":
            seen = seen & (x[..., 0] > -9)[:, None, :, None]
        elif self.shape == "heads":
            seen = seen.expand(batch, HEADS, QUERIES, KEYS)
        if self.constant is not None:
            seen = self.constant
        elif self.kind == "float":
            seen = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        elif self.kind == "finite":
            seen = torch.zeros(seen.shape).masked_fill(~seen, LOWEST)
        elif self.kind == "none":
            seen = None
        y = functional.scaled_dot_product_attention(q, kv, -kv, seen, **self.arguments) + hide[:, None, None, :1] * 0
        return y.transpose(1, 2).reshape(batch, QUERIES, HEADS * CHANNELS)


INPUTS = (TensorSpec("x", (QUERIES, 16)), TensorSpec("memory", (KEYS, 16)), TensorSpec("hide", (KEYS,)))


def feed(batch: int = 4) -> list[Any]:
    rng = np.random.default_rng(0)
    x, memory = (rng.standard_normal((batch, n, 16)).astype(np.float32) for n in (QUERIES, KEYS))
    hide = (rng.random((batch, KEYS)) > 0.5).astype(np.float32)
    hide[1:3] = [[1], [0]]
    x[3, 2, 0] = -10  # a query of its own that sees nothing, where the mask has queries
    return [x, memory, hide]


def assert_like_eager(module: nn.Module, opset: int = 20, batch: int | None = None) -> ir.Model:
    module, arrays = module.eval(), [array[:batch] for array in feed()]
    expected = module(*map(torch.from_numpy, arrays)).detach().numpy()
    assert np.isfinite(expected).all()
    model = trace(module, INPUTS, ["y"], opset=opset, batch=batch)
    np.testing.assert_allclose(run(model, *arrays)[0], expected, rtol=1e-5, atol=1e-5)
    rewrite(model)
    np.testing.assert_allclose(run(model, *arrays)[0], expected, rtol=1e-5, atol=1e-5)
    name_nodes(model, MODULE_KEY)
    assert lint(model).errors == ()
    return model


@pytest.mark.parametrize("shape", ["keys", "queries", "heads"])
@pytest.mark.parametrize("kind", ["bool", "float", "finite"])
def test_masks_of_the_input(kind: str, shape: str) -> None:
    model = assert_like_eager(Attention(kind, shape))
    hidden = run(model, *feed())[0][1]
    assert (np.abs(hidden).max() == 0) == (kind != "finite")  # as PyTorch answers
    (softmax,) = (node for node in model.graph if node.op_type == "Softmax")
    assert [use.op_type for use in softmax.outputs[0].consumers()] == ["MatMul"]  # the choice stands behind it


def rows(kind: str, empty: bool, *, queries: int = QUERIES) -> Tensor:
    seen = torch.rand(queries, KEYS, generator=torch.Generator().manual_seed(1)) > 0.5
    seen[:, 0] = True
    if empty:
        seen[2] = False
    return seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_constant_mask_with_an_empty_row(kind: str) -> None:
    model = assert_like_eager(Attention(kind, constant=rows(kind, empty=True)))
    assert np.abs(run(model, *feed())[0][:, 2]).max() == 0


@pytest.mark.parametrize(
    ("kind", "constant", "arguments"),
    [
        ("none", None, {}),
        ("none", None, {"is_causal": True}),  # every query sees the first key
        ("bool", rows("bool", empty=False), {}),
        ("float", rows("float", empty=False), {}),
        ("float", torch.full((1, 1, QUERIES, KEYS), LOWEST), {}),  # hides nothing in PyTorch: all scores are one
    ],
)
def test_what_hides_no_query_is_translated_as_before(
    kind: str, constant: Tensor | None, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, programs = traced_program._answer_zero_where_all_is_hidden, []

    def spy(node: torch.fx.Node, *rest: Any) -> None:
        before = str(node.graph)
        real(node, *rest)
        programs.append((before, str(node.graph)))

    monkeypatch.setattr(traced_program, "_answer_zero_where_all_is_hidden", spy)
    module, batch = Attention(kind, constant=constant, **arguments).eval(), torch.export.Dim("batch")
    program = torch.export.export(
        module, tuple(map(torch.from_numpy, feed())), dynamic_shapes=[{0: batch}] * 3, strict=False
    )
    traced_program.prepare(program, 20)
    ((before, after),) = programs
    assert after == before


@pytest.mark.parametrize("constant", [None, torch.full((1, 1, QUERIES, KEYS), LOWEST)])
def test_lowest_numbers_hide_nothing_from_the_operator_attention(constant: Tensor | None) -> None:
    """PyTorch answers the mean of the values to them; ONNX Runtime's Attention would answer 0."""
    assert_like_eager(Attention("finite", constant=constant), opset=23)


class WithoutHeads(nn.Module):
    """An attention over [N, 5, 16], or over [5, 16] of a sum of samples, with a mask of these axes."""

    def __init__(self, kind: str, rank: int) -> None:
        super().__init__()
        self.kind, self.rank = kind, rank

    def forward(self, x: Tensor, memory: Tensor, hide: Tensor) -> Tensor:
        seen = (hide < 0.5)[:, None, :]
        if self.kind == "float":
            seen = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        q, k = (x, memory) if self.rank == 3 else (x.sum(0), memory.sum(0))
        mask = None if self.kind == "none" else seen if self.rank == 3 else seen[0]
        y = functional.scaled_dot_product_attention(q, k, -k, mask, is_causal=self.kind == "none")
        return y + 0 * (x + hide[:, None, :1] + memory[:, :1])


@pytest.mark.parametrize(
    ("kind", "rank", "opset"), [("bool", 3, 20), ("float", 3, 23), ("none", 3, 20), ("bool", 2, 20)]
)
def test_without_an_axis_of_heads(kind: str, rank: int, opset: int) -> None:
    assert_like_eager(WithoutHeads(kind, rank), opset)


class InGroups(nn.Module):
    """An attention over [N, G, 2, 5, 8], as Twins has over groups of tokens, with a mask of these axes or of fewer."""

    def __init__(self, kind: str, groups: int = 2) -> None:
        super().__init__()
        width = groups * 2 * CHANNELS
        self.q, self.kv, self.kind, self.groups = nn.Linear(16, width), nn.Linear(16, width), kind, groups

    def forward(self, x: Tensor, memory: Tensor, hide: Tensor) -> Tensor:
        q = self.q(x).reshape(-1, QUERIES, self.groups, 2, CHANNELS).permute(0, 2, 3, 1, 4)
        kv = self.kv(memory).reshape(-1, KEYS, self.groups, 2, CHANNELS).permute(0, 2, 3, 1, 4)
        masks = {
            "none": None,
            "keys": (hide < 0.5)[:, None, None, None, :],
            "all": torch.ones(QUERIES, KEYS).tril()[None, None, None],
            "plain": torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(),
        }
        y = functional.scaled_dot_product_attention(q, kv, -kv, masks[self.kind])
        return y.permute(0, 3, 1, 2, 4).flatten(2) + hide[:, None, :1] * 0


@pytest.mark.parametrize(("kind", "opset"), [("none", 20), ("keys", 20), ("all", 23), ("plain", 20), ("none", 23)])
def test_of_further_axes(kind: str, opset: int) -> None:
    assert_like_eager(InGroups(kind), opset)


@pytest.mark.parametrize(
    ("kind", "batch", "groups"), [("none", 1, 1), ("keys", 1, 1), ("all", 1, 1), ("plain", 3, 1), ("none", None, 1)]
)
def test_of_one_image_or_one_group(kind: str, batch: int | None, groups: int) -> None:
    assert_like_eager(InGroups(kind, groups), batch=batch)


@examples(6)
@given(
    kind=st.sampled_from(["bool", "float", "finite", "none"]),
    shape=st.sampled_from(["keys", "queries", "heads"]),
    constant=st.booleans(),
    gqa=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    opset=st.sampled_from([18, 20, 23]),
)
def test_any_attention(kind: str, shape: str, constant: bool, gqa: bool, scale: float | None, opset: int) -> None:
    mask = rows(kind, empty=True) if constant and kind != "none" else None
    arguments = {"is_causal": True} if kind == "none" else {}
    assert_like_eager(Attention(kind, shape, mask, enable_gqa=gqa, scale=scale, **arguments), opset)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_in_fp16(kind: str) -> None:
    """Infinity becomes a finite number there: the row is found all the same."""
    module = Attention(kind).eval()
    expected = module(*map(torch.from_numpy, feed())).detach().numpy()
    model = trace(module, INPUTS, ["y"])
    rewrite(model)
    name_nodes(model, MODULE_KEY)
    cast(model, Policy(REDUCED_TYPES["fp16"], frozenset({"softmax"}), ()))
    found = run(model, *feed())[0]
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert np.abs(found[1]).max() == 0


class Encoder(nn.Module):
    """nn.MultiheadAttention with padded keys: tokens [N, 6, 16], hide [N, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, tokens: Tensor, hide: Tensor) -> Tensor:
        return self.attention(tokens, tokens, tokens, key_padding_mask=hide > 0.5, need_weights=False)[0]


def test_multihead_attention_with_a_sample_that_is_all_padding() -> None:
    module = Encoder().eval()
    _, tokens, hide = feed()
    expected = module(torch.from_numpy(tokens), torch.from_numpy(hide)).detach().numpy()  # not the NaN of its fast path
    model = trace(module, (TensorSpec("tokens", (KEYS, 16)), TensorSpec("hide", (KEYS,))), ["y"])
    rewrite(model)
    np.testing.assert_allclose(run(model, tokens, hide)[0], expected, rtol=1e-5, atol=1e-5)
