"""Samples that Python code gives: lists, data sets, loaders, factories, and what cannot be read twice."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from deploycli.exporters.data.samples import Samples, open_samples
from deploycli.models.errors import IntegrityError, UsageError
from deploycli.models.spec import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

INPUTS = (TensorSpec("images", (3, 4, 5)),)
TWO = (TensorSpec("images", (3, 4, 5)), TensorSpec("tokens", (7,)))
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((12, 3, 4, 5)).astype(np.float32)
TOKENS = RNG.standard_normal((12, 7)).astype(np.float32)
LABELS = np.array([0] * 9 + [1] * 3)


class Pictures(Dataset[Any]):
    """A data set as users write it: it has a length and indices, and no end when it is iterated."""

    def __init__(self, labelled: bool, noise: float = 0.0) -> None:
        self.labelled = labelled
        self.noise = noise
        self.given: list[int] = []

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> Any:
        self.given.append(index)
        image = torch.tensor(IMAGES[index % len(IMAGES)]) + self.noise * torch.randn(1)
        return (image, int(LABELS[index % len(IMAGES)])) if self.labelled else image


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(IMAGES)

    def __len__(self) -> int:
        return len(IMAGES)


class Anew:
    """Iterates over whatever its function returns, from the start each time."""

    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        return self.start()


def read(samples: Samples, size: int = 5, start: int = 0) -> dict[str, np.ndarray]:
    batches = list(samples.batches(size, start))
    assert all(len(b.inputs["images"]) <= size for b in batches)
    return {name: np.concatenate([b.inputs[name] for b in batches]) for name in batches[0].inputs}


def classes(samples: Samples) -> list[int] | None:
    batches = [batch.labels for batch in samples.batches(5)]
    return None if batches[0] is None else np.concatenate(batches).tolist()  # type: ignore[arg-type]


UNLABELLED: dict[str, Any] = {
    "list": list(IMAGES),
    "tuple": tuple(IMAGES),
    "one array": IMAGES,
    "one tensor": torch.tensor(IMAGES),
    "wider floats": list(IMAGES.astype(np.float64)),
    "tensors that need gradients": [torch.tensor(image, requires_grad=True) for image in IMAGES],
    "dictionaries": [{"images": image} for image in IMAGES],
    "tuples of one": [(image,) for image in IMAGES],
    "data set": Pictures(labelled=False),
    "streamed data set": Streamed(),
    "iterable": Anew(lambda: iter(IMAGES)),
    "tensor data set": TensorDataset(torch.tensor(IMAGES)),
    "loader of samples": DataLoader(Pictures(labelled=False), batch_size=None),
    "loader of batches": DataLoader(Pictures(labelled=False), batch_size=5),
    "loader of dictionaries": DataLoader([{"images": image} for image in IMAGES], batch_size=5),  # type: ignore[arg-type]
}
LABELLED: dict[str, Any] = {
    "list of pairs": list(zip(IMAGES, LABELS, strict=True)),
    "pairs with dictionaries": [({"images": i}, int(label)) for i, label in zip(IMAGES, LABELS, strict=True)],
    "pairs with tuples": [((i,), np.array(label)) for i, label in zip(IMAGES, LABELS, strict=True)],
    "data set": Pictures(labelled=True),
    "tensor data set": TensorDataset(torch.tensor(IMAGES), torch.tensor(LABELS)),
    "loader of pairs": DataLoader(Pictures(labelled=True), batch_size=None),
    "loader of batches": DataLoader(Pictures(labelled=True), batch_size=5),
}


@pytest.mark.parametrize("kind", UNLABELLED)
def test_unlabelled(kind: str) -> None:
    samples = open_samples(UNLABELLED[kind], INPUTS, None)
    assert samples.names == tuple(map(str, range(12)))
    for _ in range(2):
        np.testing.assert_array_equal(read(samples)["images"], IMAGES)
    np.testing.assert_array_equal(read(samples, 4, 7)["images"], IMAGES[7:])
    assert classes(samples) is None
    assert len(bytes.fromhex(samples.sha256)) == 32
    few = open_samples(UNLABELLED[kind], INPUTS, None, limit=3)
    assert few.names == ("2", "6", "10")
    np.testing.assert_array_equal(read(few)["images"], IMAGES[[2, 6, 10]])
    assert few.sha256 != samples.sha256


@pytest.mark.parametrize("kind", LABELLED)
def test_labelled(kind: str) -> None:
    samples = open_samples(LABELLED[kind], INPUTS, None, classes=2)
    np.testing.assert_array_equal(read(samples)["images"], IMAGES)
    assert classes(samples) == LABELS.tolist()
    few = open_samples(LABELLED[kind], INPUTS, None, limit=4)
    assert few.names == ("2", "6", "9", "11")  # two of each class
    assert classes(few) == [0, 0, 1, 1]


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("form", [tuple, list])
def test_two_inputs(form: type, labelled: bool) -> None:
    by_order = [form(pair) for pair in zip(IMAGES, TOKENS, strict=True)]
    by_name = [{"tokens": t, "images": i} for i, t in zip(IMAGES, TOKENS, strict=True)]
    for items in (by_order, by_name):
        source = list(zip(items, LABELS.tolist(), strict=True)) if labelled else items
        samples = open_samples(source, TWO, None)
        found = read(samples)
        np.testing.assert_array_equal(found["images"], IMAGES)
        np.testing.assert_array_equal(found["tokens"], TOKENS)
        assert classes(samples) == (LABELS.tolist() if labelled else None)


def test_a_limit_reads_no_more_than_it_takes() -> None:
    source = Pictures(labelled=False)
    read(open_samples(source, INPUTS, None, limit=3))
    assert set(source.given) == {0, 2, 6, 10}  # the first shows whether there are classes


@pytest.mark.parametrize("source", [iter(IMAGES), (image for image in IMAGES), map(np.copy, IMAGES)])
def test_what_can_be_read_once_is_refused(source: Any) -> None:
    with pytest.raises(UsageError, match="only once") as caught:
        open_samples(source, INPUTS, None)
    assert "a list" in caught.value.expected
    assert "list(...)" in caught.value.hint


@pytest.mark.parametrize("source", [{"images": IMAGES}, 3, None])
def test_what_is_no_iterable_is_refused(source: Any) -> None:
    with pytest.raises(UsageError, match=f"but {type(source).__name__}"):
        open_samples(source, INPUTS, None)


@pytest.mark.parametrize("source", [[], Anew(lambda: iter(())), np.empty((0, 3, 4, 5), np.float32)])
def test_no_samples_are_refused(source: Any) -> None:
    with pytest.raises(UsageError, match="gives no samples"):
        open_samples(source, INPUTS, None)


def shuffled() -> DataLoader[Any]:
    return DataLoader(Pictures(labelled=False), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))


def exhausted() -> Anew:
    kept = iter(IMAGES)
    return Anew(lambda: kept)


def fewer() -> Anew:
    left = itertools.count(len(IMAGES), -1)
    return Anew(lambda: iter(IMAGES[: next(left)]))


CHANGING: dict[str, Callable[[], Any]] = {
    "shuffled loader": shuffled,
    "augmented data set": lambda: Pictures(labelled=False, noise=0.1),
    "augmented, with classes": lambda: Pictures(labelled=True, noise=0.1),
    "one iterator behind an __iter__": exhausted,
    "fewer each time": fewer,
}


@pytest.mark.parametrize("kind", CHANGING)
def test_other_content_on_the_second_reading_is_an_error(kind: str) -> None:
    samples = open_samples(CHANGING[kind](), INPUTS, None)
    with pytest.raises(IntegrityError, match="when it was read") as caught:
        _ = read(samples), read(samples)
    assert "shuffle=False" in caught.value.hint


def failing() -> Iterator[Any]:
    yield IMAGES[0]
    raise OSError("the disk is gone")


SPOILT: dict[str, tuple[Any, str]] = {
    "nested lists": (IMAGES.tolist(), "sample 0 of list has 3 arrays"),
    "numbers": ([1.0, 2.0], "sample 0 of list is float"),
    "text": (["a", "b"], "sample 0 of list is str"),
    "bytes of pictures": (list(IMAGES.astype(np.uint8)), "sample 0 of 12 samples of list has element type uint8"),
    "another shape": ([*IMAGES[:3], IMAGES[3, :1]], r"sample 3 of 4 samples of list has shape \[1, 4, 5\]"),
    "another name": ([{"pixels": image} for image in IMAGES], "sample 0 of 12 samples of list has 'pixels'"),
    "NaN": ([*IMAGES, np.full_like(IMAGES[0], np.nan)], "sample 12 of 13 samples of list: 'images' has NaN"),
    "bfloat16": ([torch.zeros(3, 4, 5, dtype=torch.bfloat16)], "sample 0 of list is no array"),
    "classes out of range": (list(zip(IMAGES, LABELS + 1, strict=True)), "label 2 of sample 9 of list is out of range"),
    "classes that are no numbers": ([(image, "cat") for image in IMAGES], "the labels of list are <U3"),
    "one-hot classes": ([(image, np.eye(2)[0]) for image in IMAGES], r"class of sample 0 of list has shape \[2\]"),
    "a class here and there": ([(IMAGES[0], 1), IMAGES[1]], "2 samples, 1 of them with a class"),
    "code that raises": (Anew(failing), r"sample 1 of Anew was not given: OSError: the disk is gone \(.*\.py:\d+\)"),
    "uneven batch": (
        DataLoader([(torch.zeros(3, 4, 5), 0)] * 2, batch_size=2, collate_fn=lambda b: (b[0][0][None], torch.ones(2))),  # type: ignore[arg-type]
        "arrays of .1. samples and classes .2.",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_samples_are_one_message(kind: str) -> None:
    source, found = SPOILT[kind]
    with pytest.raises(UsageError, match=found):
        read(open_samples(source, INPUTS, None, classes=2))


FACTORY = """
import numpy as np

class Noise:
    def __iter__(self):
        return iter(np.random.default_rng(0).standard_normal((4, 3, 4, 5)))

def make():
    return Noise()

def once():
    return iter(Noise())

def fail():
    raise RuntimeError("no data today")
"""


@pytest.mark.parametrize("place", ["my_data_{0}", "my_data_{0}.py", "./my_data_{0}.py"])
def test_a_factory_is_named_as_a_models_is(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    number = "".join(filter(str.isalpha, place))  # a name for each case: modules are kept
    (tmp_path / f"my_data_{number}.py").write_text(FACTORY)
    place = place.format(number)
    samples = open_samples(f"{place}:make", INPUTS, None, limit=2)
    assert samples.description == f"2 of 4 samples of {place}:make"
    np.testing.assert_array_equal(read(samples, 1)["images"], read(samples)["images"])
    with pytest.raises(UsageError, match="only once"):
        open_samples(f"{place}:once", INPUTS, None)
    with pytest.raises(UsageError, match=r"no data today \(.*my_data.*\.py:\d+\)"):
        open_samples(f"{place}:fail", INPUTS, None)
    with pytest.raises(UsageError, match="no function 'absent'"):
        open_samples(f"{place}:absent", INPUTS, None)
