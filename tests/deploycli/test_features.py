"""`deploycli export --features`: feature maps with their strides, of our own models and of timm's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.bundle.golden import load_golden
from tests.deploycli.commands import assert_refused
from tests.peers import import_timm
from tests.weights import golden_weight

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

TINY_TIMM = '{"img_size": 64, "embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}'


def test_maps_at_any_size_are_verified_and_their_strides_are_told(
    deploycli: Command, smallest: str, checkpoint: Path, tmp_path: Path
) -> None:
    result = deploycli("export", smallest, "--features", "--img-size", "17x23", "--checkpoint", checkpoint.name)
    assert result.code == 0, result.err
    told = "4 tensors of the file are of no map, as a head's, and were left out; 2 of the maps' own norms"
    assert told in " ".join(result.err.split())
    assert deploycli("verify", smallest).code == 0
    spec = Bundle.open(tmp_path / "artifacts" / smallest).manifest.spec
    assert (spec.outputs, spec.strides) == (("stage1",), (2,))
    shown = " ".join(deploycli("inspect", smallest).out.split())
    assert "strides stage1 2 pixels" in shown
    assert "4 left out, 2 fresh" in shown
    manifest = json.loads((tmp_path / "artifacts" / smallest / "manifest.json").read_text())
    assert manifest["spec"]["strides"] == [2]
    del manifest["spec"]["strides"]  # as an older version wrote it
    (tmp_path / "artifacts" / smallest / "manifest.json").write_text(json.dumps(manifest))
    assert Bundle.open(tmp_path / "artifacts" / smallest).manifest.spec.strides == ()


def test_maps_of_a_timm_model_with_the_weights_of_its_classifier(deploycli: Command, tmp_path: Path) -> None:
    timm = import_timm()
    kwargs = json.loads(TINY_TIMM)
    classifier = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **kwargs)
    for key, parameter in classifier.named_parameters():
        parameter.data.copy_(torch.from_numpy(golden_weight(key, tuple(parameter.shape))))
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    export = ["export", "timm:swin_tiny_patch4_window7_224", "--features", "2,4", "--model-kwargs", TINY_TIMM]
    result = deploycli(*export, "--checkpoint", "classifier.pth", "--name", "tiny")
    assert result.code == 0, result.err
    assert "4 tensors of the file are of no map" in " ".join(result.err.split())
    bundle = Bundle.open(tmp_path / "artifacts/tiny")
    assert (bundle.manifest.spec.outputs, bundle.manifest.spec.strides) == (("stage2", "stage4"), (8, 32))
    inputs, outputs = load_golden(tmp_path / "artifacts/tiny/golden.npz")
    with torch.inference_mode():
        maps = classifier.eval().forward_intermediates(
            torch.from_numpy(inputs["images"]), indices=[1, 3], intermediates_only=True
        )
    assert [array.shape[1:] for array in outputs.values()] == [(48, 8, 8), (192, 2, 2)]  # [B, C, H, W]
    for found, expected in zip(outputs.values(), maps, strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-5)
    assert deploycli("verify", "tiny").code == 0


def without_features(pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
    """A model that a user registered with timm; older ones of timm's own raise this, too."""
    if kwargs.get("features_only"):
        raise RuntimeError("features_only not implemented")
    return torch.nn.Flatten()


def plain_module(pretrained: bool = False, **_kwargs: object) -> torch.nn.Module:
    """One that takes what it does not know."""
    return torch.nn.Flatten()


def test_maps_that_timm_gives_channels_last_are_turned(deploycli: Command, tmp_path: Path) -> None:
    import_timm()
    small = '{"img_size": 56, "layers": [1, 1, 1, 1], "embed_dims": [16, 24, 24, 24], "hidden_sizes": [4, 6, 6, 6]}'
    result = deploycli("export", "timm:sequencer2d_s", "--features", "--model-kwargs", small, "--img-size", "56")
    assert result.code == 0, result.err
    _, outputs = load_golden(tmp_path / "artifacts/sequencer2d_s/golden.npz")
    assert {name: array.shape[1:] for name, array in outputs.items()} == {
        "stage1": (16, 8, 8),
        "stage2": (24, 4, 4),
        "stage3": (24, 4, 4),
    }


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["vit_b_16", "--features"], ["--features of vit_b_16, which has no feature maps"]),
        (["swinv2_t", "--features"], ["which has no feature maps"]),
        (["swin_t", "--features", "0"], ["'0': write stages as 2,3,4, or all"]),
        (["swin_t", "--features", "2,"], ["'2,': write stages as 2,3,4, or all"]),
        (["swin_t", "--features", "5"], ["--features 5, and swin_t has 4 stages", "1, 2, 3, 4"]),
        (["swin_t", "--features", "--num-classes", "3"], ["both --features and --num-classes"]),
        (["swin_t", "--features", "4", "--output", "softmax", "--img-size", "32"], ["the model's outputs are stage4"]),
        (["crossformer_t", "--features", "--img-size", "800x1333"], ["800x1344"]),
        (
            ["swin_t", "--features", "--img-size", "224", "--img-size", "800x1333"],
            ["224x224 and 800x1333: a bundle holds one size", "--name"],
        ),
        (["torchvision:resnet18", "--features"], ["--features of torchvision:resnet18"]),
        (["timm:without_features", "--features"], ["--features of timm:without_features, which has no feature maps"]),
        (["timm:plain_module", "--features"], ["--features of timm:plain_module, which has no feature maps"]),
        (["timm:resnet18", "--features", "6"], ["--features 6, and timm:resnet18 has 5 stages"]),
        (["timm:no_such_model", "--features"], ["timm has no model 'no_such_model'"]),
    ],
)
def test_what_has_no_maps_is_one_message(deploycli: Command, arguments: list[str], parts: list[str]) -> None:
    timm = import_timm()
    for function in (without_features, plain_module):
        if not timm.is_model(function.__name__):
            timm.models.register_model(function)
    assert_refused(deploycli("export", *arguments), 2, *parts)
