"""NumPy's array files, read sample by sample: a file may be larger than memory, and a .npz may be compressed."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from deploycli.exporters.data.base import Array, Labels, Reader, check_kind, check_labels, numbered, pick
from deploycli.models.errors import UsageError, first_line
from deploycli.models.npy import array_header

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from deploycli.models.spec import TensorSpec

LABELS = "labels"
"""Name of the array of a .npz file that holds the class of each sample."""

_CHUNK = 1 << 16  # bytes that are read at a time to get past them

# What zipfile and NumPy's reader of headers raise on a file that is torn, or is something else.
_READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    SyntaxError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
)


class ArrayFile(Reader):
    """A .npy file for a model with one input, or a .npz file with an array for each input; see `open_samples`."""

    def __init__(self, path: Path, inputs: Sequence[TensorSpec], limit: int | None, classes: int | None) -> None:
        stored = _stored_arrays(path, inputs)
        names = [spec.name for spec in inputs]
        extra = stored.keys() - {*names, LABELS}
        if missing := [name for name in names if name not in stored] or sorted(extra):
            raise UsageError(
                f"{path} holds the arrays {', '.join(map(repr, stored)) or 'none'}: "
                f"{', '.join(map(repr, missing))} {'is unknown' if extra and missing[0] in extra else 'is missing'}",
                expected=f"{', '.join(map(repr, names))}, and perhaps {LABELS!r}",
            )
        for spec in inputs:
            array = stored[spec.name]
            check_kind(array.shape[1:], array.dtype, spec, f"each sample of {path}")
        counts = {name: stored[name].shape[0] for name in names}
        count = counts[names[0]]
        if count < 1 or len(set(counts.values())) > 1:
            found = ", ".join(f"{number} of {name!r}" for name, number in counts.items())
            raise UsageError(f"{path} holds the samples {found}", expected="one or more, as many for each input")
        labels: Labels | None = None
        if LABELS in stored and LABELS not in names:
            labels = check_labels(stored[LABELS].whole(), count, classes, str(path))
        self._chosen = pick([0] * count if labels is None else labels.tolist(), limit)
        chosen = f"{len(self._chosen)}" if len(self._chosen) == count else f"{len(self._chosen)} of {count}"
        kept = None if labels is None else labels[list(self._chosen)]
        super().__init__(numbered(self._chosen), f"{chosen} samples in {path}", inputs, kept)
        self._stored = {name: stored[name] for name in names}

    def _read(self, start: int) -> Generator[dict[str, Array], None, None]:
        with ExitStack() as stack:
            rows = {
                name: stack.enter_context(stored.rows(self._chosen[start:])) for name, stored in self._stored.items()
            }
            for _ in range(start, len(self.names)):
                yield {name: next(row) for name, row in rows.items()}


def sample_shapes(path: Path, inputs: Sequence[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Return the shape of one sample of each array in a file, by name.

    Raises:
        UsageError: the file cannot be read, or holds no array for an input.
    """
    stored = _stored_arrays(path, inputs)
    if missing := [spec.name for spec in inputs if spec.name not in stored]:
        raise UsageError(
            f"{path} holds the arrays {', '.join(map(repr, stored)) or 'none'}: {missing[0]!r} is missing",
            expected=", ".join(repr(spec.name) for spec in inputs),
        )
    return {spec.name: stored[spec.name].shape[1:] for spec in inputs}


def whole_arrays(path: Path, names: Sequence[str]) -> dict[str, Array]:
    """Read a file whole: one array for each name, whatever its axes are; a ``.npy`` file has the only one.

    Raises:
        UsageError: the file cannot be read, or does not hold these arrays.
    """
    if path.suffix == ".npy" and len(names) != 1:
        raise UsageError(
            f"{path} is one array, the graph has {len(names)} inputs", expected=f"a .npz file with {', '.join(names)}"
        )
    try:
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            held = {names[0]: loaded} if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded.files}
    except _READ_ERRORS as error:
        raise _unreadable(path, first_line(error)) from error
    if missing := [name for name in names if name not in held]:
        raise UsageError(
            f"{path} holds the arrays {', '.join(map(repr, held)) or 'none'}: {missing[0]!r} is missing",
            expected=", ".join(map(repr, names)),
        )
    return {name: held[name] for name in names}


@dataclass(frozen=True)
class _Stored:
    """One array [N, *shape] in a file.

    Attributes:
        path: the file.
        member: its name in a .npz file, or None in a .npy file.
        dtype: element type.
        shape: all axes.
        offset: where the elements begin, after the header, bytes.
    """

    path: Path
    member: str | None
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @contextmanager
    def rows(self, indices: Sequence[int]) -> Iterator[Iterator[Array]]:
        """Open the file, and give the samples at these ascending indices, [*shape], one at a time."""
        with _open(self.path, self.member) as stream:
            yield self._rows(stream, indices)

    def whole(self) -> Array:
        """Return the whole array."""
        with self.rows(range(self.shape[0])) as rows:
            return np.array(list(rows), self.dtype).reshape(self.shape)

    def _rows(self, stream: IO[bytes], indices: Sequence[int]) -> Iterator[Array]:
        size = self.dtype.itemsize * math.prod(self.shape[1:])
        for index in indices:
            try:
                self._go_to(stream, self.offset + index * size)
                data = stream.read(size)
            except _READ_ERRORS as error:
                raise _unreadable(self.path, first_line(error)) from error
            if len(data) != size:
                raise _unreadable(self.path, f"it ends within sample {index}")
            yield np.frombuffer(data, self.dtype).reshape(self.shape[1:])

    def _go_to(self, stream: IO[bytes], place: int) -> None:
        """Move forward. What lies between in a .npz file is read: zipfile's own seek takes 16 MB at a time for it."""
        if self.member is None:
            stream.seek(place)
        while (left := place - stream.tell()) > 0 and stream.read(min(left, _CHUNK)):
            pass


def _stored_arrays(path: Path, inputs: Sequence[TensorSpec]) -> Mapping[str, _Stored]:
    """Read the headers of a file; a .npy file's only array goes by the name of the model's only input."""
    if path.suffix == ".npy":
        if len(inputs) != 1:
            raise UsageError(
                f"{path} is one array, the model has {len(inputs)} inputs",
                expected=f"a .npz file with {', '.join(spec.name for spec in inputs)}",
            )
        return {inputs[0].name: _stored(path, None)}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except _READ_ERRORS as error:
        raise _unreadable(path, first_line(error)) from error
    return {member.removesuffix(".npy"): _stored(path, member) for member in members}


def _stored(path: Path, member: str | None) -> _Stored:
    where = path if member is None else f"{path}: {member}"
    try:
        with _open(path, member) as stream:
            shape, by_column, dtype = array_header(stream)
            offset = stream.tell()
            held = _length(path, member) - offset
    except _READ_ERRORS as error:
        raise _unreadable(where, first_line(error)) from error
    if dtype.hasobject or dtype.itemsize == 0:
        raise _unreadable(where, f"it holds {dtype}, not numbers")
    if not shape:
        raise _unreadable(where, "it holds a single number")
    if by_column and len(shape) > 1:
        raise UsageError(
            f"{where} is stored column by column: each sample is scattered over the whole file",
            expected="samples one after the other",
            hint="np.ascontiguousarray before np.save",
        )
    if held < dtype.itemsize * math.prod(shape) or min(shape) < 0:
        raise _unreadable(where, f"it ends after {held} bytes of an array {list(shape)}")
    return _Stored(path, member, dtype, shape, offset)


@contextmanager
def _open(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    if member is None:
        with path.open("rb") as stream:
            yield stream
    else:
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            yield stream


def _length(path: Path, member: str | None) -> int:
    """Return the bytes of a file, or of a member when it is unpacked, without reading them."""
    if member is None:
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo(member).file_size


def _unreadable(where: object, why: str) -> UsageError:
    return UsageError(
        f"{where} cannot be read as arrays ({why})",
        expected="what np.save or np.savez writes, without objects",
        hint="write the file again",
    )
