"""Pictures as model inputs, as timm's evaluation transform makes them. Needs Pillow and NumPy only."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from deploycli.models.errors import UsageError
from deploycli.models.spec import INTERPOLATIONS

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.models.spec import Preprocessing

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_FILTERS = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}


def load_image(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Decode a picture and prepare it; return [3, H, W], float32, normalised RGB.

    Raises:
        UsageError: the file cannot be decoded.
    """
    picture = _crop_centre(_resize(_decode(path), preprocessing), preprocessing.size)
    pixels = np.asarray(picture, dtype=np.float32) / np.float32(255)  # [H, W, 3], 0 to 1
    pixels = (pixels - np.array(preprocessing.mean, np.float32)) / np.array(preprocessing.std, np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # [H, W, 3] -> [3, H, W]


def image_files(folder: Path) -> list[Path]:
    """Return the pictures in a folder and its subfolders, by known suffixes, sorted; hidden files do not count.

    Raises:
        UsageError: there is no such folder, or it holds no picture.
    """
    if not folder.is_dir():
        raise UsageError(f"no folder at {folder}", expected="a folder of images", hint="check the path")
    found = (
        p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    )
    files = sorted(found)
    if not files:
        raise UsageError(
            f"no image in {folder}", expected=f"files that end in {', '.join(sorted(SUFFIXES))}", hint="another folder"
        )
    return files


def _decode(path: Path) -> Image.Image:
    """Return the first frame upright, in RGB; transparency is dropped, 16-bit grey is scaled to 8 bits."""
    try:
        with Image.open(path) as file:
            picture: Image.Image = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):
                # Pillow clips where it should scale: without this a 16-bit picture turns white.
                grey = np.asarray(picture).clip(0, 65535) // 257
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            if picture.mode == "P" and "transparency" in picture.info:
                picture = picture.convert("RGBA")
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UsageError(
            f"{path} cannot be decoded as an image ({error})",
            expected="a picture that Pillow reads",
            hint="remove or replace the file",
        ) from error


def _resize(picture: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Scale so that the picture just covers ``floor(size / crop_pct)``; rounding follows timm in both cases."""
    height, width = (math.floor(side / preprocessing.crop_pct) for side in preprocessing.size)
    if height == width:
        shorter = min(picture.size)
        new_size = tuple(height if side == shorter else int(height * side / shorter) for side in picture.size)
    else:
        ratio = min(picture.height / height, picture.width / width)
        new_size = (round(picture.width / ratio), round(picture.height / ratio))
    if new_size == picture.size:
        return picture
    return picture.resize((new_size[0], new_size[1]), _FILTERS[preprocessing.interpolation])


def _crop_centre(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    top, left = round((picture.height - height) / 2), round((picture.width - width) / 2)
    return picture.crop((left, top, left + width, top + height))
