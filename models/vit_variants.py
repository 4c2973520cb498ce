"""The named Vision Transformers and DeiTs. A new variant is one registered function."""

from typing import Any

from deploycli.models.registry import Design, HubFile, register
from deploycli.models.spec import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

IMAGENET_21K = 21843  # classes of the ImageNet-21k heads
HALF = (0.5, 0.5, 0.5)  # Google's mean and standard deviation: pixels from -1 to 1

_AT_384 = {"img_size": [384, 384]}


def _vit(embed_dim: int, depth: int, num_heads: int, *, google: bool = True, **changes: Any) -> Design:
    """A ViT (https://arxiv.org/abs/2010.11929, table 1) or DeiT; by default at 224x224 with 1000 classes."""
    config = {
        "img_size": [224, 224],
        "patch_size": 16,
        "in_chans": 3,
        "num_classes": 1000,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "qk_scale": None,
        "representation_size": None,
        "distilled": False,
        **changes,
    }
    height, width = config["img_size"]
    recipe = Preprocessing(
        size=(height, width),
        # At 224 the evaluation crops the centre nine tenths; the 384 models were tuned on the whole shorter side.
        crop_pct=1.0 if height == 384 else 0.9,
        mean=HALF if google else IMAGENET_MEAN,
        std=HALF if google else IMAGENET_STD,
    )
    return Design("vit", config, recipe)


def _vit_base(**changes: Any) -> Design:
    return _vit(768, 12, 12, **changes)


def _vit_large(**changes: Any) -> Design:
    return _vit(1024, 24, 16, **changes)


def _vit_huge(**changes: Any) -> Design:
    return _vit(1280, 32, 16, patch_size=14, **changes)


def _deit_tiny(**changes: Any) -> Design:
    return _vit(192, 12, 3, google=False, **changes)


def _deit_small(**changes: Any) -> Design:
    return _vit(384, 12, 6, google=False, **changes)


def _deit_base(**changes: Any) -> Design:
    return _vit(768, 12, 12, google=False, **changes)


@register("vit_base_patch16_224", pretrained=HubFile("timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"))
def vit_b_16() -> Design:
    """ViT-B/16, 224x224, ImageNet-21k then 1k."""
    return _vit_base()


@register("vit_base_patch32_224", pretrained=HubFile("timm/vit_base_patch32_224.augreg_in21k_ft_in1k"))
def vit_b_32() -> Design:
    """ViT-B/32, 224x224, ImageNet-21k then 1k."""
    return _vit_base(patch_size=32)


@register("vit_large_patch16_224", pretrained=HubFile("timm/vit_large_patch16_224.augreg_in21k_ft_in1k"))
def vit_l_16() -> Design:
    """ViT-L/16, 224x224, ImageNet-21k then 1k."""
    return _vit_large()


@register("vit_large_patch32_224")
def vit_l_32() -> Design:
    """ViT-L/32, 224x224, 1000 classes."""
    return _vit_large(patch_size=32)


@register("vit_huge_patch14_224")
def vit_h_14() -> Design:
    """ViT-H/14, 224x224, 1000 classes."""
    return _vit_huge()


@register("vit_base_patch16_384", pretrained=HubFile("timm/vit_base_patch16_384.augreg_in21k_ft_in1k"))
def vit_b_16_384() -> Design:
    """ViT-B/16, 384x384, ImageNet-21k then 1k."""
    return _vit_base(**_AT_384)


@register("vit_base_patch32_384", pretrained=HubFile("timm/vit_base_patch32_384.augreg_in21k_ft_in1k"))
def vit_b_32_384() -> Design:
    """ViT-B/32, 384x384, ImageNet-21k then 1k."""
    return _vit_base(patch_size=32, **_AT_384)


@register("vit_large_patch16_384", pretrained=HubFile("timm/vit_large_patch16_384.augreg_in21k_ft_in1k"))
def vit_l_16_384() -> Design:
    """ViT-L/16, 384x384, ImageNet-21k then 1k."""
    return _vit_large(**_AT_384)


@register("vit_large_patch32_384", pretrained=HubFile("timm/vit_large_patch32_384.orig_in21k_ft_in1k"))
def vit_l_32_384() -> Design:
    """ViT-L/32, 384x384, ImageNet-21k then 1k."""
    return _vit_large(patch_size=32, **_AT_384)


# As published with the paper: a tanh representation layer before the head. The hub's copies have lost layer and head,
# so these take Google's own files; the ones of "How to train your ViT" (AugReg), below, were trained without the layer.
@register("vit_base_patch16_224_in21k")
def vit_b_16_in21k() -> Design:
    """ViT-B/16, 224x224, ImageNet-21k, with representation layer."""
    return _vit_base(num_classes=IMAGENET_21K, representation_size=768)


@register("vit_base_patch32_224_in21k")
def vit_b_32_in21k() -> Design:
    """ViT-B/32, 224x224, ImageNet-21k, with representation layer."""
    return _vit_base(patch_size=32, num_classes=IMAGENET_21K, representation_size=768)


@register("vit_large_patch16_224_in21k")
def vit_l_16_in21k() -> Design:
    """ViT-L/16, 224x224, ImageNet-21k, with representation layer."""
    return _vit_large(num_classes=IMAGENET_21K, representation_size=1024)


@register("vit_large_patch32_224_in21k")
def vit_l_32_in21k() -> Design:
    """ViT-L/32, 224x224, ImageNet-21k, with representation layer."""
    return _vit_large(patch_size=32, num_classes=IMAGENET_21K, representation_size=1024)


@register("vit_huge_patch14_224_in21k")
def vit_h_14_in21k() -> Design:
    """ViT-H/14, 224x224, ImageNet-21k, with representation layer."""
    return _vit_huge(num_classes=IMAGENET_21K, representation_size=1280)


@register(pretrained=HubFile("timm/vit_base_patch16_224.augreg_in21k"))
def vit_b_16_augreg_in21k() -> Design:
    """ViT-B/16, 224x224, ImageNet-21k."""
    return _vit_base(num_classes=IMAGENET_21K)


@register(pretrained=HubFile("timm/vit_base_patch32_224.augreg_in21k"))
def vit_b_32_augreg_in21k() -> Design:
    """ViT-B/32, 224x224, ImageNet-21k."""
    return _vit_base(patch_size=32, num_classes=IMAGENET_21K)


@register(pretrained=HubFile("timm/vit_large_patch16_224.augreg_in21k"))
def vit_l_16_augreg_in21k() -> Design:
    """ViT-L/16, 224x224, ImageNet-21k."""
    return _vit_large(num_classes=IMAGENET_21K)


@register("deit_tiny_patch16_224", pretrained=HubFile("timm/deit_tiny_patch16_224.fb_in1k"))
def deit_t() -> Design:
    """DeiT-Ti, 224x224, ImageNet-1k."""
    return _deit_tiny()


@register("deit_small_patch16_224", pretrained=HubFile("timm/deit_small_patch16_224.fb_in1k"))
def deit_s() -> Design:
    """DeiT-S, 224x224, ImageNet-1k."""
    return _deit_small()


@register("deit_base_patch16_224", pretrained=HubFile("timm/deit_base_patch16_224.fb_in1k"))
def deit_b() -> Design:
    """DeiT-B, 224x224, ImageNet-1k."""
    return _deit_base()


@register("deit_base_patch16_384", pretrained=HubFile("timm/deit_base_patch16_384.fb_in1k"))
def deit_b_384() -> Design:
    """DeiT-B, 384x384, ImageNet-1k."""
    return _deit_base(**_AT_384)


@register("deit_tiny_distilled_patch16_224", pretrained=HubFile("timm/deit_tiny_distilled_patch16_224.fb_in1k"))
def deit_t_distilled() -> Design:
    """DeiT-Ti, distilled, 224x224, ImageNet-1k."""
    return _deit_tiny(distilled=True)


@register("deit_small_distilled_patch16_224", pretrained=HubFile("timm/deit_small_distilled_patch16_224.fb_in1k"))
def deit_s_distilled() -> Design:
    """DeiT-S, distilled, 224x224, ImageNet-1k."""
    return _deit_small(distilled=True)


@register("deit_base_distilled_patch16_224", pretrained=HubFile("timm/deit_base_distilled_patch16_224.fb_in1k"))
def deit_b_distilled() -> Design:
    """DeiT-B, distilled, 224x224, ImageNet-1k."""
    return _deit_base(distilled=True)


@register("deit_base_distilled_patch16_384", pretrained=HubFile("timm/deit_base_distilled_patch16_384.fb_in1k"))
def deit_b_distilled_384() -> Design:
    """DeiT-B, distilled, 384x384, ImageNet-1k."""
    return _deit_base(distilled=True, **_AT_384)
