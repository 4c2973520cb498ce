from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.bundle.golden import GOLDEN_NAME, save_golden, synthetic_inputs
from deploycli.exporters.bundle.manifest import MANIFEST_NAME, SCHEMA_VERSION, Artifact, FileRecord, Manifest
from deploycli.exporters.runtime.runtimes import EagerRuntime
from deploycli.exporters.verification.on_samples import class_output
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.build import build
from deploycli.models.errors import IntegrityError, UsageError
from deploycli.models.files import sha256_of
from deploycli.models.spec import ModelSpec, Preprocessing, TensorSpec, Weights
from tests.exporters.bundle.bundles import checks, failing_outputs, record_again, write_bundle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

node = helper.make_node
SWIN = ModelSpec(
    "swin_smallest",
    "swin",
    {
        "img_size": [32, 32],
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "num_classes": 5,
    },
    (TensorSpec("images", (3, 32, 32)),),
)


@pytest.fixture(scope="module")
def swin_onnx(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The smallest Swin with windows, shifts and a merging, exported as it is."""
    path = tmp_path_factory.mktemp("swin") / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            build(SWIN),
            (torch.zeros(2, 3, 32, 32),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            opset_version=20,
            external_data=False,
            verbose=False,
        )
    return path.read_bytes()


@pytest.fixture
def swin_bundle(swin_onnx: bytes, tmp_path: Path) -> Bundle:
    def fill(folder: Path) -> Manifest:
        (folder / "model.onnx").write_bytes(swin_onnx)
        inputs = synthetic_inputs(SWIN, 8)
        with EagerRuntime(build(SWIN), ["images"], SWIN.outputs) as eager:
            save_golden(folder / GOLDEN_NAME, inputs, eager.run(inputs))
        artifact = Artifact(FileRecord.of(folder, "model.onnx"), (), "fp32", 20, None, {}, {}, ())
        golden = FileRecord.of(folder, GOLDEN_NAME)
        weights, recipe = Weights("random", seed=0), Preprocessing((32, 32))
        return Manifest(SCHEMA_VERSION, "0.1.0", SWIN.name, SWIN, weights, recipe, (artifact,), golden, {})

    return write_bundle(tmp_path, SWIN.name, fill)


@pytest.fixture
def swin_checkpoint(tmp_path: Path) -> Path:
    """The same weights as a file."""
    path = tmp_path / "swin.safetensors"
    save_file(build(SWIN).state_dict(), path)
    return path


def append(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Put nodes, which read ``raw`` and write ``logits``, before the output of a graph."""
    mutant = onnx.ModelProto()
    mutant.CopyFrom(model)
    for each in mutant.graph.node:
        each.output[:] = ["raw" if name == "logits" else name for name in each.output]
    mutant.graph.node.extend(nodes)
    return mutant


def rewrite(bundle: Bundle, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> Bundle:
    file = bundle.path / "model.onnx"
    file.write_bytes(change(onnx.load(file)).SerializeToString())
    return record_again(bundle)


def change_weights(bundle: Bundle, weights: Weights) -> Bundle:
    manifest = replace(bundle.manifest, weights=weights)
    (bundle.path / MANIFEST_NAME).write_text(manifest.dumps(), "utf-8")
    return Bundle.open(bundle.path)


def test_exported_swin_passes_against_eager(swin_bundle: Bundle) -> None:
    steps: list[tuple[str, int, int]] = []
    report = verify(swin_bundle, VerifyOptions(batches=(3, 1), seed=7), progress=lambda *step: steps.append(step))
    assert report.passed, report.failures
    assert (report.reference, report.reference_note, report.weights) == ("eager", "", "random, seed 0")
    assert checks(report) == ["batch 1", "batch 3", "batch 3 shuffled"]
    assert steps == [(f"model.onnx, {check}", done, 3) for done, check in enumerate(checks(report))]
    assert verify(swin_bundle, VerifyOptions(reference="golden")).passed


SWIN_MUTANTS = {
    "scaled by 3": [node("Sum", ["raw", "raw", "raw"], ["logits"])],
    "zeroed": [node("Sub", ["raw", "raw"], ["logits"])],
    "NaN": [node("Sub", ["raw", "raw"], ["zero"]), node("Div", ["zero", "zero"], ["logits"])],
    "frozen batch": [
        node("Constant", [], ["first"], value_ints=[0]),
        node("Shape", ["raw"], ["shape"]),
        node("Gather", ["raw", "first"], ["one"]),
        node("Expand", ["one", "shape"], ["logits"]),
    ],
}


@pytest.mark.parametrize("mutant", SWIN_MUTANTS)
def test_swin_mutant_fails_against_eager(swin_bundle: Bundle, mutant: str) -> None:
    bundle = rewrite(swin_bundle, lambda model: append(model, *SWIN_MUTANTS[mutant]))
    report = verify(bundle, VerifyOptions(batches=(1, 3)))
    assert failing_outputs(report) == {"logits"}
    assert report.reference == "eager"


def test_one_changed_weight_fails(swin_bundle: Bundle) -> None:
    def change(model: onnx.ModelProto) -> onnx.ModelProto:
        matrix = next(i for i in model.graph.initializer if len(i.dims) == 2 and i.data_type == onnx.TensorProto.FLOAT)
        value = numpy_helper.to_array(matrix).copy()
        value.flat[0] += 0.1
        matrix.CopyFrom(numpy_helper.from_array(value, matrix.name))
        return model

    assert failing_outputs(verify(rewrite(swin_bundle, change), VerifyOptions(batches=(1,)))) == {"logits"}


def test_other_random_weights_fail(swin_bundle: Bundle) -> None:
    bundle = change_weights(swin_bundle, Weights("random", seed=1))
    assert failing_outputs(verify(bundle, VerifyOptions(batches=(2,)))) == {"logits"}
    assert verify(bundle, VerifyOptions(reference="golden")).passed


def test_checkpoint_is_loaded_again_and_must_be_the_recorded_file(
    swin_bundle: Bundle, swin_checkpoint: Path, tmp_path: Path
) -> None:
    recorded = Weights("checkpoint", path=str(swin_checkpoint), sha256=sha256_of(swin_checkpoint))
    bundle = change_weights(swin_bundle, recorded)
    report = verify(bundle, VerifyOptions(batches=(2,)))
    assert report.passed
    assert report.reference == "eager"
    moved = swin_checkpoint.rename(tmp_path / "moved.safetensors")
    assert verify(bundle, VerifyOptions(batches=(2,))).reference == "golden"
    assert verify(bundle, VerifyOptions(batches=(2,), checkpoint=moved)).reference == "eager"
    moved.write_bytes(moved.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError, match="not the checkpoint") as caught:
        verify(bundle, VerifyOptions(checkpoint=moved))
    assert recorded.sha256 in str(caught.value)


def test_checkpoint_for_random_weights_is_refused(swin_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="random weights"):
        verify(swin_bundle, VerifyOptions(checkpoint=tmp_path / "x.pth"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(7):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


def test_pictures_are_streamed_into_one_stage(swin_bundle: Bundle, pictures: Path) -> None:
    report = verify(swin_bundle, VerifyOptions(batches=(1, 3), images=pictures))
    assert report.passed, report.failures
    stage = report.stages[-1]
    assert (stage.check, stage.samples) == ("images", 7)
    assert stage.comparisons[0].reference_shape == (7, 5)
    assert stage.comparisons[0].top1 is not None
    assert stage.comparisons[0].top1.samples == 7
    assert verify(swin_bundle, VerifyOptions(images=pictures, limit=2)).stages[-1].samples == 2


def test_fixed_batch_is_filled_up_and_the_filling_is_not_judged(swin_bundle: Bundle, pictures: Path) -> None:
    (artifact,) = swin_bundle.manifest.artifacts
    manifest = replace(swin_bundle.manifest, artifacts=(replace(artifact, batch=4),))
    report = verify(replace(swin_bundle, manifest=manifest), VerifyOptions(batches=(3,), images=pictures))
    assert report.passed, report.failures
    assert checks(report) == ["batch 4", "batch 4 shuffled", "images"]
    assert report.stages[-1].comparisons[0].candidate_shape == (7, 5)


def test_mutant_fails_on_pictures(swin_bundle: Bundle, pictures: Path) -> None:
    bundle = rewrite(swin_bundle, lambda model: append(model, *SWIN_MUTANTS["scaled by 3"]))
    report = verify(bundle, VerifyOptions(batches=(2,), images=pictures))
    assert not report.stages[-1].passed
    assert "images: output 'logits'" in report.failures[-1]


def test_bad_pictures_are_one_message(swin_bundle: Bundle, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no image in"):
        verify(swin_bundle, VerifyOptions(batches=(1,), images=tmp_path / "empty"))
    (pictures / "0.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"0\.png cannot be decoded"):
        verify(swin_bundle, VerifyOptions(batches=(1,), images=pictures))
    manifest = replace(swin_bundle.manifest, preprocessing=None)
    with pytest.raises(UsageError, match="how a picture becomes"):
        verify(replace(swin_bundle, manifest=manifest), VerifyOptions(batches=(1,), images=pictures))


def as_int8(bundle: Bundle) -> Bundle:
    artifacts = tuple(replace(artifact, precision="int8") for artifact in bundle.manifest.artifacts)
    return replace(bundle, manifest=replace(bundle.manifest, artifacts=artifacts))


@pytest.fixture(scope="module")
def labelled() -> list[tuple[np.ndarray, int]]:
    """Inputs, with what the eager model says of them for a label."""
    inputs = synthetic_inputs(SWIN, 200, 5)
    with EagerRuntime(build(SWIN), ["images"], SWIN.outputs) as eager:
        labels = eager.run(inputs)["logits"].argmax(axis=1)
    return list(zip(inputs["images"], labels.tolist(), strict=True))


def favour_class_3(model: onnx.ModelProto) -> onnx.ModelProto:
    """Add to one logit what turns near-ties only."""
    bias = numpy_helper.from_array(np.array([0, 0, 0, 0.0012, 0], np.float32))
    return append(model, node("Constant", [], ["bias"], value=bias), node("Add", ["raw", "bias"], ["logits"]))


def test_accuracy_is_judged_where_agreement_is_not_lost(
    swin_bundle: Bundle, labelled: list[tuple[np.ndarray, int]]
) -> None:
    good = verify(as_int8(swin_bundle), VerifyOptions(batches=(16,), images=labelled))
    assert good.passed, good.failures
    assert [evaluation.accuracy.top1 for evaluation in good.evaluations] == [1.0, 1.0]
    bundle = as_int8(rewrite(swin_bundle, favour_class_3))
    report = verify(bundle, VerifyOptions(batches=(16,), images=labelled))
    assert failing_outputs(report) == set()
    assert not report.passed
    assert [stage for stage in report.stages if not stage.passed] == [report.stages[-1]]
    eager, damaged = report.evaluations
    assert (eager.accuracy.top1, damaged.accuracy.samples) == (1.0, 200)
    assert damaged.top1_lost == pytest.approx(1 - damaged.accuracy.top1)
    assert damaged.top1_lost > 0.005
    assert report.stages[-1].faults == damaged.reasons
    assert report.failures == (f"model.onnx in ONNX Runtime, images: {damaged.reasons[0]}",)
    assert verify(bundle, VerifyOptions(batches=(16,), images=[image for image, _ in labelled])).passed


def test_filling_of_a_fixed_batch_is_not_counted(swin_bundle: Bundle, labelled: list[tuple[np.ndarray, int]]) -> None:
    (artifact,) = swin_bundle.manifest.artifacts
    manifest = replace(swin_bundle.manifest, artifacts=(replace(artifact, batch=4),))
    report = verify(replace(swin_bundle, manifest=manifest), VerifyOptions(batches=(3,), images=labelled[:7]))
    assert [evaluation.accuracy.samples for evaluation in report.evaluations] == [7, 7]
    assert report.evaluations[1].max_top1_drop is None  # FP32 is judged by agreement alone


def test_an_artifact_that_fails_is_wrong(swin_bundle: Bundle, labelled: list[tuple[np.ndarray, int]]) -> None:
    frozen = [
        node("Constant", [], ["shape"], value_ints=[16, 5]),
        node("Reshape", ["raw", "shape"], ["logits"]),
    ]
    bundle = as_int8(rewrite(swin_bundle, lambda model: append(model, *frozen)))
    report = verify(bundle, VerifyOptions(batches=(16,), images=labelled[:20]))  # 16 and 4
    assert report.evaluations[1].accuracy.top1_correct == 16
    assert "top-1 lost 20.00 points" in report.failures[-1]


def test_labels_without_use_are_refused(swin_bundle: Bundle, pictures: Path) -> None:
    with pytest.raises(UsageError, match="labels were given without pictures"):
        verify(swin_bundle, VerifyOptions(labels="folders"))
    with pytest.raises(UsageError, match="lies in no class folder"):
        verify(swin_bundle, VerifyOptions(images=pictures, labels="folders"))


def test_labels_of_a_model_without_classes_are_refused() -> None:
    outputs = {"boxes": np.zeros((2, 7, 4)), "score": np.zeros((2, 1)), "features": np.zeros((2, 9))}
    assert class_output(outputs) == ("features", 9)
    del outputs["features"]
    assert class_output(outputs) is None


@pytest.mark.parametrize("labels", [None, "folders"])
def test_a_model_without_classes_has_no_accuracy(
    labels: Literal["folders"] | None, swin_bundle: Bundle, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploycli.exporters.verify.class_output", lambda outputs: None)
    images = pictures if labels else [(np.zeros((3, 32, 32), np.float32), 1)]
    with pytest.raises(UsageError, match=r"has no output \[batch, classes\]"):
        verify(swin_bundle, VerifyOptions(batches=(1,), images=images, labels=labels))
