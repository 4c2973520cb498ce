"""What an interrupted calibration leaves on the disk, so that the next one continues there."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.precision.histogram import BINS, Histogram
from deploycli.models.codec import Count, decode
from deploycli.models.errors import IntegrityError, first_line

if TYPE_CHECKING:
    from pathlib import Path

_VERSION = 1
# A wrong byte in the directory of a zip file is a size, a flag or a method that does not exist.
_DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, IndexError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error, IntegrityError),
)


@dataclass(frozen=True)
class _Header:
    version: int
    binding: Mapping[str, Any]
    stop: Count
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """What is known after some batches.

    Attributes:
        histograms: tensor -> its histogram.
        stop: index of the first sample that was not read yet.
        skipped: names of the samples that could not be read.
    """

    histograms: Mapping[str, Histogram]
    stop: int = 0
    skipped: tuple[str, ...] = ()

    def plus(self, histograms: Mapping[str, Histogram], stop: int, skipped: tuple[str, ...]) -> Measured:
        """Return what is known after one more batch; this one stays, so an interruption never leaves half a batch."""
        none = Histogram()
        added = {name: known + histograms.get(name, none) for name, known in self.histograms.items()}
        return Measured(added, stop, self.skipped + skipped)


def save_state(path: Path, binding: Mapping[str, Any], measured: Measured) -> None:
    """Write the state whole or not at all: an ``.npz`` without pickles.

    Args:
        path: the file.
        binding: what the state depends on, JSON values.
        measured: the state.

    Raises:
        EnvironmentUnsuitable: it cannot be written.
    """
    header = {"version": _VERSION, "binding": binding, "stop": measured.stop, "skipped": measured.skipped}
    histograms = measured.histograms.values()
    buffer = io.BytesIO()
    np.savez(
        buffer,
        header=np.array(json.dumps(header)),
        counts=np.stack([h.counts for h in histograms]),  # [T, 2048]
        ends=np.array([(h.top, h.lowest, h.highest) for h in histograms]),  # [T, 3]
    )
    write_whole(path, buffer.getvalue())


def load_state(path: Path, binding: Mapping[str, Any], tensors: tuple[str, ...]) -> tuple[Measured, str]:
    """Read a state, or begin anew.

    Args:
        path: the file that `save_state` wrote, if there is one.
        binding: what the state must depend on, JSON values.
        tensors: names of the tensors.

    Returns:
        What is known, and a note for people on where it comes from; empty where there is no file.
    """
    nothing = Measured({name: Histogram() for name in tensors})
    try:
        header, counts, ends = _read(path)
        if header.version != _VERSION or header.binding != json.loads(json.dumps(binding)):
            return nothing, f"{path} is of another calibration: begun anew"
        if counts.shape != (len(tensors), BINS) or ends.shape != (len(tensors), 3):
            raise ValueError(f"shapes {counts.shape} and {ends.shape}")
        histograms = {
            name: Histogram(row, top, lowest, highest)
            for name, row, (top, lowest, highest) in zip(tensors, counts, ends.tolist(), strict=True)
        }
        measured = Measured(histograms, header.stop, header.skipped)
    except FileNotFoundError:
        return nothing, ""
    except _DAMAGED as error:
        return nothing, f"{path} is damaged ({type(error).__name__}: {first_line(error)}): begun anew"
    return measured, f"{path}: continued after {measured.stop} samples"


def _read(path: Path) -> tuple[_Header, Any, Any]:
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as archive:
        if archive.testzip() is not None:  # before NumPy parses what may be damaged
            raise ValueError("wrong checksum")
    content.seek(0)
    with np.load(content, allow_pickle=False) as file:
        header = decode(str(file["header"]), _Header, where="its header", what="a state of a calibration")
        return header, file["counts"].astype(np.int64), file["ends"].astype(np.float64)
