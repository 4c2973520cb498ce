"""From the FP32 artifact of a bundle to one in another precision: changed, checked, written beside it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.bundle import Bundle, OnnxFile, extend_bundle
from deploycli.exporters.bundle.files import temporary_folder
from deploycli.exporters.bundle.golden import judged_samples, load_golden
from deploycli.exporters.bundle.manifest import Artifact, FileRecord
from deploycli.exporters.gate import require_readable
from deploycli.exporters.graph.cost import operator_counts
from deploycli.exporters.graph.onnx_file import load_model, map_external, write_model
from deploycli.exporters.graph.steps import Step
from deploycli.exporters.passes.common.opset import raise_opset
from deploycli.exporters.precision.insert_qdq import OLDEST_OPSET
from deploycli.exporters.precision.simulate import open_runtime
from deploycli.exporters.verification.compare import BUDGETS, Comparison, compare
from deploycli.exporters.verification.on_samples import dense
from deploycli.models.errors import NumericsError, UsageError
from deploycli.models.memory import free_memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir

    from deploycli.exporters.bundle.manifest import CalibrationRecord
    from deploycli.exporters.graph.onnx_file import ExternalData
    from deploycli.exporters.graph.steps import Remark
    from deploycli.exporters.precision.simulate import SimulatedRuntime
    from deploycli.exporters.runtime.runtimes import OrtRuntime

QUANTIZED = ("int8", "fp8")
"""Precisions of 8 bits."""

QDQ_OPSET = 20
"""What a graph of an older opset is raised to."""

CHECK_SAMPLES = 2
"""Golden samples that a new artifact is run on before it is written."""


@dataclass(frozen=True)
class Derived:
    """A new artifact, and how it compares with the eager model on a few golden samples.

    Attributes:
        file: the artifact, in the bundle that holds it now.
        runtime: what ran it.
        comparisons: one an output; a figure outside the budget is for `verify` to judge.
    """

    file: OnnxFile
    runtime: str
    comparisons: tuple[Comparison, ...]

    @property
    def bundle(self) -> Bundle:
        """The bundle that holds it now."""
        return self.file.bundle

    @property
    def artifact(self) -> Artifact:
        """What the manifest says of it."""
        return self.file.artifact

    def to_json(self) -> dict[str, Any]:
        """Return the artifact and the comparison as JSON values."""
        return {
            "path": str(self.bundle.path),
            "artifact": asdict(self.artifact),
            "unreleasable": self.file.unreleasable,
            "runtime": self.runtime,
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }


class Derivation:
    """One FP32 graph on its way to another precision; the steps are recorded as they are done.

    Args:
        bundle: an opened bundle.
        precision: of the result.
        lint: end where TensorRT could not read the result; otherwise it is written all the same.
    """

    def __init__(self, bundle: Bundle, precision: str, *, lint: bool = True) -> None:
        self.bundle = bundle
        self.precision = precision
        self.lint = lint
        self.source = fp32_file(bundle)
        self.model: ir.Model = load_source(self.source, precision)
        self.steps: list[Step] = []

    def step(self, name: str, change: Callable[[], list[Remark]]) -> None:
        """Change the model, and record what was refused."""
        start = time.perf_counter()
        refusals = change()
        self.steps.append(Step(name, self.model.graph.num_nodes(), time.perf_counter() - start, tuple(refusals)))

    def require_readable(self) -> None:
        """End where TensorRT could not read the graph as it is now, unless it is to be written all the same.

        Raises:
            ExportError: the lint finds errors.
        """
        if self.lint:
            require_readable(self.model, f"the {self.precision} graph of {self.bundle.path}")

    def note(self, name: str, refusals: list[Remark]) -> None:
        """Record a step that changed nothing by itself."""
        self.steps.append(Step(name, self.model.graph.num_nodes(), 0.0, tuple(refusals)))

    def runtime(self) -> OrtRuntime | SimulatedRuntime:
        """Run the model as it is now, without writing it into the bundle."""
        with temporary_folder() as folder:
            return open_runtime(write_model(self.model, folder / "model.onnx")[0])

    def finish(
        self,
        *,
        calibration: Callable[[Path], CalibrationRecord] | None = None,
        quantized: tuple[str, ...] = (),
        reverted: tuple[str, ...] = (),
    ) -> Derived:
        """Check the graph, write it into the bundle, run it; the model is used up.

        Args:
            calibration: writes the calibration cache into the folder it is given, and returns its record.
            quantized: what is in INT8 or FP8.
            reverted: what an accuracy budget took out of it.

        Raises:
            ExportError: TensorRT could not read the graph, or ONNX Runtime cannot load it.
            NumericsError: an output is NaN, infinite or constant.
            EnvironmentUnsuitable: the bundle cannot be written.
        """
        self.require_readable()
        name = f"model.{self.precision}.onnx"
        with extend_bundle(self.bundle) as draft:
            folder = draft.folder
            external: ExternalData = "always" if self.source.external else "auto"
            files = write_model(self.model, folder / name, external)
            ops, opset = operator_counts(self.model), self.model.opset_imports[""]
            del self.model  # it is in the file now, and a large one leaves no room to run it
            free_memory()
            runtime, comparisons = _run(folder / name, self.bundle, self.precision, self.source.artifact.batch)
            free_memory()  # an engine may be built from it next
            record, *data = (FileRecord.of(folder, file.name) for file in files)
            artifact = Artifact(
                file=record,
                external=tuple(data),
                precision=self.precision,
                opset=opset,
                batch=self.source.artifact.batch,
                ops_before=self.source.artifact.ops_after,
                ops_after=ops,
                steps=tuple(self.steps),
                source=self.source.name,
                calibration=None if calibration is None else calibration(folder),
                quantized=quantized,
                reverted=reverted,
            )
            draft.add(artifact)
        file = draft.bundle.onnx_file(name)
        assert file is not None, "it was added"
        return Derived(file, runtime, comparisons)


def load_source(file: OnnxFile, precision: str) -> ir.Model:
    """Read the FP32 graph; for 8 bits in the opset that they need, where every operator in it goes on meaning the same.

    Raises:
        UsageError: an operator would not.
    """
    model = load_model(file.path)
    map_external(model)
    opset = model.opset_imports.get("", 0)
    if precision in QUANTIZED and opset < OLDEST_OPSET and (reason := raise_opset(model, QDQ_OPSET)):
        raise UsageError(
            f"{file.path} is of opset {opset}, and cannot be raised: {reason}",
            expected=f"opset {OLDEST_OPSET} or later, where Q/DQ takes FP16 scales",
            hint=f"export the model again with opset {QDQ_OPSET}",
        )
    return model


def exported_file(bundle: Bundle) -> OnnxFile:
    """Return the graph that all others of a bundle are made from.

    Raises:
        UsageError: there is none.
    """
    found = next((file for file in bundle.onnx_files() if not file.artifact.source), None)
    if found is None:
        raise UsageError(f"{bundle.path} holds no exported graph", expected="one", hint="export it again")
    return found


def fp32_file(bundle: Bundle) -> OnnxFile:
    """Return that graph where it can be made another precision.

    Raises:
        UsageError: there is none, or it is not in FP32.
    """
    found = exported_file(bundle)
    if found.precision != "fp32":
        raise UsageError(
            f"{found.path} computes in {found.precision.upper()} already",
            expected="an FP32 graph, which can be made another precision",
            hint=f"import the file that it was made from; build-trt --precision {found.precision} takes it as it is",
        )
    return found


def _run(path: Path, bundle: Bundle, precision: str, batch: int | None) -> tuple[str, tuple[Comparison, ...]]:
    """Run a new file on golden samples; only what is a fault in any budget stops it here."""
    inputs, truth = load_golden(bundle.golden)
    held = len(next(iter(inputs.values())))
    order = judged_samples(bundle.manifest.spec.inputs, precision, batch or min(CHECK_SAMPLES, held), held)
    with open_runtime(path) as runtime:
        outputs = runtime.run({name: array[order] for name, array in inputs.items()})
    spec, wanted = bundle.manifest.spec, {name: array[order] for name, array in truth.items()}
    comparisons = compare(dense(spec, wanted), dense(spec, outputs), BUDGETS[precision])
    for comparison in comparisons:
        if comparison.faults:
            raise NumericsError(
                f"the {precision} graph gives no usable numbers: output {comparison.name!r} "
                + "; ".join(comparison.faults),
                expected="finite outputs",
                hint="keep the operators that overflow in FP32: --keep-fp32 REGEX, or --calibrate DATA to find them",
            )
    return runtime.name, comparisons
