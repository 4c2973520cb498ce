"""The simulation rounds where a typed network rounds, and ONNX Runtime's CPU provider alone does not."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from deploycli.exporters.precision.simulate import SimulatedRuntime, open_runtime, reduced_type, simulate
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.models.errors import ExportError, UsageError
from tests.exporters.precision.casts import Array, simulated, source, typed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BF16 = ml_dtypes.bfloat16
TYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": BF16}


def reduced(text: str, dtype: str = "float16", opset: int = 20, **constants: Any) -> onnx.ModelProto:
    """A graph of a reduced type as text in which T is the type, and C its number; FP16 constants in it are bits."""
    number = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]
    model = source(
        text.replace("T[", f"{dtype}[").replace("<C>", f"<to = {number}>").replace("{C}", str(number)), opset
    )
    for name, value in constants.items():
        array = np.asarray(value)
        tensor = numpy_helper.from_array(array.astype(TYPES[dtype]) if array.dtype.kind == "f" else array, name)
        model.graph.initializer.append(tensor)
    onnx.checker.check_model(model, full_check=True)
    return model


def ort(model: onnx.ModelProto, path: Path, **inputs: Array) -> dict[str, Array]:
    """What ONNX Runtime answers for the file itself, with its optimisations, as it is used."""
    onnx.save(model, path)
    with OrtRuntime(path, threads=1) as runtime:
        return runtime.run(inputs)


def wrapped(body: str) -> str:
    return f"g (float[N] x) => (float[N] y) {{ h = Cast <C> (x) {body} y = Cast <to = 1> (r) }}"


# Each keeps more in FP32 than in the reduced type: what the body does, its constants, and the same in NumPy.
CASES: dict[str, tuple[str, dict[str, Any], Callable[[Any, Any], Any]]] = {
    "absorbed": (
        "a = Add (h, k) r = Sub (a, k)",
        {"k": 2048.0},
        lambda h, t: (h + t(2048)) - t(2048),
    ),
    "overflowed": (
        "a = Mul (h, k) r = Sub (a, m)",
        {"k": 60000.0, "m": 50000.0},
        lambda h, t: (h * t(60000)) - t(50000),
    ),
    "flushed": (
        "a = Mul (h, k) b = Mul (a, k) r = Mul (b, l)",
        {"k": 1e-6, "l": 60000.0},
        lambda h, t: ((h * t(1e-6)) * t(1e-6)) * t(60000),
    ),
    "rounded to the even": (
        "a = Mul (h, k) b = Add (a, h) r = Mul (b, k)",
        {"k": 1.001},
        lambda h, t: ((h * t(1.001)) + h) * t(1.001),
    ),
    "chained": (
        "a = Add (h, k) b = Reshape (a, s) c = Neg (b) d = Relu (c) e = Max (d, c) r = Add (e, k)",
        {"k": 1024.5, "s": [-1]},
        lambda h, t: np.maximum(np.maximum(-(h + t(1024.5)), t(0)), -(h + t(1024.5))) + t(1024.5),
    ),
}
X = np.float32([0.3, 1.2, 1.5, 3.1, 100.7, -7.77, 1.0001])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_value_is_rounded(name: str, dtype: str) -> None:
    body, constants, expected = CASES[name]
    model = reduced(wrapped(body), dtype, **constants)
    scale = 1e30 if (name, dtype) == ("flushed", "bfloat16") else 1.0  # BF16 has the exponents of FP32
    with np.errstate(over="ignore"):
        wanted = expected((X * np.float32(scale)).astype(TYPES[dtype]), TYPES[dtype]).astype(np.float32)
    found = simulated(model, x=X * np.float32(scale))["y"]
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == np.float32


@pytest.mark.parametrize("name", ["absorbed", "overflowed", "flushed"])
def test_why_there_is_a_simulation(name: str, tmp_path: Path) -> None:
    """ONNX Runtime keeps FP32 between these nodes. Once it does not, the simulation may go."""
    body, constants, expected = CASES[name]
    model = reduced(wrapped(body), **constants)
    with np.errstate(over="ignore"):
        wanted = expected(X.astype(np.float16), np.float16).astype(np.float32)
    found = ort(model, tmp_path / "m.onnx", x=X)["y"]
    assert not np.allclose(found, wanted, rtol=0.1, equal_nan=True)
    assert np.isfinite(found).all()


def test_a_cast_rounds_like_numpy() -> None:
    edge = [65504, 65519.99, 65520, 70000, 2**-14, 2**-24, 2**-25, 2**-25 * 1.01, 6e-8, 1e-8, 0.0, -0.0, np.inf, np.nan]
    x = np.concatenate([np.float32(edge), -np.float32(edge)])
    for dtype in TYPES:
        model = reduced("g (float[N] x) => (float[N] y) { h = Cast <C> (x) y = Cast <to = 1> (h) }", dtype)
        with np.errstate(over="ignore"):
            wanted = x.astype(TYPES[dtype]).astype(np.float32)
        found = simulated(model, x=x)["y"]
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


def test_products_add_up_in_fp32_and_are_rounded_once() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((512, 16)).astype(np.float16)
    model = reduced(
        "g (float[4, 512] x) => (float[4, 16] y) { h = Cast <C> (x) m = MatMul (h, w) y = Cast <to = 1> (m) }", w=w
    )
    x = rng.standard_normal((4, 512)).astype(np.float16)
    found = simulated(model, x=x.astype(np.float32))["y"]
    exact = x.astype(np.float64) @ w.astype(np.float64)
    np.testing.assert_array_equal(found, found.astype(np.float16))
    assert (np.abs(found - exact) <= np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64) * 0.51).all()


def test_weights_are_those_of_the_file() -> None:
    model = reduced(wrapped("r = Mul (h, k)"), k=0.1)
    np.testing.assert_array_equal(simulated(model, x=np.ones(1, np.float32))["y"], np.float32(np.float16(0.1)))


@pytest.mark.parametrize("dtype", TYPES)
def test_inputs_and_outputs_of_the_reduced_type(dtype: str) -> None:
    model = reduced("g (T[N] x, int64 n) => (T[N] y, T[N] x, int64 n) { y = Add (x, k) }", dtype, k=1000.0)
    graph = ir.from_proto(model)
    found_type = reduced_type(graph)
    assert found_type is not None
    x = np.float32([1.2345678, 70000, 1e-9])
    with SimulatedRuntime(graph, found_type) as runtime, np.errstate(over="ignore"):
        assert [(info.name, info.dtype) for info in runtime.inputs] == [("x", dtype), ("n", "int64")]
        assert [(info.name, info.dtype) for info in runtime.outputs] == [("y", dtype), ("x", dtype), ("n", "int64")]
        wanted = x.astype(TYPES[dtype])
        outputs = {
            "y": wanted + TYPES[dtype](1000),
            "x": wanted,
            "n": np.array(3),
        }
        for given in (x, wanted, x.astype(np.float64)):
            found = runtime.run({"x": given, "n": np.array(3)})
            for name, array in outputs.items():
                np.testing.assert_array_equal(found[name].astype(np.float32), array.astype(np.float32))
        assert {name: array.dtype for name, array in found.items()} == {
            **dict.fromkeys("xy", np.float16 if dtype == "float16" else np.float32),
            "n": np.int64,
        }


def test_constants_that_are_outputs_and_defaults_of_inputs() -> None:
    model = reduced("g (T[2] x, T[2] d) => (T[2] y, T[2] c, T[2] d) { y = Mul (x, d) }", c=[0.1, 2.0], d=[3.0, 0.1])
    found = simulated(model, x=np.float32([1, 1]))
    for name, array in {"y": [3.0, 0.1], "c": [0.1, 2.0], "d": [3.0, 0.1]}.items():
        np.testing.assert_array_equal(found[name], np.float16(array))
        assert found[name].dtype == np.float16


def test_outputs_that_are_read_inside_and_nodes_with_several() -> None:
    text = """g (float[2, 4] x) => (T[2, 2] p, T[2, 2] q, T[2, 2] r, int64[2, 2] i, T[2, 2] s) {
        h = Cast <C> (x) a = Mul (h, k) p, q = Split <axis = 1> (a, n) r, i = TopK (a, two) s = Sub (r, p)
    }"""
    x = np.float32([[0.1, 0.2, 0.3, 0.7], [1.1, 1.2, 1.3, 9.9]])
    found = simulated(reduced(text, k=0.7, n=[2, 2], two=[2]), x=x)
    a = x.astype(np.float16) * np.float16(0.7)
    r = np.sort(a, axis=1)[:, ::-1][:, :2]
    for name, array in {"p": a[:, :2], "q": a[:, 2:], "r": r, "s": r - a[:, :2]}.items():
        np.testing.assert_array_equal(found[name], array)
    np.testing.assert_array_equal(found["i"], [[3, 2]] * 2)


def test_one_value_under_two_outputs() -> None:
    """ONNX allows an output to be read through an Identity under a second name."""
    found = simulated(
        reduced("g (float[N] x) => (T[N] y, T[N] z) { h = Cast <C> (x) y = Add (h, k) z = Identity (y) }", k=2048.0),
        x=X,
    )
    np.testing.assert_array_equal(found["y"], X.astype(np.float16) + np.float16(2048))
    np.testing.assert_array_equal(found["y"], found["z"])


CONTROL = """g (float[4] x, bool c, int64 n) => (float[4] y, T[K, 4] steps) {
    h = Cast <C> (x)
    a = Add (h, k)
    b = If (c) <
        then_branch = yes () => (T[4] p) { p = Sub (a, k) },
        else_branch = no () => (T[4] q) { e = Constant <value = float16[1] {14336}> () q0 = Mul (a, e) q = Sub (q0, k) }
    >
    d, steps = Loop (n, , b) <body = body (int64 i, bool go, T[4] t) => (bool more, T[4] u, T[4] v) {
        more = Identity (go)
        w = Add (t, k)
        u = Sub (w, a)
        v = Identity (w)
    }>
    y = Cast <to = 1> (d)
}"""


@pytest.mark.parametrize("c", [True, False])
def test_the_graphs_inside_a_condition_and_a_loop(c: bool) -> None:
    model = reduced(CONTROL, k=1000.0)
    x, k = np.float32([0.3, 1.2, -7.7, 100.01]), np.float16(1000)
    a = x.astype(np.float16) + k
    state, steps = a - k if c else a * np.float16(0.5) - k, []
    for _ in range(3):
        steps.append(state + k)
        state = steps[-1] - a
    found = simulated(model, x=x, c=np.array(c), n=np.array(3))
    np.testing.assert_array_equal(found["steps"], np.stack(steps))
    np.testing.assert_array_equal(found["y"], state.astype(np.float32))


def test_scales_of_fp16() -> None:
    text = """g (float[N] x) => (float[N] y) {
        h = Cast <C> (x) q = QuantizeLinear (h, s, z) d = DequantizeLinear (q, s, z)
        r = Add (d, k) y = Cast <to = 1> (r)
    }"""
    model = reduced(text, s=0.1, z=np.int8(0), k=100.0)
    x = np.float32([0.33, 1.27, -3.3, 100])
    h, s = x.astype(np.float16), np.float16(0.1)
    d = (np.clip(np.rint(h.astype(np.float32) / np.float32(s)), -128, 127) * np.float32(s)).astype(np.float16)
    np.testing.assert_array_equal(simulated(model, x=x)["y"], (d + np.float16(100)).astype(np.float32))
    wide = text.replace("DequantizeLinear (q, s, z)", "DequantizeLinear <output_dtype = {C}> (q, t, z)")
    model = reduced(
        wide.replace("d = ", "t = Constant <value_float = TTT> () d = ").replace("TTT", repr(float(s))),
        opset=23,
        s=0.1,
        z=np.int8(0),
        k=100.0,
    )
    np.testing.assert_array_equal(simulated(model, x=x)["y"], (d + np.float16(100)).astype(np.float32))


def test_values_that_attributes_make() -> None:
    text = """g (float[4] x, int64[4] n) => (float[4] y) {
        h = Cast <C> (x) f = Cast <C> (n) s = Shape (x) c = ConstantOfShape <value = float16[1] {11878}> (s)
        l = CastLike (n, h) a = Mul (h, c) b = Add (a, f) d = Add (b, l) y = Cast <to = 1> (d)
    }"""
    n = np.array([1, 2049, 4097, 7])
    f = n.astype(np.float16)
    found = simulated(reduced(text), x=np.ones(4, np.float32), n=n)["y"]
    np.testing.assert_array_equal(found, ((np.float16(1) * np.float16(0.1) + f) + f).astype(np.float32))


def test_functions() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        g (float[4] x) => (float[4] y) { h = Cast <to = 10> (x) a = local.there_and_back (h) y = Cast <to = 1> (a) }
        <domain: "local", opset_import: ["" : 20]>
        there_and_back (u) => (v) { k = Constant <value = float16 {26624}> () w = Add (u, k) v = Sub (w, k) }
    """)
    x = np.float32([0.3, 1.2, 1.6, 3.1])
    np.testing.assert_array_equal(simulated(model, x=x)["y"], [0, 2, 2, 4])


def test_a_file_that_declares_no_types() -> None:
    """Types follow from the operators: nothing is left unrounded."""
    model = reduced(wrapped("a = Add (h, k) b = Compress (a, c) r = Sub (b, k)"), k=2048.0, c=[True])
    assert not model.graph.value_info
    np.testing.assert_array_equal(simulated(model, x=np.float32([0.3, 9]))["y"], [0.0])


def test_parts_in_fp32_are_not_rounded() -> None:
    text = """g (float[N] x) => (float[N] y) {
        a = Add (x, w) h = Cast <to = 10> (a) b = Relu (h) c = Cast <to = 1> (b) y = Sub (c, w)
    }"""
    model = source(text, w=np.float32(0.0001))
    x = np.float32([1.23456789])
    wanted = (x + np.float32(0.0001)).astype(np.float16).astype(np.float32) - np.float32(0.0001)
    np.testing.assert_array_equal(simulated(model, x=x)["y"], wanted)


def test_the_runtime_of_a_file(tmp_path: Path) -> None:
    text = "g (float[N] x) => (float[N] y) { a = Add (x, k) y = Sub (a, k) }"
    model = source(text, k=np.float32(2048))
    for precision, name in (("fp16", "FP16"), ("bf16", "BF16")):
        onnx.save(typed(model, precision).proto, tmp_path / "typed.onnx")
        with open_runtime(tmp_path / "typed.onnx", threads=1) as runtime:
            assert runtime.name == f"ONNX Runtime, {name} simulated"
            assert (runtime.run({"x": np.float32([1.3])})["y"] == (2 if precision == "fp16" else 0)).all()
            with pytest.raises(UsageError, match="was given the inputs z"):
                runtime.run({"z": np.float32([0.3])})
            with pytest.raises(ExportError, match="failed on"):
                runtime.run({"x": np.float32([[0.3]])})
    onnx.save(model, tmp_path / "fp32.onnx")
    with open_runtime(tmp_path / "fp32.onnx") as runtime:
        assert type(runtime) is OrtRuntime
        assert runtime.name == "ONNX Runtime"
    with pytest.raises(UsageError, match="no file"):
        open_runtime(tmp_path / "absent.onnx")
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    with pytest.raises(UsageError, match="is no ONNX file"):
        open_runtime(tmp_path / "garbage.onnx")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("g (float[N] x) => (float[N] y) { y = Neg (x) }", None),
        ("g (float16[N] x) => (float16[N] y) { y = Neg (x) }", ir.DataType.FLOAT16),
        ("g (float[N] x) => (int64[N] y) { h = Cast <to = 16> (x) y = Cast <to = 7> (h) }", ir.DataType.BFLOAT16),
        (
            "g (float[4] x, bool c) => (float[4] y) { y = If (c) <"
            " then_branch = a () => (float[4] p) { h = Cast <to = 10> (x) p = Cast <to = 1> (h) },"
            " else_branch = b () => (float[4] q) { q = Abs (x) }> }",
            ir.DataType.FLOAT16,
        ),
    ],
)
def test_reduced_type(text: str, expected: ir.DataType | None) -> None:
    assert reduced_type(ir.from_proto(source(text))) == expected


def test_nothing_of_a_reduced_type_is_left_but_the_pairs() -> None:
    model = ir.from_proto(reduced(CONTROL, k=1000.0))
    simulate(model)
    graph = ir.to_proto(model)
    assert isinstance(graph, onnx.ModelProto)
    onnx.checker.check_model(graph, full_check=True)
    for node in model.graph.all_nodes():
        if any(value.dtype == ir.DataType.FLOAT16 for value in node.outputs):
            (output,) = node.outputs
            (reader,) = output.consumers()
            assert (node.op_type, reader.op_type) == ("Cast", "Cast")
            assert reader.outputs[0].dtype == ir.DataType.FLOAT


def test_weights_are_widened_one_at_a_time(tmp_path: Path) -> None:
    body = "".join(f"h{i + 1} = MatMul(h{i}, w{i}) " for i in range(16))
    weights = {f"w{i}": np.zeros((512, 512)) for i in range(16)}  # 16 MiB in FP32
    onnx.save(reduced(f"g (T[N, 512] h0) => (T[N, 512] h16) {{ {body} }}", **weights), tmp_path / "model.onnx")
    tracemalloc.start()
    try:
        with open_runtime(tmp_path / "model.onnx") as runtime:
            assert runtime.run({"h0": np.ones((1, 512), np.float16)})["h16"].dtype == np.float16
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20
