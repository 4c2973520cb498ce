"""Calibration: run a model on data, measure the range of the tensors that are quantised, and keep the ranges.

`calibrate` measures. What it knows after some batches is `Measured`, which an interrupted calibration leaves on the
disk, so that the next one continues there. `CalibrationCache` is the ranges as a JSON file, bound to what they were
measured on. `check_ranges` and `check_varied` say what is no range: it would quantise a tensor to nothing, or was not
measured at all.
"""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from msgspec import Meta

from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.graph.unique import listed
from deploycli.exporters.precision.methods import BINS, Histogram, Method
from deploycli.exporters.precision.observed import observed
from deploycli.models.codec import Count, Positive, Sha256, decode, load
from deploycli.models.errors import (
    DeployError,
    EnvironmentUnsuitable,
    IntegrityError,
    NumericsError,
    UsageError,
    first_line,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploycli.exporters.data.samples import Batch, Samples
    from deploycli.exporters.runtime.runtimes import OrtRuntime

    Array = npt.NDArray[Any]
    Progress = Callable[[str, int, int], None]


_SAVE_EVERY = 30.0
"""What a killed process loses at most, seconds; a state takes some 20 ms to write."""


@dataclass(frozen=True)
class Calibration:
    """What a model's tensors hold on some data.

    Attributes:
        histograms: tensor -> its histogram, in the order asked for.
        ranges: tensor -> amax by ``method``; the scale is ``amax / 127`` in INT8, ``amax / 448`` in FP8.
        method: how the ranges were chosen.
        count: samples that were used.
        skipped: names of the samples that could not be read.
        notes: what a person may want to know of an earlier, interrupted run.
    """

    histograms: Mapping[str, Histogram]
    ranges: Mapping[str, float]
    method: Method
    count: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...] = ()


def calibrate(
    model_path: Path,
    tensors: Sequence[str],
    samples: Samples,
    method: Method,
    *,
    batch_size: int,
    state: Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> Calibration:
    """Measure the ranges of named float tensors of an FP32 model, in ONNX Runtime on the CPU.

    All these tensors of one batch are in memory at once.

    Args:
        model_path: the FP32 ONNX file; external data stands beside it.
        tensors: names of float32 graph inputs, graph outputs or intermediate values (not initializers).
        samples: what to run the model on, in batches.
        method: how to choose a range, `Method.of`.
        batch_size: samples a batch; a model whose batch axis is fixed is run at its own size.
        state: file that keeps an interrupted calibration: the next call with the same key continues there and
            gives the same result, bit for bit. It is deleted on success. None keeps nothing.
        key: what the calibration depends on besides ``tensors`` and the batch size: hashes of the model, the data and
            the preprocessing. The method need not be in it. A state with another key is replaced.
        progress: called with a label, samples done and samples in all, before each batch.

    Raises:
        UsageError: an unknown tensor, no samples, samples that do not fit the model, or unreadable data.
        IntegrityError: the model is no ONNX file, or its external data is missing.
        NumericsError: NaN or Inf in a tensor (naming it and the samples), a tensor whose values are all the same (also
            where that is right, as of an unused branch: exclude it), or a degenerate range, see `check_ranges`.
        ExportError: ONNX Runtime cannot load or run the model.
        EnvironmentUnsuitable: the state cannot be written.
    """
    tensors = tuple(dict.fromkeys(tensors))
    if not tensors or batch_size < 1:
        raise UsageError(f"{len(tensors)} tensors, batch size {batch_size}", expected="at least one of each")
    with observed(model_path, tensors) as runtime:
        fixed = _fixed_batch(runtime)
        size = fixed or batch_size
        binding = {"key": key, "tensors": tensors, "batch": size, "samples": len(samples.names)}
        measured, note = Measured({name: Histogram() for name in tensors}), ""
        if state is not None:
            measured, note = load_state(state, binding, tensors)
        saved = time.monotonic()
        try:
            for batch in samples.batches(size, measured.stop):
                if progress is not None:
                    progress("calibration", measured.stop, len(samples.names))
                measured = _measure(runtime, batch, samples, measured, fixed)
                if state is not None and time.monotonic() - saved >= _SAVE_EVERY:
                    save_state(state, binding, measured)
                    saved = time.monotonic()
            calibration = _conclude(measured, method, len(samples.names), note)
        except BaseException:
            if state is not None and measured.stop:
                with suppress(DeployError):  # what happened is the better message
                    save_state(state, binding, measured)
            raise
    if state is not None:
        state.unlink(missing_ok=True)
    return calibration


def _fixed_batch(runtime: OrtRuntime) -> int | None:
    """Return the size of the batch axis where the model has fixed it."""
    sizes = {info.shape[0] for info in runtime.inputs if info.shape and isinstance(info.shape[0], int)}
    if len(sizes) > 1:
        raise UsageError(
            f"the inputs of the model have different first axes: {', '.join(map(str, sorted(map(str, sizes))))}",
            expected="one batch size",
        )
    return int(sizes.pop() or 0) if sizes else None


def _measure(runtime: OrtRuntime, batch: Batch, samples: Samples, measured: Measured, fixed: int | None) -> Measured:
    """Return what is known after one more batch."""
    histograms: dict[str, Histogram] = {}
    if used := _length(batch):
        histograms = _histograms(runtime, batch.inputs, used, fixed, tuple(measured.histograms))
        _check_finite(histograms, [n for n in samples.names[measured.stop : batch.stop] if n not in batch.skipped])
    after = measured.plus(histograms, batch.stop, batch.skipped)
    if len(after.skipped) * 100 > len(samples.names):  # those before an interruption are known here only
        raise UsageError(
            f"{len(after.skipped)} of {len(samples.names)} samples cannot be read: {listed(after.skipped, MOST_NAMES)}",
            expected="at most 1 % that cannot be read",
        )
    return after


def _length(batch: Batch) -> int:
    return min((len(array) for array in batch.inputs.values()), default=0)


def _histograms(
    runtime: OrtRuntime, inputs: Mapping[str, Array], used: int, fixed: int | None, tensors: tuple[str, ...]
) -> dict[str, Histogram]:
    """Run one batch of ``used`` samples; nothing but the histograms outlives it."""
    filled = 0 if fixed is None else fixed - used
    feed = dict(inputs)
    if filled:
        feed = {name: np.concatenate([array, np.repeat(array[-1:], filled, 0)]) for name, array in inputs.items()}
    outputs = runtime.run(feed)
    return {
        name: Histogram.of(inputs[name] if name in inputs else _without_copies(outputs[name], used, filled))
        for name in tensors
    }


def _without_copies(values: Array, used: int, filled: int) -> Array:
    """Drop what belongs to the ``filled`` copies of the last of the ``used`` samples of a batch.

    Which axis holds the samples, the graph does not say: a window, head or token axis may be in front of it or merged
    behind it. So a part is dropped only where it is seen to repeat what is kept, and no value can be lost; a tensor
    of which that is seen nowhere counts its last sample more often, which leaves its ends as they are.
    """
    batch = used + filled
    for axis, size in enumerate(values.shape if filled else ()):
        if size and size % batch == 0:
            rows = np.moveaxis(values, axis, 0).reshape(batch, -1)  # the batch is the outer part of the axis
            last = rows[used - 1]
            if np.allclose(rows[used:], last, rtol=0, atol=1e-4 * float(np.abs(last).max(initial=0))):
                return rows[:used]
    return values


def _check_finite(histograms: Mapping[str, Histogram], names: Sequence[str]) -> None:
    wrong = [f"{name} ({h.nonfinite} of {h.nonfinite + h.count})" for name, h in histograms.items() if h.nonfinite]
    if wrong:
        raise NumericsError(
            f"NaN or Inf in {listed(wrong, MOST_NAMES)}, with the samples {listed(names, MOST_NAMES)}",
            expected="finite activations in the FP32 model",
            hint="check the preprocessing and these samples, or leave them out",
        )


def _conclude(measured: Measured, method: Method, total: int, note: str) -> Calibration:
    count = total - len(measured.skipped)
    if count < 1:
        raise UsageError("there are no samples to calibrate with", expected="at least one that can be read")
    check_varied(measured.histograms)
    ranges = {name: method.amax(histogram) for name, histogram in measured.histograms.items()}
    check_ranges(ranges)
    return Calibration(measured.histograms, ranges, method, count, measured.skipped, (note,) if note else ())


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


LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 127 * float(np.finfo(np.float32).tiny)
"""Below it the scale, ``amax / 127``, is no normal float32."""

MOST_NAMES = 5
"""Tensors that a message names."""

_HINT = "exclude them from INT8, or calibrate with data that the model was made for"


def check_ranges(ranges: Mapping[str, float]) -> None:
    """Refuse degenerate ranges.

    Raises:
        NumericsError: a range that is NaN, infinite, zero or negative; or several tensors that all have the same one.
    """
    if wrong := [f"{name} ({amax:g})" for name, amax in ranges.items() if not SMALLEST <= amax <= LARGEST]:
        raise NumericsError(
            f"the INT8 range of {listed(wrong, MOST_NAMES)} is degenerate",
            expected="a finite amax above zero",
            hint=_HINT,
        )
    if len(ranges) > 1 and len(set(ranges.values())) == 1:
        (amax,) = set(ranges.values())
        raise NumericsError(
            f"the INT8 ranges of all {len(ranges)} tensors are the same, {amax:g}: {listed(ranges, MOST_NAMES)}",
            expected="ranges that were measured, which differ",
            hint="calibrate with data that the model was made for",
        )


def check_varied(histograms: Mapping[str, Histogram]) -> None:
    """Refuse tensors that do not depend on the data.

    Raises:
        NumericsError: all values of a tensor with more than one are the same, zero included.
    """
    constant = [f"{name} ({h.lowest:g})" for name, h in histograms.items() if h.count > 1 and h.lowest == h.highest]
    if constant:
        raise NumericsError(
            f"all values of {listed(constant, MOST_NAMES)} are the same",
            expected="activations that depend on the input",
            hint=_HINT,
        )


SCHEMA_VERSION = 1
_CALIBRATE_AGAIN = "calibrate again, or restore the file from where it was copied"


@dataclass(frozen=True)
class DataRecord:
    """The data of a calibration.

    Attributes:
        description: where it came from, for people.
        count: samples that were used.
        sha256: hash of the samples, ``Samples.sha256``.
        skipped: names of the samples that could not be read.
        samples: names of all samples, those included, in order.
    """

    description: str
    count: Positive
    sha256: Sha256
    skipped: tuple[str, ...]
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class CalibrationCache:
    """Ranges of the tensors of one model, and what they depend on.

    Attributes:
        model: sha256 of the FP32 model, `model_sha256`.
        data: what it ran on.
        preprocessing: the recipe as JSON values, or None where the data are model inputs already.
        method: how the ranges were chosen.
        random: made from random data; it stays with the ranges for ever.
        tool_version: version of the tool that measured.
        ranges: tensor -> amax; the scale is ``amax / 127`` in INT8, ``amax / 448`` in FP8.
    """

    model: Sha256
    data: DataRecord
    preprocessing: Mapping[str, Any] | None
    method: Method
    random: bool
    tool_version: str
    ranges: Annotated[Mapping[str, float], Meta(min_length=1)]

    @classmethod
    def of(
        cls,
        calibration: Calibration,
        samples: Samples,
        *,
        model: str,
        preprocessing: Mapping[str, Any] | None,
        tool_version: str,
    ) -> CalibrationCache:
        """Bind the ranges of a calibration to what they were measured on."""
        data = DataRecord(
            samples.description, calibration.count, samples.sha256, calibration.skipped, tuple(samples.names)
        )
        return cls(
            model,
            data,
            _as_json(preprocessing),
            calibration.method,
            samples.random,
            tool_version,
            dict(sorted(calibration.ranges.items())),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the cache as JSON values, the ranges sorted by name."""
        return {
            "schema_version": SCHEMA_VERSION,
            "tool_version": self.tool_version,
            "model": self.model,
            "data": asdict(self.data),
            "preprocessing": self.preprocessing,
            "method": self.method.to_json(),
            "random": self.random,
            "ranges": dict(sorted(self.ranges.items())),
        }

    def save(self, path: Path) -> None:
        """Write the JSON file whole or not at all; every float reads back as the same.

        Raises:
            EnvironmentUnsuitable: it cannot be written.
        """
        write_whole(path, (json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> CalibrationCache:
        """Read a file that `save` wrote.

        Raises:
            UsageError: there is no such file, or its schema version is unknown.
            IntegrityError: it is malformed.
            EnvironmentUnsuitable: it cannot be read.
            NumericsError: a degenerate range, see `check_ranges`.
        """
        if not path.is_file():
            raise UsageError(f"there is no calibration {path}", expected="a file that a calibration wrote")
        try:
            cache = load(path, cls, what="a calibration", hint=_CALIBRATE_AGAIN, version=SCHEMA_VERSION)
        except OSError as error:
            raise EnvironmentUnsuitable(f"cannot read {path}: {error.strerror or error}") from error
        check_ranges(cache.ranges)
        return cache

    def check(
        self,
        *,
        model: str,
        preprocessing: Mapping[str, Any] | None,
        method: Method | None = None,
        data: str | None = None,
        tensors: Iterable[str] = (),
    ) -> None:
        """Compare the cache with what the ranges are wanted for.

        Args:
            model: sha256 of the model.
            preprocessing: the recipe as JSON values.
            method: the method asked for; None takes the cache's.
            data: sha256 of the samples; None where there are none to compare.
            tensors: what ranges are needed of.

        Raises:
            IntegrityError: one differs, or a range is missing; the message says which, found and expected.
        """
        self._compare("model", self.model, model)
        self._compare("preprocessing", _shown(self.preprocessing), _shown(preprocessing))
        if method is not None:
            self._compare("method", _shown(self.method.to_json()), _shown(method.to_json()))
        if data is not None:
            self._compare("data", self.data.sha256, data)
        if missing := [name for name in tensors if name not in self.ranges]:
            raise IntegrityError(
                f"the calibration has no range of {listed(missing, MOST_NAMES)}",
                expected="a range of every tensor that becomes INT8",
                hint=_CALIBRATE_AGAIN,
            )

    def _compare(self, field: str, found: str, expected: str) -> None:
        if found != expected:
            raise IntegrityError(
                f"the calibration was made with another {field}: {found}", expected=expected, hint="calibrate again"
            )


def _as_json(value: Any) -> Any:
    """Return the value as it would be read back."""
    return json.loads(json.dumps(value))


def _shown(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
