"""What FP16 and INT8 cost on the test pictures: every row of their table in RESULTS.md is one :class:`Row`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnxruntime.quantization import CalibrationMethod, QuantFormat, quantize_static

from deploycli.exporters.cast import cast_bundle
from deploycli.exporters.export import ExportOptions, export
from deploycli.exporters.precision.options import CalibrationData, CastOptions, QuantizeOptions
from deploycli.exporters.precision.placement import SCHEMES
from deploycli.exporters.precision.simulate import open_runtime
from deploycli.exporters.quantize import quantize_bundle
from tests.calibration import Batches
from tests.digits import arrays, checkpoint, registered

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

    from deploycli.exporters.bundle.bundle import Bundle

CALIBRATION_SAMPLES = 128
BATCH = 54  # a tenth of the test pictures


@dataclass(frozen=True)
class Row:
    """One graph on all test pictures.

    Attributes:
        graph: what it is.
        correct: pictures that it names rightly.
        agree: pictures on which it names the digit that the FP32 graph names.
        samples: pictures.
    """

    graph: str
    correct: int
    agree: int
    samples: int


def exported(name: str, root: Path) -> Bundle:
    """Export one of ``tests.digits.NAMES`` with its trained weights."""
    with registered():
        return export(ExportOptions(name, root, checkpoint=checkpoint(name)))


QUANTIZED: Mapping[str, QuantizeOptions] = {
    **{f"INT8, {scheme}": QuantizeOptions(scheme=scheme) for scheme in SCHEMES},
    "FP8, auto": QuantizeOptions(precision="fp8"),
    "FP8, auto for Ada": QuantizeOptions(precision="fp8", targets=((8, 9),)),
    "FP8, full": QuantizeOptions(precision="fp8", scheme="full"),
}
"""Name of a row -> how its graph is quantised."""


def rows(bundle: Bundle, root: Path, names: Iterable[str] = tuple(QUANTIZED)) -> Iterator[Row]:
    """Yield FP32, FP16, INT8 and FP8 as we place them, and every operator in INT8 by its extreme values."""
    images, labels = arrays("test")
    truth = _classes(bundle.path / "model.onnx", images)

    def row(graph: str, path: Path) -> Row:
        found = truth if graph == "FP32" else _classes(path, images)
        return Row(graph, int((found == labels).sum()), int((found == truth).sum()), len(labels))

    yield row("FP32", bundle.path / "model.onnx")
    yield row("FP16", cast_bundle(bundle, CastOptions()).bundle.path / "model.fp16.onnx")
    calibration = arrays("train", CALIBRATION_SAMPLES)[0]
    for name in names:
        quantized = quantize_bundle(bundle, QUANTIZED[name], CalibrationData(list(calibration)))
        yield row(name, quantized.file.path)
    yield row("INT8, naive", naive(bundle.path / "model.onnx", calibration, root / f"{bundle.path.name}.naive.onnx"))


def naive(source: Path, calibration: npt.NDArray[np.float32], path: Path) -> Path:
    """Quantise every operator that can be, whole tensors from their smallest to their largest value."""
    quantize_static(
        source,
        path,
        Batches(calibration[:, None]),
        quant_format=QuantFormat.QDQ,
        calibrate_method=CalibrationMethod.MinMax,
        per_channel=False,
    )
    return path


def _classes(path: Path, images: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    with open_runtime(path) as runtime:
        logits = [
            runtime.run({"images": images[start : start + BATCH]})["logits"] for start in range(0, len(images), BATCH)
        ]
    return np.concatenate(logits).argmax(1)
