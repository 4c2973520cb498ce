"""Every model that has a name. A new variant is one registered function."""

from typing import Any

from deploycli.models.registry import Design, HubFile, register
from deploycli.models.spec import Preprocessing

IMAGENET_22K = 21841  # classes of the ImageNet-22k heads


def _swin(embed_dim: int, depths: list[int], num_heads: list[int], **changes: Any) -> Design:
    """A Swin Transformer (https://arxiv.org/abs/2103.14030, table 7); by default at 224x224 with 1000 classes."""
    config = {
        "img_size": [224, 224],
        "patch_size": 4,
        "in_chans": 3,
        "num_classes": 1000,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        "window_size": 7,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "qk_scale": None,
        "ape": False,
        "patch_norm": True,
        **changes,
    }
    height, width = config["img_size"]
    # At 224 the evaluation crops the centre nine tenths; the 384 models were tuned on the whole shorter side.
    return Design("swin", config, Preprocessing(size=(height, width), crop_pct=1.0 if height == 384 else 0.9))


def _swin_tiny(**changes: Any) -> Design:
    return _swin(96, [2, 2, 6, 2], [3, 6, 12, 24], **changes)


def _swin_small(**changes: Any) -> Design:
    return _swin(96, [2, 2, 18, 2], [3, 6, 12, 24], **changes)


def _swin_base(**changes: Any) -> Design:
    return _swin(128, [2, 2, 18, 2], [4, 8, 16, 32], **changes)


def _swin_large(**changes: Any) -> Design:
    return _swin(192, [2, 2, 18, 2], [6, 12, 24, 48], **changes)


_AT_384 = {"img_size": [384, 384], "window_size": 12}


@register(
    "swin_tiny_patch4_window7_224",
    pretrained=HubFile("timm/swin_tiny_patch4_window7_224.ms_in1k", "4cc3a7275b50b53a7bec45f32c236ebe64227cff"),
)
def swin_t() -> Design:
    """Swin-T, 224x224, ImageNet-1k."""
    return _swin_tiny()


@register(
    "swin_small_patch4_window7_224",
    pretrained=HubFile("timm/swin_small_patch4_window7_224.ms_in1k", "b59828b00f6fac85d99c8eac48094b605b6e7ec3"),
)
def swin_s() -> Design:
    """Swin-S, 224x224, ImageNet-1k."""
    return _swin_small()


@register(
    "swin_base_patch4_window7_224",
    pretrained=HubFile("timm/swin_base_patch4_window7_224.ms_in1k", "160443c7878650977f11a3a89d4ed685b001a304"),
)
def swin_b() -> Design:
    """Swin-B, 224x224, ImageNet-1k."""
    return _swin_base()


@register(
    "swin_large_patch4_window7_224",
    "swin_large_patch4_window7_224_22kto1k",
    pretrained=HubFile(
        "timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k", "e05e58ff5362edd212120dffaff3206a633c5534"
    ),
)
def swin_l() -> Design:
    """Swin-L, 224x224, ImageNet-22k then 1k."""
    return _swin_large()


@register("swin_base_patch4_window12_384", pretrained=HubFile("timm/swin_base_patch4_window12_384.ms_in1k"))
def swin_b_384() -> Design:
    """Swin-B, 384x384, ImageNet-1k."""
    return _swin_base(**_AT_384)


@register(
    "swin_large_patch4_window12_384",
    "swin_large_patch4_window12_384_22kto1k",
    pretrained=HubFile("timm/swin_large_patch4_window12_384.ms_in22k_ft_in1k"),
)
def swin_l_384() -> Design:
    """Swin-L, 384x384, ImageNet-22k then 1k."""
    return _swin_large(**_AT_384)


@register("swin_tiny_patch4_window7_224_22k", pretrained=HubFile("timm/swin_tiny_patch4_window7_224.ms_in22k"))
def swin_t_22k() -> Design:
    """Swin-T, 224x224, ImageNet-22k."""
    return _swin_tiny(num_classes=IMAGENET_22K)


@register("swin_small_patch4_window7_224_22k", pretrained=HubFile("timm/swin_small_patch4_window7_224.ms_in22k"))
def swin_s_22k() -> Design:
    """Swin-S, 224x224, ImageNet-22k."""
    return _swin_small(num_classes=IMAGENET_22K)


@register("swin_base_patch4_window7_224_22k", pretrained=HubFile("timm/swin_base_patch4_window7_224.ms_in22k"))
def swin_b_22k() -> Design:
    """Swin-B, 224x224, ImageNet-22k."""
    return _swin_base(num_classes=IMAGENET_22K)


@register("swin_large_patch4_window7_224_22k", pretrained=HubFile("timm/swin_large_patch4_window7_224.ms_in22k"))
def swin_l_22k() -> Design:
    """Swin-L, 224x224, ImageNet-22k."""
    return _swin_large(num_classes=IMAGENET_22K)


@register("swin_base_patch4_window12_384_22k", pretrained=HubFile("timm/swin_base_patch4_window12_384.ms_in22k"))
def swin_b_384_22k() -> Design:
    """Swin-B, 384x384, ImageNet-22k."""
    return _swin_base(num_classes=IMAGENET_22K, **_AT_384)


@register("swin_large_patch4_window12_384_22k", pretrained=HubFile("timm/swin_large_patch4_window12_384.ms_in22k"))
def swin_l_384_22k() -> Design:
    """Swin-L, 384x384, ImageNet-22k."""
    return _swin_large(num_classes=IMAGENET_22K, **_AT_384)
