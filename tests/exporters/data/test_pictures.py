"""Pictures against timm's evaluation transform, and pictures that are none; labels by folder, against torchvision's
ImageFolder, and by table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import skimage
from PIL import Image, ImageOps

from deploycli.exporters.data.pictures import csv_labels, folder_labels, image_files, load_image
from deploycli.exporters.data.samples import open_samples
from deploycli.models.errors import UsageError
from deploycli.models.registry import resolve
from deploycli.models.spec import Preprocessing, TensorSpec
from tests.peers import import_timm

PLAIN = Preprocessing((8, 8), crop_pct=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    Image.fromarray(skimage.data.chelsea()).save(path)  # 451x300
    return path


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        resolve("swin_t").preprocessing,
        resolve("swin_b_384").preprocessing,
        Preprocessing((224, 224), interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        Preprocessing((224, 448)),
        Preprocessing((96, 32), crop_pct=0.875),
        Preprocessing((301, 301), crop_pct=1.0),
    ],
    ids=lambda r: f"{r.size[0]}x{r.size[1]}-{r.interpolation}-{r.crop_pct}",
)
def test_equals_timms_evaluation_transform(recipe: Preprocessing, upright: bool, photograph: Path) -> None:
    import_timm()
    from timm.data import create_transform

    transform = create_transform(
        (3, *recipe.size),
        interpolation=recipe.interpolation,
        mean=recipe.mean,
        std=recipe.std,
        crop_pct=recipe.crop_pct,
    )
    if upright:
        Image.open(photograph).transpose(Image.Transpose.ROTATE_90).save(photograph)
    ours = load_image(photograph, recipe)
    assert (ours.dtype, ours.shape) == (np.float32, (3, *recipe.size))
    theirs = transform(Image.open(photograph)).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def sixteen_bits(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


def with_transparent_colour(picture: Image.Image) -> Image.Image:
    palette = picture.quantize(32)
    palette.info["transparency"] = 3
    return palette


def with_transparent_colours(picture: Image.Image) -> Image.Image:
    palette = picture.quantize(32)
    palette.info["transparency"] = bytes(range(0, 256, 8))
    return palette


MADE: dict[str, Callable[[Image.Image], Image.Image]] = {
    "1.png": lambda picture: picture.convert("1"),
    "L.png": lambda picture: picture.convert("L"),
    "L.jpg": lambda picture: picture.convert("L"),
    "LA.png": lambda picture: picture.convert("LA"),
    "RGBA.png": lambda picture: Image.merge("RGBA", (*picture.split(), picture.convert("L"))),
    "RGBA.webp": lambda picture: Image.merge("RGBA", (*picture.split(), picture.convert("L"))),
    "CMYK.tif": lambda picture: picture.convert("CMYK"),
    "CMYK.jpg": lambda picture: picture.convert("CMYK"),
    "P.png": lambda picture: picture.quantize(32),
    "P.gif": lambda picture: picture.quantize(32),
    "P-transparent.png": with_transparent_colour,
    "P-half-transparent.png": with_transparent_colours,
    "I16.png": sixteen_bits,
    "I16.tif": sixteen_bits,
}


@pytest.mark.parametrize("name", [*MADE, *(f"orientation-{number}.jpg" for number in range(1, 9))])
def test_every_kind_of_file_as_pillow_converts_it_and_timm_transforms_it(name: str, tmp_path: Path) -> None:
    """timm's data sets convert to RGB and transform. Two steps of ours come before: upright, and 16 bits to 8.

    timm leaves a picture on its side and clips 16 bits to white; neither is what the model was trained on.
    """
    import_timm()
    from timm.data import create_transform

    recipe, path, original = Preprocessing((64, 64)), tmp_path / name, Image.fromarray(skimage.data.chelsea())
    if name in MADE:
        MADE[name](original).save(path)
    else:
        exif = Image.Exif()
        exif[0x0112] = int(path.stem[-1])
        original.save(path, exif=exif)
    with Image.open(path) as file:
        file.load()
        picture = ImageOps.exif_transpose(file)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if isinstance(picture.info.get("transparency"), bytes):
        picture = picture.convert("RGBA")  # Pillow asks for it
    transform = create_transform(
        (3, 64, 64), interpolation="bicubic", mean=recipe.mean, std=recipe.std, crop_pct=recipe.crop_pct
    )
    theirs = transform(picture.convert("RGB")).numpy()
    np.testing.assert_allclose(load_image(path, recipe), theirs, rtol=0, atol=1e-6)
    assert theirs.std() > 0.1


def colour(path: Path) -> list[float]:
    """The colour, 0 to 255, of a picture of one colour."""
    pixels = load_image(path, PLAIN)
    assert (pixels == pixels[:, :1, :1]).all()
    return [round(float(value) * 255) for value in pixels[:, 0, 0]]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [10, 20, 30]),
        ("L", 77, [77, 77, 77]),
        ("LA", (77, 3), [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("P", 5, None),
        ("I;16", 257 * 77, [77, 77, 77]),
    ],
)
def test_every_mode_becomes_rgb(mode: str, value: object, expected: list[int] | None, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture = Image.new(mode, (12, 10), value)  # type: ignore[arg-type]
    if mode == "P":
        picture.putpalette([1, 2, 3] * 5 + [40, 50, 60])
        picture.info["transparency"] = b"\x80" * 6
        expected = [40, 50, 60]
    picture.save(path)
    assert colour(path) == expected


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.tif")
    assert colour(tmp_path / "red.tif") == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    """Each orientation stores the same upright picture, whose upper left quarter is white."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> Pillow's transpose that stores it
    upright = Image.new("L", (16, 16))
    upright.paste(255, (0, 0, 8, 8))
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    pixels = load_image(tmp_path / "photo.png", Preprocessing((16, 16), 1.0, mean=PLAIN.mean, std=PLAIN.std))
    np.testing.assert_array_equal(pixels[0], np.asarray(upright) / np.float32(255))


def test_finds_pictures_in_subfolders_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", "a/b/c.webp", "notes.txt", ".hidden.png", "a/._z.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "folder.png").mkdir()
    found = [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)]
    assert found == ["a/b/c.webp", "a/z.JPG", "b.png"]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no image in"):
        image_files(tmp_path)
    with pytest.raises(UsageError, match="no folder at"):
        image_files(tmp_path / "absent")


def test_an_image_that_is_no_image_is_refused_by_name(photograph: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake.jpg"
    fake.write_text("hello")
    torn = tmp_path / "torn.png"
    torn.write_bytes(photograph.read_bytes()[:20_000])
    for path in (fake, torn, tmp_path / "absent.png"):
        with pytest.raises(UsageError) as failure:
            load_image(path, PLAIN)
        assert f"{path} cannot be decoded as an image" in failure.value.found
        assert failure.value.exit_code == 2


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
