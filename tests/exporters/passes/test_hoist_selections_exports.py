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

from deploycli.exporters.passes import hoist_selections
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.trace import trace
from deploycli.models.spec import TensorSpec
from deploycli.models.vit import VisionTransformer
from tests.exporters.passes.graphs import proto
from tests.exporters.passes.row_programs import deviation
from tests.exporters.passes.test_hoist_selections import multiply_adds
from tests.peers import import_timm, import_transformers

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE, PATCH, C, HEADS, DEPTH, CLASSES = 32, 8, 24, 3, 2, 5
PATCHES = (SIZE // PATCH) ** 2


class Logits(nn.Module):
    """A model of transformers, which returns its logits among other things."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).logits


def ours(*, distilled: bool = False) -> nn.Module:
    return VisionTransformer((SIZE, SIZE), PATCH, 3, CLASSES, C, DEPTH, HEADS, distilled=distilled)


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
    monkeypatch.setattr(hoist_selections, "PRODUCTS_PER_BYTE", 1e-9)  # so that it pays to save those of a small model
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
