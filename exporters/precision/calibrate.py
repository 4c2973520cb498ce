"""Run a model on data and measure the range of the tensors that become INT8."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycli.exporters.graph.unique import listed
from deploycli.exporters.precision.calibration_state import Measured, load_state, save_state
from deploycli.exporters.precision.histogram import Histogram
from deploycli.exporters.precision.observed import observed
from deploycli.exporters.precision.ranges import MOST_NAMES, check_ranges, check_varied
from deploycli.models.errors import DeployError, NumericsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploycli.exporters.data.samples import Batch, Samples
    from deploycli.exporters.precision.methods import Method
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
        ranges: tensor -> amax by ``method``; the INT8 scale is ``amax / 127``.
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
