"""One reader for every command: what it refuses, and that all of them refuse it."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycli.exporters.graph.onnx_file import LARGEST_EXPANSION, load_model
from deploycli.exporters.lint.subject import inlined
from deploycli.models.errors import DeployError, ExportError, IntegrityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.deploycli.commands import Result

    Command = Callable[..., Result]


def model(*nodes: onnx.NodeProto, functions: Any = (), weight: onnx.TensorProto | None = None) -> onnx.ModelProto:
    """``y = x @ w`` where nothing else is said."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")]
    weight = weight or numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    body = nodes or (helper.make_node("MatMul", ["x", "w"], ["y"]),)
    graph = helper.make_graph(list(body), "g", ends[:1], ends[1:], [weight])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("loc", 1)]
    return helper.make_model(graph, functions=list(functions), opset_imports=opsets, ir_version=8)


def calling(depth: int, calls: int, last: str = "Relu") -> onnx.ModelProto:
    """Functions of which each calls the next, so many times; the last one calls ``last``."""
    functions = []
    for level in range(depth):
        callee, domain = (f"F{level + 1}", "loc") if level + 1 < depth else (last, "" if last == "Relu" else "loc")
        names = ["a", *(f"t{i}" for i in range(calls))]
        body = [helper.make_node(callee, [a], [b], domain=domain) for a, b in pairwise(names)]
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("loc", 1)]
        functions.append(helper.make_function("loc", f"F{level}", ["a"], names[-1:], body, opsets))
    return model(helper.make_node("F0", ["x"], ["y"], domain="loc"), functions=functions)


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (calling(30, 2), "its functions become 2147483647 nodes"),
        (calling(90, 9), "its functions become 9e+85 nodes"),
        (calling(2, 1, last="F0"), "in a circle: F0 calls F1 calls F0"),
        (calling(1, 1, last="F0"), "in a circle: F0 calls F0"),
        (calling(101, 1), "more than 100 deep"),
    ],
)
def test_functions_come_to_an_end(tmp_path: Path, proto: onnx.ModelProto, reason: str) -> None:
    onnx.save(proto, tmp_path / "m.onnx")
    start = time.perf_counter()
    with pytest.raises(UsageError) as refused:
        load_model(tmp_path / "m.onnx")
    assert reason in refused.value.found
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(("depth", "calls", "nodes"), [(99, 1, 1), (9, 2, 512), (1, 400, 400)])
def test_functions_that_do_are_inlined(tmp_path: Path, depth: int, calls: int, nodes: int) -> None:
    onnx.save(calling(depth, calls), tmp_path / "m.onnx")
    assert nodes < LARGEST_EXPANSION
    assert len(inlined(load_model(tmp_path / "m.onnx")).graph) == nodes


def test_an_unused_circle_is_refused_too(tmp_path: Path) -> None:
    proto = calling(2, 1, last="F0")
    proto.graph.node[0].op_type, proto.graph.node[0].domain = "Relu", ""
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="circle"):
        load_model(tmp_path / "m.onnx")


def tensor(**fields: Any) -> onnx.TensorProto:
    return TensorProto(**{"name": "w", "data_type": TensorProto.FLOAT, "dims": [4, 4], "raw_data": bytes(64), **fields})


def external(location: str, **entries: object) -> onnx.TensorProto:
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        outside.external_data.add(key=key, value=str(value))
    return outside


WRONG: dict[str, tuple[onnx.ModelProto | bytes, type[DeployError]]] = {
    "empty": (b"", UsageError),
    "text": (b"hello, world", UsageError),
    "cut": (model().SerializeToString()[:-20], UsageError),
    "nothing in it": (onnx.ModelProto(ir_version=8).SerializeToString(), UsageError),
    "name of bytes": (model().SerializeToString().replace(b"MatMul", b"Mat\xff\xfel"), UsageError),
    "unknown type": (model(weight=tensor(data_type=77)), UsageError),
    "short": (model(weight=tensor(raw_data=bytes(60))), ExportError),
    "long": (model(weight=tensor(raw_data=bytes(68))), ExportError),
    "negative": (model(weight=tensor(dims=[-4, 4])), ExportError),
    "terabytes": (model(weight=tensor(dims=[2**40, 2**10])), ExportError),
    "beyond 64 bits": (model(weight=tensor(dims=[2**62, 2**62])), ExportError),
    "few numbers": (model(weight=tensor(raw_data=None, float_data=[1.0])), ExportError),
    "few strings": (model(weight=tensor(data_type=TensorProto.STRING, raw_data=None, string_data=[b"a"])), ExportError),
    "absent": (model(weight=external("m.data")), IntegrityError),
    "above": (model(weight=external("../m.data")), IntegrityError),
    "absolute": (model(weight=external("/etc/passwd")), IntegrityError),
    "of Windows": (model(weight=external("C:\\m.data")), IntegrityError),
    "no place": (model(weight=external("there", offset="x")), IntegrityError),
    "past the end": (model(weight=external("there", offset=10, length=64)), IntegrityError),
    "too short": (model(weight=external("there", length=4)), IntegrityError),
    "minus": (model(weight=external("there", offset=-4)), IntegrityError),
    "in a constant": (
        model(helper.make_node("Constant", [], ["y"], value=tensor(dims=[2**40]))),
        ExportError,
    ),
    "in a function": (
        model(
            helper.make_node("F", ["x"], ["y"], domain="loc"),
            functions=[
                helper.make_function(
                    "loc",
                    "F",
                    ["a"],
                    ["b"],
                    [helper.make_node("Constant", [], ["b"], value=external("/etc/passwd"))],
                    [helper.make_opsetid("", 18)],
                )
            ],
        ),
        IntegrityError,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused(tmp_path: Path, name: str) -> None:
    content, kind = WRONG[name]
    (tmp_path / "there").write_bytes(bytes(64))
    (tmp_path / "m.onnx").write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    with pytest.raises(kind) as refused:
        load_model(tmp_path / "m.onnx")
    assert str(tmp_path / "m.onnx") in refused.value.found
    assert "\n" not in refused.value.found


@pytest.mark.parametrize("location", ["there", "./there"])
def test_data_in_the_folder_are_read(tmp_path: Path, location: str) -> None:
    (tmp_path / "there").write_bytes(np.eye(4, dtype=np.float32).tobytes())
    onnx.save(model(weight=external(location, offset=0, length=64)), tmp_path / "m.onnx")
    weight = load_model(tmp_path / "m.onnx").graph.initializers["w"].const_value
    assert weight is not None
    assert np.array_equal(weight.numpy(), np.eye(4))


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    (tmp_path / "here").mkdir()
    (tmp_path / "here/m.data").symlink_to(tmp_path / "secret")
    onnx.save(model(weight=external("m.data")), tmp_path / "here/m.onnx")
    with pytest.raises(IntegrityError, match="link"):
        load_model(tmp_path / "here/m.onnx")


@pytest.mark.parametrize("name", ["", "x" * 300, "no.onnx", "folder.onnx"])
def test_what_is_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UsageError):
        load_model(tmp_path / name)


TEXTS: dict[str, Callable[[onnx.ModelProto], object]] = {
    "producer": lambda m: setattr(m, "producer_version", "MARK"),
    "domain": lambda m: setattr(m, "domain", "MARK"),
    "documentation": lambda m: setattr(m, "doc_string", "MARK"),
    "metadata": lambda m: m.metadata_props.add(key="MARK", value="x"),
    "metadata of the graph": lambda m: m.graph.metadata_props.add(key="x", value="MARK"),
    "operator": lambda m: setattr(m.graph.node[0], "op_type", "MARK"),
    "documentation of a node": lambda m: setattr(m.graph.node[0], "doc_string", "MARK"),
    "metadata of a node": lambda m: m.graph.node[0].metadata_props.add(key="x", value="MARK"),
    "symbol": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "MARK"),
    "documentation of a value": lambda m: setattr(m.graph.output[0], "doc_string", "MARK"),
}


@pytest.mark.parametrize("where", TEXTS)
def test_text_that_is_none_is_refused(tmp_path: Path, where: str) -> None:
    proto = model()
    TEXTS[where](proto)
    written = proto.SerializeToString()
    assert b"MARK" in written
    (tmp_path / "m.onnx").write_bytes(written.replace(b"MARK", b"\xff\xfe\x80K"))
    with pytest.raises(UsageError):
        load_model(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "kind", [kind for kind in TensorProto.DataType.values() if kind not in (0, TensorProto.STRING)]
)
@pytest.mark.parametrize("field", ["float_data", "int32_data", "int64_data", "double_data", "uint64_data"])
def test_values_in_the_field_of_another_type_are_refused(tmp_path: Path, kind: int, field: str) -> None:
    """What is not refused can be read: sizes fit for types of a byte and more, small ones share an entry."""
    tensor = TensorProto(name="w", data_type=kind, dims=[4])
    getattr(tensor, field).extend([1] * 4)
    onnx.save(model(weight=tensor), tmp_path / "m.onnx")
    try:
        weight = load_model(tmp_path / "m.onnx").graph.initializers["w"].const_value
    except ExportError as error:
        found = error.found
    else:
        assert weight is not None
        found = f"{weight.numpy().shape}"
    assert found == "(4,)" or "belong in" in found or "its shape needs" in found


def test_values_in_two_fields_are_refused(tmp_path: Path) -> None:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], float_data=[1, 2], int64_data=[1])
    onnx.save(model(weight=weight), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="its values stand in int64_data, those of FLOAT belong in float_data"):
        load_model(tmp_path / "m.onnx")
