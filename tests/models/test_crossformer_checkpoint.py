"""Checkpoints of CrossFormer: what loads, and what is refused with a remedy."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deploycli.models.checkpoint import Loaded, load
from deploycli.models.errors import UsageError
from deploycli.models.spec import ModelSpec
from tests.models.crossformers import tiny_crossformer, tiny_crossformer_pp, tiny_spec, tiny_spec_pp

State = dict[str, torch.Tensor]


@pytest.fixture
def official() -> State:
    """The learned weights and the derived buffers, as the authors' files hold them."""
    return {key: value.clone() for key, value in tiny_crossformer().state_dict().items()}


def saved(state: State, tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    return path


def refusal(spec: ModelSpec, path: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as failure:
        load(spec, path, **options)
    return str(failure.value)


def assert_same_weights(loaded: Loaded, state: State) -> None:
    own = dict(loaded.model.named_parameters())
    assert own
    assert all(torch.equal(own[key], state[key]) for key in own)


def test_buffers_are_recomputed_and_not_copied(official: State, tmp_path: Path) -> None:
    loaded = load(tiny_spec(), saved(official, tmp_path))
    assert_same_weights(loaded, official)
    assert len(loaded.report.recomputed) == 2 * 6  # two in each block
    assert len(loaded.report.loaded) == len(official) - 2 * 6


def test_buffers_may_be_absent(official: State, tmp_path: Path) -> None:
    learned = dict(tiny_crossformer().named_parameters())
    loaded = load(tiny_spec(), saved({key: learned[key].detach() for key in learned}, tmp_path))
    assert_same_weights(loaded, official)
    assert loaded.report.recomputed == ()


def test_weights_fit_another_image_size_with_the_same_groups(official: State, tmp_path: Path) -> None:
    loaded = load(tiny_spec(img_size=(128, 64)), saved(official, tmp_path))
    assert_same_weights(loaded, official)
    assert loaded.model(torch.randn(1, 3, 128, 64)).shape == (1, 5)


def test_other_groups_are_refused_with_the_size_they_need(official: State, tmp_path: Path) -> None:
    message = refusal(tiny_spec(group_size=4), saved(official, tmp_path))
    assert "made for groups of 8" in message
    assert "expected: groups of 4" in message
    assert "group_size=8" in message


def test_groups_that_shrank_to_their_map_tell_the_image_size(tmp_path: Path) -> None:
    shrunk = dict(tiny_crossformer(img_size=(32, 32)).state_dict())
    message = refusal(tiny_spec(), saved(shrunk, tmp_path))
    assert "made for groups of 8 and images of 32x32" in message
    assert "expected: groups of 8 and images of 64x64" in message
    assert "group_size=8, img_size=32" in message
    load(tiny_spec(img_size=(32, 32)), saved(shrunk, tmp_path))


def test_another_index_is_refused(official: State, tmp_path: Path) -> None:
    key = "layers.0.blocks.1.attn.relative_position_index"
    official[key] = official[key].transpose(0, 1)
    assert f"other values of derived buffers (1): {key}" in refusal(tiny_spec(), saved(official, tmp_path))


def test_a_missing_and_an_unexpected_key_are_refused(official: State, tmp_path: Path) -> None:
    official["layers.0.blocks.0.attn.pos.pos4.0.weight"] = official.pop("layers.0.blocks.0.attn.pos.pos3.0.weight")
    message = refusal(tiny_spec(), saved(official, tmp_path))
    assert "missing (1): layers.0.blocks.0.attn.pos.pos3.0.weight" in message
    assert "unexpected (1): layers.0.blocks.0.attn.pos.pos4.0.weight" in message


def test_the_number_of_classes_is_the_files(tmp_path: Path) -> None:
    path = saved(dict(tiny_crossformer(num_classes=7).state_dict()), tmp_path)
    assert load(tiny_spec(), path).spec.config["num_classes"] == 7
    assert "has 7 classes" in refusal(tiny_spec(), path, num_classes=5)


def test_weights_of_the_successor_fit_any_image_and_group_size(tmp_path: Path) -> None:
    state = dict(tiny_crossformer_pp().state_dict())
    loaded = load(tiny_spec_pp(img_size=(64, 48), group_size=[5, 5, 5]), saved(state, tmp_path))
    assert_same_weights(loaded, state)


def test_the_families_are_not_mistaken_for_each_other(official: State, tmp_path: Path) -> None:
    assert "unexpected" in refusal(tiny_spec(depths=[2, 4, 2]), saved(tiny_crossformer_pp().state_dict(), tmp_path))
    assert "missing" in refusal(tiny_spec_pp(), saved(official, tmp_path))
