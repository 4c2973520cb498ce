"""Data to calibrate and to evaluate with: a finite, ordered sequence of model inputs that is read in batches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deploycli.exporters.bundle.golden import synthetic_inputs
from deploycli.exporters.data.arrays import ArrayFile
from deploycli.exporters.data.base import Array, Batch, Reader, Samples, numbered
from deploycli.exporters.data.iterables import IterableSamples, made_by_factory
from deploycli.models.errors import UsageError
from deploycli.models.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from deploycli.models.spec import Preprocessing, TensorSpec

__all__ = ["Batch", "Samples", "open_samples", "random_samples"]


def open_samples(
    source: str | Path | Iterable[Any],
    inputs: Sequence[TensorSpec],
    preprocessing: Preprocessing | None,
    *,
    limit: int | None = None,
    labels: Path | Literal["folders"] | None = None,
    classes: int | None = None,
) -> Samples:
    """Open a folder of pictures, an array file, or a Python iterable; they are read batch by batch.

    Args:
        source: a folder of pictures, flat or one folder a class; a ``.npy`` file, [N, *shape], for a model with one
            input; a ``.npz`` file with an array [N, *shape] for each input, by name, and perhaps ``labels``, [N]; an
            iterable that can be iterated twice, see `deploycli.exporters.data.iterables`; or
            ``package.module:factory`` or ``path/to/file.py:factory``, a function without arguments that returns one.
        inputs: the model's inputs; every sample must have their shapes and element types.
        preprocessing: how a picture becomes the input; only pictures need it.
        limit: at most so many samples: evenly spaced, and equally many of each class where there are labels or class
            folders. They stay in the order of the data.
        labels: of pictures: ``folders``, where the class is the index of the picture's folder among the sorted names,
            as in torchvision's ImageFolder, or a CSV file of path and class. Other sources carry their labels.
        classes: how many classes the model has, where that is known: no label may lie outside.

    Raises:
        UsageError: the source or its labels cannot be used.
        IntegrityError: while reading: an iterable gives something else than it gave before.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} samples", expected="1 or more")
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.is_dir():
        from deploycli.exporters.data.pictures import Pictures  # needs Pillow, the other readers do not

        return Pictures(path, inputs, preprocessing, limit, labels, classes)
    if labels is not None:
        raise UsageError(
            f"labels were given for {source if path is not None else type(source).__name__}",
            expected="a folder of pictures",
            hint="an array named labels in a .npz file, or an iterable of (inputs, label)",
        )
    if path is None:
        return IterableSamples(source, type(source).__name__, inputs, limit, classes)
    if path.suffix in (".npy", ".npz"):
        return ArrayFile(path, inputs, limit, classes)
    if ":" in path.name and not path.exists():
        return IterableSamples(made_by_factory(str(source)), str(source), inputs, limit, classes)
    raise UsageError(
        f"{path} is no data" if path.exists() else f"there is no folder or file {path}",
        expected="a folder of pictures, a .npy or .npz file, package.module:factory, or path/to/file.py:factory",
    )


def random_samples(inputs: Sequence[TensorSpec], count: int, seed: int) -> Samples:
    """Make up ``count`` samples of seeded normal noise, which is what normalised pictures look like.

    Raises:
        UsageError: a count below 1.
    """
    return RandomSamples(inputs, count, seed)


# --- Samples that are made up


class RandomSamples(Reader):
    """Seeded normal noise. Each sample has a seed of its own: any of them can be made without the others."""

    random = True

    def __init__(self, inputs: Sequence[TensorSpec], count: int, seed: int) -> None:
        if count < 1:
            raise UsageError(f"{count} random samples", expected="1 or more")
        super().__init__(numbered(range(count)), f"{count} random samples, seed {seed}", inputs, None)
        self._spec = ModelSpec("random", "random", {}, self._inputs)
        self._seed = seed

    def _read(self, start: int) -> Generator[dict[str, Array], None, None]:
        for index in range(start, len(self.names)):
            arrays = synthetic_inputs(self._spec, 1, (self._seed << 32) + index)
            yield {name: array[0] for name, array in arrays.items()}
