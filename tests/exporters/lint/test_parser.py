"""The lint against NVIDIA's own parser: optional results, Split and Resize in their variants; and pinned verdicts."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycli.exporters.lint import lint
from tests.exporters.lint.rtx import refusals

if TYPE_CHECKING:
    from collections.abc import Iterator

ONES, SCALES = np.ones(4, np.float32), np.float32([1, 1, 2, 2])
NORM = {"s": np.ones(8, np.float32), "t": np.zeros(8, np.float32)}
BATCH_NORM = {"s": ONES, "t": ONES, "mean": ONES, "var": ONES}


def model(
    op_type: str,
    outputs: list[str],
    constants: dict[str, Any] | None = None,
    *,
    operands: list[str] | None = None,
    shape: tuple[int | str, ...] = ("b", 4, 8, 8),
    opset: int = 20,
    read: int = 9,
    **attributes: Any,
) -> onnx.ModelProto:
    """One operator on x and constants; of its results that have a name, the first ``read`` are read."""
    node = helper.make_node(op_type, operands or ["x", *(constants or {})], outputs, name="n", **attributes)
    named = [name for name in outputs if name][:read]
    reading = [helper.make_node("Identity", [name], [f"{name}.out"], name=f"read.{name}") for name in named]
    types = {"i": TensorProto.INT64, "mask": TensorProto.BOOL}
    graph = helper.make_graph(
        [node, *reading],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"{name}.out", types.get(name, TensorProto.FLOAT), None) for name in named],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def splits() -> Iterator[onnx.ModelProto]:
    parts = (["a"], ["a", "b"], ["a", ""], ["", "b"], ["a", "", "c"], ["a", "b", ""])
    for opset, names in product((13, 18, 20), parts):
        sizes = {"sizes": np.full(len(names), 6 // len(names))}
        yield model("Split", names, sizes, shape=("b", 6), opset=opset, axis=1)
        if opset >= 18:
            yield model("Split", names, shape=("b", 6), opset=opset, axis=1, num_outputs=len(names))


def optional_results() -> Iterator[onnx.ModelProto]:
    for read in (1, 9):
        for names in (["y"], ["y", ""], ["y", "", ""], ["y", "m"], ["y", "m", "i2"], ["y", "", "i2"], ["y", "m", ""]):
            for opset in (17, 20):
                yield model("LayerNormalization", names, NORM, opset=opset, read=read)
            for opset in (9, 15):
                yield model("BatchNormalization", names, BATCH_NORM, opset=opset, read=read)
        for names, opset in product((["y"], ["y", ""]), (10, 13, 20)):
            yield model("Dropout", names, opset=opset, read=read)
        for names in (["y"], ["y", ""], ["y", "i"]):
            yield model("MaxPool", names, read=read, kernel_shape=[2, 2])
        for names, is_sorted in product((["v", "i"], ["v", ""], ["", "i"], ["v"]), (0, 1)):
            yield model("TopK", names, {"k": np.array([3])}, read=read, sorted=is_sorted)


COORDINATES = (
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize",
    "tf_half_pixel_for_nn",
)  # fmt: skip


def resizes() -> Iterator[onnx.ModelProto]:
    roi = {"roi": np.float32([0, 0, 0, 0, 1, 1, 1, 1])}
    for mode, coordinates, opset in product(("nearest", "linear", "cubic"), COORDINATES, (11, 13, 18, 20)):
        with_roi = coordinates == "tf_crop_and_resize"
        options = {"mode": mode, "coordinate_transformation_mode": coordinates}
        first = ["x", "roi" if with_roi else ""]
        scales = {"r": SCALES, **(roi if with_roi else {})}
        yield model("Resize", ["y"], scales, operands=[*first, "r"], opset=opset, **options)
        sizes = {"r": np.array([2, 4, 16, 4]), **(roi if with_roi else {})}
        yield model("Resize", ["y"], sizes, operands=[*first, "", "r"], opset=opset, shape=(2, 4, 8, 8), **options)
    extras: tuple[dict[str, Any], ...] = (
        {"cubic_coeff_a": -0.5}, {"exclude_outside": 1}, {"antialias": 1}, {"keep_aspect_ratio_policy": "not_larger"},
        {"nearest_mode": "ceil"}, {"extrapolation_value": 1.0}, {"axes": [2, 3]}, {"axes": [-1, 2]},
    )  # fmt: skip
    for mode, extra, shape in product(("nearest", "linear", "cubic"), extras, (("b", 4, 8, 8), (2, 4, 8, 8))):
        some = "axes" in extra
        scales = {"r": np.float32([2, 0.5] if some else [1, 1, 2, 0.5])}
        yield model("Resize", ["y"], scales, operands=["x", "", "r"], shape=shape, mode=mode, **extra)
        if some or shape[0] == 2:
            sizes = {"r": np.array([16, 4] if some else [2, 4, 16, 4])}
            yield model("Resize", ["y"], sizes, operands=["x", "", "", "r"], shape=shape, mode=mode, **extra)
    for mode, factors in product(
        ("nearest", "linear", "cubic"), ([1, 2], [1, 2, 2, 2], [1, 1, 2, 2, 2], [1, 1, *[2] * 4])
    ):
        shape = ("b", *[4] * (len(factors) - 1))
        yield model("Resize", ["y"], {"r": np.float32(factors)}, operands=["x", "", "r"], shape=shape, mode=mode)


@pytest.mark.parametrize("cases", [splits, optional_results, resizes])
def test_the_parser_takes_what_the_lint_passes_and_nothing_else(cases: Any) -> None:
    seen, wrong = set(), []
    for case in cases():
        refused = refusals(case)
        found = [f"rule {error.number}: {error.message}" for error in lint(ir.from_proto(case)).errors]
        seen.add(bool(refused))
        if bool(refused) != bool(found):
            node = case.graph.node[0]
            what = f"opset {case.opset_import[0].version} {helper.printable_node(node)}"
            wrong.append(f"{what}\n  parser: {refused or 'takes it'}\n  lint: {found or 'passes it'}")
    assert seen == {True, False}
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (model("Split", ["", "b"], shape=("b", 6), axis=1, num_outputs=2), "a result that has no name"),
        (model("Split", ["a", ""], shape=("b", 6), axis=1, num_outputs=2), "a result that has no name"),
        (model("LayerNormalization", ["y", "", ""], NORM), ""),
        (model("LayerNormalization", ["y", "m"], NORM, read=1), "more than one result"),
        (model("MaxPool", ["y", "i"], kernel_shape=[2, 2], read=1), "more than one result"),
        (model("Resize", ["y"], {"r": SCALES}, operands=["x", "", "r"], mode="cubic"), ""),
        (
            model(
                "Resize", ["y"], {"r": SCALES}, operands=["x", "", "r"],
                coordinate_transformation_mode="half_pixel_symmetric",
            ),
            "coordinates half_pixel_symmetric",
        ),
        (model("TopK", ["v", "i"], {"k": np.array([3])}, sorted=0), ""),
    ],
)  # fmt: skip
def test_verdicts(case: onnx.ModelProto, says: str) -> None:
    errors = lint(ir.from_proto(case)).errors
    assert (not errors) if not says else any(says in error.message for error in errors)
