"""The Swin Transformer against independent definitions, the authors' outputs, and two other implementations."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycli.models.build import build
from deploycli.models.errors import UsageError
from deploycli.models.layers import DropPath, drop_path_rates, misfit
from deploycli.models.registry import configure, resolve, variants
from deploycli.models.spec import ModelSpec
from deploycli.models.swin import (
    SwinTransformer,
    relative_position_index,
    shifted_window_mask,
    window_partition,
    window_reverse,
)
from tests.models.swins import golden_state, tiny_spec, tiny_swin, to_timm_names
from tests.peers import import_timm, import_transformers
from tests.weights import TOLERANCE, golden_image


def spec_of(name: str, **changes: Any) -> ModelSpec:
    return configure(resolve(name), **changes).spec


def test_equals_timm_under_the_same_weights() -> None:
    timm = import_timm()
    ours = build(spec_of("swin_t"))
    state = golden_state(ours)
    ours.load_state_dict(state, strict=False)
    theirs = timm.create_model("swin_tiny_patch4_window7_224").eval()
    theirs.load_state_dict(to_timm_names(state))
    images = torch.from_numpy(golden_image((2, 3, 224, 224)))
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=TOLERANCE)


def test_equals_hugging_face_under_the_same_weights() -> None:
    transformers = import_transformers()
    config = transformers.SwinConfig(num_labels=10, attn_implementation="eager", image_size=224, depths=[2, 2, 6, 2])
    theirs = transformers.SwinForImageClassification(config).eval()
    ours = build(spec_of("swin_t", num_classes=10))
    state = golden_state(ours)
    ours.load_state_dict(state, strict=False)
    theirs.load_state_dict(to_hugging_face_names(state))
    images = torch.from_numpy(golden_image((2, 3, 224, 224)))
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=0, atol=TOLERANCE)


def to_hugging_face_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts = {
        "patch_embed.proj.": "swin.embeddings.patch_embeddings.projection.",
        "patch_embed.norm.": "swin.embeddings.norm.",
        "layers.": "swin.encoder.layers.",
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
        ".attn.relative_position_bias_table": ".attention.relative_position_bias.relative_position_bias_table",
        ".attn.proj.": ".attention.o_proj.",
        "head.": "classifier.",
    }
    renamed = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                name = key.replace(".attn.qkv.", f".attention.{part}_proj.")
                renamed[name.replace("layers.", "swin.encoder.layers.")] = rows
            continue
        name = f"swin.layernorm.{key.removeprefix('norm.')}" if key.startswith("norm.") else key
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("variant", [v for v in variants() if v.spec.family == "swin"], ids=lambda v: v.name)
def test_every_variant_equals_timms_in_parameters_and_shapes(variant: Any) -> None:
    timm = import_timm()
    tag = variant.pretrained.repo.removeprefix("timm/")
    with torch.device("meta"):
        ours = build(variant.spec)
        theirs = timm.create_model(tag, num_classes=timm.get_pretrained_cfg(tag).num_classes)
    shapes = {key: value.shape for key, value in to_timm_names(dict(ours.state_dict())).items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_reverse_undoes_partition(batch: int, rows: int, columns: int, window: int, channels: int) -> None:
    x = torch.randn(batch, rows * window, columns * window, channels)
    windows = window_partition(x, window)
    assert windows.shape == (batch * rows * columns, window, window, channels)
    torch.testing.assert_close(window_reverse(windows, window, rows * window, columns * window), x, rtol=0, atol=0)


def test_windows_are_numbered_row_by_row() -> None:
    x = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    windows = window_partition(x, 2)
    expected = [
        [[[x[b, 2 * i + r, 2 * j + c].item()] for c in range(2)] for r in range(2)]
        for b, i, j in itertools.product(range(2), range(2), range(3))
    ]
    assert windows.tolist() == expected


@pytest.mark.parametrize("window", [1, 2, 5, 7])
def test_index_counts_offsets_row_by_row(window: int) -> None:
    index = relative_position_index(window)
    tokens = list(itertools.product(range(window), range(window)))
    offsets = list(itertools.product(range(1 - window, window), range(1 - window, window)))
    for (i, (qi, qj)), (j, (ki, kj)) in itertools.product(enumerate(tokens), enumerate(tokens)):
        assert offsets[index[i, j]] == (qi - ki, qj - kj)


@pytest.mark.parametrize(
    ("resolution", "window", "shift"), [((8, 8), 4, 2), ((14, 14), 7, 3), ((6, 9), 3, 1), ((4, 6), 2, 1)]
)
def test_mask_separates_tokens_that_the_shift_brought_together(
    resolution: tuple[int, int], window: int, shift: int
) -> None:
    """A pair may attend exactly if it lies in one window before the cyclic wrap-around, that is, in the plane."""
    height, width = resolution
    mask = shifted_window_mask(resolution, window, shift)
    assert mask.dtype == torch.float32
    for w, (row, column) in enumerate(itertools.product(range(0, height, window), range(0, width, window))):
        cells = [(row + i, column + j) for i in range(window) for j in range(window)]
        # Before the roll by -shift, position p held what now stands at p - shift; beyond the border it wrapped around.
        wrapped = [((i + shift) // height, (j + shift) // width) for i, j in cells]
        for (a, wrap_a), (b, wrap_b) in itertools.product(enumerate(wrapped), enumerate(wrapped)):
            assert mask[w, a, b] == (0.0 if wrap_a == wrap_b else -100.0)


def test_a_shifted_block_attends_as_defined() -> None:
    """A shifted block, written token by token: who attends to whom, with which bias."""
    block = tiny_swin().layers[0].blocks[1]
    (height, width), window, shift, heads = block.resolution, block.window_size, block.shift_size, block.attn.num_heads
    assert (window, shift) == (8, 4)
    x = torch.randn(2, height * width, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = block.attn.qkv(x).view(2, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    token = torch.arange(height * width)
    rows, columns = token // width, token % width
    # Windows of the plane, shifted by (shift, shift); those at the upper and left border are cut off.
    home = (rows - shift).div(window, rounding_mode="floor") * 100 + (columns - shift).div(
        window, rounding_mode="floor"
    )
    together = home[:, None] == home[None, :]
    offset_rows = (rows[:, None] - rows[None, :]).clamp(1 - window, window - 1) + window - 1
    offset_columns = (columns[:, None] - columns[None, :]).clamp(1 - window, window - 1) + window - 1
    bias = block.attn.relative_position_bias_table[offset_rows * (2 * window - 1) + offset_columns]
    scores = q @ k.transpose(-2, -1) * block.attn.head_dim**-0.5 + bias.permute(2, 0, 1)
    attention = scores.masked_fill(~together, float("-inf")).softmax(-1)
    expected = block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block.window_attention(x), expected, rtol=1e-4, atol=1e-5)


def test_the_window_shrinks_and_the_shift_drops_on_a_small_map() -> None:
    model = tiny_swin()
    geometry = [[(b.resolution, b.window_size, b.shift_size) for b in layer.blocks] for layer in model.layers]
    assert geometry == [
        [((32, 32), 8, 0), ((32, 32), 8, 4)],
        [((16, 16), 8, 0), ((16, 16), 8, 4)],
        [((8, 8), 8, 0), ((8, 8), 8, 0)],  # not larger than the window
    ]
    shrunk = tiny_swin(img_size=(32, 32))
    assert [(b.window_size, b.shift_size, b.attn_mask) for b in shrunk.layers[2].blocks] == [(4, 0, None)] * 2


def test_stochastic_depth_grows_evenly_over_all_blocks() -> None:
    model = tiny_swin(drop_path_rate=0.5)
    drops = [block.drop_path for layer in model.layers for block in layer.blocks]
    assert isinstance(drops[0], torch.nn.Identity)
    assert [d.rate for d in drops[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert drop_path_rates(0.3, 1) == [0.0]


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    drop = DropPath(0.25).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = drop(torch.ones(4000, 2, 3))
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (out == out[:, :1, :1]).all()
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    x = torch.randn(2, 3)
    assert drop.eval()(x) is x


def test_can_be_trained() -> None:
    model = tiny_swin(ape=True, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2).train()
    images = torch.randn(4, 3, 64, 64)
    torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    dropouts = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert dropouts == {0.1}


def test_options_change_the_parameters_as_named() -> None:
    plain = set(tiny_swin().state_dict())
    assert set(tiny_swin(ape=True).state_dict()) - plain == {"absolute_pos_embed"}
    assert tiny_swin(patch_norm=False)(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    assert plain - set(tiny_swin(patch_norm=False).state_dict()) == {"patch_embed.norm.weight", "patch_embed.norm.bias"}
    lost = plain - set(tiny_swin(qkv_bias=False).state_dict())
    assert len(lost) == 6
    assert all(key.endswith("attn.qkv.bias") for key in lost)


def test_qk_scale_replaces_the_default_scale() -> None:
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(tiny_swin()(images), tiny_swin(qk_scale=8**-0.5)(images))
        assert not torch.allclose(tiny_swin()(images), tiny_swin(qk_scale=0.1)(images))


def test_absolute_position_embedding_is_added_to_the_patches() -> None:
    model = tiny_swin(ape=True)
    images = torch.randn(1, 3, 64, 64)
    tokens = model.patch_embed(images) + model.state_dict()["absolute_pos_embed"]
    for layer in model.layers:
        tokens = layer(tokens)
    torch.testing.assert_close(model(images), model.head(model.norm(tokens).mean(1)))


def test_images_need_not_be_square() -> None:
    model = tiny_swin(img_size=(32, 64), window_size=4)
    assert model(torch.randn(2, 3, 32, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"\(64, 32\)"):
        model(torch.randn(2, 3, 64, 32))


def test_samples_of_a_batch_do_not_meet() -> None:
    model, images = tiny_swin(), torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, rtol=0, atol=TOLERANCE)


def test_the_batch_stays_symbolic_under_export() -> None:
    program = torch.export.export(
        tiny_swin(), (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
    )
    images = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(images), tiny_swin()(images), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "remedies"),
    [
        ({"img_size": 256}, ["224 or 448", "--window-size 4 or 8"]),
        ({"img_size": 384}, ["224 or 448", "12"]),
        ({"window_size": 8}, ["256", "--window-size 7"]),
        ({"img_size": (224, 300)}, ["224x448"]),
        ({"img_size": 226}, ["224"]),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_those_that_do(changes: dict[str, Any], remedies: list[str]) -> None:
    with pytest.raises(UsageError) as failure:
        build(spec_of("swin_t", **changes))
    for remedy in remedies:
        assert remedy in failure.value.hint


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 4))
def test_a_size_fits_exactly_if_a_model_of_it_runs(height: int, width: int, window: int, stages: int) -> None:
    config = {"img_size": (height, width), "patch_size": 2, "embed_dim": 1, "num_heads": [1] * stages}
    config |= {"depths": [1] * stages, "window_size": window, "num_classes": 1}
    if misfit((height, width), 2, window, stages):
        with pytest.raises(UsageError):
            SwinTransformer(**config)
    else:
        assert SwinTransformer(**config)(torch.randn(1, 3, height, width)).shape == (1, 1)


def test_random_weights_follow_the_seed_and_leave_the_global_state() -> None:
    before = torch.random.get_rng_state()
    first, again, other = build(tiny_spec()), build(tiny_spec(), seed=0), build(tiny_spec(), seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not first.training
    weights = [dict(m.named_parameters()) for m in (first, again, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])
