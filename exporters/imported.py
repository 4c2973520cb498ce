"""``deploycli import``: a bundle of an ONNX file, whoever exported it.

The file as it was, run by ONNX Runtime node by node, takes the place of the eager model: it is the reference of
`verify`, and made what golden.npz holds. A sample is what stands at one place of the first axis, which all inputs and
outputs share: the batch.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.bundle import Bundle, new_bundle
from deploycli.exporters.bundle.golden import (
    GOLDEN_NAME,
    GOLDEN_SAMPLES,
    require_comparable,
    save_golden,
    synthetic_inputs,
)
from deploycli.exporters.bundle.manifest import SCHEMA_VERSION, Artifact, FileRecord, Manifest, version_of
from deploycli.exporters.data.arrays import sample_shapes
from deploycli.exporters.data.samples import open_samples
from deploycli.exporters.gate import require_readable
from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.cost import operator_counts, refuse_what_is_too_large
from deploycli.exporters.graph.onnx_file import external_files, model_sha256, write_model
from deploycli.exporters.graph.operators import DRAWN
from deploycli.exporters.graph.steps import Step
from deploycli.exporters.graph_check import check_graphs
from deploycli.exporters.optimize import budget_of, load
from deploycli.exporters.passes.any_model import optimized, validate
from deploycli.exporters.passes.pipeline import for_attention
from deploycli.exporters.precision.simulate import computed_precision
from deploycli.exporters.runtime.runtimes import InBatches, OrtRuntime
from deploycli.exporters.verification.on_samples import class_output
from deploycli.models.errors import UsageError
from deploycli.models.labels import LABELS_KEY, known_labels, read_labels, require_fitting
from deploycli.models.memory import free_memory
from deploycli.models.sources import IMPORTED, safe_name
from deploycli.models.spec import ModelSpec, PreprocessingChange, TensorSpec, Weights, numpy_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt
    import onnx_ir as ir

    from deploycli.exporters.data.samples import Samples
    from deploycli.exporters.graph.onnx_file import ExternalData
    from deploycli.exporters.passes.pipeline import Attention
    from deploycli.exporters.runtime.runtimes import Runtime

    Arrays = Mapping[str, npt.NDArray[Any]]

MODEL_NAME = "model.onnx"
REFERENCE = "reference"
"""Folder of the file as it was, where the exported one is another."""

_PACKAGES = ("deploycli", "numpy", "onnx", "onnx-ir", "onnxruntime")


@dataclass(frozen=True)
class ImportOptions:
    """What to import, and how.

    Attributes:
        source: the ONNX file.
        root: folder of bundles.
        name: of the bundle; None takes the file's.
        inputs: inputs whose sizes or values are not told by the graph; the others are left out.
        samples: a ``.npy`` or ``.npz`` file of samples, where random numbers are none that the model takes.
        preprocessing: how a picture becomes the input, which no ONNX file says.
        labels: a file of the names of the classes; by default those in the file's metadata.
        rewrite: run the rewriting passes; otherwise the file is taken as it is.
        attention: see `deploycli.exporters.export.ExportOptions`.
        external: where the weights of a graph that is rewritten are stored.
        seed: of random inputs.
        replace: a bundle of the same name goes even if it is of another model.
        lint: end where TensorRT could not read the graph; otherwise it is written all the same.
    """

    source: Path
    root: Path
    name: str | None = None
    inputs: tuple[TensorSpec, ...] = ()
    samples: Path | None = None
    preprocessing: PreprocessingChange = field(default_factory=PreprocessingChange)
    labels: Path | None = None
    rewrite: bool = True
    attention: Attention = "4d"
    external: ExternalData = "auto"
    seed: int = 0
    replace: bool = False
    lint: bool = True


def import_model(
    options: ImportOptions,
    *,
    progress: Callable[[str], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Make a bundle of an ONNX file, replacing one of the same name and model whole.

    Args:
        options: what and how.
        progress: is told what runs.
        warn: is told what a user should know of the result.

    Raises:
        UsageError: the file is no ONNX file; its inputs share no batch axis; a size is not known; samples that do not
            fit.
        ExportError: the graph is invalid, does not run, answers NaN, or TensorRT could not read it.
        IntegrityError: its external data are missing, of another length, or outside its folder.
        NumericsError: the rewritten graph answers otherwise.
        EnvironmentUnsuitable: ONNX Runtime cannot load the file, or the folder cannot be written.
    """
    progress("reading")
    model = load(options.source)
    _refuse_random(model)
    labels = known_labels(model.metadata_props) if options.labels is None else read_labels(options.labels)
    batch = batch_of(model.graph, str(options.source))
    spec = spec_of(model.graph, options.source.stem, options.inputs, sampled=options.samples is not None)
    name = options.name or spec.name
    with new_bundle(options.root, name, model=None if options.replace else spec) as draft:
        reference, *data = _kept(options.source, external_files(model), draft.folder / REFERENCE)
        progress("running it in ONNX Runtime")
        spec, inputs = _inputs(spec, options, batch)
        recipe = options.preprocessing.applied(None, spec.inputs)
        with reference_runtime(reference, batch) as runtime:
            outputs = runtime.run(inputs)
        require_comparable(inputs, outputs, runtime.name)
        save_golden(draft.folder / GOLDEN_NAME, inputs, outputs)
        found = class_output(outputs)
        if options.labels is not None:
            require_fitting(labels, None if found is None else found.classes, str(options.labels))
        elif found is None or found.classes != len(labels):  # somebody else's word for something else
            labels = ()
        if labels:
            model.metadata_props[LABELS_KEY] = json.dumps(labels, ensure_ascii=False)
        artifact = _artifact(model, options, batch, reference, draft.folder, inputs, progress)
        if not options.rewrite:  # the file is the exported one
            shutil.rmtree(draft.folder / REFERENCE)
        draft.manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            tool_version=version_of("deploycli"),
            name=name,
            spec=spec,
            weights=Weights(IMPORTED, path=str(options.source), sha256=model_sha256(options.source)),
            preprocessing=recipe,
            artifacts=(artifact,),
            golden=FileRecord.of(draft.folder, GOLDEN_NAME),
            versions={package: version_of(package) for package in _PACKAGES},
            reference=tuple(_records(draft.folder, [reference, *data])) if options.rewrite else (),
            recorded_inputs=options.samples is not None,
            labels=labels,
        )
    if artifact.precision != "fp32":
        warn(
            f"the file computes in {artifact.precision.upper()}: it is taken as it is, and cannot be cast or quantized"
        )
    return draft.bundle


def imported_already(options: ImportOptions) -> Bundle | None:
    """Return the bundle that an earlier import of the very file made, if it is there."""
    folder = options.root / (options.name or safe_name(options.source.stem) or IMPORTED)
    try:
        bundle = Bundle.open(folder)
    except UsageError:  # there is none
        return None
    weights = bundle.manifest.weights
    same = weights.source == IMPORTED and weights.sha256 == model_sha256(options.source)
    return bundle if same and bundle.manifest.recorded_inputs == (options.samples is not None) else None


def imported_runtime(bundle: Bundle) -> Runtime:
    """Load the file that a bundle was made of, as it was.

    Raises:
        ExportError: ONNX Runtime cannot load it.
    """
    manifest = bundle.manifest
    record = manifest.reference[0] if manifest.reference else manifest.artifacts[0].file
    return reference_runtime(bundle.path / record.path, manifest.artifacts[0].batch)


def reference_runtime(path: Path, batch: int | None) -> Runtime:
    """Load an ONNX file that is the truth: node by node as it is written, any number of samples at a time."""
    runtime = OrtRuntime(path, optimize=False, move_qdq=False)
    return runtime if batch is None else InBatches(runtime, batch)


def open_file_samples(
    graph: ir.Graph, source: Path, data: Any, preprocessing: PreprocessingChange, limit: int | None
) -> Samples:
    """Open data for a graph that is in no bundle; see `deploycli.exporters.data.samples.open_samples`.

    Raises:
        UsageError: the inputs share no batch, or the data do not fit.
    """
    batch_of(graph, str(source))
    held = Path(str(data)).suffix in (".npy", ".npz")
    spec = spec_of(graph, source.stem, (), sampled=held)
    inputs = _sized(spec.inputs, Path(str(data))) if held else spec.inputs
    return open_samples(data, inputs, preprocessing.applied(None, inputs), limit=limit)


# --- the file --------------------------------------------------------------------------------------------------------


def _refuse_random(model: ir.Model) -> None:
    if drawn := next((node for node in model.graph.all_nodes() if node.op_type in DRAWN), None):
        raise UsageError(
            f"the graph draws random numbers ({drawn.name or drawn.op_type}), other ones every time: nothing could be "
            "compared with its answers",
            expected="a graph for inference",
        )


def batch_of(graph: ir.Graph, what: str) -> int | None:
    """Return the batch that a graph is for, or None where it takes any.

    Raises:
        UsageError: its inputs share no first axis.
    """
    inputs = fed(graph)
    firsts = [None if value.shape is None or not len(value.shape) else value.shape[0] for value in inputs]
    if not inputs or any(first is None for first in firsts):
        culprit = next((value.name for value, first in zip(inputs, firsts, strict=True) if first is None), None)
        found = f"its input {culprit!r} has no axis" if inputs else "it has no input"
        raise UsageError(
            f"{what} has no batch: {found}",
            expected="inputs whose first axis is the batch",
            hint="optimize, cast and lint take such a file; a bundle needs samples that can be told apart",
        )
    fixed = {int(first) for first in firsts if isinstance(first, int)}
    if len(fixed) > 1 or (fixed and len(fixed) != len({isinstance(first, int) for first in firsts})):
        shown = ", ".join(f"{value.name} {list(value.shape or ())}" for value in inputs)
        raise UsageError(
            f"the inputs of {what} share no batch: {shown}", expected="one first axis, symbolic or of one size"
        )
    return next(iter(fixed), None)


def fed(graph: ir.Graph) -> list[ir.Value]:
    """Return the inputs that are to be fed: those that are no constants."""
    return [value for value in graph.inputs if not value.is_initializer()]


def spec_of(graph: ir.Graph, name: str, given: Sequence[TensorSpec], *, sampled: bool = False) -> ModelSpec:
    """Return what goes into a graph and what comes out.

    Args:
        graph: whose inputs have a batch, see `batch_of`.
        name: what it is called.
        given: inputs whose sizes or values it does not tell.
        sampled: there are samples, which tell the sizes; until then they are 1.

    Raises:
        UsageError: a size is not known; or what was given is not the graph's.
    """
    known = {spec.name: spec for spec in given}
    inputs = fed(graph)
    names = [value.name or "" for value in inputs]
    if unknown := sorted(known.keys() - set(names)):
        raise UsageError(f"the graph has no input {unknown[0]!r}", expected=", ".join(names))
    specs = tuple(_input(value, known.get(value.name or ""), sampled) for value in inputs)
    outputs = tuple(value.name or "" for value in graph.outputs)
    return ModelSpec(safe_name(name) or IMPORTED, IMPORTED, {}, specs, outputs)


def _input(value: ir.Value, given: TensorSpec | None, sampled: bool) -> TensorSpec:
    """Return what is known of an input; 1 stands for a size that the samples are to tell."""
    name = value.name or ""
    dtype = numpy_name("undefined" if value.dtype is None else value.dtype.name)
    assert value.shape is not None, "the batch was found in it"
    dims = [dim if isinstance(dim, int) else dim.value for dim in list(value.shape)[1:]]
    if dtype in ("string", "undefined"):
        raise UsageError(f"the input {name!r} has the type {dtype}", expected="numbers")
    if given is None:
        if (symbol := next((dim for dim in dims if not isinstance(dim, int)), 0)) != 0 and not sampled:
            raise UsageError(
                f"the input {name!r} has an axis of no fixed size, {symbol or 'unnamed'}: {_shape_text(dims)}",
                expected="the size at which it is verified and built; the graph keeps the axis as it is",
                hint=f"--input {name}:1x{'x'.join(str(dim if isinstance(dim, int) else 224) for dim in dims)}, "
                "or --inputs FILE.npz",
            )
        return TensorSpec(name, tuple(dim if isinstance(dim, int) else 1 for dim in dims), dtype)
    differs = len(given.shape) != len(dims) or any(
        isinstance(dim, int) and dim != size for dim, size in zip(dims, given.shape, strict=False)
    )
    if differs or given.dtype not in ("float32", dtype):
        raise UsageError(
            f"--input {name} is {given.dtype} {_shape_text(list(given.shape))}",
            expected=f"{dtype} {_shape_text(dims)}, as the graph has it",
        )
    return replace(given, dtype=dtype)


def _shape_text(dims: Sequence[int | str | None]) -> str:
    return f"[batch, {', '.join('?' if dim is None else str(dim) for dim in dims)}]" if dims else "[batch]"


def _kept(source: Path, data: Sequence[str], folder: Path) -> list[Path]:
    """Copy the file and its external data, which keep their places."""
    copies = []
    for name in (source.name, *data):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.parent / name, copy)
        copies.append(copy)
    return copies


def _records(folder: Path, files: Sequence[Path]) -> list[FileRecord]:
    return [FileRecord.of(folder, file.relative_to(folder).as_posix()) for file in files]


# --- what it answers -------------------------------------------------------------------------------------------------


def _inputs(spec: ModelSpec, options: ImportOptions, batch: int | None) -> tuple[ModelSpec, Arrays]:
    """Return the inputs of golden.npz, and the spec with the sizes that they have."""
    wanted = max(GOLDEN_SAMPLES, batch or 0)
    if options.samples is None:
        return spec, synthetic_inputs(spec, wanted, options.seed)
    spec = replace(spec, inputs=_sized(spec.inputs, options.samples))
    samples = open_samples(options.samples, spec.inputs, None, limit=wanted)
    held = next(iter(samples.batches(len(samples.names)))).inputs
    count = len(next(iter(held.values())))
    if batch is not None and count < batch:
        raise UsageError(
            f"{options.samples} holds {count} samples, and the graph takes {batch} at a time",
            expected=f"{batch} or more",
        )
    return spec, held


def _sized(inputs: Sequence[TensorSpec], samples: Path) -> tuple[TensorSpec, ...]:
    """Return the inputs with the sizes that samples have."""
    shapes = sample_shapes(samples, inputs)
    return tuple(replace(one, shape=shapes[one.name]) for one in inputs)


def _artifact(
    model: ir.Model,
    options: ImportOptions,
    batch: int | None,
    reference: Path,
    folder: Path,
    inputs: Arrays,
    progress: Callable[[str], None],
) -> Artifact:
    """Rewrite the graph, write it and compare it with the file; without rewriting, take the file as it is."""
    steps = [Step("import", model.graph.num_nodes(), 0.0)]
    before, opset, precision = operator_counts(model), model.opset_imports.get("", 0), computed_precision(model)
    if not options.rewrite:
        validate(model)
        if options.lint:
            require_readable(model, str(options.source))
        names = (reference.name, *external_files(model))
        files = [folder / (MODEL_NAME if place == 0 else name) for place, name in enumerate(names)]
        for name, file in zip(names, files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            (reference.parent / name).replace(file)
        after = before
    else:
        progress("rewriting")
        without, also = for_attention(options.attention)
        most = len(next(iter(inputs.values())))

        def weigh(graph: ir.Graph) -> None:
            refuse_what_is_too_large(graph, Analysis(graph), batch=batch or most, hint="--no-rewrite")

        model, more = optimized(model, without=without, also=also, judge=weigh)
        steps += more
        if options.lint:
            require_readable(model, str(options.source))
        after, opset = operator_counts(model), model.opset_imports.get("", 0)
        progress("writing")
        files, budget = write_model(model, folder / MODEL_NAME, options.external), budget_of(model)
        del model
        free_memory()
        feeds = [{name: array[: batch or most] for name, array in inputs.items()}]
        if batch is None and most > 1:
            feeds.append({name: array[:1] for name, array in inputs.items()})
        check_graphs(reference, files[0], budget=budget, feeds=feeds, progress=progress)
    record, *external = _records(folder, files)
    return Artifact(
        file=record,
        external=tuple(external),
        precision=precision,
        opset=opset,
        batch=batch,
        ops_before=before,
        ops_after=after,
        steps=tuple(steps),
    )
