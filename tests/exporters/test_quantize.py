"""INT8 artifacts of bundles: what is written and recorded, what stops it, and what an accuracy budget reverts."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from deploycli.exporters.bundle.bundle import Bundle, find_bundles
from deploycli.exporters.bundle.files import interrupted
from deploycli.exporters.export import ExportOptions, export
from deploycli.exporters.graph.onnx_file import load_model
from deploycli.exporters.precision.calibration import CalibrationCache
from deploycli.exporters.precision.methods import Method
from deploycli.exporters.precision.options import AccuracyBudget, CalibrationData, CastOptions, QuantizeOptions, stages
from deploycli.exporters.precision.roles import Stage
from deploycli.exporters.precision.simulate import open_runtime
from deploycli.exporters.quantize import Quantized, quantize_bundle
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.errors import DeployError, IntegrityError, NumericsError, UsageError
from tests.deploycli.commands import files
from tests.digits import arrays, checkpoint, registered
from tests.exporters.precision.networks import assert_valid, normal
from tests.exporters.precision.tiny import CLASSES, GEMMS, labelled, make, pictures

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INT8, CACHE = "model.int8.onnx", "model.int8.calibration.json"
FP32 = QuantizeOptions(around=None)
NOTE = "no product makes an engine move fewer bytes in INT8, so the scheme is gemm: FP16 may be faster"
"""No attention of the tiny network reads its query, key and value in place."""
ROWS = normal(12, 3, 8, 8)


def data(count: int = 12) -> CalibrationData:
    return CalibrationData(list(ROWS[:count]))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path / "artifacts")


def types_of(model: ir.Model, op_type: str) -> set[str]:
    return {o.dtype.name for n in model.graph if n.op_type == op_type for o in n.outputs if o.dtype is not None}


def test_what_is_written_and_recorded(bundle: Bundle) -> None:
    made = quantize_bundle(bundle, QuantizeOptions(), data())
    assert made.bundle == Bundle.open(bundle.path)  # every hash is right
    assert [a.file.path for a in made.bundle.manifest.artifacts] == ["model.onnx", INT8]
    artifact = made.artifact
    assert (artifact.precision, artifact.source, artifact.opset, artifact.batch) == ("int8", "model.onnx", 20, None)
    assert (artifact.quantized, artifact.reverted, artifact.unreleasable) == (GEMMS, (), "")
    assert [step.name for step in artifact.steps] == ["quantize-gemm", "cast-fp16"]
    left = {refusal.node: refusal.reason.partition(":")[0] for refusal in artifact.steps[0].refusals}
    assert left == {
        "patch_embed/Conv": "patch-embed",
        "attn/MatMul": "scheme",
        "attn/MatMul_1": "scheme",
        "head/Gemm": "head",
    }
    record = artifact.calibration
    assert record is not None
    assert (record.method, record.random, record.skipped) == ("mse", False, ())
    assert (record.samples, record.data) == (tuple(map(str, range(12))), "12 samples of list")
    assert record.cache.path == CACHE
    cache = CalibrationCache.load(bundle.path / CACHE)
    assert (record.sha256, record.samples) == (cache.data.sha256, cache.data.samples)
    assert len(cache.ranges) == 4
    model = load_model(bundle.path / INT8)
    assert_valid(model)
    assert types_of(model, "DequantizeLinear") == types_of(model, "MatMul") == {"FLOAT16"}
    assert types_of(model, "QuantizeLinear") == {"INT8"}
    assert [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)] == [
        ("images", ir.DataType.FLOAT),
        ("logits", ir.DataType.FLOAT),
    ]
    assert made.comparisons[0].cosine > 0.999
    assert made.notes == (NOTE,)
    assert json.loads(json.dumps(made.to_json()))["search"] is None


@pytest.mark.parametrize("around", [None, CastOptions(), CastOptions("bf16"), CastOptions(reduce_io=True)])
def test_what_is_around(bundle: Bundle, around: CastOptions | None) -> None:
    quantize_bundle(bundle, QuantizeOptions(scheme="full", around=around), data(4))
    model = load_model(bundle.path / INT8)
    assert_valid(model)
    expected = {None: "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}[None if around is None else around.type]
    assert types_of(model, "DequantizeLinear") == types_of(model, "MatMul") == types_of(model, "Gelu") == {expected}
    ends = {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    assert ends == {ir.DataType.FLOAT16 if around is not None and around.reduce_io else ir.DataType.FLOAT}


def test_again_gives_the_same_bytes(bundle: Bundle) -> None:
    kept: list[dict[str, bytes]] = []
    for _ in range(2):
        quantize_bundle(Bundle.open(bundle.path), QuantizeOptions(scheme="full"), data())
        kept.append({name: (bundle.path / name).read_bytes() for name in (INT8, CACHE, "model.onnx")})
    assert kept[0] == kept[1]


def test_stored_as_floats(bundle: Bundle) -> None:
    found = []
    for float_weights in (False, True):
        quantize_bundle(Bundle.open(bundle.path), QuantizeOptions(float_weights=float_weights), data())
        with open_runtime(bundle.path / INT8) as runtime:
            found.append(runtime.run({"images": ROWS})["logits"])
        weights = [t for t in onnx.load(bundle.path / INT8).graph.initializer if t.data_type == onnx.TensorProto.INT8]
        assert sum(len(t.dims) == 2 for t in weights) == (0 if float_weights else 6)
    assert found[0].tobytes() == found[1].tobytes()


def test_size_of_a_model_whose_weights_dominate(tmp_path: Path) -> None:
    wide = {"w1": 0.05 * normal(32, 4096), "b1": normal(4096), "w2": 0.05 * normal(4096, 32)}
    bundle = make(tmp_path, **wide)
    made = quantize_bundle(bundle, QuantizeOptions(), data(2))
    assert 0.25 < made.artifact.file.size / bundle.manifest.artifacts[0].file.size < 0.29


def test_external_data(tmp_path: Path) -> None:
    inside, outside = make(tmp_path, "inside"), make(tmp_path, "outside", external=True)
    results = []
    for bundle in (inside, outside):
        made = quantize_bundle(bundle, QuantizeOptions(), data())
        with open_runtime(bundle.path / INT8) as runtime:
            results.append(runtime.run({"images": ROWS})["logits"])
    assert [record.path for record in made.artifact.external] == [f"{INT8}.data"]
    assert results[0].tobytes() == results[1].tobytes()


# Data.


def test_random_calibration_is_branded_for_ever(bundle: Bundle, tmp_path: Path) -> None:
    made = quantize_bundle(bundle, QuantizeOptions(), CalibrationData(limit=4, random=True, seed=3))
    assert made.artifact.unreleasable == "calibrated on random data"
    record = made.artifact.calibration
    assert record is not None
    assert (record.random, record.data) == (True, "4 random samples, seed 3")
    report = verify(made.bundle, VerifyOptions(reference="golden"))
    assert report.unreleasable == (f"{INT8}: calibrated on random data",)
    # A cache of it does not wash it off.
    (bundle.path / CACHE).rename(tmp_path / "cache.json")
    again = quantize_bundle(make(tmp_path, "again"), QuantizeOptions(), CalibrationData(cache=tmp_path / "cache.json"))
    assert again.artifact.unreleasable == "calibrated on random data"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (CalibrationData(), "there is no data to calibrate with"),
        (CalibrationData(list(ROWS), random=True), "random calibration was asked for beside data"),
        (CalibrationData(cache="cache.json", random=True), "random calibration was asked for beside data"),  # type: ignore[arg-type]
        (CalibrationData("nowhere"), "there is no folder or file nowhere"),
    ],
)
def test_no_data(bundle: Bundle, given: CalibrationData, found: str) -> None:
    refused(bundle, UsageError, found, QuantizeOptions(), given)


def refused(
    bundle: Bundle,
    error: type[DeployError],
    found: str,
    quantization: QuantizeOptions,
    given: CalibrationData,
    budget: AccuracyBudget | None = None,
    *,
    late: bool = False,
) -> DeployError:
    """Nothing is written; and nothing is calibrated, unless only the data can tell that it was in vain."""
    before, steps = files(bundle.path), set[str]()
    with pytest.raises(error) as caught:
        quantize_bundle(
            bundle, quantization, given, budget=budget, progress=lambda label, _done, _total: steps.add(label)
        )
    assert found in caught.value.found
    assert files(bundle.path) == before
    assert ("calibration" in steps) is late
    return caught.value


def test_a_cache_gives_the_same_file(bundle: Bundle, tmp_path: Path) -> None:
    quantize_bundle(bundle, QuantizeOptions(method=Method.of("max")), data())
    expected = {name: (bundle.path / name).read_bytes() for name in (INT8, CACHE)}
    (tmp_path / "cache.json").write_bytes(expected[CACHE])
    for given in (
        CalibrationData(cache=tmp_path / "cache.json"),
        CalibrationData(list(ROWS), cache=bundle.path / CACHE),
    ):
        made = quantize_bundle(Bundle.open(bundle.path), QuantizeOptions(), given)  # the method is that of the cache
        assert {name: (bundle.path / name).read_bytes() for name in (INT8, CACHE)} == expected
        assert made.artifact.calibration is not None
        assert made.artifact.calibration.method == "max"


def test_a_cache_of_something_else(bundle: Bundle, tmp_path: Path) -> None:
    made = quantize_bundle(bundle, QuantizeOptions(), data()).bundle
    cache = tmp_path / "cache.json"
    cache.write_bytes((bundle.path / CACHE).read_bytes())
    given = CalibrationData(cache=cache)
    other = make(tmp_path, "other", wh=normal(CLASSES, 32, seed=9))
    refused(other, IntegrityError, "another model", QuantizeOptions(), given)
    refused(made, IntegrityError, "another method", QuantizeOptions(method=Method.of("max")), given)
    refused(made, IntegrityError, "no range of q, kt, v", QuantizeOptions(scheme="attention"), given)
    refused(made, IntegrityError, "another data", QuantizeOptions(), CalibrationData(list(ROWS[:11]), cache=cache))
    recipe = made.manifest.preprocessing
    assert recipe is not None
    sharper = dataclasses.replace(made.manifest, preprocessing=dataclasses.replace(recipe, crop_pct=0.5))
    refused(Bundle(made.path, sharper), IntegrityError, "another preprocessing", QuantizeOptions(), given)
    cache.write_text("{")
    refused(made, IntegrityError, "is no JSON", QuantizeOptions(), given)
    refused(made, UsageError, "there is no calibration", QuantizeOptions(), CalibrationData(cache=tmp_path / "none"))


class Interruption(BaseException):
    exit_code = 130  # as what Ctrl-C raises has


class Stops:
    """Rows of which one ends in an interruption when it is read for the second time: the first is to hash it."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        if index == self.at and self.read.count(index) > 1:
            raise Interruption
        return ROWS[index]


def test_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    straight = make(tmp_path / "straight")
    quantize_bundle(straight, QuantizeOptions(), CalibrationData(Stops()))
    bundle = make(tmp_path / "stopped")
    before = files(bundle.path)
    with pytest.raises(Interruption):
        quantize_bundle(bundle, QuantizeOptions(), CalibrationData(Stops(at=7)))
    assert files(bundle.path) == before
    assert sorted(path.name for path in bundle.path.parent.iterdir()) == [".tiny.calibration.npz", "tiny"]
    assert find_bundles(bundle.path.parent) == [bundle.path]
    source = Stops()
    made = quantize_bundle(bundle, QuantizeOptions(), CalibrationData(source))
    once = source.read.count(1)
    assert [source.read.count(i) for i in range(1, 12)] == [once] * 6 + [once + 1] * 5
    assert made.notes == (f"{bundle.path.parent / '.tiny.calibration.npz'}: continued after 7 samples", NOTE)
    for name in (INT8, CACHE):
        assert (bundle.path / name).read_bytes() == (straight.path / name).read_bytes()
    assert [path.name for path in bundle.path.parent.iterdir()] == ["tiny"]


def test_the_state_is_nobody_elses_hidden_file(tmp_path: Path) -> None:
    """Names of bundles that come as near to it, and to what an atomic swap hides, as names may."""
    names = ("tiny", "tiny.calibration.npz", "tiny.tmp-1", "tiny.replaced")
    bundles = [make(tmp_path, name) for name in names]
    for bundle in bundles:
        with pytest.raises(Interruption):
            quantize_bundle(bundle, QuantizeOptions(), CalibrationData(Stops(at=3)))
    states = {f".{name}.calibration.npz": (tmp_path / f".{name}.calibration.npz").read_bytes() for name in names}
    assert not states.keys() & set(names)
    assert list(interrupted(tmp_path)) == []
    assert find_bundles(tmp_path) == sorted(bundle.path for bundle in bundles)
    quantize_bundle(bundles[0], QuantizeOptions(), data())  # a swap, which clears what dead writers left
    for name in names[1:]:
        assert (tmp_path / f".{name}.calibration.npz").read_bytes() == states[f".{name}.calibration.npz"]
    for bundle in bundles[1:]:
        made = quantize_bundle(bundle, QuantizeOptions(), CalibrationData(Stops()))
        assert "continued after 3 samples" in made.notes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_broken_pictures(bundle: Bundle, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 200, broken=2)
    made = quantize_bundle(bundle, QuantizeOptions(), CalibrationData(folder))
    record = made.artifact.calibration
    assert record is not None
    assert record.skipped == ("class 0/000.png", "class 1/001.png")
    assert len(record.samples) == 200
    pictures(tmp_path / "pictures", 3, broken=3)
    error = refused(
        made.bundle,
        UsageError,
        "3 of 200 samples cannot be read",
        QuantizeOptions(),
        CalibrationData(folder),
        late=True,
    )
    assert "1 %" in error.expected


def test_nan_names_its_sample(bundle: Bundle, tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[5, 0, 0, 0] = np.nan
    np.save(tmp_path / "rows.npy", rows)
    refused(
        bundle,
        UsageError,
        "sample 5 of 12 samples in",
        QuantizeOptions(),
        CalibrationData(tmp_path / "rows.npy"),
        late=True,
    )


def test_activations_that_do_not_depend_on_the_data(tmp_path: Path) -> None:
    bundle = make(tmp_path, g2=np.zeros(32, np.float32), z2=np.full(32, 2, np.float32))
    refused(bundle, NumericsError, "all values of n2 (2) are the same", QuantizeOptions(), data(), late=True)
    made = quantize_bundle(bundle, QuantizeOptions(exclude=("fc1",)), data())  # as the message advises
    assert "mlp.fc1/MatMul" not in made.artifact.quantized


# What fits together, and what does not.


def test_what_fp16_cannot_hold_is_not_hidden_by_int8(tmp_path: Path) -> None:
    bundle = make(tmp_path, g2=np.full(32, 1e5, np.float32), w1=1e-5 * normal(32, 64))
    error = refused(bundle, NumericsError, "beyond FLOAT16, which ends at 65504", QuantizeOptions(), data(), late=True)
    assert "n2 (" in error.found
    quantize_bundle(bundle, QuantizeOptions(around=CastOptions("bf16")), data())
    quantize_bundle(Bundle.open(bundle.path), FP32, data())


def test_an_old_opset_is_raised_where_all_operators_go_on_meaning_the_same(tmp_path: Path) -> None:
    def old(model: ir.Model) -> None:
        model.graph.opset_imports[""] = 18
        for found in [n for n in model.graph if n.op_type == "Gelu"]:
            found.op_type = "Relu"

    bundle = make(tmp_path, change=old)
    made = quantize_bundle(bundle, QuantizeOptions(), data())
    assert made.artifact.opset == 20
    assert load_model(made.file.path).opset_imports[""] == 20


@pytest.mark.parametrize(
    ("quantization", "found"),
    [
        (QuantizeOptions(scheme="int4"), "there is no scheme 'int4'"),
        (QuantizeOptions(exclude=("[",)), "'[' is no regular expression"),
        (QuantizeOptions(exclude=("blokcs",)), "no operator has a name that 'blokcs' finds"),
        (QuantizeOptions(around=CastOptions(keep=("blokcs",))), "no operator has a name that 'blokcs' finds"),
        (QuantizeOptions(around=CastOptions(allow=frozenset({"mask"}))), "no rule 'mask'"),
        (QuantizeOptions(exclude=(".",)), "nothing is left to quantise: 10 operators stay in high precision"),
    ],
)
def test_arguments_that_do_not_fit(bundle: Bundle, quantization: QuantizeOptions, found: str) -> None:
    refused(bundle, UsageError, found, quantization, data())


def test_what_is_kept_in_fp32_is_not_in_int8(bundle: Bundle) -> None:
    made = quantize_bundle(bundle, QuantizeOptions(around=CastOptions(keep=("mlp.fc2/",))), data())
    assert made.artifact.quantized == GEMMS[:-1]
    (fc2,) = (n for n in load_model(bundle.path / INT8).graph if n.name == "mlp.fc2/MatMul")
    assert {value.dtype for value in fc2.inputs if value is not None} == {ir.DataType.FLOAT}


def test_a_pair_has_the_type_of_its_reader_not_of_its_neighbour(bundle: Bundle) -> None:
    """The normalisation stays FP32, what reads it is INT8 with FP16 around it: no cast between pair and product."""
    made = quantize_bundle(bundle, QuantizeOptions(around=CastOptions(keep=("norm",))), data())
    assert made.artifact.quantized == GEMMS
    model = load_model(bundle.path / INT8)
    assert types_of(model, "DequantizeLinear") == {"FLOAT16"}
    assert_valid(model)


def test_stages_by_name() -> None:
    assert stages(["patch-embed", "head"]) == {Stage.PATCH_EMBED, Stage.HEAD}
    assert stages(["sensitive"]) == set(Stage)
    assert stages(["none"]) == frozenset()
    for names in (["nose"], ["none", "head"], []):
        with pytest.raises(UsageError, match="no stage is called") as error:
            stages(names)
        assert error.value.expected == "patch-embed, head, mlp.fc2, patch-merging, sensitive; or none, alone"


# Accuracy budgets.


class Pictures:
    """Rows with the classes that the FP32 graph gives them, some of them wrong."""

    def __init__(self, bundle: Bundle, count: int = 40, wrong: int = 0) -> None:
        self.rows, self.labels = labelled(bundle, count)
        self.labels[:wrong] = (self.labels[:wrong] + 1) % CLASSES

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(self.rows, self.labels.tolist(), strict=True))


@pytest.mark.parametrize("batch", [None, 4])
def test_a_budget_that_holds_at_once(tmp_path: Path, batch: int | None) -> None:
    bundle = make(tmp_path, batch=batch)
    source = Pictures(bundle, wrong=4)
    made = quantize_bundle(bundle, FP32, data(), budget=AccuracyBudget(0.2, source))
    assert made.search is not None
    assert (made.search.fp32.samples, made.search.fp32.top1_correct) == (40, 36)
    assert made.artifact.quantized == made.search.kept == GEMMS
    assert (made.artifact.reverted, made.search.harm) == ((), {})


def ruined(root: Path, batch: int | None = None) -> Bundle:
    """One channel of what fc2 reads is so large that INT8 has no step left for the others; fc2 does without it."""
    b1, w2 = np.zeros(64, np.float32), 3 * normal(64, 32, seed=8)
    b1[7], w2[7] = 3000, 0
    return make(root, batch=batch, b1=b1, w2=w2)


@pytest.mark.parametrize(("around", "batch"), [(None, None), (None, 4), (CastOptions(), None)])
def test_exactly_the_ruinous_layer_is_reverted(tmp_path: Path, around: CastOptions | None, batch: int | None) -> None:
    bundle = ruined(tmp_path, batch)
    source = Pictures(bundle)
    quantization = QuantizeOptions(around=around, method=Method.of("max"))
    plain = quantize_bundle(bundle, quantization, CalibrationData(list(source.rows)))
    steps: list[str] = []
    made = quantize_bundle(
        plain.bundle, quantization, CalibrationData(list(source.rows)), budget=AccuracyBudget(0.03, source),
        progress=lambda label, _done, _total: steps.append(label),
    )  # fmt: skip
    search = made.search
    assert search is not None
    assert search.quantized.top1 < 0.9 < 0.97 <= search.result.top1 <= search.fp32.top1 == 1
    assert made.artifact.reverted == search.reverted == ("mlp.fc2/MatMul",)
    assert made.artifact.quantized == search.kept == GEMMS[:-1]
    assert max(search.harm, key=lambda group: search.harm[group]) == "mlp.fc2/MatMul"
    assert set(search.harm) == set(GEMMS)
    note = made.artifact.steps[-1]
    assert note.name == "accuracy-budget"
    assert [refusal.node for refusal in note.refusals] == ["mlp.fc2/MatMul"]
    assert note.refusals[0].reason.startswith("accuracy: alone in INT8 it moves the logits by ")
    assert dict.fromkeys(steps) == dict.fromkeys(
        [
            *("calibration", "evaluating, 0 of 6 in INT8", "evaluating, 6 of 6 in INT8"),
            *("ranking", "evaluating, 5 of 6 in INT8"),
        ]
    )
    # What was evaluated is what was written.
    assert accuracy(made, source) == search.result.top1_correct
    assert json.loads((bundle.path / "manifest.json").read_text())["artifacts"][1]["reverted"] == ["mlp.fc2/MatMul"]


def accuracy(made: Quantized, source: Pictures) -> int:
    batch = made.artifact.batch or len(source.rows)
    with open_runtime(made.bundle.path / INT8) as runtime:
        found = [
            runtime.run({"images": source.rows[i : i + batch]})["logits"] for i in range(0, len(source.rows), batch)
        ]
    return int((np.concatenate(found).argmax(1) == source.labels).sum())


def test_a_budget_that_nothing_meets(tmp_path: Path) -> None:
    bundle = ruined(tmp_path)
    source = Pictures(bundle)
    quantization = QuantizeOptions(around=None, method=Method.of("max"), exclude=("attn", "fc1"))
    found = "mlp.fc2/MatMul, which hurts least of 1, alone in INT8 loses more than 1.00% of top-1"
    budget = AccuracyBudget(0.01, source)
    error = refused(bundle, NumericsError, found, quantization, CalibrationData(list(source.rows)), budget, late=True)
    assert "--max-drop" in error.hint


def test_labels_that_do_not_serve_are_refused_before_the_calibration(bundle: Bundle, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 20)
    for budget, found in (
        (AccuracyBudget(0.1, folder), "needs labelled data: 20 pictures"),
        (AccuracyBudget(0.1), "needs labelled data"),
        (AccuracyBudget(0.1, [(ROWS[0], CLASSES)]), f"label {CLASSES}"),
        (AccuracyBudget(0.1, tmp_path / "nowhere"), "there is no folder or file"),
    ):
        refused(bundle, UsageError, found, QuantizeOptions(), data(), budget)
    made = quantize_bundle(
        bundle, FP32, CalibrationData(folder), budget=AccuracyBudget(1.0, labels="folders", limit=10)
    )
    assert made.search is not None
    assert made.search.fp32.samples == 10


def test_a_trained_network_in_which_one_layer_was_made_ruinous(tmp_path: Path) -> None:
    """A channel of one normalisation is scaled up and its reader's weights down: in FP32 nothing changes."""
    state = load_file(checkpoint("digits_vit"))
    gain = torch.ones(64)
    gain[[3, 30]] = 3000
    for key in ("weight", "bias"):
        state[f"blocks.0.norm2.{key}"] *= gain
    state["blocks.0.mlp.fc1.weight"] /= gain
    save_file(state, tmp_path / "ruined.safetensors")
    with registered():
        bundle = export(ExportOptions("digits_vit", tmp_path, checkpoint=tmp_path / "ruined.safetensors"))
    images, labels = arrays("test", 200)
    budget = AccuracyBudget(0.005, list(zip(images, labels.tolist(), strict=True)))
    options = dataclasses.replace(FP32, scheme="gemm")
    made = quantize_bundle(bundle, options, CalibrationData(list(arrays("train", 32)[0])), budget=budget)
    assert made.search is not None
    assert made.search.fp32.top1 > 0.95 > made.search.quantized.top1
    assert made.search.fp32.top1 - made.search.result.top1 <= 0.005
    assert made.artifact.reverted == ("blocks.0.mlp.fc1/MatMul",)
