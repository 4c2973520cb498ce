"""The authors' own outputs, through the whole path: a checkpoint, the export, the written file in ONNX Runtime."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.graph.analysis import Analysis
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
MODEL = "swin_tiny_patch4_window7_224"
TWO_STAGES: dict[str, Any] = {"depths": [2, 2], "num_heads": [1, 2]}
MOVEMENT = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"}


def official_checkpoint(model: str, path: Path) -> None:
    shapes = json.loads((GOLDEN / f"{model}.json").read_text())
    weights = {k: torch.from_numpy(golden_weight(k, tuple(shapes["shapes"][k]))) for k in shapes["learned"]}
    torch.save({"model": weights}, path)


def test_golden_logits(deploycli: Command, tmp_path: Path) -> None:
    official_checkpoint(MODEL, tmp_path / "official.pth")
    result = deploycli("export", MODEL, "--checkpoint", "official.pth", "-o", "bundles", "--name", "golden")
    assert result.code == 0, result.err
    (tmp_path / "official.pth").unlink()  # a tenth of a gigabyte, which pytest would keep
    file = tmp_path / "bundles/golden/model.onnx"
    assert_golden(file, MODEL)
    graph = onnx.load(file).graph
    (artifact,) = Bundle.open(file.parent).manifest.artifacts
    assert Counter(node.op_type for node in graph.node) == artifact.ops_after
    assert len(graph.node) <= 400
    assert_only_the_model_is_left(graph, blocks=12, moves=7 + 3, fixed=False)
    assert_moved_before_normalised(graph)
    file.unlink()


def test_only_the_model_is_left_of_one_image() -> None:
    """Where the batch is fixed, as at 1."""
    model = trace(tiny_swin(**TWO_STAGES), tiny_spec(**TWO_STAGES).inputs, ["logits"], batch=1)
    rewrite(model)
    graph = ir.to_proto(model).graph
    assert_only_the_model_is_left(graph, blocks=4, moves=2 + 1, fixed=True)
    assert len(graph.node) <= 110


def assert_moved_before_normalised(graph: onnx.GraphProto) -> None:
    """A compiler moves and normalises by one kernel, and normalises and moves by two."""
    makers = {name: node for node in graph.node for name in node.output}
    for gather in (node for node in graph.node if node.op_type == "Gather"):
        maker = makers[gather.input[0]]
        while maker.op_type in ("Reshape", "Transpose"):
            maker = makers[maker.input[0]]
        assert maker.op_type == "Add", gather.name  # the residual stream


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


def assert_only_the_model_is_left(graph: onnx.GraphProto, blocks: int, moves: int, *, fixed: bool) -> None:
    """No pieces of a roll, no mask arithmetic, no index lookups of the bias, no shapes, no padding.

    Args:
        graph: what was exported.
        blocks: how many the model has.
        moves: how often the order of the windows changes from one block to the next, and the patch mergings.
        fixed: whether the batch is.
    """
    ops = Counter(node.op_type for node in graph.node)
    assert ops.keys() <= MOVEMENT | {
        *("Add", "Conv", "Gather", "Gelu", "Gemm", "LayerNormalization"),
        *("MatMul", "Mul", "ReduceMean", "Softmax", "Split"),
        *(("Slice",) if fixed else ()),  # of queries, keys and values; a roll would need a Concat as well
    }
    assert ops["Softmax"] == blocks
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    gathers = [node for node in graph.node if node.op_type == "Gather" and is_permutation(node, constants)]
    assert ops["Gather"] == len(gathers) <= moves
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
    spec = tiny_spec(**TWO_STAGES)
    write_model(trace(tiny_swin(**TWO_STAGES), spec.inputs, spec.outputs), path)
    return path


def run_as_written(path: Path) -> np.ndarray:
    with OrtRuntime(path, optimize=False) as runtime:
        return runtime.run({"images": golden_image((3, 3, 64, 64))})["logits"]


def test_movement_and_constants_are_bit_equal(plain: Path, tmp_path: Path) -> None:
    model = ir.load(plain)
    nodes = model.graph.num_nodes()
    analysis = Analysis(model.graph)
    assert FoldConstants(analysis)(model).modified
    assert FoldMovement(analysis)(model).modified
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
