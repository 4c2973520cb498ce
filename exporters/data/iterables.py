"""Samples that Python code gives: a list, a Dataset, a DataLoader, any object that can be iterated twice.

An item is a sample, or a pair of a sample and its class. A sample is

- an array or tensor [*shape], for a model with one input;
- a dictionary of them, by input name;
- a tuple of them, in the order of the inputs.

An item of what is iterated, but has no ``len`` and no indices, may also be a batch of samples, as a DataLoader gives
it: every array [B, *shape], and the classes [B].

What is iterated, and what has classes, is gone through once when it is opened: to count it and to note the classes.
Each sample is remembered by its hash, and must be the same whenever it is read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycli.exporters.data.base import Array, Labels, Reader, check_labels, numbered, pick
from deploycli.models.errors import DeployError, IntegrityError, UsageError, first_line
from deploycli.models.factory import call_factory, contained, said

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from deploycli.models.spec import TensorSpec

    Item = tuple[dict[str, Array], Any]  # a sample or a batch of them, and its class or classes or None


class IterableSamples(Reader):
    """Samples of an object that can be iterated twice; see `open_samples` and the top of this module."""

    def __init__(
        self, source: Any, origin: str, inputs: Sequence[TensorSpec], limit: int | None, classes: int | None
    ) -> None:
        _check_twice(source, origin)
        self._source = source
        self._origin = origin
        self._inputs = tuple(inputs)
        self._seen: dict[int, bytes] = {}  # place in the source -> hash
        self._indexed = _indexed(source)
        labels: Labels | None = None
        if self._indexed and (not len(source) or self._item(0)[1] is None):
            count = len(source)
        else:
            count, labels = self._survey(classes)
        if not count:
            raise UsageError(f"{origin} gives no samples", expected="one or more")
        self._chosen = pick([0] * count if labels is None else labels.tolist(), limit)
        chosen = f"{len(self._chosen)}" if len(self._chosen) == count else f"{len(self._chosen)} of {count}"
        kept = None if labels is None else labels[list(self._chosen)]
        super().__init__(numbered(self._chosen), f"{chosen} samples of {origin}", inputs, kept)

    def _read(self, start: int) -> Generator[dict[str, Array], None, None]:
        wanted = self._chosen[start:]
        if self._indexed:
            for place in wanted:
                arrays, _ = self._item(place)
                self._recognise(place, arrays)
                yield arrays
            return
        found = 0
        for place, (arrays, _) in enumerate(self._walk()):
            if found < len(wanted) and place == wanted[found]:
                self._recognise(place, arrays)
                yield arrays
                found += 1
        if found < len(wanted):
            raise _changed(f"{self._origin} gave {len(self._seen)} samples, and fewer when it was read again")

    def _digests(self) -> Iterator[bytes]:
        for place, _ in zip(self._chosen, self._read(0), strict=True):
            yield self._seen[place]

    def _survey(self, classes: int | None) -> tuple[int, Labels | None]:
        """Go through all samples once; return how many there are, and their classes if they have any."""
        labels = []
        count = 0
        for place, (arrays, label) in enumerate(self._walk()):
            self._recognise(place, arrays)
            count += 1
            if label is not None and np.ndim(label):
                raise UsageError(f"the class of sample {place} of {self._origin} has shape {list(np.shape(label))}")
            if label is not None:
                labels.append(label)
        if not labels:
            return count, None
        if len(labels) < count:
            raise UsageError(
                f"{self._origin} gives {count} samples, {len(labels)} of them with a class", expected="all, or none"
            )
        return count, check_labels(np.array(labels), count, classes, self._origin)

    def _recognise(self, place: int, arrays: Mapping[str, Array]) -> None:
        digest = hashlib.sha256()
        for name, array in sorted(arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        if self._seen.setdefault(place, digest.digest()) != digest.digest():
            raise _changed(f"sample {place} of {self._origin} is not what it was when it was read before")

    def _walk(self) -> Iterator[Item]:
        """Yield the samples from the first on, with their classes."""
        if self._indexed:
            yield from map(self._item, range(len(self._source)))
            return
        items = iter(self._source)
        place = 0
        while (item := self._call(lambda: next(items, _END), place)) is not _END:
            for sample in self._unpack(self._parse(item, place), place):
                yield sample
                place += 1

    def _item(self, place: int) -> Item:
        return self._parse(self._call(lambda: self._source[place], place), place)

    def _call(self, give: Callable[[], Any], place: int) -> Any:
        try:
            with contained():
                return give()
        except DeployError:
            raise
        except Exception as error:  # a stranger's code raises what it likes
            raise UsageError(f"sample {place} of {self._origin} was not given: {said(error)}") from error

    def _parse(self, item: Any, place: int) -> Item:
        """Read an item as inputs and class: a pair is inputs and class unless it is the model's two inputs."""
        label = None
        if isinstance(item, tuple | list) and len(item) == 2:
            whole = len(self._inputs) == 2 and not isinstance(item[0], tuple | list | Mapping)
            if not whole:
                item, label = item
        where = f"sample {place} of {self._origin}"
        if isinstance(item, Mapping):
            arrays = dict(item)
        elif isinstance(item, tuple | list):
            arrays = self._named(item, where)
        else:
            arrays = self._named([item], where)
        return {name: _array(value, where) for name, value in arrays.items()}, _label(label)

    def _named(self, values: Sequence[Any], where: str) -> dict[str, Any]:
        names = [spec.name for spec in self._inputs]
        if len(values) != len(names):
            raise UsageError(f"{where} has {len(values)} arrays", expected=f"{len(names)}: {', '.join(names)}")
        return dict(zip(names, values, strict=True))

    def _unpack(self, item: Item, place: int) -> Iterator[Item]:
        """Yield the samples of an item that is a batch, or the item."""
        arrays, label = item
        ranks = {spec.name: len(spec.shape) + 1 for spec in self._inputs}
        if any(array.ndim != ranks.get(name) for name, array in arrays.items()):
            yield item
            return
        sizes = {len(array) for array in arrays.values()}
        if len(sizes) != 1 or (label is not None and np.shape(label) != (*sizes,)):
            raise UsageError(
                f"the batch of {self._origin} from sample {place} on has arrays of {sorted(sizes)} samples"
                f"{'' if label is None else f' and classes {list(np.shape(label))}'}",
                expected="one number of samples",
            )
        for row in range(*sizes):
            yield {name: array[row] for name, array in arrays.items()}, None if label is None else label[row]


_END = object()


def made_by_factory(target: str) -> object:
    """Call a function that returns samples.

    Raises:
        UsageError: there is no such function, or it fails.
    """
    try:
        return call_factory(target, {})
    except DeployError:
        raise
    except Exception as error:  # a stranger's code raises what it likes
        raise UsageError(
            f"{target} gave no samples: {said(error)}",
            expected="a function without arguments that returns samples",
        ) from error


def _check_twice(source: Any, origin: str) -> None:
    works = "a list, a Dataset, a DataLoader, or any object whose __iter__ starts anew"
    if isinstance(source, Iterator):
        raise UsageError(
            f"{origin} can be iterated only once", expected=works, hint="return what it loops over, or list(...) of it"
        )
    if isinstance(source, Mapping) or not (hasattr(source, "__iter__") or hasattr(source, "__getitem__")):
        raise UsageError(f"{origin} is no iterable of samples but {type(source).__name__}", expected=works)


def _indexed(source: Any) -> bool:
    """Whether samples can be had by index; asking is the only way to know of an IterableDataset that they cannot."""
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        return False
    try:
        with contained():
            return not len(source) or source[0] is not None
    except Exception:  # if it is more than that, iterating says so
        return not hasattr(source, "__iter__")


def _array(value: Any, where: str) -> Array:
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu()
    elif not hasattr(value, "__array__") and not hasattr(value, "__array_interface__"):
        raise UsageError(f"{where} is {type(value).__name__}", expected="a NumPy array or a tensor")
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:  # bfloat16, for one
        raise UsageError(f"{where} is no array: {first_line(error)}", expected="float32 numbers") from error


def _label(value: Any) -> Any:
    """Return a class, or the classes of a batch, as NumPy has them."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return None if value is None else np.asarray(value)[()]


def _changed(found: str) -> IntegrityError:
    return IntegrityError(
        found,
        expected="the same samples in the same order whenever they are read",
        hint="shuffle=False, and no random augmentation",
    )
