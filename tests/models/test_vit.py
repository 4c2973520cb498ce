"""ViT and DeiT against the original outputs, two other implementations, and the definition."""

from typing import Any

import pytest
import torch

from deploycli.models.build import build
from deploycli.models.errors import UsageError
from deploycli.models.registry import configure, resolve, variants
from deploycli.models.variants import Variant
from deploycli.models.vit import VisionTransformer
from tests.models.swins import golden_state
from tests.models.vits import TINY, tiny_vit
from tests.peers import import_timm, import_transformers
from tests.weights import TOLERANCE, golden_image

VITS = [v for v in variants() if v.spec.family == "vit"]


def images(batch: int = 2) -> torch.Tensor:
    return torch.from_numpy(golden_image((batch, 3, 32, 32)))


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_equals_timm_under_the_same_weights(distilled: bool, qkv_bias: bool) -> None:
    timm = import_timm()
    kind = timm.models.deit.VisionTransformerDistilled if distilled else timm.models.VisionTransformer
    theirs = kind(**TINY, qkv_bias=qkv_bias).eval()
    ours = tiny_vit(distilled=distilled, qkv_bias=qkv_bias)
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(ours(images()), theirs(images()), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("distilled", [False, True])
def test_equals_hugging_face_under_the_same_weights(distilled: bool) -> None:
    transformers = import_transformers()
    settings = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    settings |= {"intermediate_size": 96, "num_labels": 5, "layer_norm_eps": 1e-6, "attn_implementation": "eager"}
    if distilled:
        theirs = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**settings)).eval()
    else:
        theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**settings)).eval()
    ours = tiny_vit(distilled=distilled)
    theirs.load_state_dict(to_hugging_face_names(golden_state(ours)))
    with torch.inference_mode():
        torch.testing.assert_close(ours(images()), theirs(images()).logits, rtol=0, atol=TOLERANCE)


def to_hugging_face_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    distilled = "dist_token" in state
    root = "deit" if distilled else "vit"
    starts = {
        "cls_token": f"{root}.embeddings.cls_token",
        "dist_token": f"{root}.embeddings.distillation_token",
        "pos_embed": f"{root}.embeddings.position_embeddings",
        "patch_embed.proj.": f"{root}.embeddings.patch_embeddings.projection.",
        "blocks.": f"{root}.layers.",
        "norm.": f"{root}.layernorm.",
        "head.": "cls_classifier." if distilled else "classifier.",
        "head_dist.": "distillation_classifier.",
    }
    inner = {".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.", ".attn.proj.": ".attention.o_proj."}
    renamed = {}
    for key, value in state.items():
        start = next(s for s in starts if key.startswith(s))
        name = starts[start] + key.removeprefix(start)
        for ours, theirs in inner.items():
            name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = rows
        else:
            renamed[name] = value
    return renamed


@pytest.mark.parametrize("variant", VITS, ids=lambda v: v.name)
def test_every_variant_equals_timms_in_parameters_and_shapes(variant: Variant) -> None:
    timm = import_timm()
    dim, classes = variant.spec.config["embed_dim"], variant.spec.config["num_classes"]
    with torch.device("meta"):
        ours = build(variant.spec)
        theirs = timm.create_model(variant.aliases[0].partition(".")[0].removesuffix("_in21k"), num_classes=classes)
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    if "representation layer" in variant.summary:  # which timm has given up
        shapes |= {"pre_logits.fc.weight": (dim, dim), "pre_logits.fc.bias": (dim,)}
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == shapes
    assert (classes == 21843) == variant.name.endswith("in21k")


@pytest.mark.parametrize("variant", [v for v in VITS if not v.pretrained], ids=lambda v: v.name)
def test_preprocessing_of_models_that_the_hub_lacks_is_that_of_their_relatives(variant: Variant) -> None:
    assert variant.preprocessing == resolve("vit_b_16").preprocessing


def test_attention_is_as_defined() -> None:
    """One head at a time, one query at a time."""
    attention = tiny_vit().blocks[0].attn
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    expected = torch.empty_like(x)
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        for i in range(17):
            scores = (k[..., part] @ q[:, i, part, None]).squeeze(-1) / 8**0.5  # [B, N]
            expected[:, i, part] = (scores.softmax(-1)[..., None] * v[..., part]).sum(1)
    torch.testing.assert_close(attention(x), attention.proj(expected), rtol=1e-4, atol=1e-5)


def test_the_class_token_comes_first_then_the_distillation_token_then_the_patches() -> None:
    model = tiny_vit(distilled=True)
    weights = model.state_dict()
    tokens, patches = model.embed(images()) - weights["pos_embed"], model.patch_embed(images())
    assert tokens.shape == (2, 18, 24)
    for token, name in enumerate(("cls_token", "dist_token")):
        torch.testing.assert_close(tokens[:, token], weights[name][:, 0].expand(2, -1))
    torch.testing.assert_close(tokens[:, 2:], patches)


def test_the_representation_layer_stands_between_norm_and_head() -> None:
    plain, model = tiny_vit(), tiny_vit(representation_size=7)
    assert set(model.state_dict()) - set(plain.state_dict()) == {"pre_logits.fc.weight", "pre_logits.fc.bias"}
    features = []
    model.norm.register_forward_hook(lambda _module, _inputs, x: features.append(x))
    logits = model(images())
    weights = model.state_dict()
    layer = torch.tanh(features[0][:, 0] @ weights["pre_logits.fc.weight"].T + weights["pre_logits.fc.bias"])
    torch.testing.assert_close(logits, layer @ weights["head.weight"].T + weights["head.bias"])
    with pytest.raises(UsageError, match="distilled model with a representation layer"):
        tiny_vit(representation_size=7, distilled=True)


def test_a_distilled_model_gives_both_heads_in_training_and_their_mean_in_evaluation() -> None:
    model = tiny_vit(distilled=True)
    mean = model(images())
    of_class, of_teacher = model.train()(images())
    assert of_class.shape == of_teacher.shape == mean.shape == (2, 5)
    assert not torch.allclose(of_class, of_teacher)
    torch.testing.assert_close(mean, (of_class + of_teacher) / 2)


@pytest.mark.parametrize("kind", [{}, {"representation_size": 7}, {"distilled": True}])
def test_can_be_trained(kind: dict[str, Any]) -> None:
    model = tiny_vit(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2, **kind).train()
    logits = model(images(5))
    loss = torch.nn.functional.cross_entropy(sum(logits) if isinstance(logits, tuple) else logits, torch.arange(5))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_stochastic_depth_grows_evenly_over_the_blocks() -> None:
    drops = [block.drop_path for block in tiny_vit(drop_path_rate=0.2).blocks]
    assert isinstance(drops[0], torch.nn.Identity)
    assert [drop.rate for drop in drops[1:]] == pytest.approx([0.1, 0.2])


def test_qk_scale_replaces_the_default_scale() -> None:
    with torch.inference_mode():
        assert torch.equal(tiny_vit()(images()), tiny_vit(qk_scale=8**-0.5)(images()))
        assert not torch.allclose(tiny_vit()(images()), tiny_vit(qk_scale=0.1)(images()))


def test_every_norm_has_the_papers_epsilon() -> None:
    assert {m.eps for m in tiny_vit().modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_images_need_not_be_square() -> None:
    model = tiny_vit(img_size=(16, 32))
    assert model(torch.randn(2, 3, 16, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"\(32, 16\)"):
        model(torch.randn(2, 3, 32, 16))


@pytest.mark.parametrize(("img_size", "remedy"), [(225, "224"), ((224, 230), "224x240"), (8, "16")])
def test_a_size_that_the_patches_do_not_tile_is_refused_with_those_that_they_do(img_size: Any, remedy: str) -> None:
    with pytest.raises(UsageError, match="patches of 16x16 pixels do not tile it") as failure:
        build(configure(resolve("vit_b_16"), img_size=img_size).spec)
    assert remedy in failure.value.hint
    assert "multiples of 16" in failure.value.expected


def test_samples_of_a_batch_do_not_meet() -> None:
    model, batch = tiny_vit(), images(3)
    with torch.inference_mode():
        alone = torch.cat([model(image[None]) for image in batch])
        torch.testing.assert_close(model(batch), alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("distilled", [False, True])
def test_the_batch_stays_symbolic_under_export(distilled: bool) -> None:
    model = tiny_vit(distilled=distilled)
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    torch.testing.assert_close(program.module()(images(5)), model(images(5)), rtol=0, atol=TOLERANCE)


def test_fresh_tokens_and_positions_are_not_zero() -> None:
    model = VisionTransformer(**TINY, distilled=True)
    for name in ("cls_token", "dist_token", "pos_embed"):
        assert 0.01 < model.state_dict()[name].std() < 0.03
