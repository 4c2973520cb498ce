from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from onnx import helper, numpy_helper

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.bundle.golden import load_golden, save_golden, synthetic_inputs
from deploycli.exporters.verification.report import Report, Stage
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.errors import EnvironmentUnsuitable, IntegrityError, UsageError
from deploycli.models.spec import Weights
from tests.exporters.bundle.bundles import (
    CLASSES,
    SAMPLES,
    SPEC,
    checks,
    failing_outputs,
    graph,
    make,
    model_file,
    record_again,
    truth,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

node = helper.make_node


def test_sound_bundle_passes_against_golden(tmp_path: Path) -> None:
    report = verify(make(tmp_path))
    assert report.passed
    assert failing_outputs(report) == set()
    assert report.reference == "golden"
    assert "/nowhere/model.pth" in report.reference_note
    assert checks(report) == ["batch 1", "batch 3", "batch 8", "batch 8 shuffled"]


def constant_answers() -> list[onnx.NodeProto]:
    """The golden logits of the first b samples, whatever the images are."""
    answers = truth(synthetic_inputs(SPEC, SAMPLES)["images"])["logits"]
    return [
        node("Constant", [], ["answers"], value=numpy_helper.from_array(answers)),
        node("Shape", ["images"], ["b"], start=0, end=1),
        node("Slice", ["answers", "first", "b"], ["logits"]),
    ]


MUTANTS: dict[str, tuple[Sequence[onnx.NodeProto], set[str]]] = {
    "scaled by 3": ([node("Mul", ["raw.logits", "three"], ["logits"])], {"logits"}),
    "zeroed": ([node("Mul", ["raw.features", "zero"], ["features"])], {"features"}),
    "NaN": ([node("Add", ["raw.logits", "not_a_number"], ["logits"])], {"logits"}),
    "one Inf": (
        [
            node("ReduceMax", ["raw.logits"], ["max"]),
            node("Less", ["raw.logits", "max"], ["less"]),
            node("Cast", ["less"], ["finite"], to=1),
            node("Div", ["raw.logits", "finite"], ["logits"]),
        ],
        {"logits"},
    ),
    "first sample for all": (
        [
            node("Gather", ["raw.logits", "first"], ["one"]),
            node("Mul", ["raw.logits", "zero"], ["none"]),
            node("Add", ["one", "none"], ["logits"]),
        ],
        {"logits"},
    ),
    "batch of three only": (
        [
            node("Constant", [], ["shape"], value_ints=[3, CLASSES]),
            node("Reshape", ["raw.logits", "shape"], ["logits"]),
        ],
        {"logits", "features"},
    ),
    "one sample only": ([node("Gather", ["raw.features", "first"], ["features"])], {"features"}),
    "padded batch": ([node("Concat", ["raw.logits", "raw.logits"], ["logits"], axis=0)], {"logits"}),
    "samples mixed": (
        [node("ReduceMean", ["raw.logits", "first"], ["mean"]), node("Sub", ["raw.logits", "mean"], ["logits"])],
        {"logits"},
    ),
    "blind to its input": (constant_answers(), {"logits"}),
    "outputs swapped": (
        [node("Identity", ["raw.features"], ["logits"]), node("Identity", ["raw.logits"], ["features"])],
        {"logits", "features"},
    ),
    "transposed": ([node("Transpose", ["raw.logits"], ["logits"])], {"logits"}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_fails_and_names_the_output(tmp_path: Path, mutant: str) -> None:
    nodes, guilty = MUTANTS[mutant]
    report = verify(make(tmp_path, model=graph(nodes)))
    assert failing_outputs(report) == guilty
    for name in guilty:
        assert any("model.onnx in ONNX Runtime, batch" in f and repr(name) in f for f in report.failures)


def test_answers_learned_by_heart_fail_by_shuffling_alone(tmp_path: Path) -> None:
    report = verify(make(tmp_path, model=graph(constant_answers())))
    assert [stage.check for stage in report.stages if not stage.passed] == ["batch 8 shuffled"]


def test_missing_and_extra_outputs_fail(tmp_path: Path) -> None:
    missing = verify(make(tmp_path, "missing", graph(outputs=("features",))))
    assert failing_outputs(missing) == {"logits"}
    extra = verify(make(tmp_path, "extra", graph(outputs=("logits", "features", "raw.logits"))))
    assert failing_outputs(extra) == {"raw.logits"}


def test_renamed_input_fails_every_output(tmp_path: Path) -> None:
    model = graph()
    model.graph.input[0].name = model.graph.node[0].input[0] = "pixels"
    assert failing_outputs(verify(make(tmp_path, model=model))) == {"logits", "features"}


def test_golden_limits_the_batch_sizes_and_says_so(tmp_path: Path) -> None:
    report = verify(make(tmp_path, samples=3), VerifyOptions(reference="golden"))
    assert report.passed
    assert checks(report) == ["batch 1", "batch 3", "batch 3 shuffled"]
    assert report.reference_note == "golden holds 3 samples: batch 8 left out"
    report = verify(Bundle.open(tmp_path / "linear"), VerifyOptions(batches=(16,)))
    assert checks(report) == ["batch 3", "batch 3 shuffled"]


def test_fixed_batch_is_swept_at_its_own_size(tmp_path: Path) -> None:
    assert checks(verify(make(tmp_path, batch=2))) == ["batch 2", "batch 2 shuffled"]
    assert checks(verify(make(tmp_path, batch=1))) == ["batch 1"]
    with pytest.raises(UsageError, match="has batch 4, the golden file holds 3"):
        verify(make(tmp_path, batch=4, samples=3))


def test_golden_of_equal_samples_is_refused(tmp_path: Path) -> None:
    bundle = make(tmp_path)
    inputs, outputs = load_golden(bundle.golden)
    save_golden(bundle.golden, {k: v[:1].repeat(8, 0) for k, v in inputs.items()}, outputs)
    with pytest.raises(IntegrityError, match="only 1 of them distinct"):
        verify(record_again(bundle))


def test_golden_without_outputs_of_the_graph_fails(tmp_path: Path) -> None:
    bundle = make(tmp_path)
    inputs, outputs = load_golden(bundle.golden)
    save_golden(bundle.golden, inputs, {"logits": outputs["logits"]})
    assert failing_outputs(verify(record_again(bundle))) == {"features"}


def test_tolerance_of_one_output_or_of_all(tmp_path: Path) -> None:
    nodes = [node("Constant", [], ["nearly"], value_float=1.001), node("Mul", ["raw.logits", "nearly"], ["logits"])]
    bundle = make(tmp_path, model=graph(nodes))
    assert failing_outputs(verify(bundle)) == {"logits"}
    assert verify(bundle, VerifyOptions(rtol={"logits": 2e-3})).passed
    assert verify(bundle, VerifyOptions(rtol={"": 2e-3})).passed
    assert failing_outputs(verify(bundle, VerifyOptions(rtol={"features": 2e-3}))) == {"logits"}
    assert failing_outputs(verify(bundle, VerifyOptions(rtol={"": 2e-3, "logits": 1e-5}))) == {"logits"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": ()}, "batch sizes"),
        ({"batches": (0, 1)}, "batch sizes"),
        ({"limit": 0}, "limit of 0"),
        ({"rtol": {"nothing": 1e-3}}, "no output 'nothing'"),
        ({"rtol": {"logits": 0.0}}, "tolerance of 0"),
        ({"rtol": {"": float("nan")}}, "tolerance of nan"),
        ({"reference": "truth"}, "no reference 'truth'"),
        ({"reference": "golden", "checkpoint": Path("x.pth")}, "the golden reference"),
        ({"images": Path("pictures")}, "cannot be compared with the golden file"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        verify(make(tmp_path), VerifyOptions(**options))


def test_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="precision 'fp4'"):
        verify(make(tmp_path, precision="fp4"))


def test_artifact_that_is_no_onnx_file(tmp_path: Path) -> None:
    bundle = make(tmp_path)
    (bundle.path / "model.onnx").write_bytes(b"something else")
    with pytest.raises(UsageError, match="is no ONNX file"):
        verify(record_again(bundle))


def test_nothing_verified_is_not_a_pass() -> None:
    assert not Stage(model_file("a"), "r", "batch 1", 1, ()).passed
    assert not Report("b", "w", "golden", "", ()).passed


def test_machine_without_pytorch_verifies_against_golden(tmp_path: Path) -> None:
    make(tmp_path, weights=Weights("random", seed=0))
    code = """
import sys
sys.modules["torch"] = None
from pathlib import Path
from deploycli.exporters.bundle.bundle import Bundle, find_bundles
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.exporters.bundle import golden, manifest
from deploycli.exporters.runtime import runtimes
from deploycli.exporters.verification import compare, report
assert "onnxruntime" not in sys.modules and "PIL" not in sys.modules
(path,) = find_bundles(Path(sys.argv[1]))
found = verify(Bundle.open(path))
assert found.passed and found.reference == "golden", found
print(found.reference_note)
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "PyTorch cannot be imported" in ran.stdout


def test_eager_without_weights_is_one_message(tmp_path: Path) -> None:
    bundle = make(tmp_path)
    for options in ({"reference": "eager"}, {"checkpoint": tmp_path / "absent.pth"}):
        with pytest.raises(EnvironmentUnsuitable, match="the weights are not at hand"):
            verify(bundle, VerifyOptions(**options))
    pretrained = make(tmp_path, weights=Weights("pretrained", path=f"owner/name@{'0' * 40}/model.safetensors"))
    with pytest.raises(EnvironmentUnsuitable, match="owner/name@"):
        verify(pretrained, VerifyOptions(reference="eager"))
