"""Pictures against timm's evaluation transform, and pictures that are none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageOps

from deploycli.exporters.data.pictures import image_files, load_image
from deploycli.models.errors import UsageError
from deploycli.models.registry import resolve
from deploycli.models.spec import Preprocessing
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
