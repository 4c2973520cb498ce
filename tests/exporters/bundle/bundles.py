"""Small bundles with two outputs, made by hand: quick to write, and easy to spoil in one known way."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploycli.exporters.bundle.bundle import Bundle, ModelFile, new_bundle
from deploycli.exporters.bundle.bundle import extend_bundle as extending
from deploycli.exporters.bundle.golden import GOLDEN_NAME, save_golden, synthetic_inputs
from deploycli.exporters.bundle.manifest import MANIFEST_NAME, SCHEMA_VERSION, Artifact, FileRecord, Manifest
from deploycli.exporters.bundle.verification import Verification
from deploycli.exporters.graph.steps import Remark, Step
from deploycli.exporters.verification.report import keep
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.spec import ModelSpec, TensorSpec, Weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from deploycli.exporters.verification.report import Report

SAMPLES, FEATURES, CLASSES = 8, 12, 5
WEIGHT = np.random.default_rng(1).standard_normal((FEATURES, CLASSES)).astype(np.float32)
ABSENT = Weights("checkpoint", path="/nowhere/model.pth", sha256="0" * 64)
SPEC = ModelSpec("linear", "by-hand", {}, (TensorSpec("images", (FEATURES,)),), ("logits", "features"))


def graph(nodes: Iterable[onnx.NodeProto] = (), *, outputs: tuple[str, ...] = SPEC.outputs) -> onnx.ModelProto:
    """``logits = images @ weight``, ``features = tanh(logits)``; ``nodes`` make the outputs from raw.NAME instead."""
    extra = list(nodes)
    made = {name for node in extra for name in node.output}
    body = [helper.make_node("MatMul", ["images", "weight"], ["raw.logits"])]
    body.append(helper.make_node("Tanh", ["raw.logits"], ["raw.features"]))
    body += extra
    body += [helper.make_node("Identity", [f"raw.{name}"], [name]) for name in SPEC.outputs if name not in made]
    constants = {
        "weight": WEIGHT,
        "zero": np.zeros((), np.float32),
        "three": np.full((), 3, np.float32),
        "first": np.zeros(1, np.int64),
        "not_a_number": np.full((), np.nan, np.float32),
    }
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", FEATURES])
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    proto = helper.make_graph(body, "linear", [images], values, initializers)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def truth(images: np.ndarray) -> dict[str, np.ndarray]:
    logits = images @ WEIGHT
    return {"logits": logits, "features": np.tanh(logits)}


def filler(
    model: onnx.ModelProto | None = None,
    *,
    spec: ModelSpec = SPEC,
    weights: Weights = ABSENT,
    samples: int = SAMPLES,
    batch: int | None = None,
    precision: str = "fp32",
) -> Callable[[Path], Manifest]:
    def fill(folder: Path) -> Manifest:
        (folder / "model.onnx").write_bytes((model or graph()).SerializeToString())
        inputs = synthetic_inputs(SPEC, samples)
        save_golden(folder / GOLDEN_NAME, inputs, truth(inputs["images"]))
        artifact = Artifact(
            FileRecord.of(folder, "model.onnx"),
            (),
            precision,
            20,
            batch,
            {"MatMul": 1, "Tanh": 1},
            {"MatMul": 1, "Tanh": 1},
            (Step("trace", 4, 0.5, (Remark("node", "reason"),)),),
        )
        golden = FileRecord.of(folder, GOLDEN_NAME)
        versions = {"onnx": onnx.__version__}
        return Manifest(SCHEMA_VERSION, "0.1.0", spec.name, spec, weights, None, (artifact,), golden, versions)

    return fill


def with_external_data(folder: Path) -> Manifest:
    manifest = filler()(folder)
    model = folder / "model.onnx"
    data = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 0}
    onnx.save(onnx.load(model), model, **data)
    (artifact,) = manifest.artifacts
    external = (FileRecord.of(folder, "model.onnx.data"),)
    return replace(
        manifest, artifacts=(replace(artifact, file=FileRecord.of(folder, "model.onnx"), external=external),)
    )


def write_bundle(root: Path, name: str, fill: Callable[[Path], Manifest], *, model: ModelSpec | None = None) -> Bundle:
    """Write a bundle that ``fill`` makes in the folder it is given."""
    with new_bundle(root, name, model=model) as draft:
        draft.manifest = fill(draft.folder)
    return draft.bundle


def extend_bundle(bundle: Bundle, write: Callable[[Path], Artifact]) -> Bundle:
    """Add the artifact that ``write`` makes in the folder it is given."""
    with extending(bundle) as draft:
        draft.add(write(draft.folder))
    return draft.bundle


def make(root: Path, name: str = "linear", model: onnx.ModelProto | None = None, **options: object) -> Bundle:
    return write_bundle(root, name, filler(model, **options))  # type: ignore[arg-type] # passed through


def model_file(name: str, precision: str = "fp32", batches: tuple[int, int] | None = None) -> ModelFile:
    """A model file of no bundle, for what looks at its name, precision and batches alone."""
    record = FileRecord(name, "0" * 64, 0)
    return ModelFile(None, record, (), precision, batches, "", Verification())  # type: ignore[arg-type]


def record_again(bundle: Bundle) -> Bundle:
    """Hash the files as they are now, as if the bundle had been exported that way."""
    manifest = bundle.manifest
    artifacts = tuple(replace(a, file=FileRecord.of(bundle.path, a.file.path)) for a in manifest.artifacts)
    manifest = replace(manifest, artifacts=artifacts, golden=FileRecord.of(bundle.path, manifest.golden.path))
    (bundle.path / MANIFEST_NAME).write_text(manifest.dumps(), "utf-8")
    return Bundle.open(bundle.path)


def failing_outputs(report: Report) -> set[str]:
    json.dumps(report.to_json(), allow_nan=False)
    assert report.passed is report.to_json()["passed"] is not bool(report.failures)
    return {c.name for stage in report.stages for c in stage.comparisons if not c.passed}


def checks(report: Report) -> list[str]:
    return [stage.check for stage in report.stages]


def proven(bundle: Bundle) -> Bundle:
    """The bundle, whose graphs passed `verify`."""
    assert keep(bundle, verify(bundle, VerifyOptions(reference="golden", engines="none"))).is_file()
    return bundle
