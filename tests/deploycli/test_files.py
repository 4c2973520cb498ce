"""Commands on an ONNX file of somebody else's, and the bundle that is made of one."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from deploycli.exporters.bundle.manifest import Manifest
from tests.exporters.passes.graphs import parse

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

RNG = np.random.default_rng(0)
WIDTH = 32

PICTURES = """g (float[batch, 3, 8, 8] images) => (float[batch, 5] logits) {
    patches = Conv <kernel_shape = [4, 4], strides = [4, 4]> (images, filters, offsets)
    rows = Reshape (patches, shape) tokens = Transpose <perm = [0, 2, 1]> (rows)
    normal = LayerNormalization (tokens, gain, shift)
    hidden = MatMul (normal, up) active = Relu (hidden) mixed = MatMul (active, down) sum = Add (tokens, mixed)
    pooled = ReduceMean <keepdims = 0> (sum, axes) logits = MatMul (pooled, head)
}"""

TEXT = """g (int64[batch, words] ids, int64[batch, words] mask) => (float[batch, words, 32] y) {
    seen = Gather (table, ids) m = Cast <to = 1> (mask) wide = Unsqueeze (m, last) kept = Mul (seen, wide)
    y = MatMul (kept, up)
}"""


def weights(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-1]))


def save(text: str, folder: Path, name: str, **constants: Any) -> Path:
    model = parse(text, **constants)
    onnx.save(model, folder / name)
    return folder / name


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A small network of pictures, with a batch that is open."""
    return save(
        PICTURES, tmp_path, "net.onnx", filters=weights(WIDTH, 3, 4, 4), offsets=weights(WIDTH), shape=[0, WIDTH, -1],
        gain=1 + weights(WIDTH), shift=weights(WIDTH), up=weights(WIDTH, WIDTH), down=weights(WIDTH, WIDTH), axes=[1],
        head=weights(WIDTH, 5),
    )  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A network of indices, whose length is open, too, and which takes 20 of them."""
    return save(TEXT, tmp_path, "text.onnx", table=weights(20, WIDTH), last=[-1], up=weights(WIDTH, WIDTH))


def sentences(folder: Path, count: int = 6, words: int = 7) -> Path:
    ids = RNG.integers(0, 20, (count, words))
    np.savez(folder / "samples.npz", ids=ids, mask=np.ones_like(ids))
    return folder / "samples.npz"


def test_a_bundle_of_a_file_goes_through_every_command(deploycli: Command, pictures: Path, tmp_path: Path) -> None:
    made = deploycli("import", pictures, "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2", "--crop", "0.9")
    assert made.code == 0, made.err
    assert "nodes in the file" in made.out
    manifest = Manifest.read(tmp_path / "artifacts/net")
    assert (manifest.spec.family, manifest.weights.source, manifest.weights.path) == ("onnx", "onnx", str(pictures))
    assert manifest.preprocessing is not None
    assert (manifest.preprocessing.mean, manifest.preprocessing.crop_pct) == ((0.5, 0.5, 0.5), 0.9)
    assert [record.path for record in manifest.reference] == ["reference/net.onnx"]
    np.savez(tmp_path / "samples.npz", images=RNG.standard_normal((4, 3, 8, 8)).astype(np.float32))
    for command in (
        ("cast",),
        ("quantize", "--calibrate", "samples.npz", "--high-precision", "none"),
        ("build-trt", "--gpu", "ada"),
        ("lint",),
        ("inspect", "net"),
        ("bench", "--rounds", 1, "--batches", 2),
        ("package", "--triton", "served", "--force"),
    ):
        done = deploycli(*command)
        assert done.code == 0, (command, done.err)
    (report,) = deploycli("verify", "--images", "samples.npz", "--json").json()
    assert (report["reference"], report["passed"]) == ("onnx", True)
    assert {stage["artifact"] for stage in report["stages"]} == {"model.onnx", "model.fp16.onnx", "model.int8.onnx"}


def test_verify_sees_that_a_bundle_answers_otherwise_than_the_file(
    deploycli: Command, pictures: Path, tmp_path: Path
) -> None:
    """The reference is the file, not what the bundle made of it: a graph with another weight fails."""
    assert deploycli("import", pictures).code == 0
    folder = tmp_path / "artifacts/net"
    model = onnx.load(folder / "model.onnx")
    tensor = next(one for one in model.graph.initializer if one.name == "head")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), "head"))
    onnx.save(model, tmp_path / "other.onnx")
    found = deploycli("verify", "other.onnx", "--against", folder / "reference/net.onnx")
    assert found.code == 5
    assert "FAILED output 'logits' relative error 0.01" in found.out
    assert deploycli("verify", folder / "model.onnx", "--against", pictures).code == 0


@pytest.mark.parametrize("how", ["cast", "quantize"])
def test_a_file_in_another_precision(deploycli: Command, pictures: Path, tmp_path: Path, how: str) -> None:
    np.savez(tmp_path / "samples.npz", images=RNG.standard_normal((4, 3, 8, 8)).astype(np.float32))
    more = ("--calibrate", "samples.npz") if how == "quantize" else ()
    done = deploycli(how, pictures, "-o", "out.onnx", *more)
    assert done.code == 0, done.err
    assert f"next: deploycli verify out.onnx --against {pictures}" in done.out
    types = {tensor.data_type for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    assert (onnx.TensorProto.INT8 in types) == (how == "quantize")
    assert (tmp_path / "out.calibration.json").is_file() == (how == "quantize")
    assert not (tmp_path / "artifacts").exists(), "no bundle is left"
    (shown,) = deploycli("verify", "out.onnx", "--against", pictures, "--json").json()
    assert (shown["precision"], shown["passed"]) == ("int8" if how == "quantize" else "fp16", True)
    built = deploycli("build-trt", "out.onnx", "--gpu", "ada", "--precision", shown["precision"])
    assert built.code == 0, built.err
    assert (tmp_path / "artifacts/out/model.onnx").read_bytes() != b""


def test_open_axes_stay_open(deploycli: Command, text: Path, tmp_path: Path) -> None:
    assert deploycli("cast", text, "-o", "half.onnx").code == 0
    shape = onnx.load(tmp_path / "half.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_param for dim in shape.dim] == ["batch", "words"]
    given = ("--input", "ids:1x9:int64:0..19", "--input", "mask:1x9:int64:0..1")
    for feeds in (given, ("--inputs", sentences(tmp_path))):
        (shown,) = deploycli("verify", "half.onnx", "--against", text, *feeds, "--json").json()
        assert shown["passed"]
        assert shown["runs"][0] == ("ids:3x9 mask:3x9" if feeds is given else "ids:6x7 mask:6x7")


def test_inputs_that_random_numbers_cannot_feed(deploycli: Command, text: Path, tmp_path: Path) -> None:
    samples = sentences(tmp_path)
    made = deploycli("import", text, "--inputs", samples)
    assert made.code == 0, made.err
    manifest = Manifest.read(tmp_path / "artifacts/text")
    assert manifest.recorded_inputs
    assert [spec.shape for spec in manifest.spec.inputs] == [(7,), (7,)]
    assert deploycli("cast").code == 0
    done = deploycli("verify")
    assert done.code == 0, done.err
    assert "golden holds 6 samples: batch 8 left out" in " ".join(done.out.split())
    assert deploycli("optimize", text, "-o", "small.onnx", "--inputs", samples).code == 0
    assert deploycli("bench", text, "--inputs", samples, "--rounds", 1, "--batches", 2).code == 0


def test_a_file_is_imported_once_for_several_builds(deploycli: Command, pictures: Path, tmp_path: Path) -> None:
    assert deploycli("build-trt", pictures, "--gpu", "ada").code == 0
    assert deploycli("build-trt", pictures, "--gpu", "ada", "--precision", "fp32").code == 0
    assert {path.name for path in (tmp_path / "artifacts/net").glob("*/*.plan")} == {
        f"{precision}-sm89-rtx{version('tensorrt-rtx-cu12')}.plan" for precision in ("fp16", "fp32")
    }, "the second found the bundle of the first"
    changed = onnx.load(pictures)
    changed.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(weights(WIDTH, 3, 4, 4), changed.graph.initializer[0].name)
    )
    onnx.save(changed, pictures)
    assert deploycli("build-trt", pictures, "--gpu", "ada").code == 0
    assert len(list((tmp_path / "artifacts/net").glob("*/*.plan"))) == 1, "the file is another one"


def test_a_fixed_batch(deploycli: Command, tmp_path: Path) -> None:
    fixed = save("g (float[4, 6] x) => (float[4, 3] y) { y = MatMul (x, w) }", tmp_path, "fixed.onnx", w=weights(6, 3))
    assert deploycli("import", fixed).code == 0
    assert deploycli("cast").code == 0
    (report,) = deploycli("verify", "--json").json()
    assert {stage["check"] for stage in report["stages"]} == {"batch 4", "batch 4 shuffled"}
    assert report["passed"]


def test_external_data_in_a_folder_of_their_own(deploycli: Command, pictures: Path, tmp_path: Path) -> None:
    model = onnx.load(pictures)
    (tmp_path / "big/weights").mkdir(parents=True)
    onnx.save(
        model, tmp_path / "big/net.onnx", save_as_external_data=True, all_tensors_to_one_file=True,
        location="weights/all.bin", size_threshold=100,
    )  # fmt: skip
    for name, more in (("rewritten", ()), ("as-it-is", ("--no-rewrite",))):
        assert deploycli("import", "big/net.onnx", "--name", name, *more).code == 0
        assert deploycli("verify", name).code == 0
    assert (tmp_path / "artifacts/rewritten/reference/weights/all.bin").is_file()
    assert (tmp_path / "artifacts/as-it-is/weights/all.bin").is_file()
    assert deploycli("quantize", "big/net.onnx", "-o", "q.onnx", "--allow-random-calibration").code == 0


REFUSED = {
    "no batch": ("g (float x) => (float y) { y = Neg (x) }", (), "has no batch: its input 'x' has no axis"),
    "two batches": (
        "g (float[2, 3] x, float[4, 3] z) => (float[2, 3] y) { s = ReduceSum <keepdims = 1> (z) y = Add (x, s) }", (),
        "share no batch: x [2, 3], z [4, 3]",
    ),
    "an open axis": (
        "g (float[batch, words] x) => (float[batch, words] y) { y = Neg (x) }", (),
        "the input 'x' has an axis of no fixed size, words: [batch, words]",
    ),
    "text": ("g (string[batch] x) => (string[batch] y) { y = Identity (x) }", (), "'x' has the type string"),
    "random": (
        "g (float[batch, 3] x) => (float[batch, 3] y) { r = RandomNormalLike (x) y = Add (x, r) }", (),
        "draws random numbers",
    ),
    "zero": (
        "g (float[batch, 3] x) => (float[batch, 3] y) { y = Mul (x, none) }", (), "answers zero everywhere, in ONNX",
    ),
    "another size": (
        "g (float[batch, 3] x) => (float[batch, 3] y) { y = Neg (x) }", ("--input", "x:1x4"),
        "--input x is float32 [batch, 4]",
    ),
    "another input": (
        "g (float[batch, 3] x) => (float[batch, 3] y) { y = Neg (x) }", ("--input", "z:1x3"), "has no input 'z'",
    ),
    "half a recipe": (
        "g (float[batch, 3, 4, 4] x) => (float[batch, 3, 4, 4] y) { y = Neg (x) }", ("--mean", "0.5,0.5,0.5"),
        "how this model wants its pictures is not known, and half of it was given",
    ),
    "no pictures": (
        "g (float[batch, 3] x) => (float[batch, 3] y) { y = Neg (x) }", ("--mean", "0,0,0", "--std", "1,1,1"),
        "are of pictures; the inputs are x [batch, 3]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_bundle(deploycli: Command, tmp_path: Path, case: str) -> None:
    text, more, message = REFUSED[case]
    constants: dict[str, Any] = {"none": np.float32(0)} if "none" in text else {}
    file = save(text, tmp_path, "in.onnx", **constants)
    refused = deploycli("import", file, *more)
    assert refused.code == (3 if case == "zero" else 2), refused.err
    assert message in " ".join(refused.err.split())
    assert not list((tmp_path / "artifacts").glob("*"))


def test_what_computes_in_less_already_is_taken_as_it_is(deploycli: Command, pictures: Path) -> None:
    assert deploycli("cast", pictures, "-o", "half.onnx").code == 0
    made = deploycli("import", "half.onnx")
    assert made.code == 0, made.err
    assert "the file computes in FP16: it is taken as it is" in made.err
    assert deploycli("verify").code == 0
    for command in (
        ("cast",),
        ("quantize", "--allow-random-calibration"),
        ("cast", "half.onnx", "-o", "again.onnx"),
        ("build-trt", "--precision", "fp32"),
    ):
        refused = deploycli(*command)
        assert refused.code == 2
        assert "computes in FP16 already" in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cast", "net.onnx"), "name the file to write for net.onnx"),
        (("cast", "net.onnx", "other", "-o", "x.onnx"), "net.onnx was given with 1 more"),
        (("verify", "net.onnx"), "two files are compared"),
        (("verify", "--against", "net.onnx"), "two files are compared"),
        (
            ("verify", "net.onnx", "--against", "net.onnx", "--batches", "1"),
            "--batches means nothing between two files",
        ),
        (("verify", "net.onnx", "--against", "net.onnx", "--rtol", "z:1"), "has no output 'z'"),
        (("cast", "net", "--inputs", "a.npz"), "--inputs means nothing to a bundle"),
        (("bench", "net", "--input", "x:1x3"), "--input means nothing to a bundle"),
        (("cast", "gone.onnx", "-o", "x.onnx"), "gone.onnx"),
    ],
)
def test_half_a_command(deploycli: Command, pictures: Path, arguments: tuple[str, ...], message: str) -> None:
    assert pictures.name == "net.onnx"
    refused = deploycli(*arguments)
    assert refused.code == 2
    assert message in " ".join(refused.err.split())


def test_samples_that_do_not_fit(deploycli: Command, text: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "half.npz", ids=np.zeros((2, 4), np.int64))
    np.savez(tmp_path / "far.npz", ids=np.full((2, 4), 99), mask=np.ones((2, 4), np.int64))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    for name, message in (("half", "'mask' is missing"), ("far", "does not run on"), ("torn", "cannot be read")):
        for command in (("import", text), ("verify", text, "--against", text), ("cast", text, "-o", "x.onnx")):
            refused = deploycli(*command, "--inputs", f"{name}.npz")
            assert refused.code in (2, 3), refused.out
            assert message in " ".join(refused.err.split()) or "out of" in refused.err
    assert not (tmp_path / "x.onnx").exists()


def test_a_sample_that_a_finite_mask_hides_is_not_judged_in_fp16() -> None:
    from deploycli.exporters.bundle.golden import HIDDEN, judged_samples
    from deploycli.models.spec import TensorSpec

    finite, infinite = (TensorSpec("mask", (4,), "float32", hides=how) for how in ("finite", "infinite"))
    for precision, spec, left_out in (("fp32", finite, False), ("fp16", finite, True), ("fp16", infinite, False)):
        order = judged_samples([spec], precision, 5, 5)
        assert len(order) == 5
        assert (HIDDEN not in order) == left_out


def test_an_opset_that_cannot_be_raised_is_said(deploycli: Command, tmp_path: Path) -> None:
    text = """g (float[batch, 4, 4, 2] grid) => (float[batch, 1, 4, 4] y) {
        picture = MatMul (grid, up) turned = Transpose <perm = [0, 3, 1, 2]> (picture) y = GridSample (turned, grid)
    }"""
    file = save(text, tmp_path, "in.onnx", up=weights(2, 1))
    model = onnx.load(file)
    model.opset_import[0].version = 16
    onnx.save(model, file)
    refused = deploycli("quantize", file, "-o", "out.onnx", "--allow-random-calibration")
    assert refused.code == 2
    assert "is of opset 16, and cannot be raised: GridSample has another meaning in opset 20" in refused.err
