"""Which class each picture belongs to: by its folder, or by a table."""

from __future__ import annotations

import csv
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path, PurePath

    Labels = npt.NDArray[np.int64]

_HEADER = ["path", "label"]
_LONGEST_LINE = 1 << 20  # characters
_INDEX = re.compile(r"[0-9]{1,9}")


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
            raise UsageError(f"{where}: label {label} is out of range", expected=_range(classes))
    if missing := [path.as_posix() for path in paths if path.as_posix() not in labels]:
        raise UsageError(
            f"{table} has no label for {len(missing)} of {len(paths)} pictures, such as {missing[0]!r}",
            expected="a line for each picture",
        )
    return np.array([labels[path.as_posix()] for path in paths], np.int64)


def check_labels(labels: npt.NDArray[Any], count: int, classes: int | None, where: str) -> Labels:
    """Return labels that came as an array as [N] int64.

    Raises:
        UsageError: they are not one whole number a sample, or one is out of range.
    """
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise UsageError(
            f"the labels of {where} are {labels.dtype} {list(labels.shape)}",
            expected=f"class indices: whole numbers, [{count}]",
        )
    outside = labels < 0 if classes is None else (labels < 0) | (labels >= classes)
    if outside.any():
        first = int(outside.argmax())
        raise UsageError(
            f"label {labels[first]} of sample {first} of {where} is out of range",
            expected="0 or more" if classes is None else _range(classes),
        )
    return labels.astype(np.int64)


def _range(classes: int) -> str:
    return f"0 to {classes - 1}, the model's classes"


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
