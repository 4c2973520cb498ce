"""Every model that has a name, as data: a new variant is one line of `VARIANTS`. Light: PyTorch is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploycli.models.spec import IMAGENET_MEAN, IMAGENET_STD, ModelSpec, Preprocessing, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

INPUT_NAME = "images"
OUTPUT_NAME = "logits"

IMAGENET_22K = 21841
"""Classes of Swin's ImageNet-22k heads."""

IMAGENET_21K = 21843
"""Classes of Google's ImageNet-21k heads."""

_AT_384 = {"img_size": [384, 384]}
_SWIN_AT_384 = {**_AT_384, "window_size": 12}
_HALF = (0.5, 0.5, 0.5)  # Google's mean and standard deviation: pixels from -1 to 1


@dataclass(frozen=True)
class HubFile:
    """One file on the Hugging Face hub.

    Attributes:
        repo: ``owner/name``.
        revision: the commit that is pinned. Where none is known it is ``main``, which is resolved to its commit when
            the file is fetched; that commit, and the hash of the file, are what the manifest records.
        filename: path within the repository; only safetensors files are fetched.
    """

    repo: str
    revision: str = "main"
    filename: str = "model.safetensors"


@dataclass(frozen=True)
class Variant:
    """One registered model.

    Attributes:
        spec: what determines its graph.
        preprocessing: how its images are prepared; None where it takes none.
        aliases: other names that resolve to it: the authors' long name, and timm's.
        pretrained: its published weights, or None.
        summary: one line for people.
    """

    spec: ModelSpec
    preprocessing: Preprocessing | None
    aliases: tuple[str, ...] = ()
    pretrained: HubFile | None = None
    summary: str = ""

    @property
    def name(self) -> str:
        """The short name."""
        return self.spec.name


def spec(name: str, family: str, config: Mapping[str, Any]) -> ModelSpec:
    """Return the spec of a model of our own, whose input and output have one name and one form."""
    height, width = config["img_size"]
    images = TensorSpec(INPUT_NAME, (config["in_chans"], height, width))
    return ModelSpec(name, family, config, inputs=(images,), outputs=(OUTPUT_NAME,))


def _variant(
    name: str,
    summary: str,
    family: str,
    config: Mapping[str, Any],
    aliases: tuple[str, ...],
    hub: str = "",
    **recipe: Any,
) -> Variant:
    """Make a variant; ``hub`` is ``name@revision`` of one of timm's repositories, whose name is an alias, too."""
    height, width = config["img_size"]
    repository, _, revision = hub.partition("@")
    return Variant(
        spec(name, family, config),
        Preprocessing(size=(height, width), **recipe),
        (*aliases, repository) if hub else aliases,
        HubFile(f"timm/{repository}", revision or "main") if hub else None,
        summary,
    )


# What the evaluation of Swin, ViT and DeiT crops: the centre nine tenths at 224; the 384 models were tuned on the whole
# shorter side.
def _crop_pct(config: Mapping[str, Any]) -> float:
    return 1.0 if config["img_size"][0] == 384 else 0.9


# Size -> channels of the first stage, blocks and heads of each stage. https://arxiv.org/abs/2103.14030, table 7.
_SWIN = {
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "small": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "large": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
}


def _swin(name: str, summary: str, size: str, *aliases: str, hub: str = "", **changes: Any) -> Variant:
    """A Swin Transformer; by default at 224x224 with 1000 classes."""
    embed_dim, depths, num_heads = _SWIN[size]
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
    return _variant(name, summary, "swin", config, aliases, hub, crop_pct=_crop_pct(config))


_SWIN_V2_FINETUNED = {"num_classes": 1000, "pretrained_window_sizes": [12, 12, 12, 6]}


def _swin_v2(name: str, summary: str, size: str, *aliases: str, hub: str = "", **changes: Any) -> Variant:
    """A Swin Transformer V2; by default at 256x256 with 1000 classes."""
    embed_dim, depths, num_heads = _SWIN[size]
    config = {
        "img_size": [256, 256],
        "patch_size": 4,
        "in_chans": 3,
        "num_classes": 1000,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        "window_size": 8,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "ape": False,
        "patch_norm": True,
        "pretrained_window_sizes": [0, 0, 0, 0],
        **changes,
    }
    return _variant(name, summary, "swin_v2", config, aliases, hub, crop_pct=_crop_pct(config))


# Size -> channels, blocks, heads. https://arxiv.org/abs/2010.11929, table 1.
_VIT = {"base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}
# https://arxiv.org/abs/2012.12877, table 1.
_DEIT = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}


def _vit(name: str, summary: str, size: str, *aliases: str, hub: str = "", **changes: Any) -> Variant:
    """A ViT of Google's; by default at 224x224 with 1000 classes."""
    return _plain_transformer(name, summary, _VIT[size], _HALF, _HALF, aliases, hub, changes)


def _deit(name: str, summary: str, size: str, *aliases: str, hub: str = "", **changes: Any) -> Variant:
    """A DeiT; by default at 224x224 with 1000 classes."""
    return _plain_transformer(name, summary, _DEIT[size], IMAGENET_MEAN, IMAGENET_STD, aliases, hub, changes)


def _plain_transformer(
    name: str,
    summary: str,
    sizes: tuple[int, int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    aliases: tuple[str, ...],
    hub: str,
    changes: Mapping[str, Any],
) -> Variant:
    embed_dim, depth, num_heads = sizes
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
    return _variant(name, summary, "vit", config, aliases, hub, crop_pct=_crop_pct(config), mean=mean, std=std)


# Size -> channels of the first stage, blocks and heads of each stage. https://arxiv.org/abs/2108.00154, table 1.
_CROSSFORMER = {
    "tiny": (64, [1, 1, 8, 6], [2, 4, 8, 16]),
    "small": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "base": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "large": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
}
# https://arxiv.org/abs/2303.06908, as its authors' configs/crossformer_pp define it.
_CROSSFORMER_PP = {
    "small": (64, [2, 2, 18, 2], [2, 4, 8, 16]),
    "base": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "large": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "huge": (128, [6, 6, 18, 2], [4, 8, 16, 32]),
}


def _crossformer(name: str, summary: str, size: str, *aliases: str, img_size: int = 224) -> Variant:
    """A CrossFormer; 1000 classes. No weights of theirs are on the hub."""
    return _cross_scale(name, summary, "crossformer", _CROSSFORMER[size], aliases, {"group_size": 7}, img_size)


def _crossformer_pp(name: str, summary: str, size: str, *aliases: str) -> Variant:
    """A CrossFormer++; 1000 classes. No weights of theirs are on the hub."""
    groups = {"group_size": [4, 4, 14, 7], "interval": [4, 2, 1, 1]}
    return _cross_scale(name, summary, "crossformer_pp", _CROSSFORMER_PP[size], aliases, groups)


def _cross_scale(
    name: str,
    summary: str,
    family: str,
    sizes: tuple[int, list[int], list[int]],
    aliases: tuple[str, ...],
    groups: Mapping[str, Any],
    img_size: int = 224,
) -> Variant:
    embed_dim, depths, num_heads = sizes
    config = {
        "img_size": [img_size, img_size],
        "patch_size": [4, 8, 16, 32],
        "in_chans": 3,
        "num_classes": 1000,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        **groups,
        "merge_size": [2, 4],
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "qk_scale": None,
    }
    # The authors' evaluation resizes the shorter side to 256 and crops the centre.
    return _variant(name, summary, family, config, aliases, crop_pct=224 / 256)


VARIANTS = (
    _swin(
        "swin_t",
        "Swin-T, 224x224, ImageNet-1k.",
        "tiny",
        "swin_tiny_patch4_window7_224",
        hub="swin_tiny_patch4_window7_224.ms_in1k@4cc3a7275b50b53a7bec45f32c236ebe64227cff",
    ),
    _swin(
        "swin_s",
        "Swin-S, 224x224, ImageNet-1k.",
        "small",
        "swin_small_patch4_window7_224",
        hub="swin_small_patch4_window7_224.ms_in1k@b59828b00f6fac85d99c8eac48094b605b6e7ec3",
    ),
    _swin(
        "swin_b",
        "Swin-B, 224x224, ImageNet-1k.",
        "base",
        "swin_base_patch4_window7_224",
        hub="swin_base_patch4_window7_224.ms_in1k@160443c7878650977f11a3a89d4ed685b001a304",
    ),
    _swin(
        "swin_l",
        "Swin-L, 224x224, ImageNet-22k then 1k.",
        "large",
        "swin_large_patch4_window7_224",
        "swin_large_patch4_window7_224_22kto1k",
        hub="swin_large_patch4_window7_224.ms_in22k_ft_in1k@e05e58ff5362edd212120dffaff3206a633c5534",
    ),
    _swin(
        "swin_b_384",
        "Swin-B, 384x384, ImageNet-1k.",
        "base",
        "swin_base_patch4_window12_384",
        hub="swin_base_patch4_window12_384.ms_in1k",
        **_SWIN_AT_384,
    ),
    _swin(
        "swin_l_384",
        "Swin-L, 384x384, ImageNet-22k then 1k.",
        "large",
        "swin_large_patch4_window12_384",
        "swin_large_patch4_window12_384_22kto1k",
        hub="swin_large_patch4_window12_384.ms_in22k_ft_in1k",
        **_SWIN_AT_384,
    ),
    _swin(
        "swin_t_22k",
        "Swin-T, 224x224, ImageNet-22k.",
        "tiny",
        "swin_tiny_patch4_window7_224_22k",
        hub="swin_tiny_patch4_window7_224.ms_in22k",
        num_classes=IMAGENET_22K,
    ),
    _swin(
        "swin_s_22k",
        "Swin-S, 224x224, ImageNet-22k.",
        "small",
        "swin_small_patch4_window7_224_22k",
        hub="swin_small_patch4_window7_224.ms_in22k",
        num_classes=IMAGENET_22K,
    ),
    _swin(
        "swin_b_22k",
        "Swin-B, 224x224, ImageNet-22k.",
        "base",
        "swin_base_patch4_window7_224_22k",
        hub="swin_base_patch4_window7_224.ms_in22k",
        num_classes=IMAGENET_22K,
    ),
    _swin(
        "swin_l_22k",
        "Swin-L, 224x224, ImageNet-22k.",
        "large",
        "swin_large_patch4_window7_224_22k",
        hub="swin_large_patch4_window7_224.ms_in22k",
        num_classes=IMAGENET_22K,
    ),
    _swin(
        "swin_b_384_22k",
        "Swin-B, 384x384, ImageNet-22k.",
        "base",
        "swin_base_patch4_window12_384_22k",
        hub="swin_base_patch4_window12_384.ms_in22k",
        num_classes=IMAGENET_22K,
        **_SWIN_AT_384,
    ),
    _swin(
        "swin_l_384_22k",
        "Swin-L, 384x384, ImageNet-22k.",
        "large",
        "swin_large_patch4_window12_384_22k",
        hub="swin_large_patch4_window12_384.ms_in22k",
        num_classes=IMAGENET_22K,
        **_SWIN_AT_384,
    ),
    _swin_v2(
        "swinv2_t",
        "Swin V2-T, window 8, 256x256, ImageNet-1k.",
        "tiny",
        "swinv2_tiny_patch4_window8_256",
        hub="swinv2_tiny_window8_256.ms_in1k",
    ),
    _swin_v2(
        "swinv2_t_w16",
        "Swin V2-T, window 16, 256x256, ImageNet-1k.",
        "tiny",
        "swinv2_tiny_patch4_window16_256",
        hub="swinv2_tiny_window16_256.ms_in1k",
        window_size=16,
    ),
    _swin_v2(
        "swinv2_s",
        "Swin V2-S, window 8, 256x256, ImageNet-1k.",
        "small",
        "swinv2_small_patch4_window8_256",
        hub="swinv2_small_window8_256.ms_in1k",
    ),
    _swin_v2(
        "swinv2_s_w16",
        "Swin V2-S, window 16, 256x256, ImageNet-1k.",
        "small",
        "swinv2_small_patch4_window16_256",
        hub="swinv2_small_window16_256.ms_in1k",
        window_size=16,
    ),
    _swin_v2(
        "swinv2_b",
        "Swin V2-B, window 8, 256x256, ImageNet-1k.",
        "base",
        "swinv2_base_patch4_window8_256",
        hub="swinv2_base_window8_256.ms_in1k",
    ),
    _swin_v2(
        "swinv2_b_w16",
        "Swin V2-B, window 16, 256x256, ImageNet-1k.",
        "base",
        "swinv2_base_patch4_window16_256",
        hub="swinv2_base_window16_256.ms_in1k",
        window_size=16,
    ),
    _swin_v2(
        "swinv2_b_22k",
        "Swin V2-B, window 12, 192x192, ImageNet-22k.",
        "base",
        "swinv2_base_patch4_window12_192_22k",
        hub="swinv2_base_window12_192.ms_in22k",
        img_size=[192, 192],
        window_size=12,
        num_classes=IMAGENET_22K,
    ),
    _swin_v2(
        "swinv2_b_256",
        "Swin V2-B, window 16, 256x256, ImageNet-22k then 1k.",
        "base",
        "swinv2_base_patch4_window12to16_192to256_22kto1k_ft",
        hub="swinv2_base_window12to16_192to256.ms_in22k_ft_in1k",
        img_size=[256, 256],
        window_size=16,
        **_SWIN_V2_FINETUNED,
    ),
    _swin_v2(
        "swinv2_b_384",
        "Swin V2-B, window 24, 384x384, ImageNet-22k then 1k.",
        "base",
        "swinv2_base_patch4_window12to24_192to384_22kto1k_ft",
        hub="swinv2_base_window12to24_192to384.ms_in22k_ft_in1k",
        img_size=[384, 384],
        window_size=24,
        **_SWIN_V2_FINETUNED,
    ),
    _swin_v2(
        "swinv2_l_22k",
        "Swin V2-L, window 12, 192x192, ImageNet-22k.",
        "large",
        "swinv2_large_patch4_window12_192_22k",
        hub="swinv2_large_window12_192.ms_in22k",
        img_size=[192, 192],
        window_size=12,
        num_classes=IMAGENET_22K,
    ),
    _swin_v2(
        "swinv2_l_256",
        "Swin V2-L, window 16, 256x256, ImageNet-22k then 1k.",
        "large",
        "swinv2_large_patch4_window12to16_192to256_22kto1k_ft",
        hub="swinv2_large_window12to16_192to256.ms_in22k_ft_in1k",
        img_size=[256, 256],
        window_size=16,
        **_SWIN_V2_FINETUNED,
    ),
    _swin_v2(
        "swinv2_l_384",
        "Swin V2-L, window 24, 384x384, ImageNet-22k then 1k.",
        "large",
        "swinv2_large_patch4_window12to24_192to384_22kto1k_ft",
        hub="swinv2_large_window12to24_192to384.ms_in22k_ft_in1k",
        img_size=[384, 384],
        window_size=24,
        **_SWIN_V2_FINETUNED,
    ),
    _vit(
        "vit_b_16",
        "ViT-B/16, 224x224, ImageNet-21k then 1k.",
        "base",
        "vit_base_patch16_224",
        hub="vit_base_patch16_224.augreg2_in21k_ft_in1k",
    ),
    _vit(
        "vit_b_32",
        "ViT-B/32, 224x224, ImageNet-21k then 1k.",
        "base",
        "vit_base_patch32_224",
        hub="vit_base_patch32_224.augreg_in21k_ft_in1k",
        patch_size=32,
    ),
    _vit(
        "vit_l_16",
        "ViT-L/16, 224x224, ImageNet-21k then 1k.",
        "large",
        "vit_large_patch16_224",
        hub="vit_large_patch16_224.augreg_in21k_ft_in1k",
    ),
    _vit("vit_l_32", "ViT-L/32, 224x224, 1000 classes.", "large", "vit_large_patch32_224", patch_size=32),
    _vit("vit_h_14", "ViT-H/14, 224x224, 1000 classes.", "huge", "vit_huge_patch14_224", patch_size=14),
    _vit(
        "vit_b_16_384",
        "ViT-B/16, 384x384, ImageNet-21k then 1k.",
        "base",
        "vit_base_patch16_384",
        hub="vit_base_patch16_384.augreg_in21k_ft_in1k",
        **_AT_384,
    ),
    _vit(
        "vit_b_32_384",
        "ViT-B/32, 384x384, ImageNet-21k then 1k.",
        "base",
        "vit_base_patch32_384",
        hub="vit_base_patch32_384.augreg_in21k_ft_in1k",
        patch_size=32,
        **_AT_384,
    ),
    _vit(
        "vit_l_16_384",
        "ViT-L/16, 384x384, ImageNet-21k then 1k.",
        "large",
        "vit_large_patch16_384",
        hub="vit_large_patch16_384.augreg_in21k_ft_in1k",
        **_AT_384,
    ),
    _vit(
        "vit_l_32_384",
        "ViT-L/32, 384x384, ImageNet-21k then 1k.",
        "large",
        "vit_large_patch32_384",
        hub="vit_large_patch32_384.orig_in21k_ft_in1k",
        patch_size=32,
        **_AT_384,
    ),
    # As published with the paper: a tanh representation layer before the head. The hub's copies have lost layer and
    # head, so these take Google's own files; the ones of AugReg, below, were trained without the layer.
    _vit(
        "vit_b_16_in21k",
        "ViT-B/16, 224x224, ImageNet-21k, with representation layer.",
        "base",
        "vit_base_patch16_224_in21k",
        num_classes=IMAGENET_21K,
        representation_size=768,
    ),
    _vit(
        "vit_b_32_in21k",
        "ViT-B/32, 224x224, ImageNet-21k, with representation layer.",
        "base",
        "vit_base_patch32_224_in21k",
        patch_size=32,
        num_classes=IMAGENET_21K,
        representation_size=768,
    ),
    _vit(
        "vit_l_16_in21k",
        "ViT-L/16, 224x224, ImageNet-21k, with representation layer.",
        "large",
        "vit_large_patch16_224_in21k",
        num_classes=IMAGENET_21K,
        representation_size=1024,
    ),
    _vit(
        "vit_l_32_in21k",
        "ViT-L/32, 224x224, ImageNet-21k, with representation layer.",
        "large",
        "vit_large_patch32_224_in21k",
        patch_size=32,
        num_classes=IMAGENET_21K,
        representation_size=1024,
    ),
    _vit(
        "vit_h_14_in21k",
        "ViT-H/14, 224x224, ImageNet-21k, with representation layer.",
        "huge",
        "vit_huge_patch14_224_in21k",
        num_classes=IMAGENET_21K,
        representation_size=1280,
        patch_size=14,
    ),
    _vit(
        "vit_b_16_augreg_in21k",
        "ViT-B/16, 224x224, ImageNet-21k.",
        "base",
        hub="vit_base_patch16_224.augreg_in21k",
        num_classes=IMAGENET_21K,
    ),
    _vit(
        "vit_b_32_augreg_in21k",
        "ViT-B/32, 224x224, ImageNet-21k.",
        "base",
        hub="vit_base_patch32_224.augreg_in21k",
        patch_size=32,
        num_classes=IMAGENET_21K,
    ),
    _vit(
        "vit_l_16_augreg_in21k",
        "ViT-L/16, 224x224, ImageNet-21k.",
        "large",
        hub="vit_large_patch16_224.augreg_in21k",
        num_classes=IMAGENET_21K,
    ),
    _deit(
        "deit_t", "DeiT-Ti, 224x224, ImageNet-1k.", "tiny", "deit_tiny_patch16_224", hub="deit_tiny_patch16_224.fb_in1k"
    ),
    _deit(
        "deit_s",
        "DeiT-S, 224x224, ImageNet-1k.",
        "small",
        "deit_small_patch16_224",
        hub="deit_small_patch16_224.fb_in1k",
    ),
    _deit(
        "deit_b", "DeiT-B, 224x224, ImageNet-1k.", "base", "deit_base_patch16_224", hub="deit_base_patch16_224.fb_in1k"
    ),
    _deit(
        "deit_b_384",
        "DeiT-B, 384x384, ImageNet-1k.",
        "base",
        "deit_base_patch16_384",
        hub="deit_base_patch16_384.fb_in1k",
        **_AT_384,
    ),
    _deit(
        "deit_t_distilled",
        "DeiT-Ti, distilled, 224x224, ImageNet-1k.",
        "tiny",
        "deit_tiny_distilled_patch16_224",
        hub="deit_tiny_distilled_patch16_224.fb_in1k",
        distilled=True,
    ),
    _deit(
        "deit_s_distilled",
        "DeiT-S, distilled, 224x224, ImageNet-1k.",
        "small",
        "deit_small_distilled_patch16_224",
        hub="deit_small_distilled_patch16_224.fb_in1k",
        distilled=True,
    ),
    _deit(
        "deit_b_distilled",
        "DeiT-B, distilled, 224x224, ImageNet-1k.",
        "base",
        "deit_base_distilled_patch16_224",
        hub="deit_base_distilled_patch16_224.fb_in1k",
        distilled=True,
    ),
    _deit(
        "deit_b_distilled_384",
        "DeiT-B, distilled, 384x384, ImageNet-1k.",
        "base",
        "deit_base_distilled_patch16_384",
        hub="deit_base_distilled_patch16_384.fb_in1k",
        distilled=True,
        **_AT_384,
    ),
    _crossformer(
        "crossformer_t",
        "CrossFormer-T, 224x224, ImageNet-1k.",
        "tiny",
        "crossformer_tiny",
        "crossformer_tiny_patch4_group7_224",
    ),
    _crossformer(
        "crossformer_s",
        "CrossFormer-S, 224x224, ImageNet-1k.",
        "small",
        "crossformer_small",
        "crossformer_small_patch4_group7_224",
    ),
    _crossformer(
        "crossformer_b",
        "CrossFormer-B, 224x224, ImageNet-1k.",
        "base",
        "crossformer_base",
        "crossformer_base_patch4_group7_224",
    ),
    _crossformer(
        "crossformer_l",
        "CrossFormer-L, 224x224, ImageNet-1k.",
        "large",
        "crossformer_large",
        "crossformer_large_patch4_group7_224",
    ),
    _crossformer(
        "crossformer_s_448",
        "CrossFormer-S, 448x448; the weights of 224x224 fit it.",
        "small",
        "crossformer_small_448",
        img_size=448,
    ),
    _crossformer_pp(
        "crossformer_pp_s",
        "CrossFormer++-S, 224x224, ImageNet-1k.",
        "small",
        "crossformer_pp_small",
        "crossformer_pp_small_patch4_group_const_224",
    ),
    _crossformer_pp(
        "crossformer_pp_b",
        "CrossFormer++-B, 224x224, ImageNet-1k.",
        "base",
        "crossformer_pp_base",
        "crossformer_pp_base_patch4_group_const_224",
    ),
    _crossformer_pp(
        "crossformer_pp_l",
        "CrossFormer++-L, 224x224, ImageNet-1k.",
        "large",
        "crossformer_pp_large",
        "crossformer_pp_large_patch4_group_const_224",
    ),
    _crossformer_pp(
        "crossformer_pp_h",
        "CrossFormer++-H, 224x224, ImageNet-1k.",
        "huge",
        "crossformer_pp_huge",
        "crossformer_pp_huge_patch4_group_const_224",
    ),
)
"""In the order in which `deploycli list` shows them."""
