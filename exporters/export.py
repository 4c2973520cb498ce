"""From the name of a model to a proven bundle: build, trace, rewrite, write, check."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.bundle import new_bundle
from deploycli.exporters.bundle.golden import (
    GOLDEN_NAME,
    GOLDEN_SAMPLES,
    require_comparable,
    save_golden,
    synthetic_inputs,
)
from deploycli.exporters.bundle.manifest import SCHEMA_VERSION, Artifact, FileRecord, Manifest, version_of
from deploycli.exporters.bundle.trust import sign
from deploycli.exporters.graph.cost import operator_counts
from deploycli.exporters.graph.operators import ATTENTION_OPSET
from deploycli.exporters.graph.steps import Step
from deploycli.exporters.runtime.runtimes import EagerRuntime, OrtRuntime
from deploycli.exporters.verification.compare import BUDGETS, compare
from deploycli.exporters.verification.on_samples import class_output, dense
from deploycli.models.errors import EnvironmentUnsuitable, ExportError, UsageError
from deploycli.models.factory import contained
from deploycli.models.features import with_features
from deploycli.models.labels import LABELS_KEY, library_labels, read_labels, require_fitting
from deploycli.models.memory import collector_paused, free_memory, set_aside
from deploycli.models.registry import configure, resolve
from deploycli.models.sources import FACTORY, LIBRARIES, parse_source
from deploycli.models.spec import PreprocessingChange
from deploycli.models.variants import HubFile, Variant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt
    import onnx_ir as ir
    from torch import nn

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.graph.onnx_file import ExternalData
    from deploycli.exporters.passes.pipeline import Attention
    from deploycli.exporters.tune import Form, TuneOptions, Tuning
    from deploycli.models.sources import Source
    from deploycli.models.spec import Layout, ModelSpec, TensorSpec, Weights

    Arrays = Mapping[str, npt.NDArray[Any]]

MODEL_NAME = "model.onnx"

TIMES_OWN, MOST_OWN = 4, 0.1
"""How much further than PyTorch's float32 answers the file's may be from the float64 ones, and how far, relatively."""

CHECK_BATCH = 3
"""Batch of the check after the export: neither 1 nor the batch that was traced."""

_PACKAGES = ("deploycli", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch")


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and where to.

    Attributes:
        model: a registered name.
        root: folder of bundles.
        name: name of the bundle; by default the model's short name.
        checkpoint: the weights, or None.
        pretrained: fetch published weights: the variant's own, or those of a given hub file.
        seed: seed of random weights, where neither of the two is given.
        img_size: image height and width in place of the variant's, pixels.
        window_size: attention window in place of the variant's, tokens.
        num_classes: classes of the head; with weights, read from them.
        weights_entry: which of the checkpoint's sets of weights; by default EMA weights before plain ones.
        model_kwargs: keyword arguments of what makes a model that is not registered here.
        inputs: inputs of such a model, in the order of its forward; by default one image.
        opset: ONNX operator set version.
        batch: a fixed batch size, or None for a symbolic one.
        rewrite: run the rewriting passes; otherwise keep the plain graph.
        attention: ``4d``, ``5d`` to leave the scores of masked windows in five dimensions, or ``onnx`` for the operator
            of that name, from opset 23 on.
        external: where the weights are stored.
        replace: a bundle of the same name goes even if it is of another model.
        lint: end where TensorRT could not read the graph; otherwise it is written all the same.
        preprocessing: what the user says of how pictures become inputs.
        pixels: the graph takes decoded pictures in this layout, and normalises them itself.
        ending: ``softmax`` or ``topk:N`` in place of logits.
        features: give the feature maps of these stages in place of logits, the first is 1; empty for all, None for
            logits.
        labels: a file of the names of the classes; by default those that the model's library knows.
        tune: compile forms of the graph and keep the cheapest; None takes the default form.
    """

    model: str
    root: Path
    name: str | None = None
    checkpoint: Path | None = None
    pretrained: bool | HubFile = False
    seed: int = 0
    img_size: tuple[int, int] | None = None
    window_size: int | None = None
    num_classes: int | None = None
    weights_entry: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[TensorSpec, ...] = ()
    opset: int = 20
    batch: int | None = None
    rewrite: bool = True
    attention: Attention = "4d"
    external: ExternalData = "auto"
    replace: bool = False
    lint: bool = True
    preprocessing: PreprocessingChange = field(default_factory=PreprocessingChange)
    pixels: Layout | None = None
    ending: str = ""
    features: tuple[int, ...] | None = None
    labels: Path | None = None
    tune: TuneOptions | None = None


def export(
    options: ExportOptions,
    *,
    progress: Callable[[str], None] = lambda _: None,
    told: Callable[[Weights], None] = lambda _: None,
    tuned: Callable[[Tuning], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export a model into a bundle, replacing one of the same name and model whole.

    If the graph comes out as it was, byte for byte, what was made from it stays; else `Bundle.gone` names it.

    Args:
        options: what to export.
        progress: is told what runs.
        told: is told of the weights as soon as they are known.
        tuned: is told what became of the forms that were compiled.
        warn: is told what a user should know of the result.

    Raises:
        UsageError: an unknown name, an argument or a checkpoint that does not fit.
        ExportError: the model cannot be traced, TensorRT could not read its graph, or the written file disagrees with
            it.
        EnvironmentUnsuitable: the folder cannot be written, or the hub cannot be reached.
    """
    variant = _adapted(_variant(options), options)
    named = () if options.labels is None else read_labels(options.labels)
    name = options.name or variant.name
    model = None if options.replace else variant.spec
    with collector_paused(), set_aside(), new_bundle(options.root, name, model=model) as draft:
        progress("building the model")
        module, spec, weights = _weighted(options, variant)
        told(weights)
        if options.ending:
            from deploycli.models.adapt import ended  # PyTorch

            spec = ended(module, spec, options.ending)
        labels = named or library_labels(spec.family, module, published=weights.source == "pretrained")
        progress("running it in PyTorch")
        inputs = synthetic_inputs(spec, max(GOLDEN_SAMPLES, options.batch or 0))
        with EagerRuntime(module, [i.name for i in spec.inputs], spec.outputs, poison=False) as eager:
            outputs = eager.run(inputs)
        require_comparable(inputs, outputs, "PyTorch")
        save_golden(draft.folder / GOLDEN_NAME, inputs, outputs)
        if named:
            classes = class_output(dense(spec, outputs))
            require_fitting(named, None if classes is None else classes.classes, str(options.labels))
        artifact = _write_onnx(draft.folder, module, spec, labels, options, progress, tuned)
        del module
        free_memory()  # traced programs are cycles, and hold the weights: the check needs their room
        progress("checking the file in ONNX Runtime")
        size = options.batch or CHECK_BATCH
        feed, truth = ({name: array[:size] for name, array in arrays.items()} for arrays in (inputs, outputs))
        if remark := _check(
            draft.folder / artifact.file.path, spec, feed, truth, lambda: _exact(options, variant, feed)
        ):
            warn(remark)
        signature, unsigned = sign(spec)
        if unsigned:
            warn(f"the function is not signed, and verify will ask for --trust-factory: {unsigned}")
        draft.manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            tool_version=version_of("deploycli"),
            name=name,
            spec=spec,
            weights=weights,
            preprocessing=variant.preprocessing,
            artifacts=(artifact,),
            golden=FileRecord.of(draft.folder, GOLDEN_NAME),
            versions={package: version_of(package) for package in (*_PACKAGES, *_library(spec))},
            factory_signature=signature,
            labels=labels,
        )
    return draft.bundle


def _variant(options: ExportOptions) -> Variant:
    """Return what is exported.

    Raises:
        UsageError, EnvironmentUnsuitable: see `export`.
    """
    try:
        from deploycli.exporters.trace import check_opset
    except (ImportError, OSError, SystemError) as error:  # a shared library is missing; there is no memory for it
        raise EnvironmentUnsuitable(
            f"the exporter cannot be imported: {error}",
            expected="PyTorch, ONNX and onnxscript",
            hint="pip install torch",
        ) from error
    check_opset(options.opset)
    if options.checkpoint is not None and options.pretrained:
        raise UsageError("both --checkpoint and --pretrained were given", expected="one source of weights")
    if options.attention == "onnx" and options.opset < ATTENTION_OPSET:
        raise UsageError(
            f"--attention onnx with opset {options.opset}",
            expected=f"opset {ATTENTION_OPSET}, the first that has the operator",
            hint=f"--opset {ATTENTION_OPSET}",
        )
    if options.attention == "onnx" and not options.rewrite:
        raise UsageError("both --attention onnx and --no-rewrite were given", expected="one of the two")
    if options.tune is not None:
        from deploycli.exporters.tune import refuse_other_forms

        refuse_other_forms(options.tune, options.attention, rewrite=options.rewrite)
    if options.batch is not None and options.batch < 1:
        raise UsageError(f"a batch of {options.batch}", expected="a positive number, or dynamic")
    if options.features is not None and options.num_classes is not None:
        raise UsageError("both --features and --num-classes were given", expected="one of the two: maps or classes")
    source = parse_source(options.model)
    return _registered(options) if source is None else _foreign(options, source)


def _adapted(variant: Variant, options: ExportOptions) -> Variant:
    """Let what is exported take its pictures as the user says."""
    spec = variant.spec
    recipe = options.preprocessing.applied(variant.preprocessing, spec.inputs)
    if options.pixels is not None:
        from deploycli.models.adapt import from_pixels  # PyTorch

        spec, recipe = from_pixels(spec, recipe, options.pixels)
    return replace(variant, spec=spec, preprocessing=recipe)


def _registered(options: ExportOptions) -> Variant:
    variant = resolve(options.model)
    if options.model_kwargs or options.inputs:
        raise UsageError(
            f"{variant.name} takes neither --model-kwargs nor --input",
            expected="a model from elsewhere, such as timm:NAME",
            hint="--img-size, --window-size or --num-classes",
        )
    configured = configure(
        variant, img_size=options.img_size, window_size=options.window_size, num_classes=options.num_classes
    )
    return configured if options.features is None else with_features(configured, options.features)


def _foreign(options: ExportOptions, source: Source) -> Variant:
    from deploycli.models.describe import describe, with_classes

    if options.window_size is not None:
        raise UsageError(
            f"{options.model} is not registered here: --window-size means nothing to it",
            hint="""--model-kwargs '{"window_size": 8}', if that is what it calls it""",
        )
    kwargs = with_classes(source, options.model_kwargs, options.num_classes)
    return describe(source, kwargs, inputs=options.inputs, img_size=options.img_size, features=options.features)


def _weighted(options: ExportOptions, variant: Variant) -> tuple[nn.Module, ModelSpec, Weights]:
    """Return the model with its weights, the spec that they led to, and where they came from."""
    from deploycli.models.build import build
    from deploycli.models.checkpoint import load
    from deploycli.models.fingerprint import build_factory
    from deploycli.models.spec import Weights

    own = None if options.checkpoint is not None else _own_checkpoint(variant.spec)
    if own is not None and options.pretrained:
        raise UsageError(
            f"{options.model} brings its own weights, and others were asked for",
            expected="one source of weights",
            hint="leave out --pretrained and --pretrained-from, or give a --checkpoint FILE",
        )
    checkpoint = options.checkpoint or own
    if checkpoint is not None:
        loaded = load(variant.spec, checkpoint, num_classes=options.num_classes, entry=options.weights_entry)
    elif options.pretrained:
        from deploycli.models.hub import fetch

        file = options.pretrained if isinstance(options.pretrained, HubFile) else variant.pretrained
        if file is None:
            raise UsageError(f"{variant.name} has no published weights", hint="--checkpoint FILE")
        fetched = fetch(file)
        loaded = load(
            variant.spec,
            fetched.path,
            num_classes=options.num_classes,
            entry=options.weights_entry,
            source="pretrained",
            origin=fetched.origin,
        )
    else:
        if options.weights_entry is not None:
            raise UsageError("--weights-entry without weights from a file", hint="--checkpoint FILE")
        if variant.spec.family == FACTORY:
            module, weights = build_factory(variant.spec, seed=options.seed)
            return module, variant.spec, weights
        return build(variant.spec, seed=options.seed), variant.spec, Weights("random", seed=options.seed)
    return loaded.model, loaded.spec, loaded.weights


def _own_checkpoint(spec: ModelSpec) -> Path | None:
    """Return the weights that come with a transformers configuration."""
    if spec.family != "hf":
        return None
    from deploycli.models.describe import own_checkpoint

    return own_checkpoint(spec.config["target"])


def _write_onnx(
    folder: Path,
    module: nn.Module,
    spec: ModelSpec,
    labels: Sequence[str],
    options: ExportOptions,
    progress: Callable[[str], None],
    tuned: Callable[[Tuning], None],
) -> Artifact:
    from deploycli.exporters.gate import require_readable
    from deploycli.exporters.graph.onnx_file import write_model
    from deploycli.exporters.passes.common.names import name_nodes
    from deploycli.exporters.passes.pipeline import for_attention, rewrite
    from deploycli.exporters.trace import MODULE_KEY, store_operands, trace

    progress("tracing")
    start = time.perf_counter()
    model = trace(module, spec.inputs, spec.outputs, opset=options.opset, batch=options.batch)
    steps = [Step("trace", model.graph.num_nodes(), time.perf_counter() - start)]
    before = operator_counts(model)
    if options.rewrite:
        without, also = for_attention(options.attention)
        if options.tune is not None:
            without, also = _tune(model, options.tune, steps, progress, tuned)
        progress("rewriting")
        steps += rewrite(model, without=without, also=also)
    else:
        store_operands(model)
    name_nodes(model, MODULE_KEY)
    if labels:
        model.metadata_props[LABELS_KEY] = json.dumps(labels, ensure_ascii=False)
    if options.lint:
        require_readable(model, f"the graph of {options.model}")
    progress("writing")
    files = write_model(model, folder / MODEL_NAME, options.external)
    record, *external = (FileRecord.of(folder, file.name) for file in files)
    return Artifact(
        file=record,
        external=tuple(external),
        precision="fp32",
        opset=options.opset,
        batch=options.batch,
        ops_before=before,
        ops_after=operator_counts(model),
        steps=tuple(steps),
    )


def _tune(
    model: ir.Model,
    options: TuneOptions,
    steps: list[Step],
    progress: Callable[[str], None],
    tuned: Callable[[Tuning], None],
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the passes to leave out, and those to run besides, that make the cheapest engine."""
    from deploycli.exporters.passes.common.names import name_nodes
    from deploycli.exporters.passes.pipeline import rewrite
    from deploycli.exporters.trace import MODULE_KEY
    from deploycli.exporters.tune import tune

    def rewritten(candidate: ir.Model, form: Form) -> ir.Model:
        without, also = form.passes
        rewrite(candidate, without=without, also=also)
        name_nodes(candidate, MODULE_KEY)
        return candidate

    start = time.perf_counter()
    tuning = tune(model, options, rewritten, progress=progress)
    tuned(tuning)
    seconds = time.perf_counter() - start
    steps.append(Step("tune", model.graph.num_nodes(), seconds, remark=tuning.summary))
    return tuning.form.passes


def _check(path: Path, spec: ModelSpec, feed: Arrays, truth: Arrays, exact: Callable[[], Arrays | None]) -> str:
    """Fail the export where the file does not compute what the model computes.

    Args:
        path: the file.
        spec: of the model.
        feed: inputs.
        truth: what the model answers in float32.
        exact: makes what it answers in float64, or None where it cannot; asked only where the file disagrees.

    Returns:
        What to say of the model, where its own float32 answers are no closer to the exact ones than the file's.
    """
    with OrtRuntime(path, optimize=False) as runtime:  # the file as it is written; `verify` runs it optimised too
        outputs = dense(spec, runtime.run(feed))
    truth = dense(spec, truth)
    budget = BUDGETS["fp32"]
    failed = [comparison for comparison in compare(truth, outputs, budget) if not comparison.passed]
    if not failed:
        return ""
    best = None if any(comparison.faults for comparison in failed) else exact()
    if best is not None:
        best = dense(spec, best)
        theirs = max(one.max_rel_error or 0.0 for one in compare(best, truth, budget))
        ours = [one.max_rel_error for one in compare(best, outputs, budget)]
        if (
            all(error is not None and error <= max(budget.max_rel_error, theirs) for error in ours)
            and theirs < MOST_OWN
        ):
            return (
                f"with these weights float32 is inexact: PyTorch's answers are {theirs:.1e} from its float64 ones, the "
                f"file's {max(error or 0.0 for error in ours):.1e}; verify will want --rtol {10 * theirs:.0e}"
            )
    raise ExportError(
        f"the exported graph disagrees with the model: output {failed[0].name!r} " + "; ".join(failed[0].reasons),
        expected="equal outputs within the FP32 budget",
        hint="--no-rewrite, to see whether the exporter or a rewriting pass is at fault",
    )


def _exact(options: ExportOptions, variant: Variant, feed: Arrays) -> Arrays | None:
    """Return what the model answers in float64; None where it cannot, as one that names float32 in its code."""
    import torch

    from deploycli.models.outputs import flatten

    try:
        module, spec, _ = _weighted(options, variant)
        if options.ending:
            from deploycli.models.adapt import ended

            spec = ended(module, spec, options.ending)
        tensors = (torch.tensor(feed[i.name]) for i in spec.inputs)
        with torch.inference_mode(), contained():
            found = flatten(module.double()(*(t.double() if t.is_floating_point() else t for t in tensors)))
        return {name: value.detach().numpy() for name, value in zip(spec.outputs, found.values(), strict=True)}
    except Exception:  # a stranger's code raises what it likes
        return None


def _library(spec: ModelSpec) -> tuple[str, ...]:
    return (LIBRARIES[spec.family],) if spec.family in LIBRARIES else ()
