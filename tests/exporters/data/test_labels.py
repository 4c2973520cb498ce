"""Labels by folder, against torchvision's ImageFolder, and by table."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from deploycli.exporters.data.pictures import csv_labels, folder_labels
from deploycli.exporters.data.samples import open_samples
from deploycli.models.errors import UsageError
from deploycli.models.spec import Preprocessing, TensorSpec
from tests.peers import import_timm

PATHS = [PurePosixPath(name) for name in ("a.png", "b.png", "deep/c.png")]


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), len(name)).save(path)
    return folder


def relative(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*.png"))


def table(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("cat/1.png", "cat/2.png", "dog/1.png", "Zebra/1.png"),
        ("0/a.png", "1/a.png", "2/a.png", "10/a.png", "11/a.png"),
        ("b/deep/er/1.png", "b/2.png", "a b/1.png", "ä/1.png", "_/1.png"),
    ],
)
def test_folders_are_classes_as_in_torchvision(names: tuple[str, ...], tmp_path: Path) -> None:
    import_timm()  # makes torchvision importable
    from torchvision.datasets import ImageFolder

    folder = pictures(tmp_path / "data", *names)
    theirs = {Path(path).relative_to(folder): label for path, label in ImageFolder(str(folder)).samples}
    paths = relative(folder)
    assert folder_labels(folder, paths).tolist() == [theirs[path] for path in paths]


def test_whole_numbers_are_sorted_by_character(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", "2/x.png", "10/x.png")
    assert folder_labels(folder, [Path("2/x.png"), Path("10/x.png")]).tolist() == [1, 0]


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", "a/x.png", "b/x.png", "c/x.png")
    assert folder_labels(folder, relative(folder), 3).tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="3 class folders") as caught:
        folder_labels(folder, relative(folder), 2)
    assert "at most 2" in caught.value.expected
    (folder / "empty").mkdir()
    with pytest.raises(UsageError, match="without a picture: empty"):
        folder_labels(folder, relative(folder))
    pictures(folder, "empty/x.png", "lost.png")
    with pytest.raises(UsageError, match=r"lost\.png lies in no class folder"):
        folder_labels(folder, relative(folder))


@pytest.mark.parametrize(
    "text",
    [
        "a.png,4\nb.png,0\ndeep/c.png,2\n",
        "path,label\na.png,4\nb.png,0\ndeep/c.png,2\n",
        "Path, Label\r\n\r\ndeep/c.png, 2\r\n./b.png,0\r\na.png,4",
        '\ufeffpath,label\n"a.png",4\nb.png,00\ndeep//c.png,2\n,\n',
    ],
)
def test_a_table_labels_each_picture(text: str, tmp_path: Path) -> None:
    labels = csv_labels(table(tmp_path, text), PATHS, 5)
    assert labels.dtype == np.int64
    assert labels.tolist() == [4, 0, 2]


GOOD = "a.png,1\nb.png,2\ndeep/c.png,3\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (GOOD + "e.png,1\n", r"line 4: there is no picture 'e\.png'"),
        (GOOD + "../a.png,1\n", r"line 4: there is no picture '\.\./a\.png'"),
        (GOOD + "/a.png,1\n", r"line 4: there is no picture '/a\.png'"),
        (GOOD + ",1\n", "line 4: there is no picture ''"),
        (GOOD + "./a.png,1\n", r"line 4: '\./a\.png' has a label already"),
        (GOOD.replace("2", "5"), "line 2: label 5 is out of range"),
        (GOOD.replace("2", "-1"), "line 2: label '-1' is no class index"),
        (GOOD.replace("2", "cat"), "line 2: label 'cat' is no class index"),
        (GOOD.replace("2", "2.0"), r"line 2: label '2\.0' is no class index"),
        (GOOD.replace("2", "9" * 30), "line 2: label '9+' is no class index"),
        (GOOD.replace("2", "\u0662"), "line 2: label '\u0662' is no class index"),
        ("file,class\n" + GOOD, "line 1: there is no picture 'file'"),
        (GOOD.replace(",", ";"), "line 1: 1 columns"),
        (GOOD.replace("a.png,1", "a.png,1,cat"), "line 1: 3 columns"),
        ("a.png,1\n", r"no label for 2 of 3 pictures, such as 'b\.png'"),
        ("", "no label for 3 of 3 pictures"),
        (b"\xff\xfe\x00", "cannot be read as labels"),
        ('a.png,"1', "cannot be read as labels"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(text: str | bytes, found: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"labels.csv.*{found}" if "cannot" not in found else found):
        csv_labels(table(tmp_path, text), PATHS, 5)


def test_an_absent_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.csv cannot be read as labels"):
        csv_labels(tmp_path / "absent.csv", PATHS)


def test_labels_reach_the_batches_and_balance_a_limit(tmp_path: Path) -> None:
    inputs, recipe = (TensorSpec("images", (3, 8, 8)),), Preprocessing((8, 8))
    names = [f"{label}/{number}.png" for label in "ab" for number in range(2 if label == "a" else 8)]
    folder = pictures(tmp_path / "data", *names)
    by_folder = open_samples(folder, inputs, recipe, labels="folders", limit=4)
    assert [name[0] for name in by_folder.names] == ["a", "a", "b", "b"]
    (batch,) = by_folder.batches(9)
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 0, 1, 1]
    turned = table(tmp_path, "".join(f"{name},{7 if name.endswith('0.png') else 3}\n" for name in names))
    by_table = open_samples(folder, inputs, recipe, labels=turned, limit=4, classes=8)
    (batch,) = by_table.batches(9)
    assert batch.labels is not None
    assert sorted(batch.labels.tolist()) == [3, 3, 7, 7]
    assert all((label == 7) == name.endswith("0.png") for name, label in zip(by_table.names, batch.labels, strict=True))
    with pytest.raises(UsageError, match="labels were given for list"):
        open_samples([np.zeros((3, 8, 8))], inputs, recipe, labels=turned)
