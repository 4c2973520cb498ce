"""Trained models that are small enough to be committed, and the pictures that they were trained and are judged on.

The pictures are scikit-learn's digits, 1797 of 8x8 pixels. Their order goes by the forms that their writers filled in:
the same sequence of labels begins anew about every 128 pictures, fourteen times. So the split follows the order: the
first 1257 pictures train and calibrate, the last 540 test. No picture is in both, and all test pictures but the first
30, which finish a form, are of forms that training never saw. After a random split, training would hold neighbours of
most test pictures, by the same hand.

The README beside this file says how the checkpoints were made and what they score.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import numpy as np
import numpy.typing as npt
from PIL import Image

from deploycli.models import registry
from deploycli.models.spec import Preprocessing
from deploycli.models.variants import Variant, spec

if TYPE_CHECKING:
    from collections.abc import Iterator

Split = Literal["train", "test"]

NAMES = ("digits_swin", "digits_vit", "digits_crossformer")
CLASSES = 10
SPLITS: dict[Split, range] = {"train": range(1257), "test": range(1257, 1797)}  # positions in scikit-learn's order
SIDE = 56  # pixels: each one of the 8x8 becomes 7x7
PREPROCESSING = Preprocessing(size=(SIDE, SIDE), crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def indices(split: Split, limit: int | None = None) -> npt.NDArray[np.int64]:
    """Return the positions of a split's pictures in scikit-learn's order.

    With a limit, they are the first ones of a fixed shuffle: from 34 on they are of all digits, and a smaller set is
    part of a larger one.
    """
    positions = np.array(SPLITS[split])
    return positions if limit is None else np.random.RandomState(0).permutation(positions)[:limit]


def arrays(split: Split, limit: int | None = None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return model inputs [N, 3, H, W] and labels [N], the same as from the files of :func:`write_folder`."""
    chosen = indices(split, limit)
    pictures, labels = _digits()
    pixels = np.stack([np.asarray(_rgb(pictures[i])) for i in chosen])  # [N, H, W, 3], uint8
    mean, std = (np.array(value, np.float32) for value in (PREPROCESSING.mean, PREPROCESSING.std))
    images = (pixels / np.float32(255) - mean) / std
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels[chosen]  # [N, H, W, 3] -> [N, 3, H, W]


def write_folder(path: Path, split: Split, limit: int | None = None) -> None:
    """Write pictures as ``LABEL/INDEX.png``, where the index is the position in scikit-learn's order."""
    pictures, labels = _digits()
    for i in indices(split, limit):
        folder = path / str(labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        _rgb(pictures[i]).save(folder / f"{i:04}.png")


def checkpoint(name: str) -> Path:
    """Return the trained weights of one of ``NAMES``."""
    return Path(__file__).with_name(f"{name}.safetensors")


@contextmanager
def registered(*variants: Variant) -> Iterator[None]:
    """Register models for a while, as a user registers models of their own; by default ``NAMES``."""
    with mock.patch.dict(registry._VARIANTS), mock.patch.dict(registry._SHORT_NAMES):
        for variant in variants or (_swin(), _vit(), _crossformer()):
            registry.register(variant)
        yield


def _swin() -> Variant:
    """Swin for digits: 14x14 tokens in four windows of 7x7, shifted in every second block, then 7x7 tokens in one."""
    return _variant(
        "swin",
        patch_size=4,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=7,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
        ape=False,
        patch_norm=True,
    )


def _vit() -> Variant:
    """ViT for digits: 7x7 tokens and a class token."""
    return _variant(
        "vit",
        patch_size=8,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
        representation_size=None,
        distilled=False,
    )


def _crossformer() -> Variant:
    """CrossFormer for digits: three scales, 14x14 tokens with short- and long-distance attention, then 7x7 tokens."""
    return _variant(
        "crossformer",
        patch_size=[4, 8, 16],
        embed_dim=64,
        depths=[2, 1],
        num_heads=[2, 4],
        group_size=7,
        merge_size=[2, 4],
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
    )


def _variant(family: str, **config: Any) -> Variant:
    common = {"img_size": [SIDE, SIDE], "in_chans": 3, "num_classes": CLASSES}
    return Variant(spec(f"digits_{family}", family, {**common, **config}), PREPROCESSING)


def _digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return all pictures [1797, 8, 8], 0 to 255, and their labels [1797]."""
    from sklearn.datasets import load_digits  # takes a second, and whoever wants the models alone needs none of it

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def _rgb(picture: npt.NDArray[np.uint8]) -> Image.Image:
    """Enlarge a picture [8, 8] to what the models take."""
    return Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
