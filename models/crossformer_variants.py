"""The named CrossFormers. A new variant is one registered function. No weights of theirs are on the hub."""

from deploycli.models.registry import Design, register
from deploycli.models.spec import Preprocessing

CROP = 224 / 256  # the authors' evaluation resizes the shorter side to 256 and crops the centre


def _crossformer(embed_dim: int, depths: list[int], num_heads: list[int], img_size: int = 224) -> Design:
    """A CrossFormer (https://arxiv.org/abs/2108.00154, table 1); 1000 classes."""
    config = {
        "img_size": [img_size, img_size],
        "patch_size": [4, 8, 16, 32],
        "in_chans": 3,
        "num_classes": 1000,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        "group_size": 7,
        "merge_size": [2, 4],
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "qk_scale": None,
    }
    return Design("crossformer", config, Preprocessing(size=(img_size, img_size), crop_pct=CROP))


@register("crossformer_tiny", "crossformer_tiny_patch4_group7_224")
def crossformer_t() -> Design:
    """CrossFormer-T, 224x224, ImageNet-1k."""
    return _crossformer(64, [1, 1, 8, 6], [2, 4, 8, 16])


@register("crossformer_small", "crossformer_small_patch4_group7_224")
def crossformer_s() -> Design:
    """CrossFormer-S, 224x224, ImageNet-1k."""
    return _crossformer(96, [2, 2, 6, 2], [3, 6, 12, 24])


@register("crossformer_base", "crossformer_base_patch4_group7_224")
def crossformer_b() -> Design:
    """CrossFormer-B, 224x224, ImageNet-1k."""
    return _crossformer(96, [2, 2, 18, 2], [3, 6, 12, 24])


@register("crossformer_large", "crossformer_large_patch4_group7_224")
def crossformer_l() -> Design:
    """CrossFormer-L, 224x224, ImageNet-1k."""
    return _crossformer(128, [2, 2, 18, 2], [4, 8, 16, 32])


@register("crossformer_small_448")
def crossformer_s_448() -> Design:
    """CrossFormer-S, 448x448; the weights of 224x224 fit it."""
    return _crossformer(96, [2, 2, 6, 2], [3, 6, 12, 24], img_size=448)


def _crossformer_pp(embed_dim: int, depths: list[int], num_heads: list[int]) -> Design:
    """A CrossFormer++ (https://arxiv.org/abs/2303.06908), as its authors' configs/crossformer_pp define it."""
    config = {
        "img_size": [224, 224],
        "patch_size": [4, 8, 16, 32],
        "in_chans": 3,
        "num_classes": 1000,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        "group_size": [4, 4, 14, 7],
        "interval": [4, 2, 1, 1],
        "merge_size": [2, 4],
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "qk_scale": None,
    }
    return Design("crossformer_pp", config, Preprocessing(size=(224, 224), crop_pct=CROP))


@register("crossformer_pp_small", "crossformer_pp_small_patch4_group_const_224")
def crossformer_pp_s() -> Design:
    """CrossFormer++-S, 224x224, ImageNet-1k."""
    return _crossformer_pp(64, [2, 2, 18, 2], [2, 4, 8, 16])


@register("crossformer_pp_base", "crossformer_pp_base_patch4_group_const_224")
def crossformer_pp_b() -> Design:
    """CrossFormer++-B, 224x224, ImageNet-1k."""
    return _crossformer_pp(96, [2, 2, 18, 2], [3, 6, 12, 24])


@register("crossformer_pp_large", "crossformer_pp_large_patch4_group_const_224")
def crossformer_pp_l() -> Design:
    """CrossFormer++-L, 224x224, ImageNet-1k."""
    return _crossformer_pp(128, [2, 2, 18, 2], [4, 8, 16, 32])


@register("crossformer_pp_huge", "crossformer_pp_huge_patch4_group_const_224")
def crossformer_pp_h() -> Design:
    """CrossFormer++-H, 224x224, ImageNet-1k."""
    return _crossformer_pp(128, [6, 6, 18, 2], [4, 8, 16, 32])
