from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from deploycli.exporters import trace as trace_module
from deploycli.exporters.passes.common.names import name_nodes
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.trace import MODULE_KEY, OPSETS, trace
from deploycli.models.errors import ExportError
from deploycli.models.spec import TensorSpec
from tests.models.swins import tiny_swin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEQUENCE = (TensorSpec("images", (6, 4)),)
IMAGES = (TensorSpec("images", (3, 64, 64)),)


class Model(nn.Module):
    """A model with a weight of its own and the given forward pass."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.function = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def run(model: ir.Model, *inputs: Any) -> list[Any]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(zip([i.name for i in session.get_inputs()], inputs, strict=True))))


def image(batch: int, *shape: int) -> Any:
    return np.random.default_rng(batch).standard_normal((batch, *shape)).astype(np.float32)


def assert_like_eager(module: nn.Module, model: ir.Model, *inputs: Any) -> None:
    made = module.eval()(*map(torch.from_numpy, inputs))
    expected = [tensor.detach() for tensor in ([made] if isinstance(made, Tensor) else made)]
    for found, want in zip(run(model, *inputs), expected, strict=True):
        assert found.dtype == want.numpy().dtype
        np.testing.assert_allclose(found, want.numpy(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which way each trace goes."""
    taken: list[str] = []
    real = trace_module._translate_as_traced

    def spy(*arguments: Any) -> Any:
        model = real(*arguments)
        taken.append("decomposed" if model is None else "direct")
        return model

    monkeypatch.setattr(trace_module, "_translate_as_traced", spy)
    return taken


def test_the_batch_of_a_swin_stays_symbolic(paths: list[str]) -> None:
    module = tiny_swin(depths=[2, 2], num_heads=[1, 2])
    model = trace(module, IMAGES, ["logits"])
    assert paths == ["direct"]
    assert [str(d) for d in model.graph.inputs[0].shape or ()] == ["batch", "3", "64", "64"]
    assert [str(d) for d in model.graph.outputs[0].shape or ()] == ["batch", "5"]
    for batch in (1, 2, 5):
        assert_like_eager(module, model, image(batch, 3, 64, 64))


def test_a_fixed_batch() -> None:
    module = tiny_swin(depths=[2], num_heads=[2])
    model = trace(module, IMAGES, ["logits"], batch=3)
    assert list(model.graph.inputs[0].shape or ()) == [3, 3, 64, 64]
    assert list(model.graph.outputs[0].shape or ()) == [3, 5]
    assert_like_eager(module, model, image(3, 3, 64, 64))


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_runs_and_agrees(opset: int) -> None:
    module = tiny_swin(depths=[1], num_heads=[2], img_size=[16, 16])
    model = trace(module, (TensorSpec("images", (3, 16, 16)),), ["logits"], opset=opset)
    assert model.opset_imports[""] == opset
    rewrite(model)
    assert_like_eager(module, model, image(3, 3, 16, 16))


@pytest.mark.parametrize("opset", [0, 17, 24])
def test_an_opset_outside_of_the_range_is_refused(opset: int) -> None:
    with pytest.raises(ExportError, match=f"opset {opset} cannot be exported") as caught:
        trace(Model(lambda m, x: m.linear(x)), SEQUENCE, ["y"], opset=opset)
    assert "18 to 23" in caught.value.expected


def test_both_ways_give_equal_outputs(monkeypatch: pytest.MonkeyPatch, paths: list[str]) -> None:
    module = tiny_swin(depths=[1], num_heads=[2])
    direct = trace(module, IMAGES, ["logits"])
    monkeypatch.setattr(trace_module, "_translates_directly", lambda *_: False)
    decomposed = trace(module, IMAGES, ["logits"])
    assert paths == ["direct", "decomposed"]
    x = image(3, 3, 64, 64)
    np.testing.assert_allclose(run(direct, x)[0], run(decomposed, x)[0], rtol=1e-5, atol=1e-6)


def test_other_internals_of_pytorch_lead_to_the_public_way(monkeypatch: pytest.MonkeyPatch, paths: list[str]) -> None:
    from torch.onnx._internal.exporter import _registration

    monkeypatch.delattr(_registration, "ONNXRegistry")
    module = Model(lambda m, x: m.linear(x))
    with monkeypatch.context() as late:  # the public way needs the registry itself
        late.setattr(trace_module, "_translates_directly", lambda *_: True)
        with pytest.raises(ExportError):
            trace(module, SEQUENCE, ["y"])
    assert paths == ["decomposed"]


def in_place(_model: Model, x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 1
    y[:, 1:3, 2] += x[:, 1:3, 0]
    return y


def mask_by_slices(_model: Model, x: Tensor) -> Tensor:
    """As Hugging Face fills Swin's mask, a region at a time."""
    regions = torch.zeros(6)
    for count, part in enumerate((slice(0, -3), slice(-3, -1), slice(-1, None))):
        regions[part] = count
    difference = regions[None, :] - regions[:, None]
    mask = difference.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)
    return (x @ x.transpose(1, 2) + mask).softmax(-1)


@pytest.mark.parametrize("forward", [in_place, mask_by_slices])
def test_what_writes_in_place_is_decomposed_and_right(forward: Callable[..., Tensor], paths: list[str]) -> None:
    module = Model(forward)
    model = trace(module, SEQUENCE, ["y"])
    assert paths == ["decomposed"]
    rewrite(model)
    for batch in (1, 3):
        assert_like_eager(module, model, image(batch, 6, 4))


def test_integers_that_become_numbers_of_another_type_are_decomposed() -> None:
    """PyTorch's own translations of these take the type of the operand for that of the result."""
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: x * 0.5,
        lambda x: x / 2,
        lambda x: x / (x + 1),
        torch.sqrt,
        lambda x: (x > 2).sum(1),
        lambda x: (x > 2) * 1.5,
        lambda x: x.clamp(0.5, 2.5),
        lambda x: (x > 2).cumsum(1),
        lambda x: x.float().mean(1),
        lambda x: ~(x > 2),
    ]
    module = Model(lambda _, x: tuple(function(x) for function in functions))
    model = trace(module, (TensorSpec("ids", (4,), "int64"),), [f"y{i}" for i in range(len(functions))])
    assert_like_eager(module, model, np.arange(12).reshape(3, 4))


def test_integer_arithmetic_is_translated_directly(paths: list[str]) -> None:
    module = Model(lambda _, x: (x // 2, x % 3 > 1))
    model = trace(module, (TensorSpec("ids", (4,), "int64"),), ["half", "odd"])
    assert paths == ["direct"]
    assert_like_eager(module, model, np.arange(12).reshape(3, 4))


def test_two_inputs_and_a_tuple_of_outputs() -> None:
    module = Model(lambda m, x, z: (m.linear(x) + z[:, None], z * m.scale))
    model = trace(module, (TensorSpec("tokens", (6, 4)), TensorSpec("extra", (4,))), ["sum", "scaled"])
    assert [v.name for v in model.graph.inputs] == ["tokens", "extra"]
    assert [v.name for v in model.graph.outputs] == ["sum", "scaled"]
    assert {str(v.shape[0]) for v in (*model.graph.inputs, *model.graph.outputs) if v.shape} == {"batch"}
    assert_like_eager(module, model, image(3, 6, 4), image(3, 4))


def test_the_number_of_outputs_must_be_the_declared_one() -> None:
    with pytest.raises(ExportError, match="the model has 2 outputs") as caught:
        trace(Model(lambda m, x: (m.linear(x), x * 2)), SEQUENCE, ["y"])
    assert caught.value.expected == "1: y"


@pytest.mark.parametrize(
    "forward",
    [
        lambda _, x: (x + 1,) * 2,
        lambda _, x: (x, x + 1),
        lambda m, x: (m.scale, x + m.scale),
        lambda m, x: (x, m.scale),
    ],
)
def test_outputs_that_are_one_value_or_an_input_or_a_parameter_keep_their_names(forward: Callable[..., Any]) -> None:
    module = Model(forward)
    model = trace(module, SEQUENCE, ["first", "second"])
    rewrite(model)
    name_nodes(model, MODULE_KEY)
    assert [v.name for v in model.graph.inputs] == ["images"]
    assert [v.name for v in model.graph.outputs] == ["first", "second"]
    assert_like_eager(module, model, image(3, 6, 4))


def test_a_parameter_called_like_an_input_does_not_become_its_default() -> None:
    module = Model(lambda m, x: x + m.scale)
    model = trace(module, (TensorSpec("scale", (4,)),), ["y"])
    name_nodes(model, MODULE_KEY)
    assert [v.name for v in model.graph.inputs] == ["scale"]
    assert list(model.graph.initializers) == ["module.scale"]
    assert_like_eager(module, model, image(3, 4))


def test_names_carry_the_module_and_parameters_their_own() -> None:
    model = trace(tiny_swin(depths=[2], num_heads=[2]), IMAGES, ["logits"])
    rewrite(model)
    name_nodes(model, MODULE_KEY)
    names = [node.name or "" for node in model.graph]
    assert "layers.0.blocks.1.attn/Softmax" in names
    assert "layers.0.blocks.0.norm1/LayerNormalization" in names
    assert len(set(names)) == len(names)
    assert {"norm.weight", "head.bias", "patch_embed.proj.weight"} <= set(model.graph.initializers)
    assert not any(node.metadata_props for node in model.graph.all_nodes())


def test_nothing_of_the_build_machine_is_left_in_the_graph() -> None:
    model = trace(Model(lambda m, x: m.linear(x).relu()), SEQUENCE, ["y"])
    text = ir.to_proto(model).SerializeToString()
    assert b"torch." not in text
    assert b".py" not in text


def baked(_model: Model, x: Tensor) -> Tensor:
    return x.view(int(x.shape[0]), 24)


def branches(_model: Model, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] == 2 else x


def reads_data(_model: Model, x: Tensor) -> Tensor:
    return x + 1 if x.sum() > 0 else x - 1


def one_size_only(_model: Model, x: Tensor) -> Tensor:
    return x.reshape(2, 24)


@pytest.mark.parametrize(
    ("forward", "words"),
    [(baked, "batch"), (branches, "batch"), (one_size_only, "batch"), (reads_data, "data-dependent")],
)
def test_what_cannot_be_traced_ends_in_one_error(
    forward: Callable[..., Tensor], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError) as caught:
        trace(Model(forward), SEQUENCE, ["y"])
    assert words in str(caught.value).lower()
    assert "control flow" in caught.value.expected
    assert caught.value.hint
    assert capfd.readouterr() == ("", "")


def test_what_works_at_one_size_can_be_traced_at_that_size() -> None:
    module = Model(one_size_only)
    assert_like_eager(module, trace(module, SEQUENCE, ["y"], batch=2), image(2, 6, 4))


def test_tracing_leaves_the_users_logging_as_it_was() -> None:
    import logging

    trace(Model(lambda m, x: m.linear(x)), SEQUENCE, ["y"])
    assert logging.root.manager.disable == logging.NOTSET
