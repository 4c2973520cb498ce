"""What every reader shares: it makes batches, counts what cannot be read, and refuses what the model does not take."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from deploycli.models.spec import TensorSpec

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]

_NAMED = 3  # how many of the samples that cannot be read a message names


@dataclass(frozen=True)
class Batch:
    """Some samples, in order.

    Attributes:
        inputs: input name -> [B, ...]; B is 0 where every sample of the batch was skipped.
        labels: class of each sample, [B], or None where the data has no labels.
        stop: index, in the names of the samples, after the last one that was read or skipped.
        skipped: names of those that could not be read.
    """

    inputs: Mapping[str, Array]
    labels: Labels | None
    stop: int
    skipped: tuple[str, ...] = ()


class Samples(Protocol):
    """A finite, ordered sequence of model inputs; reading it twice gives the same.

    Attributes:
        names: one name a sample, such as a path relative to the folder.
        description: where they come from, for people.
        random: made up, not data.
    """

    names: Sequence[str]
    description: str
    random: bool

    @property
    def sha256(self) -> str:
        """Hash of the samples' names and contents, in order: 64 hexadecimal digits."""

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        """Read the samples from index ``start`` on, at most ``size`` at a time; one batch is in memory.

        Raises:
            UsageError: more than 1 % of all samples cannot be read, or a sample has NaN or Inf.
        """


class Reader(ABC):
    """Base of all samples. A reader finds its samples when it is made, and reads them one by one, forward.

    Args:
        names: one name a sample.
        description: where they come from, for people.
        inputs: the model's inputs.
        labels: class of each sample, [N], or None.
    """

    random = False

    def __init__(
        self, names: Sequence[str], description: str, inputs: Sequence[TensorSpec], labels: Labels | None
    ) -> None:
        self.names = names
        self.description = description
        self._inputs = tuple(inputs)
        self._labels = labels
        self._unreadable: dict[int, str] = {}  # index -> why; kept from one reading to the next

    @abstractmethod
    def _read(self, start: int) -> Generator[Mapping[str, Array] | UsageError, None, None]:
        """Yield the samples from index ``start`` on as name -> [*shape], or why one cannot be read."""

    def _digests(self) -> Iterator[bytes]:
        """Yield a hash of the content of each sample; here of arrays, all of which can be read."""
        for sample in self._read(0):
            assert not isinstance(sample, UsageError), "what may be unreadable has digests of its own"
            yield hashlib.sha256(b"".join(array.tobytes() for array in sample.values())).digest()

    @cached_property
    def sha256(self) -> str:
        """Hash of names and contents; see `Samples.sha256`."""
        digest = hashlib.sha256()
        for name, content in zip(self.names, self._digests(), strict=True):
            encoded = name.encode("utf-8", "surrogateescape")  # a file name may be no text
            digest.update(len(encoded).to_bytes(8, "big") + encoded + content)
        return digest.hexdigest()

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        """Read batch after batch; see `Samples.batches`."""
        if size < 1 or not 0 <= start <= len(self.names):
            raise ValueError(f"batches of {size} from {start} of {len(self.names)} samples")
        with closing(self._read(start)) as samples:  # a reading that is broken off leaves no file open
            while start < len(self.names):
                stop = min(start + size, len(self.names))
                yield self._batch(samples, start, stop)
                start = stop

    def _batch(self, samples: Iterator[Mapping[str, Array] | UsageError], start: int, stop: int) -> Batch:
        arrays = {spec.name: np.empty((stop - start, *spec.shape), spec.dtype) for spec in self._inputs}
        kept: list[int] = []
        skipped: list[str] = []
        for index in range(start, stop):
            sample = next(samples)
            if isinstance(sample, UsageError):
                self._skip(index, sample)
                skipped.append(self.names[index])
                continue
            for name, value in self._conform(index, sample).items():
                arrays[name][len(kept)] = value
            kept.append(index)
        labels = None if self._labels is None else self._labels[kept]
        return Batch({name: array[: len(kept)] for name, array in arrays.items()}, labels, stop, tuple(skipped))

    def _skip(self, index: int, why: UsageError) -> None:
        self._unreadable[index] = why.found
        count, total = len(self._unreadable), len(self.names)
        if count * 100 > total:
            first = "; ".join([why for _, why in sorted(self._unreadable.items())][:_NAMED])
            raise UsageError(
                f"{count} of {total} samples cannot be read: {first}{'; ...' if count > _NAMED else ''}",
                expected="at most 1 % that cannot be read",
                hint="remove or replace them",
            ) from why

    def _conform(self, index: int, sample: Mapping[str, Array]) -> dict[str, Array]:
        """Return a sample with the model's element types, or refuse it."""
        where = f"sample {self.names[index]} of {self.description}"
        if set(sample) != {spec.name for spec in self._inputs}:
            raise UsageError(
                f"{where} has {', '.join(map(repr, sorted(sample))) or 'nothing'}",
                expected=f"the inputs {', '.join(spec.name for spec in self._inputs)}",
            )
        return {spec.name: conform(sample[spec.name], spec, where) for spec in self._inputs}


def conform(array: Array, spec: TensorSpec, where: str) -> Array:
    """Return one sample with the element type of its input, [*shape].

    Raises:
        UsageError: it has another shape or kind of element, or NaN or Inf.
    """
    check_kind(array.shape, array.dtype, spec, where)
    with np.errstate(over="ignore"):  # what a narrower type cannot hold is Inf, and refused below
        value: Array = array.astype(spec.dtype, copy=False)
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        nan, infinite = int(np.isnan(value).sum()), int(np.isinf(value).sum())
        raise UsageError(
            f"{where}: {spec.name!r} has NaN or Inf: {nan} NaN and {infinite} Inf of {value.size} values",
            expected="finite numbers",
            hint="remove the sample, or mend what prepares it",
        )
    return value


def check_kind(shape: tuple[int, ...], dtype: np.dtype[Any], spec: TensorSpec, where: str) -> None:
    """Refuse a sample's shape, or an element type that would not become the input's without loss of meaning.

    Raises:
        UsageError: it does not fit; a float of another width does.
    """
    wanted = np.dtype(spec.dtype)
    expected = f"{spec.dtype} {list(spec.shape)} for the input {spec.name!r}"
    if dtype.kind == wanted.kind == "f" or (dtype.kind == wanted.kind and np.can_cast(dtype, wanted)):
        if shape != spec.shape:
            raise UsageError(f"{where} has shape {list(shape)}", expected=expected)
        return
    hint = f"convert it to {spec.dtype}"
    if dtype == np.uint8:  # a picture as it was decoded
        hint = "scale and normalise it as the model's preprocessing does, or give a folder of pictures"
    raise UsageError(f"{where} has element type {dtype} and shape {list(shape)}", expected=expected, hint=hint)


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
            expected="0 or more" if classes is None else class_range(classes),
        )
    return labels.astype(np.int64)


def class_range(classes: int) -> str:
    """Return what to say of the classes that there are."""
    return f"0 to {classes - 1}, the model's classes"


def numbered(indices: Sequence[int]) -> tuple[str, ...]:
    """Name samples that have no name of their own by their place in the data, from 0."""
    return tuple(map(str, indices))


# --- Which samples to take where not all are wanted: by arithmetic alone, so that every machine takes the same

Group = TypeVar("Group", int, str)


def pick(groups: Sequence[Group], limit: int | None) -> Sequence[int]:
    """Return the indices of at most ``limit`` samples, ascending, evenly from all groups and evenly spaced in each.

    The groups take turns, in sorted order, until ``limit`` is reached; one that is used up is passed over. A last turn
    that does not reach every group goes to evenly spaced ones.

    Args:
        groups: the group of each sample, such as its class.
        limit: at most so many; None takes all.
    """
    if limit is None or limit >= len(groups):
        return range(len(groups))
    members: dict[Group, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    taken = dict.fromkeys(sorted(members), 0)
    left = limit
    while left:
        waiting = [group for group, number in taken.items() if number < len(members[group])]
        turn = [waiting[place] for place in evenly(len(waiting), min(left, len(waiting)))]
        for group in turn:
            taken[group] += 1
        left -= len(turn)
    return sorted(
        members[group][place] for group, number in taken.items() for place in evenly(len(members[group]), number)
    )


def evenly(count: int, wanted: int) -> list[int]:
    """Return ``wanted`` of ``count`` places, at most all, ascending: the middles of equal stretches."""
    return [(2 * place + 1) * count // (2 * wanted) for place in range(wanted)]
