"""Classifiers as other libraries write them: the last block is computed for the tokens that their heads read."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from deploycli.exporters.graph import kernels
from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.passes import hoist_selections
from deploycli.exporters.passes.pipeline import PASSES, rewrite
from deploycli.exporters.trace import trace
from deploycli.models.spec import TensorSpec
from deploycli.models.vit import VisionTransformer
from tests.exporters.passes.graphs import ops, proto
from tests.exporters.passes.row_programs import deviation
from tests.exporters.passes.test_hoist_selections import multiply_adds
from tests.peers import import_timm, import_transformers

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploycli.exporters.graph.steps import KernelFigures

SIZE, PATCH, C, HEADS, DEPTH, CLASSES = 32, 8, 48, 3, 2, 5
PATCHES = (SIZE // PATCH) ** 2


class Logits(nn.Module):
    """A model of transformers, which returns its logits among other things."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).logits


def ours(*, distilled: bool = False, heads: int = HEADS) -> nn.Module:
    return VisionTransformer((SIZE, SIZE), PATCH, 3, CLASSES, C, DEPTH, heads, distilled=distilled)


def timm(*, pool: str = "token", distilled: bool = False) -> nn.Module:
    import_timm()
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    sizes = {"img_size": SIZE, "patch_size": PATCH, "num_classes": CLASSES, "embed_dim": C, "depth": DEPTH}
    if distilled:
        return VisionTransformerDistilled(num_heads=HEADS, **sizes)
    return TimmVisionTransformer(num_heads=HEADS, global_pool=pool, class_token=pool == "token", **sizes)


def torchvision() -> nn.Module:
    import_timm()  # it makes torchvision importable
    from torchvision.models.vision_transformer import VisionTransformer as TorchvisionTransformer

    return TorchvisionTransformer(SIZE, PATCH, DEPTH, HEADS, C, 4 * C, num_classes=CLASSES)


def transformers() -> nn.Module:
    library = import_transformers()
    config = library.ViTConfig(
        hidden_size=C, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * C,
        image_size=SIZE, patch_size=PATCH, num_labels=CLASSES,
    )  # fmt: skip
    return Logits(library.ViTForImageClassification(config))


def traced(model: nn.Module) -> onnx.ModelProto:
    return ir.to_proto(trace(model, [TensorSpec("images", (3, SIZE, SIZE))], ["logits"]))


def by_torchscript(model: nn.Module) -> onnx.ModelProto:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so in many words
        torch.onnx.export(
            model, (torch.zeros(2, 3, SIZE, SIZE),), buffer, dynamo=False, opset_version=17, input_names=["images"],
            output_names=["logits"], dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip
    return onnx.load_model_from_string(buffer.getvalue())


MODELS: dict[
    str, tuple[Callable[[], nn.Module], int, int]
] = {  # and how many tokens it has beside the patches, or reads
    "ours": (ours, 1, 1),
    "ours, distilled": (lambda: ours(distilled=True), 2, 2),
    "timm": (timm, 1, 1),
    "timm, distilled": (lambda: timm(distilled=True), 2, 2),
    "timm, mean of the patches": (lambda: timm(pool="avg"), 0, PATCHES),
    "torchvision": (torchvision, 1, 1),
    "transformers": (transformers, 1, 1),
}


@pytest.mark.parametrize("export", [traced, by_torchscript])
@pytest.mark.parametrize("name", MODELS)
def test_the_last_block_is_computed_for_what_is_read(
    name: str, export: Callable[[nn.Module], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (hoist_selections, kernels):  # so that it pays to save those of a small model
        monkeypatch.setattr(module, "PRODUCTS_PER_BYTE", 1e-9)
    make, more, read = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no bias, position or head is zero
            parameter.add_(0.2 * torch.randn_like(parameter))
    plain = export(model)
    whole, rewritten = (ir.from_proto(plain) for _ in range(2))
    rewrite(whole, without=frozenset({"hoist-selections"}))
    rewrite(rewritten)
    tokens = PATCHES + more
    row = C * C + 2 * tokens * C + C * C + 8 * C * C  # query, attention, projection and MLP of one token
    before, after = multiply_adds(proto(whole)), multiply_adds(proto(rewritten))
    assert before is not None
    assert after == before - (tokens - read) * row
    assert deviation(plain, proto(rewritten)) < 1e-4


def folded(plain: onnx.ModelProto) -> ir.Model:
    """Return the graph whose shapes are known, and that is otherwise as it was."""
    model = ir.from_proto(plain)
    rewrite(model, without=frozenset(PASSES) - {"fold-constants"})
    return model


def figures(model: ir.Model) -> KernelFigures:
    return kernels.predict(model.graph, Analysis(model.graph)).figures


def test_a_selection_that_saves_less_than_its_launches_take_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all that the pass knows it pays; TensorRT is predicted to make three kernels more of it."""
    monkeypatch.setattr(hoist_selections, "PRODUCTS_PER_BYTE", 1e-9)
    plain = traced(timm(distilled=True).eval())
    whole, rewritten = (ir.from_proto(plain) for _ in range(2))
    rewrite(whole, without=frozenset({"hoist-selections"}))
    remarks = [step.remark for step in rewrite(rewritten) if step.name == "hoist-selections"]
    assert len(remarks) == 1
    assert remarks[0].startswith("hoist-selections would make more of it than")
    assert ops(proto(rewritten)) == ops(proto(whole))
    assert multiply_adds(proto(rewritten)) == multiply_adds(plain)


@pytest.mark.parametrize("heads", [HEADS, 2 * HEADS])
def test_no_more_kernels_than_of_the_plain_graph(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 8 channels have no kernel of their own, so that nothing makes up for what a selection launches."""
    for module in (hoist_selections, kernels):
        monkeypatch.setattr(module, "PRODUCTS_PER_BYTE", 1e-9)
    plain = by_torchscript(ours(distilled=True, heads=heads).eval())
    rewritten = ir.from_proto(plain)
    steps = rewrite(rewritten)
    before, after = figures(folded(plain)), figures(rewritten)
    assert after.launches <= before.launches
    assert after.moved_bytes <= before.moved_bytes
    assert ("fewer" in [step.name for step in steps]) == (heads > HEADS)
    assert deviation(plain, proto(rewritten)) < 1e-4
