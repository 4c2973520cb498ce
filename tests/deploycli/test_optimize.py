from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import time
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from deploycli.exporters import file_target, tune
from tests.deploycli.commands import assert_refused, files, run, start
from tests.digits import checkpoint, registered
from tests.exporters.bundle.bundles import make
from tests.exporters.lint.rtx import WHY
from tests.exporters.passes.graphs import ops, parse

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.bundle.bundle import Bundle
    from tests.deploycli.conftest import Command

ROLL = """g (float[batch, 8, 4] x) => (float[batch, 8, 4] y) {
    tail = Slice (x, three, end, one) head = Slice (x, zero, three, one) y = Concat <axis: int = 1> (tail, head)
}"""


@pytest.fixture
def roll(tmp_path: Path) -> Path:
    model = parse(ROLL, zero=[0], one=[1], three=[3], end=[2**63 - 1])
    onnx.save(model, tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def test_the_table_shows_every_operator_before_and_after(deploycli: Command, roll: Path) -> None:
    result = deploycli("optimize", roll, "-o", "out.onnx")
    assert result.code == 0, result.err
    rows = {line.split("  ")[0]: line.split()[-3:] for line in result.out.splitlines()}
    assert re.search(r"^Slice +2 +-100\.0 % *$", result.out, re.MULTILINE)
    assert re.search(r"^Gather +1 +new *$", result.out, re.MULTILINE)
    assert re.search(r"^nodes +3 +1 +-66\.7 % *$", result.out, re.MULTILINE)
    assert {"moved in a run", "multiply-adds of a run", "constants", "file size"} <= rows.keys()
    assert "checked in ONNX Runtime on 3 inputs (x:3x8x4; x:1x8x4): identical" in result.out
    assert "wrote out.onnx" in result.out
    assert ops(onnx.load(roll.parent / "out.onnx")) == {"Gather": 1}
    assert "fold-movement" not in result.out
    assert "fold-movement" in deploycli("optimize", roll, "-o", "out.onnx", "-v").out


def test_json_has_all_that_the_table_has(deploycli: Command, roll: Path) -> None:
    shown = deploycli("optimize", roll, "-o", "out.onnx", "--json", "--check", 1).json()
    assert shown["before"]["ops"] == {"Slice": 2, "Concat": 1}
    assert shown["after"]["ops"] == {"Gather": 1}
    assert shown["after"]["cost"] == {"movement_bytes": 128, "multiply_adds": 0, "constant_bytes": 64}
    assert shown["check"]["runs"] == ["x:3x8x4"]
    assert shown["files"] == ["out.onnx"]
    assert {"name", "nodes", "seconds", "refusals", "cost", "remark"} == set(shown["steps"][0])


def test_a_dry_run_writes_nothing(deploycli: Command, roll: Path) -> None:
    before = files(roll.parent)
    result = deploycli("optimize", roll, "--dry-run", "-o", "out.onnx", "--check", "0")
    assert result.code == 0
    assert "not checked (--check 0)" in result.out
    assert "wrote nothing: a dry run" in result.out
    assert files(roll.parent) == before


def test_in_place_and_again(deploycli: Command, roll: Path) -> None:
    assert deploycli("optimize", roll, "-o", roll).code == 0
    once = files(roll.parent)
    assert list(once) == ["in.onnx"]
    assert deploycli("optimize", roll, "-o", roll).code == 0
    assert files(roll.parent) == once


def test_other_answers_are_exit_5_and_nothing_is_written(
    deploycli: Command, roll: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(roll.parent)
    monkeypatch.setattr(file_target, "write_model", _wrong(file_target.write_model))
    result = deploycli("optimize", roll, "-o", roll)
    assert_refused(result, 5, "the optimized graph answers otherwise: output y", "--without PASS")
    assert files(roll.parent) == before


def _wrong(write: object) -> object:
    def write_model(model: object, path: Path, *arguments: object, **options: object) -> list[Path]:
        written: list[Path] = write(model, path, *arguments, **options)  # type: ignore[operator]  # as declared there
        message = onnx.load(path)
        message.graph.initializer[0].CopyFrom(
            onnx.numpy_helper.from_array(np.arange(8), message.graph.initializer[0].name)
        )
        onnx.save(message, path)
        return written

    return write_model


def custom(folder: Path) -> Path:
    text = '<ir_version: 10, opset_import: ["" : 20, "d" : 1]> g (float[2] x) => (float[2] y) { y = d.Mine (x) }'
    onnx.save(onnx.parser.parse_model(text), folder / "custom.onnx")
    return folder / "custom.onnx"


def test_what_cannot_be_run_here_is_exit_7_unless_it_is_not_to_be_checked(deploycli: Command, tmp_path: Path) -> None:
    path = custom(tmp_path)
    assert_refused(
        deploycli("optimize", path, "-o", "out.onnx", "--no-lint"), 7, "cannot be checked", "Mine", "--check 0"
    )
    assert not (tmp_path / "out.onnx").exists()
    result = deploycli("optimize", path, "-o", "out.onnx", "--check", 0, "--no-lint")
    assert result.code == 0
    assert re.search(r"^multiply-adds of a run +not known +not known *$", result.out, re.MULTILINE)
    assert re.search(r"^d::Mine +1 +1 *$", result.out, re.MULTILINE)


def test_what_tensorrt_cannot_read_is_exit_3_unless_it_is_to_be_written_all_the_same(
    deploycli: Command, tmp_path: Path
) -> None:
    text = "g (float[batch, 4] x) => (float[batch, 4] y) { a = Det (c) b = Relu (x) y = Add (b, a) }"
    onnx.save(parse(text, c=np.eye(2, dtype=np.float32)), tmp_path / "in.onnx")
    before = files(tmp_path)
    assert deploycli("optimize", "in.onnx", "--dry-run").code == 0  # the passes took it away
    onnx.save(parse(text.replace("c)", "x)").replace("4", "2"), c=np.float32([1])), tmp_path / "in.onnx")
    before = files(tmp_path)
    for target in (["-o", "out.onnx"], ["-o", "in.onnx"], ["--dry-run"]):
        refused = deploycli("optimize", "in.onnx", *target, "--check", 0)
        assert_refused(
            refused,
            3,
            "TensorRT 11.4 cannot read in.onnx",
            "rule operator-support: ",
            "Det is not supported",
            "--no-lint",
        )
        assert files(tmp_path) == before
    assert deploycli("optimize", "in.onnx", "-o", "out.onnx", "--check", 0, "--no-lint").code == 0
    assert "Det" in ops(onnx.load(tmp_path / "out.onnx"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["in.onnx"], 2, "Missing option '-o' / '--output'"),
        (["absent.onnx", "-o", "out.onnx"], 2, "there is no file absent.onnx"),
        (["text.onnx", "-o", "out.onnx"], 2, "text.onnx is no ONNX file"),
        (["in.onnx", "-o", "."], 2, "is a folder"),
        (["in.onnx", "-o", "out.onnx", "--without", "magic"], 2, "there is no pass magic"),
        (["in.onnx", "-o", "out.onnx", "--shape", "x"], 2, "write name:1x3x224x224"),
        (["in.onnx", "-o", "out.onnx", "--shape", "x:3x8"], 2, "expected: x:batchx8x4"),
        (["in.onnx", "-o", "out.onnx", "--check", "-1"], 2, "--check"),
        (["invalid.onnx", "-o", "out.onnx"], 3, "the graph is invalid"),
        (["outside.onnx", "-o", "out.onnx"], 8, "leaves the folder of the model"),
        (["in.onnx", "-o", "text.onnx/out.onnx"], 7, "cannot write"),
    ],
)
def test_what_fails_is_one_message(
    deploycli: Command, roll: Path, arguments: list[str], code: int, message: str
) -> None:
    folder = roll.parent
    (folder / "text.onnx").write_text("text")
    invalid = onnx.load(roll)
    invalid.graph.node[0].input[0] = "nowhere"
    onnx.save(invalid, folder / "invalid.onnx")
    outside = onnx.load(roll)
    tensor = outside.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.ClearField("int64_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (folder / "outside.onnx").write_bytes(outside.SerializeToString())
    before = files(folder)
    assert_refused(deploycli("optimize", *arguments), code, message)
    assert files(folder) == before


def test_typed_graphs_of_ours_are_judged_by_their_own_budget(deploycli: Command, tmp_path: Path) -> None:
    with registered():
        assert deploycli("export", "digits_swin", "--checkpoint", checkpoint("digits_swin")).code == 0
        random = ("--allow-random-calibration", "--samples", 2, "--around", "fp32")
        assert deploycli("quantize", "digits_swin", *random).code == 0
        assert deploycli("cast", "digits_swin").code == 0
    for precision in ("fp16", "int8"):
        path = tmp_path / "artifacts/digits_swin" / f"model.{precision}.onnx"
        shown = deploycli("optimize", path, "-o", "out.onnx", "--json").json()
        assert shown["check"]["budget"] == "fp16"
        assert [output["vacuous"] for output in shown["check"]["outputs"]] == [""]
        kept = ("QuantizeLinear", "DequantizeLinear", "Cast", "Softmax", "LayerNormalization", "MatMul")
        assert [shown["after"]["ops"].get(op) for op in kept] == [shown["before"]["ops"].get(op) for op in kept]
        assert shown["after"]["nodes"] <= shown["before"]["nodes"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_the_folder_as_it_was(true_bundle: Bundle, tmp_path: Path, number: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((true_bundle.path / "model.onnx").read_bytes())
    before = files(tmp_path)
    process = start("optimize", "model.onnx", "-o", "model.onnx", "--check", "100000", cwd=tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if "running the graph" in line:
            break
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "nothing was written" in err
    assert files(tmp_path) == before


def test_a_process_of_its_own_does_the_same(roll: Path) -> None:
    result = run("optimize", "in.onnx", "-o", "sub/out.onnx", "--json", cwd=roll.parent)
    assert json.loads(result.out)["files"] == ["sub/out.onnx"]
    assert ops(onnx.load(roll.parent / "sub/out.onnx")) == {"Gather": 1}


# --- the costs in a bundle -------------------------------------------------------------------------------------------


def test_inspect_shows_what_every_pass_cost(deploycli: Command, true_bundle: Bundle) -> None:
    printed = deploycli("inspect", true_bundle.path).out
    heading = next(line for line in printed.splitlines() if line.startswith("step "))
    assert re.findall(r"\S+(?: MB)?", heading) == [
        "step", "nodes", "moved MB", "GMACs", "constants MB", "seconds", "refusals",
    ]  # fmt: skip
    shown = deploycli("inspect", true_bundle.path, "--json").json()
    steps = {step["name"]: step["cost"] for step in shown["artifacts"][0]["steps"]}
    assert steps["trace"] is None
    assert steps["clean"]["movement_bytes"] < steps["infer"]["movement_bytes"]
    assert 0 < steps["clean"]["multiply_adds"] <= steps["infer"]["multiply_adds"]
    row = next(line for line in printed.splitlines() if line.startswith("clean "))
    assert row.split()[2:5] == [
        f"{steps['clean']['movement_bytes'] / 1e6:.1f}",
        f"{steps['clean']['multiply_adds'] / 1e9:.2f}",
        f"{steps['clean']['constant_bytes'] / 1e6:.1f}",
    ]


def test_inspect_counts_a_file(deploycli: Command, roll: Path, tmp_path: Path) -> None:
    printed = deploycli("inspect", roll).out
    assert re.search(r"^costs +0\.0 MB moved, 0\.00 GMACs, 0\.0 MB of constants *$", printed, re.MULTILINE)
    counted = {"movement_bytes": 256, "multiply_adds": 0, "constant_bytes": 32}
    assert deploycli("inspect", roll, "--json").json()["cost"] == counted
    broken = onnx.load(roll)
    broken.graph.node[0].input[0] = "y"
    onnx.save(broken, tmp_path / "circle.onnx")
    result = deploycli("inspect", "circle.onnx")
    assert result.code == 0
    assert "costs" not in result.out


def test_a_bundle_of_before_costs_were_counted_is_read(deploycli: Command, tmp_path: Path) -> None:
    bundle = make(tmp_path / "artifacts")
    path = bundle.path / "manifest.json"
    manifest = json.loads(path.read_text())
    for artifact in manifest["artifacts"]:
        for step in artifact["steps"]:
            del step["cost"]
    path.write_text(json.dumps(manifest))
    result = deploycli("inspect", "linear")
    assert result.code == 0, result.err
    manifest["artifacts"][0]["steps"][0]["cost"] = {"movement_bytes": "much", "multiply_adds": 1, "constant_bytes": 1}
    path.write_text(json.dumps(manifest))
    assert_refused(deploycli("inspect", "linear"), 8, "manifest.json is malformed at $.artifacts[0].steps[0].cost")


# --- what ONNX Runtime may do to a check


def test_a_crash_of_onnx_runtime_is_a_sentence_and_leaves_nothing(deploycli: Command, tmp_path: Path) -> None:
    """ONNX Runtime writes to an output that the node does not have."""
    split = onnx.helper.make_node("Split", ["x"], ["y", ""], axis=1, num_outputs=2)
    values = (onnx.helper.make_tensor_value_info(name, 1, dims) for name, dims in (("x", [3, 8]), ("y", [3, 4])))
    x, y = values
    graph = onnx.helper.make_graph([split], "g", [x], [y])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "in.onnx",
    )
    for target in ("out.onnx", "in.onnx"):
        before = files(tmp_path)
        result = deploycli("optimize", "in.onnx", "-o", target, "--no-lint")
        assert_refused(result, 7, "ONNX Runtime was killed by SIG", "while running the graph as it was", "--check 0")
        assert files(tmp_path) == before
    assert deploycli("optimize", "in.onnx", "-o", "out.onnx", "--no-lint", "--check", 0).code == 0


def test_a_graph_that_is_too_large_to_run_is_weighed_first(deploycli: Command, tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Tile", ["one", "many"], ["t"]), onnx.helper.make_node("Gather", ["t", "i"], ["g"])]
    nodes.append(onnx.helper.make_node("Add", ["x", "g"], ["y"]))
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [3, 4]) for name in "xy")
    arrays = {"one": np.ones(1, np.float32), "many": np.array([2**33]), "i": np.array(0)}
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], stored)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "in.onnx",
    )
    result = deploycli("optimize", "in.onnx", "-o", "out.onnx")
    assert_refused(result, 7, "Tile t takes and makes 32.0 GiB", "(8589934592)", "--check 0")
    assert list(files(tmp_path)) == ["in.onnx"]
    assert deploycli("optimize", "in.onnx", "-o", "out.onnx", "--no-lint", "--check", 0).code == 0


@pytest.mark.parametrize("target", ["/dev/null", "/dev/full", "folder", "pipe"])
def test_only_a_file_is_replaced(deploycli: Command, roll: Path, target: str) -> None:
    (roll.parent / "folder").mkdir()
    os.mkfifo(roll.parent / "pipe")
    before = (roll.parent / target).stat()
    result = deploycli("optimize", roll, "-o", target)
    assert_refused(result, 2, f"{target} is a ", "a file to replace, or nothing there")
    assert "reading" not in result.err
    assert (roll.parent / target).stat().st_ino == before.st_ino


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)
def test_forms_are_compiled_and_the_best_is_written(
    deploycli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "user_cache_path", lambda name: tmp_path / name)
    text = "g (float[batch, 8, 16] x) => (float[batch, 8, 16] y) { m = MatMul (x, w) y = Relu (m) }"
    onnx.save(parse(text, w=np.ones((16, 16), np.float32)), tmp_path / "product.onnx")
    result = deploycli("optimize", "product.onnx", "-o", "tuned.onnx", "--tune", "--tune-gpu", "ada")
    assert result.code == 0, result.err
    assert re.search(r"^default +\d+ +\d+\.\d +0 +kept *$", result.out, re.M)
    assert "counted for FP16, batch 8, GPU 8.9, TensorRT for RTX" in result.out
    again = deploycli("optimize", "product.onnx", "-o", "tuned.onnx", "--tune", "--tune-gpu", "ada", "--json")
    assert again.json()["tuning"]["best"] == "default"
    assert "compiling" not in again.err


@pytest.mark.parametrize(
    ("command", "other"),
    [
        (("optimize", "roll.onnx", "-o", "tuned.onnx"), ("--attention", "5d")),
        (("export", "deit_t"), ("--attention", "5d")),
        (("export", "deit_t"), ("--no-rewrite",)),
    ],
)
def test_a_search_that_would_be_without_effect_is_refused(
    deploycli: Command, tmp_path: Path, command: tuple[str, ...], other: tuple[str, ...]
) -> None:
    before = files(tmp_path)
    assert_refused(deploycli(*command, "--tune", *other), 2, f"both --tune and {' '.join(other)}", "one of the two")
    assert files(tmp_path) == before
