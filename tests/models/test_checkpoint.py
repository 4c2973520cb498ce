"""What a checkpoint may look like, and what is refused."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deploycli.models.build import build, family
from deploycli.models.checkpoint import Loaded, load
from deploycli.models.checkpoint_file import read_weights
from deploycli.models.errors import UsageError
from deploycli.models.files import sha256_of
from deploycli.models.registry import resolve
from deploycli.models.swin import translate
from tests.models.swins import DERIVED, golden_state, tiny_spec, tiny_swin, to_timm_names

State = dict[str, torch.Tensor]


@pytest.fixture
def official() -> State:
    """The learned weights and the derived buffers, as the authors' files hold them."""
    return {key: value.clone() for key, value in tiny_swin().state_dict().items()}


def learned(state: State) -> State:
    return {key: value for key, value in state.items() if not key.endswith(DERIVED)}


def assert_same_weights(loaded: Loaded, state: State) -> None:
    own = loaded.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in learned(state).items())
    assert not loaded.model.training


def refusal(path: Path, *, num_classes: int | None = None, **changes: Any) -> str:
    with pytest.raises(UsageError) as failure:
        load(tiny_spec(**changes), path, num_classes=num_classes)
    assert failure.value.exit_code == 2
    return str(failure.value)


def saved(content: object, tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_ema": state},
        lambda state: state,
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    ],
    ids=["model", "state_dict", "model_ema", "bare", "module.", "compiled"],
)
def test_loads_what_training_scripts_save(wrap: Any, official: State, tmp_path: Path) -> None:
    path = saved(wrap(official), tmp_path)
    loaded = load(tiny_spec(), path)
    assert_same_weights(loaded, official)
    counts = loaded.report.counts()
    assert counts["loaded"] == len(learned(official))
    assert counts["recomputed"] == len(official) - len(learned(official))
    assert counts["renamed"] in (0, len(official))
    assert loaded.weights.report == counts
    assert (loaded.weights.source, loaded.weights.path) == ("checkpoint", str(path))
    assert loaded.weights.sha256 == sha256_of(path)


def test_loads_timms_names_from_safetensors(official: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in to_timm_names(official).items()}, path)
    loaded = load(tiny_spec(), path, source="pretrained", origin="timm/x@abc/model.safetensors")
    assert_same_weights(loaded, official)
    assert set(loaded.report.renamed) == {key for key in official if "downsample" in key or key.startswith("head.")}
    assert loaded.report.recomputed == ()
    assert (loaded.weights.source, loaded.weights.path) == ("pretrained", "timm/x@abc/model.safetensors")


def test_loads_the_format_of_old_pytorch(official: State, tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"model": official}, path, _use_new_zipfile_serialization=False)
    assert_same_weights(load(tiny_spec(), path), official)


def test_half_precision_becomes_single(official: State, tmp_path: Path) -> None:
    halves = {key: value.half() if value.is_floating_point() else value for key, value in official.items()}
    loaded = load(tiny_spec(), saved({"model": halves}, tmp_path))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert_same_weights(loaded, {key: value.float() for key, value in learned(halves).items()})


def test_the_file_is_mapped_and_not_kept(official: State, tmp_path: Path) -> None:
    path = saved({"model": official}, tmp_path)
    loaded = load(tiny_spec(), path)
    storages = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    assert storages.isdisjoint(value.untyped_storage().data_ptr() for value in read_weights(path).tensors.values())
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same_weights(loaded, official)


def test_the_number_of_classes_is_the_files(tmp_path: Path) -> None:
    path = saved(golden_state(tiny_swin(num_classes=7)), tmp_path)
    loaded = load(tiny_spec(num_classes=5), path)
    assert loaded.spec.config["num_classes"] == 7
    assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert load(tiny_spec(), path, num_classes=7).spec == loaded.spec
    assert "head has 7 classes" in refusal(path, num_classes=5)


@pytest.mark.parametrize("keep_derived", [True, False])
def test_another_window_is_refused_with_the_one_it_needs(keep_derived: bool, tmp_path: Path) -> None:
    state = tiny_swin(window_size=4, img_size=(32, 32)).state_dict()
    message = refusal(saved(state if keep_derived else learned(state), tmp_path))
    assert "made for a window of 4" in message
    assert "--window-size 4" in message
    assert ("32x32" in message) == keep_derived  # the last map is as large as the window: only a mask tells


def test_another_image_size_is_refused_with_the_one_it_needs(tmp_path: Path) -> None:
    with_masks = saved(tiny_swin(img_size=(128, 128)).state_dict(), tmp_path)
    assert "images of 128x128" in refusal(with_masks)
    shrunk = saved(golden_state(tiny_swin(img_size=(32, 32))), tmp_path)
    assert "--img-size 32" in refusal(shrunk)
    embedded = saved(golden_state(tiny_swin(img_size=(128, 128), ape=True)), tmp_path)
    assert "images of 128x128" in refusal(embedded, ape=True)
    oblong = saved(tiny_swin(img_size=(64, 128)).state_dict(), tmp_path)
    assert "images of 2048 patches" in refusal(oblong)


def test_swin_b_at_384_is_not_swin_b_at_224(tmp_path: Path) -> None:
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    state = {table: torch.zeros(23**2, 4), "layers.0.blocks.1.attn_mask": torch.zeros(64, 144, 144)}
    with pytest.raises(UsageError, match="window of 12 and images of 384x384"):
        load(resolve("swin_b").spec, saved(state, tmp_path))


def test_missing_and_unexpected_keys_are_named_in_one_message(official: State, tmp_path: Path) -> None:
    del official["norm.weight"], official["layers.0.blocks.0.mlp.fc1.bias"]
    official["extra.weight"] = torch.zeros(1)
    message = refusal(saved(official, tmp_path))
    assert "missing (2): layers.0.blocks.0.mlp.fc1.bias, norm.weight" in message
    assert "unexpected (1): extra.weight" in message


def test_a_headless_checkpoint_says_so(official: State, tmp_path: Path) -> None:
    del official["head.weight"], official["head.bias"]
    assert "missing (2): head.weight, head.bias" in refusal(saved(official, tmp_path))


def test_another_model_is_refused_by_its_shapes(tmp_path: Path) -> None:
    message = refusal(saved(tiny_swin(embed_dim=16).state_dict(), tmp_path))
    assert "patch_embed.proj.weight [16, 3, 2, 2] instead of [8, 3, 2, 2]" in message


def test_a_name_that_is_there_twice_is_not_overwritten(official: State, tmp_path: Path) -> None:
    official["head.fc.weight"] = torch.zeros_like(official["head.weight"])
    assert "unexpected (1): head.fc.weight" in refusal(saved(official, tmp_path))


def test_derived_buffers_must_be_the_models_own(official: State, tmp_path: Path) -> None:
    official["layers.0.blocks.1.attn_mask"][0, 0, 1] = -50
    assert "derived buffers (1): layers.0.blocks.1.attn_mask" in refusal(saved(official, tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, official: State, tmp_path: Path) -> None:
    official["layers.1.blocks.0.mlp.fc2.weight"][3, 4] = value
    assert "layers.1.blocks.0.mlp.fc2.weight holds NaN or infinity" in refusal(saved(official, tmp_path))


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    in_a_zip = saved({"model": Exploit()}, tmp_path)
    assert "pickled code or objects (posix.mkdir)" in refusal(in_a_zip)
    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickle.dumps({"model": Exploit()}, protocol=2))
    assert "pickled code" in refusal(bare)
    bare.write_bytes(pickle.dumps({"model": Exploit()}))
    assert "cannot be read as a checkpoint (not what torch.save writes)" in refusal(bare)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_files_are_refused(suffix: str, share: float, official: State, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": official}, path)
    else:
        save_file({key: value.contiguous() for key, value in official.items()}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert f"{path} cannot be read as a checkpoint" in refusal(path)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    assert "no checkpoint at" in refusal(tmp_path / "absent.pth")
    assert "no checkpoint at" in refusal(tmp_path)
    text = tmp_path / "text.pth"
    text.write_text("hello")
    assert "cannot be read" in refusal(text)
    for content in ({"epoch": 3}, [1, 2], {"model": {}}, torch.zeros(3)):
        assert "no state dict" in refusal(saved(content, tmp_path))


def test_timms_older_releases_renamed_only_the_head() -> None:
    state = {key: torch.zeros(1) for key in ("layers.0.downsample.norm.weight", "head.fc.bias")}
    translated, renamed = translate(state)
    assert set(translated) == {"layers.0.downsample.norm.weight", "head.bias"}
    assert renamed == {"head.fc.bias": "head.bias"}


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown model family 'vgg'"):
        family("vgg")


def test_load_gives_what_build_gives_with_those_weights(official: State, tmp_path: Path) -> None:
    model = build(tiny_spec(), seed=3)
    model.load_state_dict(official)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(load(tiny_spec(), saved(official, tmp_path)).model(images), model(images))
