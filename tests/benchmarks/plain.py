"""Models of timm with weights by the rule of tests/golden, as PyTorch's own exporter writes them."""

from pathlib import Path

import torch

from tests.peers import import_timm
from tests.weights import golden_weight


def export_plain(model: str, path: Path) -> None:
    """Write a model of timm as `torch.onnx.export(dynamo=True)` does, for any batch."""
    module = import_timm().create_model(model)
    state = {key: torch.from_numpy(golden_weight(key, tuple(p.shape))) for key, p in module.named_parameters()}
    module.load_state_dict(module.state_dict() | state)
    images, batch = torch.zeros(2, *module.default_cfg.get("input_size", (3, 224, 224))), torch.export.Dim("batch")
    program = torch.onnx.export(
        module.eval(), (images,), dynamo=True, opset_version=20, dynamic_shapes=({0: batch},),
        input_names=["images"], output_names=["logits"], external_data=False,
    )  # fmt: skip
    assert program is not None
    program.save(str(path))
