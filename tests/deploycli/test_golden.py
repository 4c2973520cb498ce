"""The authors' own outputs, through the whole path: a checkpoint, the export, the written file in ONNX Runtime."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.graph.analysis import Facts
from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.passes.fold_constants import FoldConstants
from deploycli.exporters.passes.fold_movement import FoldMovement
from deploycli.exporters.passes.pipeline import rewrite, tidy
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.exporters.trace import trace
from tests.models.swins import tiny_spec, tiny_swin
from tests.weights import golden_image, golden_weight

if TYPE_CHECKING:
    from tests.deploycli.conftest import Command

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCKS = {  # all of them, and how often the order of the windows changes from one to the next
    "swin_tiny_patch4_window7_224": (12, 7),
    "swin_base_patch4_window12_384": (24, 19),
}
MOVEMENT = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"}


def official_checkpoint(model: str, path: Path) -> None:
    shapes = json.loads((GOLDEN / f"{model}.json").read_text())
    weights = {k: torch.from_numpy(golden_weight(k, tuple(shapes["shapes"][k]))) for k in shapes["learned"]}
    torch.save({"model": weights}, path)


@pytest.mark.parametrize(
    ("model", "options", "limit"),
    [
        ("swin_tiny_patch4_window7_224", [], 350),
        ("swin_base_patch4_window12_384", ["--batch", 1], 650),
    ],
)
def test_golden_logits(deploycli: Command, tmp_path: Path, model: str, options: list[object], limit: int) -> None:
    official_checkpoint(model, tmp_path / "official.pth")
    result = deploycli("export", model, "--checkpoint", "official.pth", "-o", "bundles", "--name", "golden", *options)
    assert result.code == 0, result.err
    (tmp_path / "official.pth").unlink()  # half a gigabyte, which pytest would keep
    file = tmp_path / "bundles/golden/model.onnx"
    assert_golden(file, model)
    graph = onnx.load(file).graph
    (artifact,) = Bundle.open(file.parent).manifest.artifacts
    assert Counter(node.op_type for node in graph.node) == artifact.ops_after
    assert len(graph.node) <= limit
    assert_only_the_model_is_left(graph, model, fixed=bool(options))
    file.unlink()


def assert_golden(file: Path, model: str) -> None:
    """Plain ONNX Runtime, without any of our code."""
    shape = json.loads((GOLDEN / f"{model}.json").read_text())["image"]
    with np.load(GOLDEN / f"{model}.npz", allow_pickle=False) as expected:
        logits = expected["logits"]
    (found,) = ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(
        ["logits"], {"images": golden_image(tuple(shape))}
    )
    assert found.shape == logits.shape
    assert np.abs(found - logits).max() / np.abs(logits).max() < 2e-5


def assert_only_the_model_is_left(graph: onnx.GraphProto, model: str, *, fixed: bool) -> None:
    """No pieces of a roll, no mask arithmetic, no index lookups of the bias, no shapes, no padding."""
    ops = Counter(node.op_type for node in graph.node)
    assert ops.keys() <= MOVEMENT | {
        *("Add", "Conv", "Gather", "Gelu", "Gemm", "LayerNormalization"),
        *("MatMul", "Mul", "ReduceMean", "Softmax", "Split"),
        *(("Slice",) if fixed else ()),  # of queries, keys and values; a roll would need a Concat as well
    }
    blocks, changes = BLOCKS[model]
    assert ops["Softmax"] == blocks
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    gathers = [node for node in graph.node if node.op_type == "Gather" and is_permutation(node, constants)]
    assert ops["Gather"] == len(gathers) <= changes + 3  # and patch merging
    for node in graph.node:
        if node.op_type == "Softmax":
            assert additions_of_constants(node, producers, constants) == 1  # bias and mask in one


def is_permutation(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    index = numpy_helper.to_array(constants[node.input[1]])
    return index.size > 4 and np.array_equal(np.sort(index, axis=None), np.arange(index.size))


def additions_of_constants(
    node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], constants: dict[str, onnx.TensorProto]
) -> int:
    """Count the additions between a Softmax and the product of queries and keys."""
    count = 0
    while (node := producers[next(name for name in node.input if name not in constants)]).op_type != "MatMul":
        assert node.op_type in {"Add", *MOVEMENT}
        count += node.op_type == "Add"
    return count


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "plain.onnx"
    spec = tiny_spec(depths=[2, 2], num_heads=[1, 2])
    write_model(trace(tiny_swin(depths=[2, 2], num_heads=[1, 2]), spec.inputs, spec.outputs), path)
    return path


def run_as_written(path: Path) -> np.ndarray:
    with OrtRuntime(path, optimize=False) as runtime:
        return runtime.run({"images": golden_image((3, 3, 64, 64))})["logits"]


def test_movement_and_constants_are_bit_equal(plain: Path, tmp_path: Path) -> None:
    model = ir.load(plain)
    nodes = model.graph.num_nodes()
    facts = Facts(model.graph)
    assert FoldConstants(facts)(model).modified
    assert FoldMovement(facts)(model).modified
    tidy(model)
    assert model.graph.num_nodes() < nodes / 2
    write_model(model, tmp_path / "folded.onnx")
    assert np.array_equal(run_as_written(tmp_path / "folded.onnx"), run_as_written(plain))


def test_the_whole_rewriting_is_bounded(plain: Path, tmp_path: Path) -> None:
    model = ir.load(plain)
    rewrite(model)
    write_model(model, tmp_path / "rewritten.onnx")
    expected = run_as_written(plain)
    assert np.abs(run_as_written(tmp_path / "rewritten.onnx") - expected).max() / np.abs(expected).max() < 2e-6
