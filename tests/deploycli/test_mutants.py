"""A judge that passes everything also passes the right one: `deploycli verify` must fail every wrong bundle."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.bundle.reference import reference_model
from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.trace import trace
from deploycli.models.swin import SwinTransformer, SwinTransformerBlock
from tests.exporters.bundle.bundles import record_again

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.deploycli.conftest import Command

node = helper.make_node


@pytest.fixture
def bundle(true_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the true bundle, to be spoilt."""
    return Bundle.open(shutil.copytree(true_bundle.path, tmp_path / "artifacts" / true_bundle.path.name))


def assert_outside(deploycli: Command, bundle: Bundle, *, found: str = "") -> None:
    result = deploycli("verify", "--json")
    assert result.code == 5, result.err
    (report,) = json.loads(result.out)
    assert report["reference"] == "eager"
    assert not report["passed"]
    assert all("output 'logits'" in line for line in report["failures"])
    assert found in " ".join(report["failures"])
    told = deploycli("verify", bundle.path, "--reference", "golden")
    assert told.code == 5
    assert any("FAILED" in line and "output 'logits'" in line for line in told.out.splitlines())


def shifted(model: SwinTransformer) -> SwinTransformerBlock:
    (block,) = [b for b in model.modules() if isinstance(b, SwinTransformerBlock) and b.shift_size]
    return block


def roll_the_other_way(model: SwinTransformer) -> None:
    shifted(model).shift_size *= -1


def drop_the_mask(model: SwinTransformer) -> None:
    shifted(model).attn_mask = None


def transpose_the_bias(model: SwinTransformer) -> None:
    index = shifted(model).attn.relative_position_index
    index.copy_(index.T.clone())


def leave_as_it_is(_: SwinTransformer) -> None:
    pass


def replace_by_export_of(bundle: Bundle, change: Callable[[SwinTransformer], None]) -> Bundle:
    manifest = bundle.manifest
    module = reference_model(manifest, None)
    assert isinstance(module, SwinTransformer)
    change(module)
    model = trace(module, manifest.spec.inputs, manifest.spec.outputs)
    rewrite(model)
    write_model(model, bundle.path / "model.onnx")
    return record_again(bundle)


@pytest.mark.parametrize("change", [roll_the_other_way, drop_the_mask, transpose_the_bias])
def test_mutated_module_fails(deploycli: Command, bundle: Bundle, change: Callable[[SwinTransformer], None]) -> None:
    assert_outside(deploycli, replace_by_export_of(bundle, change))


def test_unmutated_twin_passes(deploycli: Command, bundle: Bundle) -> None:
    replace_by_export_of(bundle, leave_as_it_is)
    for reference in ("eager", "golden"):
        (report,) = deploycli("verify", "--reference", reference, "--json").json()
        assert report["passed"]
        assert report["failures"] == []


def constant(name: str, value: Any) -> onnx.NodeProto:
    return node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value)))


# Nodes that make `logits` of the true `raw`, and a part of what is said of them.
EDITS: dict[str, tuple[list[onnx.NodeProto], str]] = {
    "three times as large": ([constant("k", np.float32(3)), node("Mul", ["raw", "k"], ["logits"])], ""),
    "zero": ([node("Sub", ["raw", "raw"], ["logits"])], ""),
    "one NaN in one class": (
        [constant("k", np.array([0, 0, np.nan, 0, 0], np.float32)), node("Add", ["raw", "k"], ["logits"])],
        "NaN",
    ),
    "the first sample for all": (
        [
            constant("first", np.array([0])),
            node("Shape", ["raw"], ["shape"]),
            node("Gather", ["raw", "first"], ["one"]),
            node("Expand", ["one", "shape"], ["logits"]),
        ],
        "",
    ),
    "as it was": ([node("Identity", ["raw"], ["logits"])], ""),
}


def append(bundle: Bundle, nodes: list[onnx.NodeProto]) -> Bundle:
    model = onnx.load(bundle.path / "model.onnx")
    for each in model.graph.node:
        each.output[:] = ["raw" if name == "logits" else name for name in each.output]
    model.graph.node.extend(nodes)
    onnx.save(model, bundle.path / "model.onnx")
    return record_again(bundle)


@pytest.mark.parametrize("name", [name for name in EDITS if name != "as it was"])
def test_edited_graph_fails(deploycli: Command, bundle: Bundle, name: str) -> None:
    nodes, found = EDITS[name]
    assert_outside(deploycli, append(bundle, nodes), found=found)


def test_unedited_twin_passes(deploycli: Command, bundle: Bundle) -> None:
    append(bundle, EDITS["as it was"][0])
    assert deploycli("verify").code == 0


def test_batch_that_became_a_number_fails(deploycli: Command, bundle: Bundle) -> None:
    model = onnx.load(bundle.path / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, bundle.path / "model.onnx")
    assert_outside(deploycli, record_again(bundle), found="was not computed")
