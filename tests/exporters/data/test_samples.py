"""Pictures and noise as samples, and what all samples share: balance, batches, what is skipped and what is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deploycli.exporters.data.base import evenly, pick
from deploycli.exporters.data.pictures import load_image
from deploycli.exporters.data.samples import Samples, open_samples, random_samples
from deploycli.models.errors import UsageError
from deploycli.models.spec import Preprocessing, TensorSpec

INPUTS = (TensorSpec("images", (3, 24, 24)),)
RECIPE = Preprocessing((24, 24))
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real pictures, made small, as ``class/number.png``: 3, 6, 9 and 12 tiles of four photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, name in enumerate(PHOTOGRAPHS, 1):
        (folder / name).mkdir()
        picture = Image.fromarray(getattr(skimage.data, name)()).resize((120, 120))
        for tile in range(3 * number):
            left, top = 40 * (tile % 3), 30 * (tile // 3)
            picture.crop((left, top, left + 40, top + 30)).save(folder / name / f"{tile}.png")
    return folder


@pytest.fixture
def folder(photographs: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(photographs, tmp_path / "photographs"))


def many(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("L", (24, 24), number % 256).save(folder / f"{number:04}.png")
    return folder


def read(samples: Samples, size: int = 7, start: int = 0) -> tuple[np.ndarray, list[str]]:
    """Everything that is read, and the names of what was skipped."""
    batches = list(samples.batches(size, start))
    assert batches[-1].stop == len(samples.names)
    assert all(len(b.inputs["images"]) + len(b.skipped) <= size for b in batches)
    return np.concatenate([b.inputs["images"] for b in batches]), [name for b in batches for name in b.skipped]


def test_pictures_are_prepared_as_the_model_evaluates_them(photographs: Path) -> None:
    samples = open_samples(photographs, INPUTS, RECIPE)
    assert len(samples.names) == 30
    assert not samples.random
    assert samples.description == f"30 pictures in {photographs}"
    pixels, skipped = read(samples)
    assert skipped == []
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, [load_image(photographs / name, RECIPE) for name in samples.names])


@pytest.mark.parametrize("size", [1, 7, 30, 1000])
def test_every_batch_size_and_every_start_give_the_same(photographs: Path, size: int) -> None:
    samples = open_samples(str(photographs), INPUTS, RECIPE)
    whole, _ = read(samples)
    np.testing.assert_array_equal(read(samples, size)[0], whole)
    for start in (0, 1, 7, 29, 30):
        rest = [b.inputs["images"] for b in samples.batches(size, start)]
        np.testing.assert_array_equal(np.concatenate([whole[:start], *rest]), whole)


def test_interrupted_reading_goes_on_where_it_stopped(photographs: Path) -> None:
    uninterrupted = list(open_samples(photographs, INPUTS, RECIPE).batches(4))
    reading = open_samples(photographs, INPUTS, RECIPE).batches(4)
    parts = [next(reading), next(reading)]
    reading.close()  # type: ignore[attr-defined]  # it is a generator
    parts += open_samples(photographs, INPUTS, RECIPE).batches(4, parts[-1].stop)
    assert [b.stop for b in parts] == [b.stop for b in uninterrupted]
    for part, expected in zip(parts, uninterrupted, strict=True):
        np.testing.assert_array_equal(part.inputs["images"], expected.inputs["images"])


def test_impossible_batches_are_refused(photographs: Path) -> None:
    samples = open_samples(photographs, INPUTS, RECIPE)
    for size, start in ((0, 0), (1, -1), (1, 31)):
        with pytest.raises(ValueError, match="of 30 samples"):
            list(samples.batches(size, start))


def test_the_hash_is_of_names_and_contents(folder: Path, photographs: Path) -> None:
    def digest(**options: int) -> str:
        return open_samples(folder, INPUTS, RECIPE, **options).sha256  # type: ignore[arg-type]

    before = digest()
    assert before == open_samples(photographs, INPUTS, RECIPE).sha256
    assert len(bytes.fromhex(before)) == 32
    assert digest(limit=29) != before
    (folder / "rocket/0.png").rename(folder / "rocket/00.png")
    renamed = digest()
    (folder / "rocket/00.png").write_bytes((folder / "rocket/1.png").read_bytes())
    assert len({before, renamed, digest()}) == 3


def test_a_limit_takes_as_many_of_each_class(photographs: Path) -> None:
    def chosen(limit: int) -> Counter[str]:
        names = open_samples(photographs, INPUTS, RECIPE, limit=limit).names
        assert len(set(names)) == len(names)
        assert list(names) == sorted(names)
        return Counter(name.partition("/")[0] for name in names)

    assert chosen(8) == dict.fromkeys(PHOTOGRAPHS, 2)
    assert chosen(20) == {"astronaut": 3, "chelsea": 6, "coffee": 5, "rocket": 6}
    assert chosen(30) == chosen(100) == {"astronaut": 3, "chelsea": 6, "coffee": 9, "rocket": 12}
    spread = open_samples(photographs, INPUTS, RECIPE, limit=12).names[-3:]
    assert spread == ("rocket/10.png", "rocket/4.png", "rocket/8.png")  # the middles of thirds, by sorted name


def test_a_flat_folder_is_sampled_evenly(tmp_path: Path) -> None:
    samples = open_samples(many(tmp_path / "flat", 100), INPUTS, RECIPE, limit=4)
    assert samples.names == ("0012.png", "0037.png", "0062.png", "0087.png")
    assert samples.description == f"4 of 100 pictures in {tmp_path / 'flat'}"


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.integers(1, 90))
def test_picks_are_balanced(groups: list[int], limit: int) -> None:
    chosen = pick(groups, limit)
    assert len(chosen) == min(limit, len(groups))
    assert list(chosen) == sorted(set(chosen))
    held, taken = Counter(groups), Counter(groups[index] for index in chosen)
    most = max(taken.values())
    assert all(taken[group] >= min(most - 1, held[group]) for group in held)


@given(st.integers(1, 500), st.data())
def test_evenly_spaced_places_are_distinct_and_even(count: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, count))
    places = evenly(count, wanted)
    assert 0 <= places[0] <= places[-1] < count
    gaps = np.diff(places)
    assert (gaps >= 1).all()
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def test_picks_do_not_depend_on_the_order_of_the_file_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_samples(folder, INPUTS, RECIPE, limit=11)
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(listed(self, pattern))))
    after = open_samples(folder, INPUTS, RECIPE, limit=11)
    assert (after.names, after.sha256) == (before.names, before.sha256)


def test_one_broken_picture_of_300_is_skipped_and_counted(tmp_path: Path) -> None:
    folder = many(tmp_path / "pictures", 300)
    whole, _ = read(open_samples(folder, INPUTS, RECIPE))
    (folder / "0100.png").write_bytes((folder / "0100.png").read_bytes()[:40])
    samples = open_samples(folder, INPUTS, RECIPE)
    for _ in range(5):  # it is the same picture each time
        pixels, skipped = read(samples, 16)
        assert skipped == ["0100.png"]
        np.testing.assert_array_equal(pixels, np.delete(whole, 100, 0))
    alone = list(samples.batches(1, 100))[0]  # noqa: RUF015 - the rest of the reading belongs to it
    assert alone.inputs["images"].shape == (0, 3, 24, 24)
    assert (alone.stop, alone.skipped) == (101, ("0100.png",))


def test_labels_stay_with_their_pictures_beside_a_broken_one(tmp_path: Path) -> None:
    folder = many(tmp_path / "pictures", 100)
    table = tmp_path / "labels.csv"
    table.write_text("".join(f"{number:04}.png,{number}\n" for number in range(100)))
    (folder / "0042.png").write_bytes(b"")
    batches = list(open_samples(folder, INPUTS, RECIPE, labels=table).batches(9))
    labels = [label for b in batches if b.labels is not None for label in b.labels.tolist()]
    assert labels == [number for number in range(100) if number != 42]


def test_two_broken_pictures_of_100_are_an_error(tmp_path: Path) -> None:
    folder = many(tmp_path / "pictures", 100)
    for name in ("0003.png", "0050.png"):
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"2 of 100 samples cannot be read: .*0003\.png .*0050\.png") as caught:
        read(open_samples(folder, INPUTS, RECIPE))
    assert "at most 1 %" in caught.value.expected


def test_many_broken_pictures_end_the_reading_early(tmp_path: Path) -> None:
    folder = many(tmp_path / "pictures", 9)
    for file in folder.iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"1 of 9 samples cannot be read: .*0000\.png"):
        next(open_samples(folder, INPUTS, RECIPE).batches(9))


def test_pictures_of_a_model_that_takes_none_are_refused(photographs: Path) -> None:
    with pytest.raises(UsageError, match="how a picture becomes"):
        open_samples(photographs, INPUTS, None)
    with pytest.raises(UsageError, match="the model has 2 inputs"):
        open_samples(photographs, (*INPUTS, TensorSpec("mask", (24,))), RECIPE)
    with pytest.raises(UsageError, match=r"has shape \[3, 24, 24\]") as caught:
        read(open_samples(photographs, (TensorSpec("images", (3, 32, 32)),), RECIPE))
    assert "[3, 32, 32] for the input 'images'" in caught.value.expected


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(photographs: Path, limit: int) -> None:
    with pytest.raises(UsageError, match=f"a limit of {limit}"):
        open_samples(photographs, INPUTS, RECIPE, limit=limit)


@pytest.mark.parametrize("source", ["absent", "absent/deeper", "text.txt"])
def test_what_is_no_data_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").touch()
    with pytest.raises(UsageError, match=source) as caught:
        open_samples(tmp_path / source, INPUTS, RECIPE)
    assert "a folder of pictures" in caught.value.expected


def test_noise_is_seeded_and_says_that_it_is_noise() -> None:
    samples = random_samples(INPUTS, 20, 3)
    assert samples.random
    assert "random" in samples.description
    pixels, _ = read(samples)
    assert pixels.shape == (20, 3, 24, 24)
    assert abs(pixels.mean()) < 0.02
    assert abs(pixels.std() - 1) < 0.02
    assert len({sample.tobytes() for sample in pixels}) == 20
    again = random_samples(INPUTS, 20, 3)
    np.testing.assert_array_equal(read(again, 3, 5)[0], pixels[5:])
    assert again.sha256 == samples.sha256
    assert random_samples(INPUTS, 20, 4).sha256 != samples.sha256
    np.testing.assert_array_equal(read(random_samples(INPUTS, 5, 3))[0], pixels[:5])
    with pytest.raises(UsageError, match="0 random samples"):
        random_samples(INPUTS, 0, 0)
