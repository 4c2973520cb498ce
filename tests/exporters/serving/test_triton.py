from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from deploycli.exporters.bundle.golden import load_golden
from deploycli.exporters.bundle.manifest import CalibrationRecord, FileRecord
from deploycli.exporters.serving.triton import prepare
from deploycli.exporters.serving.triton_config import TritonOptions
from deploycli.exporters.target.settings import BuildSettings
from deploycli.exporters.verification.report import keep
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.codec import decode
from deploycli.models.errors import DeployError, EnvironmentUnsuitable, IntegrityError, NumericsError, UsageError
from deploycli.models.spec import Preprocessing, Weights
from tests.exporters import engines
from tests.exporters.bundle import bundles
from tests.exporters.bundle.bundles import proven, with_external_data, write_bundle
from tests.exporters.serving.triton_schema import parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.bundle.manifest import Manifest
    from deploycli.exporters.serving.triton import PackagedVersion

FORCED = TritonOptions(force=True)
RANDOM = Weights("random", seed=3)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return proven(bundles.make(tmp_path / "bundles"))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def package(bundle: Bundle, root: Path, options: TritonOptions | None = None) -> PackagedVersion:
    return prepare(bundle, root, options).write()


def config_of(models: Path, name: str = "linear") -> Any:
    return parse((models / name / "config.pbtxt").read_text("utf-8"))


def parameters_of(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def tree(folder: Path) -> dict[str, str]:
    """Every entry below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def variant(root: Path, change: Callable[[Manifest], Manifest], model: onnx.ModelProto | None = None) -> Bundle:
    return write_bundle(root, "linear", lambda folder: change(bundles.filler(model)(folder)))


# --- the configuration


def test_configuration_is_what_triton_reads(bundle: Bundle, models: Path) -> None:
    packaged = package(
        bundle, models, TritonOptions(preferred_batch=(8, 4, 8), queue_delay=500, instances=2, kind="cpu")
    )
    config = config_of(models)
    assert (config.name, config.backend, config.max_batch_size) == ("linear", "onnxruntime", 32)
    (images,) = config.input
    assert (images.name, images.data_type, list(images.dims)) == ("images", 11, [12])
    assert [(o.name, o.data_type, list(o.dims), o.label_filename) for o in config.output] == [
        ("logits", 11, [5], ""),
        ("features", 11, [5], ""),
    ]
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    (group,) = config.instance_group
    assert (group.kind, group.count) == (2, 2)
    assert config.version_policy.latest.num_versions == 1
    assert [
        (w.batch_size, list(w.inputs["images"].dims), w.inputs["images"].data_type) for w in config.model_warmup
    ] == [
        (1, [12], 11),
        (32, [12], 11),
    ]
    assert all(warm.inputs["images"].zero_data for warm in config.model_warmup)
    assert not config.HasField("optimization")
    assert packaged.to_json()["max_batch_size"] == 32
    assert (packaged.version, packaged.file.verdict.status, packaged.forced) == (1, "ok", ())


def test_configuration_says_where_the_model_came_from(tmp_path: Path, models: Path) -> None:
    recipe = Preprocessing((12, 12))
    bundle = proven(variant(tmp_path / "bundles", lambda m: replace(m, preprocessing=recipe)))
    package(bundle, models)
    said = parameters_of(config_of(models))
    assert said["deploycli_sha256"] == FileRecord.of(models / "linear/1", "model.onnx").sha256
    assert said["deploycli_weights"] == bundle.manifest.weights.describe()
    assert (said["deploycli_proof"], said["deploycli_proof_reference"]) == ("ok", "golden")
    assert said["deploycli_proof_checks"].endswith("batch 8 shuffled")
    assert said["deploycli_model_version"] == "1"
    assert decode(said["deploycli_preprocessing"], Preprocessing, where="it", what="a recipe") == recipe
    assert "deploycli_not_for_release" not in said


def test_same_bundle_gives_the_same_configuration(bundle: Bundle, models: Path, tmp_path: Path) -> None:
    package(bundle, models)
    package(bundle, tmp_path / "other")
    assert tree(models) == tree(tmp_path / "other")


def test_without_options_triton_does_not_wait(bundle: Bundle, models: Path) -> None:
    package(bundle, models)
    config = config_of(models)
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert config.instance_group[0].kind == 0


def test_batches_of_one_are_not_gathered(bundle: Bundle, models: Path) -> None:
    package(bundle, models, TritonOptions(max_batch=1))
    config = config_of(models)
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (1, False)
    assert [warm.batch_size for warm in config.model_warmup] == [1]


def typed(images: int, logits: int, *, shape: list[Any] | None = None) -> onnx.ModelProto:
    """The graph with other types at its ends; ``shape`` is that of the input."""
    model = bundles.graph()
    body = [helper.make_node("Cast", ["pixels"], ["images"], to=TensorProto.FLOAT), *model.graph.node]
    for node in body:
        node.output[:] = ["wide" if name == "logits" else name for name in node.output]
    body.append(helper.make_node("Cast", ["wide"], ["logits"], to=logits))
    leading = (shape or ["batch"])[0]
    ends = [helper.make_tensor_value_info("pixels", images, shape or ["batch", 12])]
    outputs = [
        helper.make_tensor_value_info("logits", logits, [leading, 5]),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, [leading, 5]),
    ]
    graph = helper.make_graph(body, "typed", ends, outputs, model.graph.initializer)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("images", "logits", "expected"),
    [
        (TensorProto.FLOAT16, TensorProto.FLOAT16, ("TYPE_FP16", "TYPE_FP16")),
        (TensorProto.FLOAT, TensorProto.BFLOAT16, ("TYPE_FP32", "TYPE_BF16")),
        (TensorProto.UINT8, TensorProto.DOUBLE, ("TYPE_UINT8", "TYPE_FP64")),
        (TensorProto.INT64, TensorProto.BOOL, ("TYPE_INT64", "TYPE_BOOL")),
    ],
)
def test_types_are_those_of_the_file(
    tmp_path: Path, models: Path, images: int, logits: int, expected: tuple[str, str]
) -> None:
    package(bundles.make(tmp_path, model=typed(images, logits), precision="fp32"), models, FORCED)
    config = config_of(models)
    enum = config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
    found = [tensor.data_type for tensor in (config.input[0], config.output[0], config.output[1])]
    assert tuple(enum[number].name for number in found) == (*expected, "TYPE_FP32")
    assert config.model_warmup[0].inputs["pixels"].data_type == found[0]


def test_type_that_triton_has_not(tmp_path: Path, models: Path) -> None:
    bundle = bundles.make(tmp_path, model=typed(TensorProto.FLOAT, TensorProto.FLOAT8E4M3FN))
    with pytest.raises(UsageError, match="'logits' is float8e4m3fn"):
        package(bundle, models, FORCED)
    assert not models.exists()


def test_fixed_batch_is_part_of_the_dims(tmp_path: Path, models: Path) -> None:
    bundle = bundles.make(tmp_path, model=typed(TensorProto.FLOAT, TensorProto.FLOAT, shape=[4, 12]), batch=4)
    packaged = package(bundle, models, FORCED)
    config = config_of(models)
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
    assert [list(tensor.dims) for tensor in (*config.input, *config.output)] == [[4, 12], [4, 5], [4, 5]]
    assert [(warm.batch_size, list(warm.inputs["pixels"].dims)) for warm in config.model_warmup] == [(1, [4, 12])]
    assert "fixed batch" in packaged.notes[0]
    for options in (TritonOptions(max_batch=4), TritonOptions(preferred_batch=(2,)), TritonOptions(queue_delay=0)):
        with pytest.raises(UsageError, match="no variable batch axis"):
            package(bundle, models, replace(options, force=True))


def test_axes_that_stay_variable_are_warmed_up_at_the_size_of_the_spec(tmp_path: Path, models: Path) -> None:
    model = bundles.graph()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "features"
    package(bundles.make(tmp_path, model=model), models, FORCED)
    config = config_of(models)
    assert list(config.input[0].dims) == [-1]
    assert list(config.model_warmup[1].inputs["images"].dims) == [12]


def test_output_without_a_dimension_of_its_own_is_reshaped(tmp_path: Path, models: Path) -> None:
    model = bundles.graph()
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch"]))
    package(bundles.make(tmp_path, model=model), models, FORCED)
    (output,) = config_of(models).output
    assert (list(output.dims), output.HasField("reshape"), list(output.reshape.shape)) == ([1], True, [])


@pytest.mark.parametrize("name", ['q"uote', "naïve 模型", "back`tick' 😀", "a.b-c+d"])
def test_names_that_need_care(bundle: Bundle, models: Path, name: str) -> None:
    package(bundle, models, TritonOptions(name=name))
    assert config_of(models, name).name == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a\nb", "a\0b", " a", "a ", "a\udcff"])
def test_names_of_no_folder(bundle: Bundle, models: Path, name: str) -> None:
    if name:
        with pytest.raises(UsageError, match="cannot name a model"):
            package(bundle, models, TritonOptions(name=name))
        assert not models.exists()
    else:
        assert package(bundle, models, TritonOptions(name=name)).name == "linear"


def test_tensor_names_with_quotes(tmp_path: Path, models: Path) -> None:
    model = typed(TensorProto.FLOAT, TensorProto.FLOAT)
    model.graph.input[0].name = model.graph.node[0].input[0] = 'pi"x\\els é'
    package(bundles.make(tmp_path, model=model), models, FORCED)
    config = config_of(models)
    assert config.input[0].name == 'pi"x\\els é'
    assert list(config.model_warmup[0].inputs) == ['pi"x\\els é']


def test_onnx_runtime_with_tensorrt(bundle: Bundle, models: Path) -> None:
    package(bundle, models, TritonOptions(onnx_tensorrt=True, kind="gpu"))
    (accelerator,) = config_of(models).optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("tensorrt", {"precision_mode": "FP32"})


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (TritonOptions(onnx_tensorrt=True, kind="cpu"), "--onnx-tensorrt with --kind cpu"),
        (TritonOptions(flavour="tensorrt", onnx_tensorrt=True), "--onnx-tensorrt with --flavour tensorrt"),
        (TritonOptions(flavour="tensorrt", kind="cpu"), "--kind cpu with --flavour tensorrt"),
        (TritonOptions(engine="x.plan"), "--engine without --flavour tensorrt"),
        (TritonOptions(max_batch=4, preferred_batch=(8,)), "preferred batches 8"),
        (TritonOptions(precision="int8"), "holds no int8"),
        (TritonOptions(version=0), "below 1"),
        (TritonOptions(queue_delay=-1), "negative"),
    ],
)
def test_options_that_do_not_fit(bundle: Bundle, models: Path, options: TritonOptions, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        package(bundle, models, options)
    assert not models.exists()


# --- the files


def outputs_of(file: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """Plain ONNX Runtime, without any of our code."""
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {"images": images}), strict=True))


@pytest.mark.parametrize("fill", [bundles.filler(), with_external_data], ids=["inline", "external data"])
def test_model_in_the_repository_gives_the_golden_outputs(
    tmp_path: Path, models: Path, fill: Callable[[Path], Manifest]
) -> None:
    bundle = proven(write_bundle(tmp_path, "linear", fill))
    package(bundle, models)
    inputs, golden = load_golden(bundle.golden)
    (bundle.path / "model.onnx").rename(tmp_path / "away")  # the repository stands on its own
    outputs = outputs_of(models / "linear/1/model.onnx", inputs["images"])
    for name, expected in golden.items():
        assert np.abs(outputs[name] - expected).max() < 1e-5 * np.abs(expected).max()


def test_external_data_is_copied_under_the_name_that_the_model_refers_to(tmp_path: Path, models: Path) -> None:
    bundle = proven(write_bundle(tmp_path, "linear", with_external_data))
    packaged = package(bundle, models)
    assert sorted(path.name for path in (models / "linear/1").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert packaged.file.size == sum(path.stat().st_size for path in (models / "linear/1").iterdir())
    assert "deploycli_sha256 model.onnx.data" in parameters_of(config_of(models))


def test_files_are_copies(bundle: Bundle, models: Path) -> None:
    package(bundle, models)
    copy = models / "linear/1/model.onnx"
    assert copy.stat().st_nlink == 1
    assert not copy.is_symlink()
    assert copy.read_bytes() == (bundle.path / "model.onnx").read_bytes()


def test_everybody_may_read_what_the_server_reads(bundle: Bundle, models: Path) -> None:
    before = os.umask(0o022)
    try:
        package(bundle, models)
        package(bundle, models)
    finally:
        os.umask(before)
    for path in models.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_second_packaging_is_version_2_and_the_first_stays(bundle: Bundle, models: Path) -> None:
    package(bundle, models)
    (models / "linear/notes.txt").write_text("kept")
    first = (models / "linear/1/model.onnx").stat()
    before = tree(models)
    assert package(bundle, models).version == 2
    after = tree(models)
    assert {path: after[path] for path in before if not path.endswith("config.pbtxt")} == {
        path: content for path, content in before.items() if not path.endswith("config.pbtxt")
    }
    assert set(after) - set(before) == {"linear/2", "linear/2/model.onnx"}
    assert (models / "linear/1/model.onnx").stat() == first
    assert parameters_of(config_of(models))["deploycli_model_version"] == "2"
    assert package(bundle, models, TritonOptions(version=10)).version == 10
    assert package(bundle, models).version == 11


@pytest.mark.parametrize(("version", "why"), [(3, "has a version 3 already"), (2, "would not be served")])
def test_versions_are_never_overwritten(bundle: Bundle, models: Path, version: int, why: str) -> None:
    package(bundle, models, TritonOptions(version=3))
    before = tree(models)
    with pytest.raises(UsageError, match=why):
        package(bundle, models, TritonOptions(version=version, force=True))
    assert tree(models) == before


@pytest.mark.parametrize("existing", [False, True])
def test_of_two_at_once_one_is_refused(bundle: Bundle, models: Path, existing: bool) -> None:
    if existing:
        package(bundle, models)
    first, second = prepare(bundle, models), prepare(bundle, models, TritonOptions(max_batch=7))
    first.write()
    before = tree(models)
    with pytest.raises(UsageError, match="appeared while it was written"):
        second.write()
    assert tree(models) == before


class Interruption:
    """Lets the first calls of an operating-system function through, and fails the next one."""

    def __init__(self, function: Callable[..., Any], calls: int, error: BaseException) -> None:
        self.function, self.left, self.error = function, calls, error
        self.happened = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.left == 0 and not self.happened:
            self.happened = True
            raise self.error
        self.left -= 1
        return self.function(*arguments, **options)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_interruption_leaves_the_repository_as_it_was(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, error: BaseException
) -> None:
    """Whichever sync or rename fails, nothing is half-written, and packaging again is as if nothing had happened."""
    bundle = proven(write_bundle(tmp_path / "bundles", "linear", with_external_data))
    labels = tmp_path / "labels"
    labels.write_text("a\nb\nc\nd\ne\n")
    options = TritonOptions(labels=labels)
    (models / "other").mkdir(parents=True)
    if existing:
        package(bundle, models, options)
        labels.write_text("v\nw\nx\ny\nz\n")
    before = tree(models)
    interrupted = 0
    for target, name in ((os, "fsync"), (Path, "rename"), (Path, "replace")):
        for calls in range(20):
            delivery = prepare(bundle, models, options)
            failing = Interruption(getattr(target, name), calls, error)
            with monkeypatch.context() as patch:
                patch.setattr(target, name, lambda *given, failing=failing: failing(*given))
                try:
                    delivery.write()
                except (KeyboardInterrupt, EnvironmentUnsuitable):
                    interrupted += 1
                    assert tree(models) == before, (name, calls)
                else:
                    break
        else:
            pytest.fail("it never went through")
        shutil.rmtree(delivery.packaged.path if existing else models / "linear")
        before = tree(models)
    assert interrupted >= (6 if existing else 5)


def test_file_that_changes_while_it_is_copied(bundle: Bundle, models: Path) -> None:
    delivery = prepare(bundle, models)
    with (bundle.path / "model.onnx").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(IntegrityError, match=r"model\.onnx changed while"):
        delivery.write()
    assert tree(models) == {}


# --- what is refused


def test_never_verified(tmp_path: Path, models: Path) -> None:
    with pytest.raises(UsageError, match="not verified: it was never verified") as caught:
        package(bundles.make(tmp_path), models)
    assert "deploycli verify linear" in caught.value.hint
    assert not models.exists()


def test_failed(tmp_path: Path, models: Path) -> None:
    bundle = bundles.make(tmp_path)
    keep(bundle, verify(bundle, VerifyOptions(reference="golden", rtol={"features": 1e-12})))
    with pytest.raises(NumericsError, match=r"failed: .*'features'") as caught:
        package(bundle, models)
    assert caught.value.exit_code == 5


def test_changed_since(bundle: Bundle, models: Path) -> None:
    model = onnx.load(bundle.path / "model.onnx")
    model.producer_name = "somebody else"
    (bundle.path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match="stale: it has changed since"):
        package(bundles.record_again(bundle), models)


def on_noise(folder: Path) -> Manifest:
    manifest = bundles.filler()(folder)
    (folder / "ranges.json").write_text("{}")
    cache = FileRecord.of(folder, "ranges.json")
    record = CalibrationRecord("mse", "random numbers", (), "0" * 64, (), True, cache)
    return replace(manifest, artifacts=(replace(manifest.artifacts[0], calibration=record),))


def test_random_weights_and_random_calibration(tmp_path: Path, models: Path) -> None:
    untrained = proven(bundles.make(tmp_path / "untrained", weights=replace(bundles.ABSENT, source="random", seed=3)))
    with pytest.raises(UsageError, match=r"random weights \(random, seed 3\)") as caught:
        package(untrained, models)
    assert "--checkpoint" in caught.value.hint
    with pytest.raises(UsageError, match="calibrated on random data"):
        package(proven(write_bundle(tmp_path, "linear", on_noise)), models)
    assert not models.exists()


def test_forced_says_every_reason(tmp_path: Path, models: Path) -> None:
    def fill(folder: Path) -> Manifest:
        return replace(on_noise(folder), weights=RANDOM)

    packaged = package(write_bundle(tmp_path, "linear", fill), models, FORCED)
    assert len(packaged.forced) == 3
    text = (models / "linear/config.pbtxt").read_text()
    comments = [line for line in text.splitlines() if line.startswith("# NOT FOR RELEASE: ")]
    said = parameters_of(config_of(models))["deploycli_not_for_release"]
    for why in ("not verified", "random weights", "calibrated on random data"):
        assert sum(why in line for line in comments) == 1
        assert why in said
    assert parameters_of(config_of(models))["deploycli_proof"] == "not verified"
    assert "deploycli_proof_reference" not in parameters_of(config_of(models))


def test_force_without_need_says_nothing(bundle: Bundle, models: Path) -> None:
    assert package(bundle, models, FORCED).forced == ()
    assert "NOT FOR RELEASE" not in (models / "linear/config.pbtxt").read_text()


def test_looser_budget_is_said(tmp_path: Path, models: Path) -> None:
    bundle = bundles.make(tmp_path)
    keep(bundle, verify(bundle, VerifyOptions(reference="golden", rtol={"logits": 0.25})))
    packaged = package(bundle, models)
    assert parameters_of(config_of(models))["deploycli_proof_tolerances"] == "logits 0.25"
    assert "logits 0.25" in packaged.notes[0]


# --- what stands in the place


def _link(models: Path) -> None:
    (models.parent / "elsewhere").mkdir()
    models.mkdir()
    (models / "linear").symlink_to(models.parent / "elsewhere")


def _link_of_a_configuration(models: Path) -> None:
    (models / "linear").mkdir(parents=True)
    (models.parent / "config.pbtxt").write_text("")
    (models / "linear/config.pbtxt").symlink_to(models.parent / "config.pbtxt")


def _file(models: Path) -> None:
    models.mkdir()
    (models / "linear").write_text("kept")


def _thesis(models: Path) -> None:
    (models / "linear").mkdir(parents=True)
    (models / "linear/thesis.tex").write_text("kept")


def _repository_that_is_a_file(models: Path) -> None:
    models.write_text("kept")


def _bundle(models: Path) -> None:
    models.mkdir()
    (models / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (_link, "linear is a symbolic link"),
        (_link_of_a_configuration, r"config\.pbtxt is a symbolic link"),
        (_file, "linear is a file"),
        (_thesis, r"a folder without config\.pbtxt"),
        (_repository_that_is_a_file, "models is a file"),
        (_bundle, "models is a bundle"),
    ],
)
def test_what_is_no_model_is_left_alone_even_where_forced(
    bundle: Bundle, models: Path, make: Callable[[Path], None], found: str
) -> None:
    make(models)
    before = tree(models.parent)
    with pytest.raises(UsageError, match=found):
        package(bundle, models, FORCED)
    assert tree(models.parent) == before


def test_empty_folder_is_a_place(bundle: Bundle, models: Path) -> None:
    (models / "linear").mkdir(parents=True)
    assert package(bundle, models).version == 1


FOREIGN = 'name: "linear" backend: "python" instance_group [ { kind: KIND_CPU } ]'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (FOREIGN, "not written by deploycli"),
        ("name: {", "not written by deploycli"),
        ("", "not written by"),
        ("\xff", "cannot be read"),
    ],
)
def test_configuration_of_somebody_else(bundle: Bundle, models: Path, text: str, why: str) -> None:
    (models / "linear/1").mkdir(parents=True)
    (models / "linear/config.pbtxt").write_bytes(text.encode("latin-1"))
    before = tree(models)
    with pytest.raises(UsageError, match=why):
        package(bundle, models)
    assert tree(models) == before
    assert package(bundle, models, FORCED).version == 2
    assert config_of(models).backend == "onnxruntime"


@pytest.mark.parametrize(
    ("model", "batch", "difference"),
    [
        (typed(TensorProto.FLOAT16, TensorProto.FLOAT), None, "input pixels TYPE_FP16"),
        (typed(TensorProto.FLOAT, TensorProto.FLOAT, shape=[4, 12]), 4, "no batch axis"),
        (bundles.graph(outputs=("logits",)), None, "no output features"),
    ],
)
def test_other_interface_is_refused_unless_forced(
    bundle: Bundle, models: Path, tmp_path: Path, model: onnx.ModelProto, batch: int | None, difference: str
) -> None:
    package(bundle, models)
    before = tree(models)
    other = bundles.make(tmp_path / "other", model=model, batch=batch)
    report, (file,) = verify(bundle, VerifyOptions(reference="golden")), other.onnx_files()
    keep(other, replace(report, stages=tuple(replace(stage, file=file) for stage in report.stages)))
    with pytest.raises(UsageError, match=difference):
        package(other, models)
    assert tree(models) == before
    assert package(other, models, FORCED).version == 2


def test_hand_tuned_configuration_of_ours_is_still_ours(bundle: Bundle, models: Path) -> None:
    package(bundle, models)
    path = models / "linear/config.pbtxt"
    path.write_text(
        path.read_text().replace("instance_group {", "instance_group [ {", 1).replace("count: 1 }", "count: 4 } ]", 1)
    )
    assert config_of(models).instance_group[0].count == 4
    assert package(bundle, models).version == 2


# --- labels


@pytest.mark.parametrize("text", ["a\nb\nc\nd\ne\n", "a\r\nb\r\nc\r\nd\r\ne", "\ufeffa\nb\nc\nd\ne\n"])
def test_labels(bundle: Bundle, models: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "classes"
    path.write_text(text, "utf-8", newline="")
    package(bundle, models, TritonOptions(labels=path))
    assert [output.label_filename for output in config_of(models).output] == ["labels.txt", ""]
    assert (models / "linear/labels.txt").read_bytes() == b"a\nb\nc\nd\ne\n"


def test_labels_may_hold_what_other_tools_take_for_line_breaks(bundle: Bundle, models: Path, tmp_path: Path) -> None:
    path = tmp_path / "classes"
    path.write_text('crane\ncrane\n"é"\x85x\u2028y\nd\ne\n', "utf-8")
    package(bundle, models, TritonOptions(labels=path))
    assert (models / "linear/labels.txt").read_text("utf-8").split("\n")[2] == '"é"\x85x\u2028y'


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"a\nb\n", "names 2 classes"),
        (b"a\nb\nc\nd\ne\nf\n", "names 6 classes"),
        (b"a\n\nc\nd\ne\n", "empty line 2"),
        (b"", "empty line 1"),
        (b"a\nb\nc\nd\n\xff\n", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_labels_that_do_not_fit(bundle: Bundle, models: Path, tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "classes"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=why):
        package(bundle, models, TritonOptions(labels=path))
    assert not models.exists()


def test_labels_of_what_has_no_classes(tmp_path: Path, models: Path) -> None:
    model = bundles.graph(outputs=("logits",))
    shape = model.graph.output[0].type.tensor_type.shape
    for size in (5, 1):
        shape.dim.add(dim_value=size) if shape.dim else shape.dim.add(dim_param="batch")
    shape.dim.add(dim_value=7)
    (tmp_path / "classes").write_text("a\n")
    with pytest.raises(UsageError, match=r"no output \[batch, classes\]"):
        package(bundles.make(tmp_path, model=model), models, replace(FORCED, labels=tmp_path / "classes"))


# --- engines


TENSORRT = TritonOptions(flavour="tensorrt")


def test_engine(bundle: Bundle, models: Path) -> None:
    sidecar = engines.build(bundle)
    engines.verify_engines(bundle, "fp16")
    packaged = package(bundle, models, replace(TENSORRT, preferred_batch=(4, 8)))
    config = config_of(models)
    assert (config.backend, config.max_batch_size) == ("tensorrt", 16)
    assert [tensor.data_type for tensor in (*config.input, *config.output)] == [10, 11, 11]
    assert (config.instance_group[0].kind, config.instance_group[0].count) == (1, 1)
    cuda = config.optimization.cuda
    assert (cuda.graphs, [spec.batch_size for spec in cuda.graph_spec]) == (True, [1, 4, 8, 16])
    assert (models / "linear/1/model.plan").read_bytes() == (bundle.path / "engines" / sidecar.plan).read_bytes()
    said = parameters_of(config)
    assert said["deploycli_tensorrt"] == engines.TENSORRT
    assert said["deploycli_gpu"] == "NVIDIA L4, compute capability 8.9"
    assert said["deploycli_proof_runtime"] == "TensorRT"
    assert engines.TENSORRT in packaged.notes[0]


def test_engine_with_a_fixed_batch(bundle: Bundle, models: Path) -> None:
    engines.build(bundle, io=engines.io(None))
    engines.verify_engines(bundle, "fp16")
    package(bundle, models, TENSORRT)
    config = config_of(models)
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [4, 12])
    assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == [0]


def test_without_an_engine_it_says_what_to_run(bundle: Bundle, models: Path) -> None:
    with pytest.raises(UsageError, match="holds no TensorRT engine") as caught:
        package(bundle, models, TENSORRT)
    assert "deploycli build-trt linear" in caught.value.hint


def test_smallest_verified_engine_is_taken(bundle: Bundle, models: Path) -> None:
    for precision in ("fp32", "fp16", "int8"):
        engines.build(bundle, precision)
    engines.verify_engines(bundle, "fp32", "fp16")
    assert package(bundle, models, TENSORRT).file.precision == "fp16"
    engines.verify_engines(bundle, "fp32", "fp16", "int8")
    assert package(bundle, models, TENSORRT).file.precision == "int8"
    engines.build(bundle, "int8", unreleasable="calibrated on random data")
    engines.verify_engines(bundle, "fp32", "fp16", "int8")
    assert package(bundle, models, TENSORRT).file.precision == "fp16"
    with pytest.raises(UsageError, match="calibrated on random data"):
        package(bundle, models, replace(TENSORRT, precision="int8"))


def test_of_several_engines_one_must_be_named(bundle: Bundle, models: Path) -> None:
    for capability in ((8, 0), (8, 9)):
        engines.build(bundle, capability=capability)
    engines.verify_engines(bundle, "fp16")
    with pytest.raises(UsageError, match="2 engines") as caught:
        package(bundle, models, TENSORRT)
    name = "fp16-sm80-trt10.13.3.9.plan"
    assert name in caught.value.hint
    assert package(bundle, models, replace(TENSORRT, engine=name)).file.name == f"engines/{name}"
    with pytest.raises(UsageError, match=r"holds no x\.plan"):
        package(bundle, models, replace(TENSORRT, engine="x.plan"))


@pytest.mark.parametrize(
    ("changes", "options", "error", "why"),
    [
        ({"io": engines.io((2, 8, 16))}, TENSORRT, UsageError, "takes no batch below 2"),
        ({}, replace(TENSORRT, max_batch=17), UsageError, "takes 16 at most"),
        ({"settings": BuildSettings({}, strip_weights=True)}, TENSORRT, UsageError, "has no weights"),
        ({"sha256": "0" * 64}, replace(TENSORRT, force=True), IntegrityError, "has changed"),
    ],
)
def test_engines_that_cannot_be_served(
    bundle: Bundle, models: Path, changes: dict[str, Any], options: TritonOptions, error: type[DeployError], why: str
) -> None:
    engines.build(bundle, **changes)
    engines.verify_engines(bundle, "fp16")
    with pytest.raises(error, match=why):
        package(bundle, models, options)
    assert not models.exists()


def test_engine_beside_an_onnx_model_is_another_interface(bundle: Bundle, models: Path) -> None:
    package(bundle, models)
    engines.build(bundle, io=engines.io(dtype="float32"))
    engines.verify_engines(bundle, "fp16")
    with pytest.raises(UsageError, match="backend tensorrt, not onnxruntime"):
        package(bundle, models, TENSORRT)
