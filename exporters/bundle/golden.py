"""golden.npz: inputs with the eager model's outputs, so that a machine without PyTorch can still verify."""

from __future__ import annotations

import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deploycli.models.errors import ExportError, IntegrityError
from deploycli.models.npy import claims
from deploycli.models.spec import is_mask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from deploycli.models.spec import ModelSpec, TensorSpec

Arrays = dict[str, npt.NDArray[Any]]

GOLDEN_NAME = "golden.npz"

GOLDEN_SAMPLES = 8
"""Samples in golden.npz: enough for the default batch sweep of verify."""

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


_NUMBERS = "biuf"  # kinds of element types

_DEFAULT_VALUES = {"int8": (-128, 127), "uint8": (0, 255)}
"""Lowest and highest value of pixels and of quantized numbers; of other integers 0 to 9, for they may be indices."""


_SHOWN = ("high", "low")
"""What hides, where the lowest and where the highest value shows."""


def synthetic_inputs(spec: ModelSpec, samples: int, seed: int = 0) -> Arrays:
    """Return seeded inputs, one array [samples, *shape] an input.

    Floating-point numbers are normal noise, which is what normalised pictures look like. Integers are even between the
    lowest and the highest that the spec tells; without it pixels take all of their range, masks 0 and 1, and others 0
    to 9. Masks hide everything in the second sample and nothing in the third, or nowhere a whole row where the model
    does not bear that.
    """
    rng = np.random.default_rng(seed)
    return {i.name: _values(i, samples, rng) for i in spec.inputs}


HIDDEN = 1
"""The sample in which masks hide everything."""


def judged_samples(inputs: Sequence[TensorSpec], precision: str, count: int, held: int) -> npt.NDArray[np.intp]:
    """Return which of the recorded or the synthetic samples a file is judged on, some of them twice if need be.

    A finite mask that hides everything adds the same huge number to all scores. In FP32 that number absorbs them, and
    all weights are equal; a number that FP16 holds does not. No answer to such a sample is right, so a file in less
    than FP32 is not judged on it.

    Args:
        inputs: the model's.
        precision: the file's.
        count: how many samples are wanted.
        held: how many there are.

    Returns:
        Indices, [count].
    """
    left_out = precision != "fp32" and held > 1 and any(spec.hides == "finite" for spec in inputs)
    return np.resize([index for index in range(held) if not (left_out and index == HIDDEN)], count)


def _values(spec: TensorSpec, samples: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    shape, dtype = (samples, *spec.shape), np.dtype(spec.dtype)
    array: npt.NDArray[Any]
    if dtype.kind == "f":
        array = rng.standard_normal(shape).astype(dtype)
        if spec.hides:
            array[HIDDEN : HIDDEN + 1] = -np.inf if spec.hides == "infinite" else -np.abs(array[HIDDEN : HIDDEN + 1])
            array[2:3] = np.abs(array[2:3])
        return array
    low, high = spec.values or _DEFAULT_VALUES.get(spec.dtype) or (0, 1 if is_mask(spec) else 9)
    array = rng.integers(low, high, shape, np.uint8 if dtype.kind == "b" else dtype, endpoint=True).astype(dtype)
    if spec.hides in _SHOWN:  # the model answers NaN where all is hidden: the first of each row never is
        array[..., :1] = array[2:3] = (low, high)[_SHOWN.index(spec.hides)]
    elif spec.hides:
        array[HIDDEN : HIDDEN + 1], array[2:3] = low, high
    return array


def require_comparable(
    inputs: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, npt.NDArray[Any]], where: str
) -> None:
    """Refuse what a model answers where no file could be compared with it.

    Args:
        inputs: name -> [samples, ...].
        outputs: what it answered.
        where: what ran it.

    Raises:
        ExportError: an output without the batch for its first axis, or one that is not finite, or zero throughout.
    """
    samples = len(next(iter(inputs.values())))
    for name, array in outputs.items():
        if array.ndim == 0:
            raise ExportError(
                f"the output {name!r} is one number for the whole batch: it has no axis",
                expected="outputs with the batch for their first axis, so that every sample has an answer of its own",
                hint="leave it out at inference, as a loss; or return it for each sample: x.sum(1) in place of x.sum()",
            )
        if len(array) != samples:
            raise ExportError(
                f"the first axis of the output {name!r} is not the batch: it has the shape {list(array.shape)} for "
                f"{samples} samples",
                expected="outputs with the batch for their first axis",
                hint="return a mask or a score in place of what x[mask] selects; or move the batch to the front",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
            raise ExportError(
                f"the model itself answers NaN or Inf, in {where}: {nan} NaN and {infinite} Inf of the {array.size} "
                f"values of the output {name!r}",
                expected="finite numbers for seeded noise: nothing could be compared with such an answer",
                hint="weights that are trained (--checkpoint), or the range of an input: --input NAME:SHAPE:int64:0..9",
            )
        if not array.any():
            raise ExportError(
                f"the model itself answers zero everywhere, in {where}: the output {name!r}",
                expected="numbers that differ: agreement with zero would prove nothing",
                hint="weights that are trained (--checkpoint), such as those of a head that starts at zero",
            )


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
        _weigh(path)
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


def _weigh(path: Path) -> None:
    """Raise ValueError where an array claims more than the file holds: what is made of it would take that much."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed")
        if sum(member.file_size for member in members) > size:
            raise ValueError(f"its arrays take more than the {size} bytes of the file")
        for claim in claims(archive):
            if claim.dtype.kind not in _NUMBERS or claim.claimed != claim.held:
                raise ValueError(f"{claim.name} holds {claim.held} bytes, and is no {claim.shape} {claim.dtype}")


def _unreadable(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is no golden file ({why})",
        expected="arrays input/NAME and output/NAME with one number of samples",
        hint="export the model again",
    )
