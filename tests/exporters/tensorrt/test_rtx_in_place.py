"""What NVIDIA's compiler makes of attentions whose tokens stand first: no copy between products and attention."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest

from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.passes.common.names import name_nodes
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.exporters.target.settings import BuildSettings, ShapeRange
from deploycli.exporters.target.targets import DEFAULT_TARGETS
from deploycli.exporters.tensorrt.traffic import compiled
from deploycli.exporters.trace import MODULE_KEY, trace
from deploycli.models.outputs import output_names
from deploycli.models.spec import TensorSpec
from tests.exporters.lint.rtx import WHY
from tests.models.swins import tiny_swin
from tests.models.vits import tiny_vit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir
    from torch import nn

    from deploycli.exporters.bundle.engine import Kernel

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)

SIZE = 64
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "swin": lambda: tiny_swin(img_size=(SIZE, SIZE), embed_dim=64, depths=[2], num_heads=[2]),
    "vit": lambda: tiny_vit(img_size=(SIZE, SIZE), embed_dim=64, depth=2, num_heads=2),
}
"""Of two blocks each, of 64 channels."""

TOKENS = {"swin": 32 * 32, "vit": 8 * 8 + 1}
"""Of an image, in patches of 2 pixels and of 8, and the class token."""

IN_A_BLOCK = 7
"""LayerNormalization; query, key and value; attention; projection; LayerNormalization; two products."""

AROUND = 6
"""Two of the embedding, two of the last normalisation, two of the head, whose five classes are padded."""


def kernels(module: nn.Module, folder: Path, batches: tuple[int, int, int] = (1, 4, 8)) -> tuple[Kernel, ...]:
    """Export, rewrite and type a network, and compile it for the least, the best and the most of a batch."""
    folder.mkdir(exist_ok=True)
    inputs = [TensorSpec("images", (3, SIZE, SIZE))]
    model: ir.Model = trace(module, inputs, output_names(module, inputs), opset=20)
    rewrite(model)
    name_nodes(model, MODULE_KEY)
    cast(model, Policy(REDUCED_TYPES["fp16"]))
    (path, *_) = write_model(model, folder / "model.onnx")
    settings = BuildSettings({"images": ShapeRange(*((batch, 3, SIZE, SIZE) for batch in batches))})
    return compiled(path, settings, folder / "work", DEFAULT_TARGETS, timeout=120).kernels


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_copied_between_products_and_attention(name: str, tmp_path: Path) -> None:
    found = kernels(NETWORKS[name](), tmp_path)
    attentions = [place for place, kernel in enumerate(found) if kernel.attention]
    assert len(attentions) == 2
    for place in attentions:
        products = found[place - 1]
        assert [node.rpartition("/")[2] for node in products.nodes] == ["MatMul", "MatMul_1", "MatMul_2"]
        assert [tensor.split()[1][:2] for tensor in products.writes] == ["3x"]
    assert len(found) <= 2 * IN_A_BLOCK + AROUND


@pytest.mark.parametrize("name", NETWORKS)
def test_three_parts_of_one_product_are_read_whatever_the_batch(name: str, tmp_path: Path) -> None:
    for least, best, most in ((4, 4, 4), (1, 4, 8)):
        found = kernels(NETWORKS[name](), tmp_path / str(least), (least, best, most))
        for place in (place for place, kernel in enumerate(found) if kernel.attention):
            elements = SIZE * TOKENS[name]  # channels as wide as the image
            assert found[place - 1].moved == (1 + 3) * 2 * elements  # the tokens; query, key and value
            assert found[place].moved == (3 + 1) * 2 * elements  # those; and the result
