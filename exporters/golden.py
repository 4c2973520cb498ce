"""golden.npz: inputs with the eager model's outputs, so that a machine without PyTorch can still verify."""

from __future__ import annotations

import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from models.spec import ModelSpec

Arrays = dict[str, npt.NDArray[Any]]

GOLDEN_NAME = "golden.npz"
# What NumPy raises, and what follows where it finds a lone array, another key or a scalar in the file.
_LOAD_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
)


def synthetic_inputs(spec: ModelSpec, samples: int, seed: int = 0) -> Arrays:
    """Return seeded normal noise, which is what normalised pictures look like, one array [samples, *shape] an input."""
    rng = np.random.default_rng(seed)
    return {i.name: rng.standard_normal((samples, *i.shape)).astype(i.dtype) for i in spec.inputs}


def save_golden(path: Path, inputs: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write inputs and outputs, each [samples, ...]; equal arrays give equal bytes.

    numpy stamps every member with 1980-01-01, so no clock reaches the file.
    """
    arrays: dict[str, Any] = {f"input/{name}": array for name, array in inputs.items()}
    arrays.update({f"output/{name}": array for name, array in outputs.items()})
    with path.open("wb") as stream:
        np.savez(stream, **arrays)


def load_golden(path: Path) -> tuple[Arrays, Arrays]:
    """Read inputs and outputs, each name -> [samples, ...]; nothing is unpickled.

    Raises:
        IntegrityError: the file is missing, is no golden file, or its arrays disagree on the number of samples.
    """
    kinds: dict[str, Arrays] = {"input": {}, "output": {}}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            for key in archive.files:
                kind, _, name = key.partition("/")
                kinds[kind][name] = archive[key]
        samples = {array.shape[0] for arrays in kinds.values() for array in arrays.values()}
    except _LOAD_ERRORS as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if not kinds["input"] or not kinds["output"] or len(samples) != 1 or 0 in samples:
        raise _unreadable(
            path, f"{len(kinds['input'])} inputs, {len(kinds['output'])} outputs, {sorted(samples)} samples"
        )
    return kinds["input"], kinds["output"]


def _unreadable(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is no golden file ({why})",
        expected="arrays input/NAME and output/NAME with one number of samples",
        hint="export the model again",
    )
