"""A folder of pictures, prepared as the model's evaluation prepares them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from deploycli.exporters.data.base import Array, Labels, Reader, pick
from deploycli.exporters.data.labels import csv_labels, folder_labels
from deploycli.models.errors import UsageError
from deploycli.models.files import sha256_of
from deploycli.models.preprocess import image_files, load_image

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from deploycli.models.spec import Preprocessing, TensorSpec


class Pictures(Reader):
    """The pictures of a folder and its subfolders, in the order of their sorted paths; see `open_samples`."""

    def __init__(
        self,
        folder: Path,
        inputs: Sequence[TensorSpec],
        preprocessing: Preprocessing | None,
        limit: int | None,
        labels: Path | Literal["folders"] | None,
        classes: int | None,
    ) -> None:
        if preprocessing is None or len(inputs) != 1:
            raise UsageError(
                "nothing says how a picture becomes the model's input"
                if len(inputs) == 1
                else f"the model has {len(inputs)} inputs: nothing says how a picture becomes them",
                expected="a model with one image as its input, and its preprocessing",
                hint="prepared inputs in a .npz file",
            )
        files = image_files(folder)
        paths = [file.relative_to(folder) for file in files]
        targets: Labels | None = None
        if labels == "folders":
            targets = folder_labels(folder, paths, classes)
        elif labels is not None:
            targets = csv_labels(labels, paths, classes)
        # Without labels a folder at the top counts as a class, and the pictures beside it as one more.
        tops = [path.parts[0] if len(path.parts) > 1 else "" for path in paths]
        chosen = pick(tops, limit) if targets is None else pick(targets.tolist(), limit)
        names = tuple(paths[index].as_posix() for index in chosen)
        count = f"{len(names)}" if len(names) == len(files) else f"{len(names)} of {len(files)}"
        description = f"{count} pictures in {folder}"
        super().__init__(names, description, inputs, None if targets is None else targets[list(chosen)])
        self._files = [files[index] for index in chosen]
        self._recipe = preprocessing

    def _read(self, start: int) -> Generator[dict[str, Array] | UsageError, None, None]:
        yield from map(self._load, self._files[start:])

    def _load(self, file: Path) -> dict[str, Array] | UsageError:
        (image,) = self._inputs
        try:
            return {image.name: load_image(file, self._recipe)}  # [3, H, W]
        except UsageError as error:
            return error

    def _digests(self) -> Iterator[bytes]:
        try:
            yield from (bytes.fromhex(sha256_of(file)) for file in self._files)
        except OSError as error:
            raise UsageError(f"a picture cannot be read: {error}") from error
