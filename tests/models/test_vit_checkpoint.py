"""Checkpoints of ViT and DeiT: JAX's archives, the variant that fits, and images of another size."""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploycli.models.build import build
from deploycli.models.checkpoint import Loaded, adapt, load
from deploycli.models.errors import UsageError
from deploycli.models.registry import configure, resolve
from deploycli.models.vit import check_geometry, resample
from tests.models.swins import golden_state
from tests.models.vits import TINY, tiny_spec, tiny_vit, to_jax
from tests.peers import import_timm

Arrays = dict[str, Any]
QUERY = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"


@pytest.fixture
def arrays() -> Arrays:
    return to_jax(golden_state(tiny_vit()))


def saved(arrays: Arrays, tmp_path: Path) -> Path:
    path = tmp_path / "weights.npz"
    np.savez(path, **arrays)
    return path


def refusal(path: Path, **changes: Any) -> str:
    with pytest.raises(UsageError) as failure:
        load(tiny_spec(**changes), path)
    return str(failure.value)


def assert_same_weights(loaded: Loaded, state: dict[str, torch.Tensor]) -> None:
    own = loaded.model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], value) for key, value in state.items())


@pytest.mark.parametrize("kind", [{}, {"distilled": True}, {"representation_size": 24}])
def test_loads_the_names_of_timm_and_of_deits_releases(kind: dict[str, Any], tmp_path: Path) -> None:
    state = golden_state(tiny_vit(**kind))
    torch.save({"model": state}, tmp_path / "deit.pth")
    loaded = load(tiny_spec(**kind), tmp_path / "deit.pth")
    assert_same_weights(loaded, state)
    assert loaded.weights.report == {"loaded": len(state), "renamed": 0, "recomputed": 0, "resampled": 0}


@pytest.mark.parametrize("kind", [{}, {"representation_size": 24}, {"num_classes": 9}])
def test_loads_what_jax_saved(kind: dict[str, Any], tmp_path: Path) -> None:
    state = golden_state(tiny_vit(**kind))
    loaded = load(tiny_spec(**kind | {"num_classes": 5}), saved(to_jax(state), tmp_path))
    assert_same_weights(loaded, state)
    assert loaded.spec.config["num_classes"] == kind.get("num_classes", 5)
    assert loaded.weights.report == {"loaded": len(state), "renamed": len(state), "recomputed": 0, "resampled": 0}


@pytest.mark.parametrize(
    "name",
    [
        "cls",
        "embedding/kernel",
        "Transformer/posembed_input/pos_embedding",
        "Transformer/encoder_norm/scale",
        "Transformer/encoderblock_2/LayerNorm_2/bias",
        QUERY,
        "head/bias",
    ],
)
def test_an_array_that_jax_did_not_save_is_named(name: str, arrays: Arrays, tmp_path: Path) -> None:
    del arrays[name]
    assert f"the checkpoint lacks {name}\n" in refusal(saved(arrays, tmp_path))


def test_whatever_else_is_wrong_in_an_archive_is_named(arrays: Arrays, tmp_path: Path) -> None:
    path = saved({key: value for key, value in arrays.items() if not key.startswith("head/")}, tmp_path)
    assert "missing (2): head.weight, head.bias" in refusal(path)
    path = saved({key: value for key, value in arrays.items() if "encoderblock_0" not in key}, tmp_path)
    assert "lacks Transformer/encoderblock_0/LayerNorm_0/scale and 15 more arrays" in refusal(path)
    assert "unexpected (1): conv_root/kernel" in refusal(saved(arrays | {"conv_root/kernel": np.ones(2)}, tmp_path))
    message = refusal(saved(arrays | {QUERY: arrays[QUERY][:, :2]}, tmp_path))
    assert f"{QUERY}, " in message
    assert "have shapes [24, 2, 8], [24, 3, 8], [24, 3, 8]" in message
    assert "head.weight [5] instead of [5, 24]" in refusal(saved(arrays | {"head/kernel": np.ones(5)}, tmp_path))
    arrays["cls"][0, 0, 3] = np.nan
    assert "cls_token holds NaN" in refusal(saved(arrays, tmp_path))


def test_archives_that_cannot_be_read_are_refused(arrays: Arrays, tmp_path: Path) -> None:
    objects = saved({"cls": np.array([{}, None], dtype=object)}, tmp_path)
    assert "holds pickled code or objects (an array of objects)" in refusal(objects)
    whole = saved(arrays, tmp_path).read_bytes()
    for content in (b"", b"\x93NUMPY", whole[: len(whole) // 2], whole[:500] + b"damage" + whole[506:]):
        (tmp_path / "bad.npz").write_bytes(content)
        assert "bad.npz cannot be read as a checkpoint" in refusal(tmp_path / "bad.npz")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes.txt", "no array")
    (tmp_path / "bad.npz").write_bytes(buffer.getvalue())
    assert "cannot be read as a checkpoint" in refusal(tmp_path / "bad.npz")
    assert "no state dict" in refusal(saved({}, tmp_path))


@pytest.mark.parametrize(
    ("made_as", "loaded_as", "found", "remedy"),
    [
        ("vit_b_16_in21k", "vit_b_16", "a 768-channel representation layer (pre_logits)", "vit_b_16_in21k"),
        ("vit_b_16_augreg_in21k", "vit_b_16_in21k", "no representation layer (pre_logits)", "vit_b_16_augreg_in21k"),
        ("vit_l_32_in21k", "vit_l_32", "a 1024-channel representation layer (pre_logits)", "vit_l_32_in21k"),
        ("vit_b_16", "vit_b_16_in21k", "no representation layer (pre_logits)", "vit_b_16 or deit_b"),
        ("deit_b_distilled_384", "deit_b", "a distillation token", "deit_b_distilled_384"),
        ("deit_t", "deit_t_distilled", "no distillation token", "deit_t"),
        ("deit_s", "deit_t", "tokens of 384 channels", "deit_s"),
        ("vit_l_16", "vit_b_32", "patches of 16x16, tokens of 1024 channels, 24 blocks", "vit_l_16"),
    ],
)
def test_a_checkpoint_of_another_variant_names_that_variant(
    made_as: str, loaded_as: str, found: str, remedy: str
) -> None:
    with torch.device("meta"):
        state = build(resolve(made_as).spec).state_dict()
    with pytest.raises(UsageError, match=re.escape(f"the checkpoint has {found}\n")) as failure:
        check_geometry(adapt(resolve(loaded_as).spec, state).config, state)
    assert failure.value.hint == remedy


def test_where_no_variant_fits_the_message_says_what_differs(tmp_path: Path) -> None:
    path = saved(to_jax(golden_state(tiny_vit(representation_size=24))), tmp_path)
    message = refusal(path)
    assert "the checkpoint has a 24-channel representation layer (pre_logits)" in message
    assert "expected: no representation layer (pre_logits), as in the model" in message
    assert "deploycli list" in message


def test_a_checkpoint_without_head_and_representation_layer_lacks_both(tmp_path: Path) -> None:
    state = golden_state(tiny_vit())
    del state["head.weight"], state["head.bias"]
    torch.save(state, tmp_path / "weights.pth")
    message = refusal(tmp_path / "weights.pth", representation_size=24)
    assert "missing (4): pre_logits.fc.weight, pre_logits.fc.bias, head.weight, head.bias" in message


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("img_size", [(48, 48), (16, 16), (40, 24), (8, 128)])
def test_positions_are_resampled_as_timm_does_and_reported(
    distilled: bool, img_size: tuple[int, int], tmp_path: Path
) -> None:
    import_timm()
    from timm.layers import resample_abs_pos_embed

    state = golden_state(tiny_vit(distilled=distilled))
    torch.save(state, tmp_path / "weights.pth")
    loaded = load(tiny_spec(distilled=distilled, img_size=img_size), tmp_path / "weights.pth")
    grid = (img_size[0] // 8, img_size[1] // 8)
    expected = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=2 if distilled else 1)
    torch.testing.assert_close(loaded.model.state_dict()["pos_embed"], expected, rtol=0, atol=0)
    assert loaded.report.resampled == ("pos_embed",)
    assert loaded.weights.report["resampled"] == 1
    assert loaded.weights.report["loaded"] == len(state)
    assert loaded.model(torch.zeros(1, 3, *img_size)).shape == (1, 5)


def test_what_jax_saved_is_resampled_too(arrays: Arrays, tmp_path: Path) -> None:
    loaded = load(tiny_spec(img_size=(64, 64)), saved(arrays, tmp_path))
    assert loaded.weights.report == {"loaded": 44, "renamed": 44, "recomputed": 0, "resampled": 1}


def test_positions_of_an_oblong_image_fit_only_that_image(tmp_path: Path) -> None:
    state = golden_state(tiny_vit(img_size=(16, 40)))
    torch.save(state, tmp_path / "weights.pth")
    loaded = load(tiny_spec(img_size=(16, 40)), tmp_path / "weights.pth")
    assert_same_weights(loaded, state)
    assert loaded.report.resampled == ()
    message = refusal(tmp_path / "weights.pth")
    assert "images of 10 patches, which form no square" in message
    assert "expected: 4x4 patches" in message


def test_faults_of_the_positions_are_found_whatever_the_image_size() -> None:
    config = {**TINY, "distilled": False, "img_size": [64, 64]}
    assert resample(config, {}) == ({}, ())
    flat = {"pos_embed": torch.zeros(17)}
    assert resample(config, flat) == (flat, ())
    with pytest.raises(UsageError, match="0 patches"):
        resample(config, {"pos_embed": torch.zeros(1, 1, 24)})
    twice, _ = resample(config, {"pos_embed": torch.zeros(2, 17, 24)})
    assert twice["pos_embed"].shape == (2, 65, 24)  # which the strict load refuses by its shape
    broken = torch.zeros(1, 17, 24)
    broken[0, 9, 3] = torch.nan
    assert not resample(config, {"pos_embed": broken})[0]["pos_embed"].isfinite().all()


def test_an_image_size_that_the_patches_do_not_tile_is_refused_before_resampling(tmp_path: Path) -> None:
    torch.save(golden_state(tiny_vit()), tmp_path / "weights.pth")
    assert "patches of 8x8 pixels do not tile it" in refusal(tmp_path / "weights.pth", img_size=(4, 4))


def test_a_model_of_384_takes_a_checkpoint_of_224() -> None:
    with torch.device("meta"):
        state = build(resolve("deit_t").spec).state_dict()
    check_geometry(configure(resolve("deit_t"), img_size=384).spec.config, state)
