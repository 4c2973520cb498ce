"""What overflows FP16 is stored smaller: networks with outliers, and each refusal."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploycli.exporters.bundle.golden import GOLDEN_NAME, save_golden
from deploycli.exporters.bundle.manifest import SCHEMA_VERSION, Artifact, FileRecord, Manifest
from deploycli.exporters.cast import cast_bundle
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.options import CalibrationData, CastOptions
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.exporters.precision.rescale import rescale, scaling
from deploycli.exporters.verification.compare import BUDGETS
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.spec import ModelSpec, TensorSpec, Weights
from tests.exporters.bundle.bundles import write_bundle
from tests.exporters.precision.casts import plain, simulated, source, weights
from tests.exporters.precision.networks import normal, proto_of, ranges
from tests.exporters.precision.outliers import FORMS, cast_with_data, exported

if TYPE_CHECKING:
    from pathlib import Path

Array = Any  # arrays of any type, in tests

HALF = REDUCED_TYPES["fp16"]


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip", "relu"])
def test_a_network_with_outliers(name: str, form: str) -> None:
    blind = cast_with_data(name, form, repair=False, data=False)
    assert not np.isfinite(blind.error)
    before, after = (cast_with_data(name, form, repair=repair) for repair in (False, True))
    assert before.fp32_products
    assert after.fp32_products == []
    assert len(after.proto.graph.node) <= len(before.proto.graph.node)
    assert (after.too_large, after.said("unscaled")) == (0, [])
    assert after.said("rescaled")
    assert after.error < BUDGETS["fp16"].max_rel_error / 4


@pytest.mark.parametrize("form", FORMS)
def test_a_residual_stream_is_said_in_one_line(form: str) -> None:
    (said,) = cast_with_data("vit", form, repair=True).said("rescaled")
    counts = "1 Conv, 7 Add, 7 LayerNormalization, 6 MatMul"
    assert said == f"blocks.*: rescaled: residual stream, up to 1e+05, stored as x/16: {counts}"


def test_gelu_knows_no_scale() -> None:
    before, after = (cast_with_data("gelu", "in place", repair=repair) for repair in (False, True))
    assert after.proto == before.proto
    assert after.said("rescaled") == []
    assert [text.partition("; ")[2] for text in after.said("unscaled")] == ["act/Gelu is not linear"] * 2
    assert after.fp32_products


def test_a_bundle_is_verified(tmp_path: Path) -> None:
    images = normal(8, 3, 32, 32, seed=7)
    proto = onnx.load_from_string(exported("vit", "in place"))
    spec = ModelSpec("outlier", "by-hand", {}, (TensorSpec("images", (3, 32, 32)),), ("logits",))

    def fill(folder: Path) -> Manifest:
        onnx.save(proto, folder / "model.onnx")
        save_golden(folder / GOLDEN_NAME, {"images": images}, plain(proto, images=images))
        record, golden = (FileRecord.of(folder, name) for name in ("model.onnx", GOLDEN_NAME))
        artifact = Artifact(record, (), "fp32", 20, None, {}, {}, ())
        weights_record = Weights("checkpoint", path="/nowhere/model.pth", sha256="0" * 64)
        return Manifest(SCHEMA_VERSION, "0.1.0", "outlier", spec, weights_record, None, (artifact,), golden, {})

    bundle = write_bundle(tmp_path, "outlier", fill)
    derived = cast_bundle(bundle, CastOptions(), data=CalibrationData([{"images": image} for image in images]))
    (step,) = derived.artifact.steps
    assert [r.node for r in step.refusals if r.reason.startswith("rescaled: residual stream")] == ["blocks.*"]
    report = verify(derived.bundle, VerifyOptions(reference="golden", engines="none"))
    assert report.passed, report.failures
    assert {stage.precision for stage in report.stages} == {"fp32", "fp16"}


# --- what is repaired, and what is refused ---------------------------------------------------------------------------


def rescaled(
    text: str, inputs: dict[str, Array], *, data: bool = True, opset: int = 20, **constants: Any
) -> tuple[onnx.ModelProto, list[str]]:
    """Rescale a graph, and check that no bit of what it answers is another; return it, and what was said."""
    proto = onnx.shape_inference.infer_shapes(source(text, opset, **constants), strict_mode=True, data_prop=True)
    model = ir.from_proto(copy.deepcopy(proto))
    magnitudes = ranges(ir.from_proto(copy.deepcopy(proto)), inputs) if data else {}
    _, remarks = rescale(model, Policy(HALF, magnitudes=magnitudes))
    made = proto_of(model)
    expected, found = plain(proto, **inputs), plain(made, **inputs)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    return made, [remark.reason for remark in remarks]


def constants_of(proto: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


X = {"x": normal(4, 8)}


@pytest.mark.parametrize(
    ("magnitude", "limit", "k"), [(8, 8, 0), (8.1, 8, 1), (16, 8, 1), (17, 8, 2), (1e-3, 8, -12), (0, 8, -40)]
)
def test_scaling_is_the_least_power(magnitude: float, limit: float, k: int) -> None:
    assert scaling(magnitude, limit) == k


def test_what_fits_is_left_alone() -> None:
    made, said = rescaled("g (float[4,8] x) => (float[4,8] y) { h = MatMul (x, w) y = Gelu (h) }", X, w=weights(8, 8))
    assert said == []
    np.testing.assert_array_equal(constants_of(made)["w"], weights(8, 8))


def test_a_weight_needs_no_data() -> None:
    """The result of the first product is smaller, and the second weight is larger."""
    text = "g (float[4,8] x) => (float[4,8] y) { h = MatMul (x, w) r = Relu (h) m = MatMul (r, v) y = Tanh (m) }"
    made, said = rescaled(text, X, data=False, w=1e5 * weights(8, 8), v=1e-5 * weights(8, 8))
    assert said == ["rescaled: h stored as x/4: 2 MatMul"]
    assert np.abs(constants_of(made)["w"]).max() < 32752
    np.testing.assert_array_equal(constants_of(made)["v"], weights(8, 8) * np.float32(1e-5) * 4)


def test_a_weight_in_front_of_gelu_takes_its_scale_from_a_normalisation() -> None:
    text = """g (float[4,8] x) => (float[4,8] y) {
        n = LayerNormalization (x, g, b) h = MatMul (n, w) y = Gelu (h)
    }"""
    w = weights(8, 8)
    w[2] *= 1e5
    g = np.ones(8)
    g[2] = 1e-5
    made, said = rescaled(text, X, data=False, w=w, g=g, b=0.1 * g)
    (reason,) = said
    assert reason == ("rescaled: 1 of 8 channels stored as 4*x, in its gain and in the rows of 1 products")
    assert constants_of(made)["g"][2] == np.float32(1e-5) * 4
    np.testing.assert_array_equal(constants_of(made)["b"][[1, 2]], (0.1 * g).astype(np.float32)[[1, 2]] * [1, 4])


def test_a_gain_beyond_fp16_goes_into_the_next_products_channel_by_channel() -> None:
    """Through movement of rows, into weights of both ways round; the other channels keep their digits."""
    text = """g (float[2,4,8] x) => (float[4,2,8] y, float[8,8] z) {
        n = LayerNormalization (x, g, b) t = Transpose <perm = [1, 0, 2]> (n) h = MatMul (t, w) y = Tanh (h)
        r = Reshape (n, rows) l = Gemm <transB = 1> (r, v) z = Tanh (l)
    }"""
    g, v = np.full(8, 1e-3), weights(8, 8, seed=1)
    g[3] = 1e5
    v[:, 3] *= 1e-5
    w = weights(8, 8)
    w[3] *= 1e-5
    made, said = rescaled(text, {"x": normal(2, 4, 8)}, g=g, b=g / 10, w=w, v=v, rows=np.array([8, 8], np.int64))
    assert said == ["rescaled: 1 of 8 channels stored as x/8, in its gain and in the rows of 2 products"]
    found = constants_of(made)
    assert found["g"][3] == np.float32(1e5) / 8
    assert (found["g"][:3] == np.float32(1e-3)).all()
    np.testing.assert_array_equal(found["w"][3], w[3] * 8)
    np.testing.assert_array_equal(found["v"][:, 3], v[:, 3] * 8)


def test_a_constant_that_several_read_is_scaled_for_each_and_stored_once() -> None:
    text = """g (float[4,8] x) => (float[4,8] y) {
        a = MatMul (x, big) n = LayerNormalization <epsilon = 0.01> (a, one, one) c = MatMul (n, big)
        d = MatMul (c, small) m = LayerNormalization (d, one, one) y = MatMul (m, small)
    }"""
    made, _ = rescaled(text, X, big=2e4 * weights(8, 8), small=1e-3 * weights(8, 8), one=np.ones(8))
    assert len(made.graph.initializer) == len(constants_of(made))
    read = {name for node in made.graph.node for name in node.input}
    assert set(constants_of(made)) <= read
    first, second = (node for node in made.graph.node if node.op_type == "LayerNormalization")
    epsilons = [onnx.helper.get_node_attr_value(node, "epsilon") for node in (first, second) if node.attribute]
    assert epsilons[0] < np.float32(0.01)


def test_scores_are_scaled_by_what_divides_them() -> None:
    """Queries times keys overflow in front of their scale, which takes what is left over."""
    text = """g (float[4,8] x) => (float[4,8] y) {
        q = MatMul (x, w) l = MatMul (x, v) k = Transpose <perm = [1, 0]> (l) s = MatMul (q, k) t = Mul (s, scale)
        p = Softmax (t) m = MatMul (p, x) y = Tanh (m)
    }"""
    made, said = rescaled(text, X, w=100 * weights(8, 8), v=100 * weights(8, 8), scale=np.float32(1e-4))
    assert ["stored as x/64" in reason for reason in said] == [True, True]  # the scores, and the queries or the keys
    assert constants_of(made)["scale"] == np.float32(1e-4) * 64


def test_small_weights_keep_their_digits() -> None:
    """What reads the large value takes the scale; where neither can, the value stays FP32 and it is said why."""
    text = "g (float[4,8] x) => (float[4,8] y) { h = MatMul (x, w) r = Relu (h) m = MatMul (r, v) y = Tanh (m) }"
    w = 1e-4 * weights(8, 8)
    w[:, 0] = 3e4
    _, said = rescaled(text, X, w=w, v=1e-5 * weights(8, 8))
    (reason,) = said
    assert reason.startswith("unscaled: ")
    assert "numbers of w would lose digits" in reason


def test_a_value_that_is_small_among_its_group_keeps_its_digits() -> None:
    text = """g (float[4,8] x) => (float[4,8] y) {
        a = MatMul (x, tiny) n = LayerNormalization (a, one, one) h = MatMul (x, big) s = Add (a, h)
        m = LayerNormalization (s, one, one) l = Add (m, n) y = Tanh (l)
    }"""
    _, said = rescaled(text, X, tiny=1e-3 * weights(8, 8), big=3e4 * weights(8, 8), one=np.ones(8))
    assert any("a (" in reason and "would lose digits" in reason for reason in said), said


@pytest.mark.parametrize(
    "reader",
    [
        "y = Gelu (h)",
        "y = Exp (h)",
        "c = Cast <to = 11> (h) y = Cast <to = 1> (c)",
        "y = Softmax (h)",
        "y = Identity (h)",
    ],
)
def test_what_pins_a_value(reader: str) -> None:
    text = f"g (float[4,8] x) => (float[4,8] y) {{ h = MatMul (x, w) {reader} }}"
    _, said = rescaled(text, {"x": 0.01 * normal(4, 8) - 1}, w=np.full((8, 8), 1e4))
    assert [reason.partition(":")[0] for reason in said] == ["unscaled"] * len(said)
    assert said


def test_a_graph_inside_reads_a_value_as_it_is() -> None:
    text = """g (float[4,8] x, bool c) => (float[4,8] y) {
        h = MatMul (x, w) r = MatMul (h, v)
        i = If <then_branch = t () => (float[4,8] a) { a = Neg (h) },
                else_branch = e () => (float[4,8] b) { b = Neg (r) }> (c)
        y = Tanh (i)
    }"""
    _, said = rescaled(text, {**X, "c": np.array(True)}, w=3e4 * weights(8, 8), v=1e-5 * weights(8, 8))
    assert any("the graphs inside block.2/If read it" in reason for reason in said)


def test_a_mask_is_clipped_and_not_scaled() -> None:
    text = "g (float[4,8] x) => (float[4,8] y) { h = Add (x, mask) y = Softmax (h) }"
    _, said = rescaled(text, X, mask=np.where(np.arange(8) > 5, -1e9, 0.0))
    assert said == []


def test_bf16_needs_no_repair() -> None:
    model = ir.from_proto(source("g (float[4,8] x) => (float[4,8] y) { y = MatMul (x, w) }", w=1e6 * weights(8, 8)))
    assert rescale(model, Policy(REDUCED_TYPES["bf16"]))[1] == []


def test_the_scaled_graph_is_fp16_from_end_to_end() -> None:
    text = """g (float[2,8,6] x) => (float[2,8,6] y) {
        a = Conv <kernel_shape = [1]> (x, k, kb) r = LeakyRelu (a) b = Conv <kernel_shape = [1]> (r, l, lb) y = Tanh (b)
    }"""
    inputs = {"x": normal(2, 8, 6)}
    constants = {"k": 5e4 * weights(8, 8, 1), "kb": np.full(8, 1e5), "l": 1e-6 * weights(8, 8, 1), "lb": weights(8)}
    made, said = rescaled(text, inputs, **constants)
    assert said == ["rescaled: a, up to " + next(iter(said)).partition("up to ")[2]]
    model = ir.from_proto(copy.deepcopy(made))
    policy = Policy(HALF, magnitudes=ranges(ir.from_proto(copy.deepcopy(made)), inputs))
    assert cast(model, policy) == []
    expected, found = plain(made, **inputs)["y"], simulated(proto_of(model), **inputs)["y"]
    assert np.abs(found - expected).max() < 4e-3
