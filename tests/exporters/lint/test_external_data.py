"""Rule 13, on files: where external data lie and how long they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploycli.exporters.lint import RULES, lint

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.lint import LintReport

SIZE = 32
BYTES = SIZE * SIZE * 4
ALL = {"location": "weights", "offset": "0", "length": str(BYTES)}


def write(folder: Path, *entries: dict[str, str], content: int = 2 * BYTES) -> Path:
    """A chain of products; each weight has one external data entry."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(0).uniform(0.1, 1, content // 4).astype(np.float32)
    (folder / "weights").write_bytes(numbers.tobytes())
    names = ["x", *(f"h{i}" for i in range(len(entries) - 1)), "y"]
    nodes, tensors = [], []
    for i, entry in enumerate(entries):
        nodes.append(helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"MatMul.{i}"))
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[SIZE, SIZE])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entry.items():
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", SIZE]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", edges[:1], edges[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def said(report: LintReport) -> list[str]:
    return [f"{f.node}: {f.message}" for f in report.errors if f.number == 13]


def test_sound_data_are_read(tmp_path: Path) -> None:
    report = lint(write(tmp_path, ALL, {**ALL, "offset": str(BYTES)}))
    assert report.findings == ()


def test_no_offset_and_no_length_mean_the_beginning(tmp_path: Path) -> None:
    assert lint(write(tmp_path, {"location": "weights"}, content=BYTES)).findings == ()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"location": "../weights"}, "leaves the folder"),
        ({"location": "sub/../../weights"}, "leaves the folder"),
        ({"location": "..\\weights"}, "leaves the folder"),
        ({"location": "/etc/hostname"}, "absolute"),
        ({"location": "C:\\weights"}, "absolute"),
        ({"location": "elsewhere"}, "does not exist"),
        ({"location": "."}, "does not exist"),
        ({"location": ""}, "no file"),
        ({"location": "a\0b"}, "cannot be read"),
        ({"offset": str(BYTES + 4)}, "ends at byte"),
        ({"length": str(BYTES - 4)}, "its shape needs"),
        ({"offset": "-4"}, "not a number"),
        ({"offset": "four"}, "not a number"),
        ({"length": "9" * 30}, "its shape needs"),
        ({"checksum": "0"}, ""),
        ({"surprise": "0"}, ""),
    ],
)
def test_an_entry_that_lies_is_an_error(tmp_path: Path, entry: dict[str, str], message: str) -> None:
    (tmp_path / "weights").write_bytes(b"\0" * BYTES)
    report = lint(write(tmp_path / "model", {**ALL, **entry}))
    found = said(report)
    assert len(found) == bool(message)
    assert all(message in line and line.startswith("w0: ") for line in found)
    assert report.passed is not bool(message)


def test_what_lies_outside_is_never_read(tmp_path: Path) -> None:
    path = write(tmp_path / "model", {**ALL, "location": "../secret"})
    (tmp_path / "secret").write_bytes(np.full(SIZE * SIZE, np.nan, np.float32).tobytes())
    report = lint(path)
    assert len(said(report)) == 1
    assert [f.message for f in report.findings if f.number == 14] == ["its numbers cannot be read and were not checked"]


def test_a_link_that_leaves_the_folder_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "model", {**ALL, "location": "link"})
    (tmp_path / "secret").write_bytes(b"\0" * BYTES)
    (tmp_path / "model" / "link").symlink_to(tmp_path / "secret")
    assert said(lint(path)) == ["w0: its file 'link' is a link that leaves the folder of the model"]
    (tmp_path / "model" / "link").unlink()
    (tmp_path / "model" / "link").symlink_to("link")
    assert len(said(lint(path))) == 1


def test_tensors_that_overlap_are_an_error(tmp_path: Path) -> None:
    report = lint(write(tmp_path, ALL, {**ALL, "offset": str(BYTES // 2)}))
    assert said(report) == ["w1: its data overlap those of w0 in weights"]


def test_tensors_may_share_their_data(tmp_path: Path) -> None:
    report = lint(write(tmp_path, ALL, ALL))
    assert {f.number for f in report.findings} == {18}  # it is a waste in the engine, not a fault


def test_inline_data_must_have_the_length_of_their_shape(tmp_path: Path) -> None:
    path = write(tmp_path, ALL)
    model = onnx.load(path)
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    path.write_bytes(model.SerializeToString())
    assert said(lint(path)) == [f"w0: it has {BYTES - 4} bytes, its shape needs {BYTES}"]
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].float_data.append(1)
    path.write_bytes(model.SerializeToString())
    assert said(lint(path)) == [f"w0: it has 1 values, its shape needs {SIZE * SIZE}"]


def test_more_than_2_gib_of_weights_are_not_loaded(tmp_path: Path) -> None:
    rows = 700_000_000 // SIZE
    path = write(tmp_path, ALL)
    model = onnx.load(path, load_external_data=False)
    table = TensorProto(
        name="table", data_type=TensorProto.FLOAT, dims=[rows, SIZE], data_location=TensorProto.EXTERNAL
    )
    table.external_data.add(key="location", value="large")
    model.graph.initializer.append(table)
    model.graph.input.append(helper.make_tensor_value_info("i", TensorProto.INT64, ["batch"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", SIZE]))
    model.graph.node.append(helper.make_node("Gather", ["table", "i"], ["z"], name="Gather"))
    path.write_bytes(model.SerializeToString())
    with (tmp_path / "large").open("wb") as file:
        file.truncate(rows * SIZE * 4)  # a hole: it takes no room on the disk
    reads_all = {14, 18}
    report = lint(path, rules=[rule.number for rule in RULES if rule.number not in reads_all])
    assert report.findings == ()


def test_a_model_in_memory_says_where_its_data_are(tmp_path: Path) -> None:
    import onnx_ir as ir

    path = write(tmp_path, ALL)
    assert lint(ir.load(path)).findings == ()
    (tmp_path / "weights").unlink()
    assert said(lint(ir.load(path))) == ["w0: its file 'weights' does not exist"]
