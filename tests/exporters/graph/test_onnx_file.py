from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from deploycli.exporters.graph import onnx_file
from deploycli.exporters.graph.onnx_file import write_model
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 64


def linear(count: int = 3, width: int = WIDTH, dtype: Any = np.float32) -> ir.Model:
    """A chain of products with a large and a small weight each."""
    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for i in range(count):
        weights.append(numpy_helper.from_array(rng.standard_normal((width, width)).astype(dtype), f"w{i}"))
        weights.append(numpy_helper.from_array(rng.standard_normal(width).astype(dtype), f"b{i}"))
        nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"], f"layer{i}/MatMul"))
        nodes.append(helper.make_node("Add", [f"m{i}", f"b{i}"], [f"y{i}"], f"layer{i}/Add"))
        x = f"y{i}"
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    ends = [helper.make_tensor_value_info(name, kind, ["batch", width]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "linear", ends[:1], ends[1:], weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def run(path: Path, dtype: Any = np.float32) -> Any:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((2, WIDTH), dtype)})[0]


def test_the_file_holds_the_model(tmp_path: Path) -> None:
    model = linear()
    expected = ir.to_proto(model)
    (path,) = write_model(model, tmp_path / "model.onnx")
    onnx.checker.check_model(path, full_check=True)
    found = onnx.load(path)
    assert found.graph.node == expected.graph.node
    assert found.graph.input == expected.graph.input
    assert found.opset_import == expected.opset_import
    assert [t.name for t in found.graph.initializer] == [t.name for t in expected.graph.initializer]
    for a, b in zip(found.graph.initializer, expected.graph.initializer, strict=True):
        assert np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))
    assert run(path).shape == (2, WIDTH)


def test_the_model_is_as_it_was_after_writing(tmp_path: Path) -> None:
    model = linear()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    write_model(model, tmp_path / "model.onnx", "always")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for external in ("never", "always"):
        (tmp_path / external).mkdir()
        first = [f.read_bytes() for f in write_model(linear(), tmp_path / external / "a.onnx", external)]
        again = [f.read_bytes() for f in write_model(linear(), tmp_path / external / "a.onnx", external)]
        assert first == again


def test_external_data_stands_beside_the_model_and_is_aligned(tmp_path: Path) -> None:
    path, data = write_model(linear(), tmp_path / "model.onnx", "always")
    assert data == tmp_path / "model.onnx.data"
    onnx.checker.check_model(path, full_check=True)
    offsets = []
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if np.prod(tensor.dims) * 4 < 1024:
            assert not entries  # shapes and other small numbers can be read without the data
            assert tensor.raw_data
        else:
            assert entries["location"] == "model.onnx.data"
            assert int(entries["length"]) == np.prod(tensor.dims) * 4
            offsets.append(int(entries["offset"]))
    assert len(offsets) == 3
    assert all(offset % 4096 == 0 for offset in offsets)
    assert data.stat().st_size == offsets[-1] + WIDTH * WIDTH * 4
    inline = write_model(linear(), tmp_path / "inline.onnx", "never")
    assert np.array_equal(run(path), run(inline[0]))


def test_external_data_may_be_moved_with_its_model(tmp_path: Path) -> None:
    files = write_model(linear(), tmp_path / "model.onnx", "always")
    (tmp_path / "elsewhere").mkdir()
    moved = [file.rename(tmp_path / "elsewhere" / file.name) for file in files]
    assert run(moved[0]).shape == (2, WIDTH)


@pytest.mark.parametrize(("limit", "files"), [(3 * (WIDTH + 1) * WIDTH * 4, 1), (3 * (WIDTH + 1) * WIDTH * 4 - 1, 2)])
def test_auto_moves_the_weights_out_only_above_the_limit(
    limit: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", limit)
    written = write_model(linear(), tmp_path / "model.onnx", "auto")
    assert len(written) == files
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert run(written[0]).shape == (2, WIDTH)


def test_never_is_refused_above_the_limit_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 1000)
    with pytest.raises(UsageError, match="the weights take") as caught:
        write_model(linear(), tmp_path / "model.onnx", "never")
    assert "--external-data auto" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("external", ["never", "always"])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_types_of_other_sizes(dtype: Any, external: Any, tmp_path: Path) -> None:
    path, *_ = write_model(linear(dtype=dtype), tmp_path / "model.onnx", external)
    onnx.checker.check_model(path, full_check=True)
    assert run(path, dtype).dtype == dtype


@pytest.mark.parametrize("external", ["never", "always"])
def test_tensors_that_have_no_plain_bytes(external: Any, tmp_path: Path) -> None:
    """Booleans, four-bit numbers two to a byte, bfloat16, strings, and one without elements."""
    tensors = [
        ir.Tensor(np.arange(3000) % 3 == 0, name="flags"),
        ir.Tensor(np.arange(-8, 7).astype(ml_dtypes.int4), name="nibbles"),
        ir.Tensor(np.linspace(-1, 1, 700).astype(ml_dtypes.bfloat16), name="half"),
        ir.StringTensor(np.array([b"cat", b"dog"], object), name="words"),
        ir.Tensor(np.zeros((0, 3), np.float32), name="nothing"),
        ir.Tensor(np.float32(2.5), name="scalar"),
    ]
    model = linear(1)
    for tensor in tensors:
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.register_initializer(value)
    path, *_ = write_model(model, tmp_path / "model.onnx", external)
    onnx.checker.check_model(path, full_check=True)
    found = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    for tensor in tensors:
        name = tensor.name or ""
        if name == "words":
            assert list(found[name].string_data) == [b"cat", b"dog"]
        else:
            assert np.array_equal(numpy_helper.to_array(found[name]), tensor.numpy())
    assert run(path).shape == (2, WIDTH)


def test_a_transposed_view_is_written_in_its_own_order(tmp_path: Path) -> None:
    model = linear(1)
    value = model.graph.initializers["w0"]
    assert value.const_value is not None
    array = value.const_value.numpy()
    value.const_value = ir.Tensor(array.T, name="w0")
    (path,) = write_model(model, tmp_path / "model.onnx")
    written = next(t for t in onnx.load(path).graph.initializer if t.name == "w0")
    assert np.array_equal(numpy_helper.to_array(written), array.T)


def test_constants_of_inner_graphs_are_written(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[2] x, bool flag) => (float[2] y) {
            y = If (flag) <
                then_branch = yes () => (float[2] p) <float[2] c = {1, 2}> { p = Add (x, c) },
                else_branch = no () => (float[2] q) { q = Neg (x) }
            >
        }
    """)
    (path,) = write_model(ir.from_proto(proto), tmp_path / "model.onnx", "auto")
    session = ort.InferenceSession(path)
    assert session.run(None, {"x": np.float32([1, 1]), "flag": np.array(True)})[0].tolist() == [2, 3]


@pytest.mark.parametrize("external", ["never", "always"])
def test_writing_holds_one_tensor_at_a_time(external: Any, tmp_path: Path) -> None:
    model = linear(16, 512)  # 16 MiB of weights, 1 MiB each
    tracemalloc.start()
    try:
        write_model(model, tmp_path / "model.onnx", external)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * 2**20
