"""Pictures of a folder as model inputs, and which class each belongs to: by its folder, or by a table.

They are prepared as timm's evaluation transform makes them, with Pillow and NumPy only.
"""

from __future__ import annotations

import csv
import math
import re
import struct
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from deploycli.exporters.data.base import Array, Labels, Reader, class_range, pick
from deploycli.models.errors import UsageError
from deploycli.models.files import sha256_of
from deploycli.models.spec import INTERPOLATIONS

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path, PurePath

    from deploycli.models.spec import Preprocessing, TensorSpec


class PictureFiles(Reader):
    """Some pictures, in the order in which they are given.

    Args:
        files: the pictures.
        names: what they are called.
        description: where they come from, for people.
        inputs: the model's.
        preprocessing: how a picture becomes the only one of them.
        labels: the class of each, or None.

    Raises:
        UsageError: nothing says how a picture becomes the model's input.
    """

    def __init__(
        self,
        files: Sequence[Path],
        names: tuple[str, ...],
        description: str,
        inputs: Sequence[TensorSpec],
        preprocessing: Preprocessing | None,
        labels: Labels | None = None,
    ) -> None:
        self._recipe = _require_recipe(inputs, preprocessing)
        super().__init__(names, description, inputs, labels)
        self._files = files

    def _read(self, start: int) -> Generator[dict[str, Array] | UsageError, None, None]:
        yield from map(self._load, self._files[start:])

    def _load(self, file: Path) -> dict[str, Array] | UsageError:
        (image,) = self._inputs
        try:
            return {image.name: load_image(file, self._recipe)}  # [3, H, W], or pixels
        except UsageError as error:
            return error

    def _digests(self) -> Iterator[bytes]:
        try:
            yield from (bytes.fromhex(sha256_of(file)) for file in self._files)
        except OSError as error:
            raise UsageError(f"a picture cannot be read: {error}") from error


_HEADER = ["path", "label"]
_LONGEST_LINE = 1 << 20  # characters
_INDEX = re.compile(r"[0-9]{1,9}")


class Pictures(PictureFiles):
    """The pictures of a folder and its subfolders, in the order of their sorted paths; see `open_samples`."""

    def __init__(
        self,
        folder: Path,
        inputs: Sequence[TensorSpec],
        preprocessing: Preprocessing | None,
        limit: int | None,
        labels: Path | Literal["folders"] | None,
        classes: int | None,
    ) -> None:
        _require_recipe(inputs, preprocessing)
        files = image_files(folder)
        paths = [file.relative_to(folder) for file in files]
        targets: Labels | None = None
        if labels == "folders":
            targets = folder_labels(folder, paths, classes)
        elif labels is not None:
            targets = csv_labels(labels, paths, classes)
        # Without labels a folder at the top counts as a class, and the pictures beside it as one more.
        tops = [path.parts[0] if len(path.parts) > 1 else "" for path in paths]
        chosen = pick(tops, limit) if targets is None else pick(targets.tolist(), limit)
        names = tuple(paths[index].as_posix() for index in chosen)
        count = f"{len(names)}" if len(names) == len(files) else f"{len(names)} of {len(files)}"
        super().__init__(
            [files[index] for index in chosen],
            names,
            f"{count} pictures in {folder}",
            inputs,
            preprocessing,
            None if targets is None else targets[list(chosen)],
        )


def _require_recipe(inputs: Sequence[TensorSpec], preprocessing: Preprocessing | None) -> Preprocessing:
    if preprocessing is None or len(inputs) != 1:
        raise UsageError(
            "nothing says how a picture becomes the model's input"
            if len(inputs) == 1
            else f"the model has {len(inputs)} inputs: nothing says how a picture becomes them",
            expected="a model with one image as its input, and its preprocessing",
            hint="--mean and --std when it is exported or imported; or prepared inputs in a .npz file",
        )
    return preprocessing


def folder_labels(folder: Path, paths: Sequence[PurePath], classes: int | None = None) -> Labels:
    """Label pictures as torchvision's ImageFolder does: by the index of their top folder among the sorted names.

    Sorted means by character: folder ``10`` comes before folder ``2``.

    Args:
        folder: what the pictures are in; every folder in it is a class.
        paths: the pictures, relative to it.
        classes: how many the model has, where that is known.

    Returns:
        The class of each picture, [N].

    Raises:
        UsageError: there are more folders than classes, a picture lies in none, or a folder has no picture.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    rule = "one folder a class, with its pictures in it"
    if classes is not None and len(names) > classes:
        raise UsageError(f"{folder} has {len(names)} class folders", expected=f"at most {classes}, the model's classes")
    for path in paths:
        if len(path.parts) < 2:
            raise UsageError(f"{path} lies in no class folder of {folder}", expected=rule)
    filled = {path.parts[0] for path in paths}
    if empty := [name for name in names if name not in filled]:
        raise UsageError(f"{folder} has class folders without a picture: {', '.join(empty[:3])}", expected=rule)
    index = {name: number for number, name in enumerate(names)}
    return np.array([index[path.parts[0]] for path in paths], np.int64)


def csv_labels(table: Path, paths: Sequence[PurePath], classes: int | None = None) -> Labels:
    """Label pictures by a CSV file of two columns: path, relative to the pictures' folder, and class index.

    A first line ``path,label`` is a header. Paths are written with slashes.

    Args:
        table: the file, UTF-8.
        paths: the pictures, relative to their folder; each must have a line, and each line a picture.
        classes: how many the model has, where that is known.

    Returns:
        The class of each picture, [N].

    Raises:
        UsageError: the file cannot be read, or a line of it cannot be used.
    """
    wanted = {path.as_posix() for path in paths}
    labels: dict[str, int] = {}
    for line, path, label in _rows(table):
        where = f"{table}, line {line}"
        name = PurePosixPath(path).as_posix()  # without ./ and doubled slashes
        if name not in wanted:
            raise UsageError(f"{where}: there is no picture {path!r}", expected="a path relative to the folder")
        if name in labels:
            raise UsageError(f"{where}: {path!r} has a label already", expected="one line for each picture")
        if not _INDEX.fullmatch(label):
            raise UsageError(
                f"{where}: label {label!r} is no class index", expected="a whole number, 0 for the first class"
            )
        labels[name] = int(label)
        if classes is not None and labels[name] >= classes:
            raise UsageError(f"{where}: label {label} is out of range", expected=class_range(classes))
    if missing := [path.as_posix() for path in paths if path.as_posix() not in labels]:
        raise UsageError(
            f"{table} has no label for {len(missing)} of {len(paths)} pictures, such as {missing[0]!r}",
            expected="a line for each picture",
        )
    return np.array([labels[path.as_posix()] for path in paths], np.int64)


def _rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, path and label of every line that is neither empty nor the header."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:  # spreadsheets put a mark before UTF-8
            reader = csv.reader(
                iter(lambda: stream.readline(_LONGEST_LINE), ""), strict=True
            )  # a device may have no end
            for cells in reader:
                row = [cell.strip() for cell in cells]
                if not any(row) or (reader.line_num == 1 and [cell.lower() for cell in row] == _HEADER):
                    continue
                if len(row) != 2:
                    raise UsageError(f"{table}, line {reader.line_num}: {len(row)} columns", expected=",".join(_HEADER))
                yield reader.line_num, row[0], row[1]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{table} cannot be read as labels: {error}", expected="a CSV file of path,label") from error


SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_FILTERS = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}


def load_image(path: Path, preprocessing: Preprocessing) -> npt.NDArray[Any]:
    """Decode a picture and prepare it; return [3, H, W], float32, normalised RGB.

    Where the graph does that itself, it is uint8, [H, W, 3] or [3, H, W] as the graph takes it.

    Raises:
        UsageError: the file cannot be decoded.
    """
    picture = _crop_centre(_resize(_decode(path), preprocessing), preprocessing.size)
    if preprocessing.pixels is not None:
        raw = np.asarray(picture)  # [H, W, 3]
        return np.ascontiguousarray(raw.transpose(2, 0, 1)) if preprocessing.pixels == "nchw" else raw
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
