"""Samples in NumPy's files, and that their number costs no memory."""

from __future__ import annotations

import tracemalloc
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploycli.exporters.data.samples import Samples, open_samples
from deploycli.models.errors import UsageError
from deploycli.models.spec import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INPUTS = (TensorSpec("images", (3, 4, 5)),)
TWO = (TensorSpec("images", (3, 4, 5)), TensorSpec("tokens", (7,), "int64"))
IMAGES = np.random.default_rng(0).standard_normal((23, 3, 4, 5)).astype(np.float32)
TOKENS = np.arange(23 * 7).reshape(23, 7)


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def read(samples: Samples, size: int = 5, start: int = 0) -> dict[str, np.ndarray]:
    batches = list(samples.batches(size, start))
    return {name: np.concatenate([b.inputs[name] for b in batches]) for name in batches[0].inputs}


def test_npy(tmp_path: Path) -> None:
    samples = open_samples(save(tmp_path / "images.npy", IMAGES), INPUTS, None)
    assert samples.names == tuple(map(str, range(23)))
    assert samples.description == f"23 samples in {tmp_path / 'images.npy'}"
    for _ in range(2):
        np.testing.assert_array_equal(read(samples)["images"], IMAGES)
    np.testing.assert_array_equal(read(samples, 4, 9)["images"], IMAGES[9:])
    assert all(batch.labels is None for batch in samples.batches(5))


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_with_labels(tmp_path: Path, write: Callable[..., None]) -> None:
    labels = np.array([0] * 20 + [1] * 3, np.uint8)
    write(tmp_path / "data.npz", images=IMAGES, tokens=TOKENS, labels=labels)
    samples = open_samples(tmp_path / "data.npz", TWO, None, classes=2)
    for start in (0, 11):
        found = read(samples, 5, start)
        np.testing.assert_array_equal(found["images"], IMAGES[start:])
        np.testing.assert_array_equal(found["tokens"], TOKENS[start:])
    batches = [batch.labels for batch in samples.batches(8)]
    np.testing.assert_array_equal(np.concatenate(batches), labels)  # type: ignore[arg-type]
    limited = open_samples(tmp_path / "data.npz", TWO, None, limit=6)
    assert limited.names == ("3", "10", "16", "20", "21", "22")  # three of each class
    np.testing.assert_array_equal(read(limited)["images"], IMAGES[[3, 10, 16, 20, 21, 22]])
    (batch,) = limited.batches(10)
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_compressed_or_not_the_hash_is_of_the_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", images=IMAGES)
    np.savez_compressed(tmp_path / "small.npz", images=IMAGES)
    np.savez(tmp_path / "other.npz", images=IMAGES + (np.arange(IMAGES.size) == IMAGES.size - 1).reshape(IMAGES.shape))
    paths = [tmp_path / name for name in ("plain.npz", "small.npz", "other.npz")] + [save(tmp_path / "x.npy", IMAGES)]
    plain, small, other, npy = (open_samples(path, INPUTS, None).sha256 for path in paths)
    assert plain == small == npy != other


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_other_floats_are_converted(tmp_path: Path, dtype: str) -> None:
    found = read(open_samples(save(tmp_path / "x.npy", IMAGES.astype(dtype)), INPUTS, None))["images"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, IMAGES.astype(dtype).astype(np.float32))


def save_npz(path: Path, array: np.ndarray) -> None:
    np.savez(path, images=array)


def save_compressed(path: Path, array: np.ndarray) -> None:
    np.savez_compressed(path, images=array)


@pytest.mark.parametrize(("suffix", "write"), [("npy", np.save), ("npz", save_npz), ("npz", save_compressed)])
def test_2000_samples_need_the_memory_of_32(tmp_path: Path, suffix: str, write: Callable[..., None]) -> None:
    inputs = (TensorSpec("images", (3, 32, 32)),)
    sample = 3 * 32 * 32 * 4  # bytes

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.{suffix}"
        write(path, np.zeros((count, 3, 32, 32), np.float32))
        tracemalloc.start()
        for _ in open_samples(path, inputs, None).batches(8):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(32), peak(2000)
    assert 8 * sample < few < 32 * sample
    assert many < few + 2000 * 100  # the name of a sample is kept: some bytes of it


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    spoilt = IMAGES.astype(np.float64)
    spoilt[17, 2, 3, 1] = value
    samples = open_samples(save(tmp_path / "x.npy", spoilt), INPUTS, None)
    with pytest.raises(UsageError, match=r"sample 17 of 23 samples in .*x\.npy: 'images' has NaN or Inf: . NaN"):
        read(samples)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (IMAGES.astype(np.uint8), "element type uint8"),
        (IMAGES.astype(np.int32), "element type int32"),
        (IMAGES.astype(np.complex64), "element type complex64"),
        (IMAGES > 0, "element type bool"),
        (IMAGES[0], r"shape \[4, 5\]"),
        (IMAGES[:, :, :, :4], r"shape \[3, 4, 4\]"),
        (IMAGES[:0], "0 of 'images'"),
        (IMAGES.astype(object), "it holds object"),
        (np.float32(1), "a single number"),
        (np.asfortranarray(IMAGES), "column by column"),
        (np.zeros(3, [("a", "f4")]), "element type"),
    ],
)
def test_another_kind_of_array_is_refused(tmp_path: Path, array: Any, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        open_samples(save(tmp_path / "x.npy", array), INPUTS, None)


def test_pictures_as_bytes_get_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        open_samples(save(tmp_path / "x.npy", IMAGES.astype(np.uint8)), INPUTS, None)
    assert "preprocessing" in caught.value.hint


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({"images": IMAGES}, "'tokens' is missing"),
        ({"arr_0": IMAGES, "tokens": TOKENS}, "'images' is missing"),
        ({"images": IMAGES, "tokens": TOKENS, "label": TOKENS[:, 0]}, "'label' is unknown"),
        ({"images": IMAGES, "tokens": TOKENS[:9]}, "23 of 'images', 9 of 'tokens'"),
        ({"images": IMAGES, "tokens": TOKENS.astype(np.uint64)}, "element type uint64"),
        ({"images": IMAGES, "tokens": TOKENS, "labels": TOKENS[:, 0]}, "label 7 of sample 1 of .* is out of range"),
        ({"images": IMAGES, "tokens": TOKENS, "labels": -TOKENS[:, 0]}, "label -7 of sample 1 of .* is out of range"),
        ({"images": IMAGES, "tokens": TOKENS, "labels": TOKENS[:9, 0]}, r"labels of .* are int64 \[9\]"),
        ({"images": IMAGES, "tokens": TOKENS, "labels": TOKENS}, r"labels of .* are int64 \[23, 7\]"),
        ({"images": IMAGES, "tokens": TOKENS, "labels": IMAGES[:, 0, 0, 0]}, "labels of .* are float32"),
    ],
)
def test_npz_that_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, Any], found: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UsageError, match=found):
        open_samples(tmp_path / "x.npz", TWO, None, classes=5)


def test_narrow_integers_are_widened(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=IMAGES, tokens=TOKENS.astype(np.int16))
    found = read(open_samples(tmp_path / "x.npz", TWO, None))["tokens"]
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, TOKENS)


def test_an_input_may_be_called_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", labels=IMAGES)
    samples = open_samples(tmp_path / "x.npz", (TensorSpec("labels", (3, 4, 5)),), None)
    assert next(samples.batches(3)).labels is None


def test_npy_of_a_model_with_two_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model has 2 inputs") as caught:
        open_samples(save(tmp_path / "x.npy", IMAGES), TWO, None)
    assert "images, tokens" in caught.value.expected


def test_labels_of_an_array_file_lie_within_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="labels were given for") as caught:
        open_samples(save(tmp_path / "x.npy", IMAGES), INPUTS, None, labels="folders")
    assert ".npz" in caught.value.hint


@pytest.mark.parametrize("keep", [0, 5, 60, 130, -1])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_torn_file_is_one_message(tmp_path: Path, suffix: str, keep: int) -> None:
    whole = tmp_path / f"whole{suffix}"
    (np.save if suffix == ".npy" else np.savez)(whole, IMAGES)
    torn = tmp_path / f"torn{suffix}"
    torn.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(UsageError, match=rf"torn{suffix}.* cannot be read as arrays"):
        open_samples(torn, INPUTS, None)
    with pytest.raises(UsageError, match="absent"):
        open_samples(tmp_path / f"absent{suffix}", INPUTS, None)


def test_a_file_that_shrinks_while_it_is_read_is_one_message(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", IMAGES)
    samples = open_samples(path, INPUTS, None)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UsageError, match="it ends within sample 11"):
        read(samples)


def test_a_damaged_member_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=IMAGES)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read as arrays"):
        read(open_samples(path, INPUTS, None))


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", b"hello")
    with pytest.raises(UsageError, match=r"images\.npy cannot be read"):
        open_samples(tmp_path / "x.npz", INPUTS, None)
