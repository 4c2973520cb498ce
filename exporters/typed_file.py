"""``deploycli cast IN.onnx`` and ``quantize IN.onnx``: an ONNX file in another precision, without a bundle.

The graph stays as it is, but for its types: `optimize` rewrites one. What is written is compared with the file it was
made from, as `verify A.onnx --against B.onnx` does.
"""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.files import place, temporary_folder
from deploycli.exporters.cast import patterns, typed
from deploycli.exporters.compare_files import FeedOptions, FileComparison, compare_files
from deploycli.exporters.file_target import folder_beside, real_target, write_beside
from deploycli.exporters.gate import require_readable
from deploycli.exporters.graph.cost import operator_counts
from deploycli.exporters.graph.steps import Step
from deploycli.exporters.imported import ImportOptions, import_model, open_file_samples
from deploycli.exporters.optimize import load
from deploycli.exporters.precision.observed import magnitudes
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.exporters.precision.simulate import computed_precision
from deploycli.exporters.quantize import quantize_bundle
from deploycli.models.errors import UsageError
from deploycli.models.memory import free_memory
from deploycli.models.spec import PreprocessingChange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.graph.onnx_file import ExternalData
    from deploycli.exporters.precision.options import AccuracyBudget, CalibrationData, CastOptions, QuantizeOptions
    from deploycli.exporters.quantize import Quantized

    Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FileOptions:
    """Which file, and what it is run on.

    Attributes:
        source: the ONNX file.
        target: where the result goes, which may be the same file.
        feeds: what the two graphs are compared on.
        preprocessing: how a picture becomes the input, which no ONNX file says.
        external: where the weights are stored.
        lint: end where TensorRT could not read the result; otherwise it is written all the same.
    """

    source: Path
    target: Path
    feeds: FeedOptions = field(default_factory=FeedOptions)
    preprocessing: PreprocessingChange = field(default_factory=PreprocessingChange)
    external: ExternalData = "auto"
    lint: bool = True


@dataclass(frozen=True)
class TypedFile:
    """A file in another precision.

    Attributes:
        source: the file that it was made from.
        files: what was written, the model first.
        precision: of `deploycli.exporters.bundle.manifest.PRECISIONS`.
        opset: ONNX operator set version.
        ops_before: operator type -> number of nodes, of the source.
        ops_after: the same of the result.
        steps: what was done in between, in order.
        comparison: how the two answer.
        quantized: what led to it, of an INT8 or FP8 graph; its files are gone.
    """

    source: Path
    files: tuple[Path, ...]
    precision: str
    opset: int
    ops_before: Mapping[str, int]
    ops_after: Mapping[str, int]
    steps: tuple[Step, ...]
    comparison: FileComparison
    quantized: Quantized | None = None

    @property
    def size(self) -> int:
        """Bytes on disk, external data included."""
        return sum(path.stat().st_size for path in self.files)

    def to_json(self) -> dict[str, Any]:
        """Return the file and what led to it as JSON values."""
        made = {} if self.quantized is None else self.quantized.to_json()
        return {
            "source": str(self.source),
            "files": [str(path) for path in self.files],
            "precision": self.precision,
            "opset": self.opset,
            "ops_before": dict(self.ops_before),
            "ops_after": dict(self.ops_after),
            "steps": [step.to_json() for step in self.steps],
            "comparison": self.comparison.to_json(),
            "search": made.get("search"),
            "notes": made.get("notes", []),
            "calibration": None if self.quantized is None else asdict(self.quantized.artifact)["calibration"],
        }


def cast_file(
    options: FileOptions,
    cast: CastOptions,
    *,
    data: CalibrationData | None = None,
    progress: Progress = lambda _label, _done, _total: None,
) -> TypedFile:
    """Write the FP16 or BF16 graph of an ONNX file.

    Args:
        options: which file.
        cast: how it is typed.
        data: to find values near the end of FP16's range with; None skips that.
        progress: called with a label, what is done and how much there is.

    Raises:
        UsageError: the file is no ONNX file, is not in FP32, or an argument does not fit.
        ExportError: TensorRT could not read the result, or ONNX Runtime cannot load it.
        EnvironmentUnsuitable: ONNX Runtime cannot run the file, or the result cannot be written.
    """
    real = real_target(options.target)
    progress("reading", 0, 1)
    model = load(options.source)
    _require_fp32(computed_precision(model), options.source)
    policy = Policy(REDUCED_TYPES[cast.type], cast.allow, patterns(cast.keep))
    if data is not None:
        assert data.source is not None, "a cast has no other data"
        samples = open_file_samples(model.graph, options.source, data.source, options.preprocessing, data.limit)
        policy = replace(policy, magnitudes=magnitudes(options.source, samples, progress=progress))
    before, start = operator_counts(model), time.perf_counter()
    remarks = typed(model, policy, cast)
    steps = (Step(f"cast-{cast.type}", model.graph.num_nodes(), time.perf_counter() - start, tuple(remarks)),)
    if options.lint:
        require_readable(model, f"the {cast.type} graph of {options.source}")
    after, opset = operator_counts(model), model.opset_imports.get("", 0)
    with folder_beside(real) as folder:
        progress("writing", 0, 1)
        files = write_beside(model, folder / options.target.name, options.external)
        del model
        free_memory()
        comparison = _compared(options, files[0], progress)
        placed = place(files, options.target)
    return TypedFile(options.source, placed, cast.type, opset, before, after, steps, comparison)


def quantize_file(
    options: FileOptions,
    quantize: QuantizeOptions,
    data: CalibrationData,
    *,
    budget: AccuracyBudget | None = None,
    progress: Progress = lambda _label, _done, _total: None,
) -> TypedFile:
    """Write the INT8 or FP8 graph of an ONNX file, and the ranges beside it, as ``OUT.calibration.json``.

    Args:
        options: which file.
        quantize: how.
        data: what ranges are measured on.
        budget: revert what hurts most until the loss fits.
        progress: called with a label, what is done and how much there is.

    Raises:
        UsageError, ExportError, IntegrityError, NumericsError, EnvironmentUnsuitable: see
            `deploycli.exporters.imported.import_model` and `deploycli.exporters.quantize.quantize_bundle`.
    """
    real = real_target(options.target)
    with file_bundle(options, data, progress) as bundle:
        _require_fp32(bundle.manifest.artifacts[0].precision, options.source)
        made = quantize_bundle(bundle, quantize, data, budget=budget, lint=options.lint, progress=progress)
        artifact, calibration = made.artifact, made.artifact.calibration
        assert calibration is not None, "what is quantized was calibrated"
        with folder_beside(real) as folder:
            files = write_beside(load(made.file.path), folder / options.target.name, options.external)
            ranges = folder / f"{options.target.stem}.calibration.json"
            shutil.copyfile(made.bundle.path / calibration.cache.path, ranges)
            comparison = _compared(options, files[0], progress)
            placed = place([*files, ranges], options.target)
    return TypedFile(
        options.source, placed, artifact.precision, artifact.opset, artifact.ops_before, artifact.ops_after,
        artifact.steps, comparison, made,
    )  # fmt: skip


@contextmanager
def file_bundle(
    options: FileOptions,
    data: CalibrationData | None = None,
    progress: Progress = lambda _label, _done, _total: None,
) -> Iterator[Bundle]:
    """Yield a bundle of the file as it is, which vanishes.

    Raises:
        UsageError, ExportError, IntegrityError, EnvironmentUnsuitable: see `deploycli.exporters.imported.import_model`.
    """
    samples = options.feeds.samples
    if samples is None and data is not None and Path(str(data.source)).suffix in (".npy", ".npz"):
        samples = Path(str(data.source))
    with temporary_folder() as root:
        yield import_model(
            ImportOptions(
                options.source,
                root / "bundles",  # whoever writes a bundle locks the folder that it stands in, and this one is
                inputs=options.feeds.inputs,
                samples=samples,
                preprocessing=options.preprocessing,
                rewrite=False,
                seed=options.feeds.seed,
                lint=False,
            ),
            progress=lambda label: progress(label, 0, 1),
        )


def _compared(options: FileOptions, written: Path, progress: Progress) -> FileComparison:
    return compare_files(
        written, options.source, options.feeds, shown=options.target, progress=lambda label: progress(label, 0, 1)
    )


def _require_fp32(precision: str, source: Path) -> None:
    if precision != "fp32":
        raise UsageError(
            f"{source} computes in {precision.upper()} already",
            expected="an FP32 graph, which can be made another precision",
            hint="the file that it was made from; build-trt, bench and verify take this one as it is",
        )
