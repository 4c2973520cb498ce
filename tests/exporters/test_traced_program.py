"""What PyTorch gives and takes in lists becomes no ONNX sequence, which TensorRT does not read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deploycli.exporters.lint import lint
from deploycli.exporters.passes.common.names import name_nodes
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.trace import MODULE_KEY, store_operands, trace
from deploycli.models.spec import TensorSpec
from tests.exporters.lint.rtx import refusals
from tests.exporters.passes.test_properties import examples
from tests.exporters.test_trace import Model, assert_like_eager, image
from tests.peers import import_timm

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

X = (TensorSpec("x", (4, 6)),)


def op_types(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph.all_nodes()}


def assert_no_sequence(function: Callable[[Tensor], Any], opset: int = 20) -> None:
    module = Model(lambda _, x: function(x))
    outputs = [f"y{i}" for i in range(len(module(torch.zeros(2, 4, 6))))]
    model = trace(module, X, outputs, opset=opset)
    for batch in (1, 3):
        assert_like_eager(module, model, image(batch, 4, 6))
    rewrite(model)
    assert_like_eager(module, model, image(3, 4, 6))
    assert not {name for name in op_types(model) if "Sequence" in name}
    name_nodes(model, MODULE_KEY)
    assert lint(model).errors == ()
    assert refusals(model) == []


LISTS: dict[str, Callable[[Tensor], Any]] = {
    "chunk of an odd length": lambda x: x.chunk(4, -1),
    "chunk that is one": lambda x: (*x.chunk(1, 1), x),
    "split, and one part is read": lambda x: (x.split(4, 2)[1],),
    "split by sizes": lambda x: x.split([1, 2, 1], 1),
    "an empty part": lambda x: (x.split([0, 4], 1)[1],),
    "tensor_split by sections": lambda x: x.tensor_split(4, 2),
    "tensor_split by places": lambda x: x.tensor_split([1, 3], -2),
    "hsplit": lambda x: x.hsplit(2),
    "dsplit": lambda x: x.dsplit([2, 3]),
    "vsplit": lambda x: tuple(part.transpose(0, 1) for part in x.transpose(0, 1).vsplit(2)),
    "unbind": lambda x: x.unbind(-1),
    "unsafe_chunk": lambda x: x.unsafe_chunk(2, 1),
    "meshgrid": lambda x: (x + torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")[1],),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x[:, :1], x),
    "atleast_3d": lambda x: torch.atleast_3d(x, x[:, 0]),
    "hstack": lambda x: (torch.hstack([x, x[:, :1]]),),
    "vstack": lambda x: (x + torch.vstack([x[0, :2], x[0, 2:]]),),
    "dstack": lambda x: (torch.dstack([x, -x]),),
    "column_stack": lambda x: (torch.column_stack([x, x]),),
    "block_diag": lambda x: (x + torch.block_diag(x[0, :1, :2], x[0, :3, :4]),),
    "cartesian_prod": lambda x: (x[:, :2, :2] + torch.cartesian_prod(torch.arange(2.0), torch.arange(1.0)),),
    "written into": lambda x: (_written_into(x),),
    "a type that must be promoted": lambda x: tuple(part * (x > 0)[..., :3] for part in x.chunk(2, -1)),
}


def _written_into(x: Tensor) -> Tensor:
    y = x.clone()
    first, second = y.chunk(2, 1)
    first.mul_(second)
    return y


@pytest.mark.parametrize("name", LISTS)
def test_lists_become_single_tensors(name: str) -> None:
    assert_no_sequence(LISTS[name])


@examples(8)
@given(st.data())
def test_parts_of_any_axis(data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from([1, 2, -1, -2]))
    length = (4, 6)[axis - 1 if axis > 0 else axis]
    opset = data.draw(st.sampled_from([18, 20, 23]))
    how = data.draw(st.sampled_from(["chunk", "split", "sizes", "places"]))
    if how == "sizes":
        ends = sorted(data.draw(st.lists(st.integers(1, length - 1), unique=True)))
        sizes = np.diff([0, *ends, length]).tolist()
        assert_no_sequence(lambda x: x.split(sizes, axis), opset)
    elif how == "places":
        places = sorted(data.draw(st.lists(st.integers(1, length - 1), unique=True, min_size=1)))
        assert_no_sequence(lambda x: x.tensor_split(places, axis), opset)
    else:
        count = data.draw(st.integers(1, length))
        assert_no_sequence(lambda x: getattr(x, how)(count, axis), opset)


ROTARY = {
    "vit_small_patch16_dinov3": {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5},
    "eva02_tiny_patch14_224": {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5},
}


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_embeddings(name: str) -> None:
    module = import_timm().create_model(name, **ROTARY[name]).eval()
    side = int(ROTARY[name]["img_size"])
    inputs = (TensorSpec("images", (3, side, side)),)
    model = trace(module, inputs, ["logits"])
    plain = model.graph.num_nodes()
    store_operands(model)
    name_nodes(model, MODULE_KEY)
    assert lint(model).errors == ()
    assert refusals(model) == []  # as --no-rewrite writes it
    rewrite(model)
    name_nodes(model, MODULE_KEY)
    assert not {"Sin", "Cos", "CastLike", "SplitToSequence", "SequenceAt"} & op_types(model)
    tokens = 2 if "dinov3" in name else 0  # class and registers: nothing is added to them, so they are expanded
    assert sum(node.op_type == "Expand" for node in model.graph) == tokens
    assert ("Shape" in op_types(model)) == bool(tokens)
    assert model.graph.num_nodes() < plain
    assert lint(model).errors == ()
    assert refusals(model) == []
    assert_like_eager(module, model, image(3, 3, side, side))


def test_the_operands_of_a_range_are_stored() -> None:
    model = trace(Model(lambda _, x: x * torch.arange(x.shape[-1] * 1.0)), X, ["y"])
    store_operands(model)
    name_nodes(model, MODULE_KEY)
    assert "Range" in op_types(model)
    assert lint(model).errors == ()


def test_the_axes_of_reductions_are_stored(tmp_path: Any) -> None:
    module = Model(lambda m, x: (m.linear(x[..., :4]).mean((1, -1), keepdim=True), x.sum(1), x.amax(-1)))
    model = trace(module, X, ["a", "b", "c"])
    store_operands(model)
    name_nodes(model, MODULE_KEY)
    reductions = [node for node in model.graph if node.op_type.startswith("Reduce")]
    assert len(reductions) == 3
    assert all(node.inputs[1] is not None and node.inputs[1].is_initializer() for node in reductions)
    assert refusals(model) == []
    assert_like_eager(module, model, image(3, 4, 6))


def test_type_as_of_one_type_is_nothing() -> None:
    model = trace(Model(lambda m, x: m.linear(x[..., :4].type_as(x)).type_as(x)), X, ["y"])
    assert "CastLike" not in op_types(model)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_networks_take_lists_and_stay_what_they_are(kind: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(nn, kind)(6, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x)[0]

    module = Recurrent().eval()
    model = trace(module, X, ["y"])
    assert kind in op_types(model)
    assert_like_eager(module, model, image(3, 4, 6))
