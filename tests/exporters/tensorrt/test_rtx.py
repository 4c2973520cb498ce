"""TensorRT for RTX, the real one: what is compiled in the child process, and whatever becomes of it."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploycli.ending import explain
from deploycli.exporters.bundle.engine import Sidecar, header_of_plan
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.settings import BuildSettings, ShapeRange
from deploycli.exporters.target.targets import TARGETS
from deploycli.exporters.tensorrt.child import run_build
from deploycli.exporters.tensorrt.compilers.rtx import LISTING, PlainNames, as_inspector_json
from deploycli.exporters.tensorrt.inspector import EngineLayers, parse_layers
from deploycli.exporters.tensorrt.traffic import read_engine
from deploycli.models.errors import BuildError, EnvironmentUnsuitable, IntegrityError, UsageError
from tests.exporters import engines
from tests.exporters.bundle import bundles
from tests.exporters.lint.rtx import WHY

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploycli.exporters.tensorrt.job import BuildResult, Progress


pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)

TOKENS, WIDTH, HEADS = 16, 64, 2
PROFILE = {"x": ShapeRange((1, TOKENS, WIDTH), (4, TOKENS, WIDTH), (8, TOKENS, WIDTH))}
NASTY = ", LayerType: gemm, Inputs: [ ]\nName: "


def block(prefix: str = "", batch: int | str = "batch", dtype: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    """One attention with its products: q, k, v, two of its own, the projection, and a convolution over the tokens."""
    rng = np.random.default_rng(0)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    constants = {
        "qkv": rng.standard_normal((WIDTH, 3 * WIDTH)).astype(kind),
        "proj": rng.standard_normal((WIDTH, WIDTH)).astype(kind),
        "conv": rng.standard_normal((WIDTH, WIDTH, 3)).astype(kind),
        "bias": rng.standard_normal(3 * WIDTH).astype(kind),
        "scale": np.full((), (WIDTH // HEADS) ** -0.5, kind),
        "split": np.array([0, TOKENS, 3, HEADS, WIDTH // HEADS]),
        "merge": np.array([0, TOKENS, WIDTH]),
        "parts": np.array([1, 1, 1]),
        "axis": np.array([0]),
    }
    nodes = [
        ("MatMul", ["x", "qkv"], ["m"], {}),
        ("Add", ["m", "bias"], ["a"], {}),
        ("Reshape", ["a", "split"], ["r"], {}),
        ("Transpose", ["r"], ["t"], {"perm": [2, 0, 3, 1, 4]}),
        ("Split", ["t", "parts"], ["q1", "k1", "v1"], {"axis": 0}),
        *(("Squeeze", [f"{name}1", "axis"], [name], {}) for name in "qkv"),
        ("Transpose", ["k"], ["kt"], {"perm": [0, 1, 3, 2]}),
        ("MatMul", ["q", "kt"], ["s"], {}),
        ("Mul", ["s", "scale"], ["ss"], {}),
        ("Softmax", ["ss"], ["p"], {"axis": -1}),
        ("MatMul", ["p", "v"], ["o"], {}),
        ("Transpose", ["o"], ["ot"], {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["ot", "merge"], ["om"], {}),
        ("MatMul", ["om", "proj"], ["pr"], {}),
        ("Transpose", ["pr"], ["tr"], {"perm": [0, 2, 1]}),
        ("Conv", ["tr", "conv"], ["y"], {"pads": [1, 1]}),
    ]
    made = [
        helper.make_node(op, ins, outs, name=f"{prefix}blocks.{i // 9}.attn/{op}_{i}", **attributes)
        for i, (op, ins, outs, attributes) in enumerate(nodes)
    ]
    x = helper.make_tensor_value_info("x", dtype, [batch, TOKENS, WIDTH])
    y = helper.make_tensor_value_info("y", dtype, [batch, WIDTH, TOKENS])
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(made, "block", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def compile_(
    model: onnx.ModelProto | bytes, folder: Path, profile: Any = None, targets: Any = TARGETS, **more: Any
) -> BuildResult:
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    settings = BuildSettings(PROFILE if profile is None else profile)
    return run_build(path, settings, folder / "work", compiler="rtx", targets=targets, **{"timeout": 120, **more})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    return compile_(block(), tmp_path_factory.mktemp("built"))


def layers_of(result: BuildResult) -> EngineLayers:
    assert result.layers is not None
    return parse_layers(result.layers.read_text("utf-8"))


def test_an_engine_is_compiled_for_all_gpus(built: BuildResult) -> None:
    header = header_of_plan(built.plan)
    assert header is not None
    assert (header.product, header.targets) == (RTX, TARGETS)
    assert ".".join(map(str, header.version)) == built.tensorrt == built.facts["plan_version"]
    assert (built.gpu, built.timing_cache_sha256) == (None, "")
    assert built.facts["weights_memory"] > 0
    assert [(t.name, t.dtype, t.shape) for t in built.io] == [
        ("x", "float16", (-1, TOKENS, WIDTH)),
        ("y", "float16", (-1, WIDTH, TOKENS)),
    ]
    log = built.log.read_text("utf-8")
    assert "for compute capability 7.5, 8.0, 8.6, 8.9, 12.0 and 12.1" in log
    assert "cudaError 35" not in log


def test_every_product_of_the_graph_is_in_a_layer_that_counts_as_one(built: BuildResult) -> None:
    layers = layers_of(built)
    (found,) = read_engine(built.plan.parent.parent / "model.onnx", [(layers, None)])
    kernels = found.kernels
    assert (found.missing, found.layers) == ((), layers)
    assert layers.fused_attention == 1
    products = [kernel for kernel in kernels if kernel.product]
    assert {kernel.precision for kernel in products} == {"fp16"}
    assert len(products) == 4  # q k v, attention, projection, convolution
    (attention,) = (kernel for kernel in kernels if kernel.attention)
    assert {"blocks.1.attn/MatMul_9", "blocks.1.attn/Softmax_11", "blocks.1.attn/MatMul_12"} <= set(attention.nodes)
    assert attention.module == "blocks.1.attn"
    assert attention.moved == 4 * TOKENS * WIDTH * 2  # q, k, v and the result, of one image


def test_the_same_bytes_again(built: BuildResult, tmp_path: Path) -> None:
    assert compile_(block(), tmp_path).sha256 == built.sha256


@pytest.mark.parametrize("targets", [((8, 6),), ((7, 5), (12, 1))])
def test_targets_stand_in_the_plan(targets: Any, tmp_path: Path) -> None:
    header = header_of_plan(compile_(block(), tmp_path, targets=targets).plan)
    assert header is not None
    assert header.targets == targets


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.FLOAT])
def test_bytes_that_follow_from_the_graph_are_those_of_an_engine_of_one_batch(dtype: int, tmp_path: Path) -> None:
    """An engine of one batch says all its shapes: with the batch hidden, the same must follow."""
    size = 8
    shape = (size, TOKENS, WIDTH)
    result = compile_(block(dtype=dtype), tmp_path, {"x": ShapeRange(shape, shape, shape)}, TARGETS[1:])
    onnx_file, layers = tmp_path / "model.onnx", layers_of(result)

    def hidden(tensor: Any) -> Any:
        """The batch stands first, or behind what stands before it in another order of tokens."""
        axis = next((axis for axis in (0, 1) if tensor.shape[axis : axis + 1] and tensor.shape[axis] % size == 0), None)
        return replace(tensor, shape=tuple(-1 if place == axis else n for place, n in enumerate(tensor.shape)))

    dynamic = EngineLayers(
        tuple(
            replace(layer, reads=tuple(map(hidden, layer.reads)), writes=tuple(map(hidden, layer.writes)))
            for layer in layers.layers
        )
    )
    fixed, free = read_engine(onnx_file, [(layers, size), (dynamic, None)])
    said = [kernel.moved for kernel in fixed.kernels]
    assert [kernel.moved for kernel in free.kernels] == said
    assert None not in said


def test_names_of_nodes_do_not_confuse_the_reader(built: BuildResult, tmp_path: Path) -> None:
    found = layers_of(compile_(block(NASTY), tmp_path))
    plain = layers_of(built)

    def kinds(layers: EngineLayers) -> list[Any]:
        return [(layer.kind, layer.product, [str(tensor) for tensor in layer.reads]) for layer in layers.layers]

    assert kinds(found) == kinds(plain)
    nodes = {node for layer in found.layers for node in layer.nodes}
    assert {node.removeprefix(NASTY) for node in nodes} == {node for layer in plain.layers for node in layer.nodes}


def one(op: str, shape: list[int | str], out: list[int | str], **attributes: Any) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", out)))
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], name="head/one", **attributes)], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def branches() -> onnx.ModelProto:
    """Two chains of products of one value, which the compiler gives a stream each."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for branch in "ab":
        x = "x"
        for i in range(2):
            weight, product, soft = (f"{branch}{i}.{what}" for what in ("w", "m", "s"))
            weights.append(numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH)).astype(np.float16), weight))
            nodes.append(helper.make_node("MatMul", [x, weight], [product], name=f"{branch}/MatMul_{i}"))
            nodes.append(helper.make_node("Softmax", [product], [soft], name=f"{branch}/Softmax_{i}", axis=1))
            x = soft
    nodes.append(helper.make_node("Add", ["a1.s", "b1.s"], ["y"], name="head/Add"))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT16, ["b", TOKENS, WIDTH]) for n in "xy")
    graph = helper.make_graph(nodes, "branches", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_what_streams_tell_each_other_is_no_launch(tmp_path: Path) -> None:
    wide = {"x": ShapeRange((1, TOKENS, WIDTH), (32, TOKENS, WIDTH), (64, TOKENS, WIDTH))}
    layers = layers_of(compile_(branches(), tmp_path, wide))
    assert all(layer.kind for layer in layers.layers)  # each was read
    assert {"signal", "wait"} <= {layer.kind for layer in layers.layers}
    assert {layer.kind for layer in layers.launched} <= {"gemm", "kgen", "runtime_fusion"}


SQUARE = {"x": ShapeRange((1, 4, 4), (2, 4, 4), (4, 4, 4))}


@pytest.mark.parametrize(("dtype", "queries"), [(TensorProto.FLOAT, TOKENS), (TensorProto.FLOAT16, 1)])
def test_the_operator_attention_without_a_kernel_of_its_own_is_taken_apart(
    dtype: int, queries: int, tmp_path: Path
) -> None:
    shapes = {"q": queries, "k": TOKENS, "v": TOKENS}
    inputs = [helper.make_tensor_value_info(name, dtype, ["b", n, WIDTH]) for name, n in shapes.items()]
    y = helper.make_tensor_value_info("y", dtype, ["b", queries, WIDTH])
    node = helper.make_node("Attention", list("qkv"), ["y"], name="attn/one", q_num_heads=HEADS, kv_num_heads=HEADS)
    graph = helper.make_graph([node], "g", inputs, [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    profile = {name: ShapeRange((1, n, WIDTH), (2, n, WIDTH), (4, n, WIDTH)) for name, n in shapes.items()}
    result = compile_(model, tmp_path, profile, TARGETS[1:])
    (found,) = read_engine(tmp_path / "model.onnx", [(layers_of(result), None)])
    assert found.missing == ()
    assert any(kernel.product for kernel in found.kernels)


class TestWhatGoesWrong:
    def test_the_parser_refuses(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match=r"'head/one' \(Det\).*UNSUPPORTED_NODE") as caught:
            compile_(one("Det", ["b", 4, 4], ["b"]), tmp_path, SQUARE)
        assert "TensorRT for RTX cannot read" in caught.value.found
        assert "cudaError" not in str(caught.value)
        assert left(tmp_path) == {"job.json", "builder.log"}

    def test_the_parser_refuses_more_than_is_worth_reading(self, tmp_path: Path) -> None:
        model = one("Det", ["b", 4, 4], ["b"])
        for place in range(29):
            model.graph.node.add().CopyFrom(helper.make_node("Det", ["x"], [f"y{place}"]))
        with pytest.raises(BuildError, match="and 10 more"):
            compile_(model, tmp_path, SQUARE)

    def test_shapes_of_inputs_that_the_model_has_not(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="the shapes are for other, x"):
            compile_(block(), tmp_path, {**PROFILE, "other": SQUARE["x"]})

    @pytest.mark.parametrize("empty", [b"", onnx.ModelProto(ir_version=10).SerializeToString()])
    def test_an_empty_file(self, empty: bytes, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is no ONNX file: it holds no graph"):
            compile_(empty, tmp_path)

    def test_an_empty_graph(self, tmp_path: Path) -> None:
        empty = helper.make_model(helper.make_graph([], "g", [], []))
        with pytest.raises(BuildError, match="holds no graph: the parser reads 0 layers and no output"):
            compile_(empty, tmp_path)

    def test_a_graph_that_has_no_output(self, tmp_path: Path) -> None:
        model = one("Relu", ["b", 4, 4], ["b", 4, 4])
        del model.graph.output[:]
        with pytest.raises(BuildError, match="holds no graph: the parser reads"):
            compile_(model, tmp_path, SQUARE)

    def test_a_profile_that_contradicts_the_graph(self, tmp_path: Path) -> None:
        wrong = {"x": ShapeRange((1, 5, 4), (2, 5, 4), (4, 5, 4))}
        with pytest.raises(BuildError, match="Dimension mismatch for tensor x and profile 0") as caught:
            compile_(one("Relu", ["b", 4, 4], ["b", 4, 4]), tmp_path, wrong)
        assert "cudaError" not in str(caught.value)

    def test_fp32_products_for_turing(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match="FP32 GEMM is not supported"):
            compile_(block(dtype=TensorProto.FLOAT), tmp_path)

    def test_it_takes_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match=r"stopped after 0\.01 s"):
            compile_(block(), tmp_path, timeout=0.01)
        assert left(tmp_path) == {"job.json", "builder.log"}

    def test_it_hangs(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match="stopped after 1 s"):
            compile_(
                block(), tmp_path, timeout=1, progress=during("deploycli: build", lambda p: os.kill(p, signal.SIGSTOP))
            )
        assert left(tmp_path) == {"job.json", "builder.log"}

    def test_it_is_killed(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match="killed by SIGKILL: most likely by the kernel, for lack of memory"):
            compile_(block(), tmp_path, progress=during("deploycli: build", lambda pid: os.kill(pid, signal.SIGKILL)))
        assert left(tmp_path) == {"job.json", "builder.log"}

    def test_there_is_no_memory(self, tmp_path: Path) -> None:
        def take(pid: int) -> None:
            now = 4096 * int(Path(f"/proc/{pid}/statm").read_text().split()[0])
            resource.prlimit(pid, resource.RLIMIT_AS, (now, now))

        said = r"TensorRT for RTX ran out of memory: .*bad_alloc|the engine builder was killed by SIG"  # as it happens
        with pytest.raises(BuildError, match=said) as caught:
            compile_(block(), tmp_path, progress=during("deploycli: build", take))
        assert explain(caught.value) is caught.value  # the command says so, with the exit code of a build
        assert left(tmp_path) == {"job.json", "builder.log"}

    def test_there_is_no_space(self, built: BuildResult, tmp_path: Path) -> None:
        def fill(pid: int) -> None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (built.size // 2, built.size // 2))

        with pytest.raises(EnvironmentUnsuitable, match=r"cannot write .*model\.plan: File too large"):
            compile_(block(), tmp_path, progress=during("deploycli: build", fill))
        assert left(tmp_path) == {"job.json", "builder.log"}

    def test_an_interruption_in_the_step_that_calls_nothing_back(self, tmp_path: Path) -> None:
        builders: list[int] = []

        def interrupt(pid: int) -> None:
            builders.append(pid)
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            compile_(block(), tmp_path, progress=during("Building engine", interrupt))
        assert builders
        assert not Path(f"/proc/{builders[0]}").exists()
        assert left(tmp_path) == {"job.json", "builder.log"}


def during(phase: str, act: Callable[[int], object]) -> Callable[[Progress], None]:
    """Do something to the process of the builder, once, as soon as a phase has begun."""
    done: list[int] = []

    def progress(step: Progress) -> None:
        if step.phase == phase and not done:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                if b"deploycli.exporters.runtime.isolated" in Path(f"/proc/{child}/cmdline").read_bytes():
                    done.append(int(child))
                    act(int(child))

    return progress


def left(folder: Path) -> set[str]:
    """What a build has left in its folder."""
    return {path.name for path in (folder / "work").iterdir()}


class TestThePlan:
    @pytest.fixture
    def sidecar(self, built: BuildResult, tmp_path: Path) -> Sidecar:
        bundle = bundles.make(tmp_path)
        made = engines.build(bundle)
        content = built.plan.read_bytes()
        (bundle.path / "engines" / made.plan).write_bytes(content)
        return replace(
            made,
            **{"compiler": "rtx", "targets": TARGETS, "gpu": None, "tensorrt": built.tensorrt},
            sha256=built.sha256,
            size=built.size,
        )

    def test_it_is_what_its_sidecar_says(self, sidecar: Sidecar, tmp_path: Path) -> None:
        folder = next(tmp_path.glob("*/engines"))
        assert sidecar.check_file(folder).is_file()
        sidecar.save(folder)
        assert Sidecar.load(folder / f"{Path(sidecar.plan).stem}.json") == sidecar

    def test_of_the_other_product(self, sidecar: Sidecar, tmp_path: Path) -> None:
        folder = next(tmp_path.glob("*/engines"))
        gpu = engines.GpuRecord("NVIDIA L4", (8, 9))
        other = replace(sidecar, compiler="tensorrt", targets=(), gpu=gpu)
        with pytest.raises(IntegrityError, match="was written by TensorRT for RTX 1"):
            other.check_file(folder)

    def test_for_other_gpus(self, sidecar: Sidecar, tmp_path: Path) -> None:
        folder = next(tmp_path.glob("*/engines"))
        with pytest.raises(IntegrityError, match=r"is for compute capability 7\.5, .* as its header says"):
            replace(sidecar, targets=((8, 6),)).check_file(folder)

    def test_changed_by_a_byte(self, sidecar: Sidecar, tmp_path: Path) -> None:
        folder = next(tmp_path.glob("*/engines"))
        plan = folder / sidecar.plan
        content = bytearray(plan.read_bytes())
        content[len(content) // 2] ^= 1
        plan.write_bytes(content)
        with pytest.raises(IntegrityError, match="has changed"):
            sidecar.check_file(folder)


def test_the_job_is_kept(built: BuildResult) -> None:
    job = json.loads((built.plan.parent / "job.json").read_text())
    assert (job["compiler"], job["targets"]) == ("rtx", [list(target) for target in TARGETS])


PIECES = (
    "attn",
    "/",
    ".",
    ", ",
    "LayerType: ",
    "gemm",
    "Name: ",
    "\n",
    "\nName: ",
    "[",
    "]",
    "{",
    "}",
    "Inputs: [",
    "\n\nI/O",
)
NAMES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join).filter(lambda name: name.strip())
SHAPES = st.lists(st.sampled_from([-1, 1, 49, 96]), max_size=4)
TENSORS = st.lists(st.tuples(NAMES, SHAPES, st.sampled_from(["Half", "Float", "Int8"])), max_size=3)
LAYERS = st.lists(
    st.tuples(
        NAMES,
        st.sampled_from(["kgen", "gemm", "runtime_fusion", "signal", "wait"]),
        TENSORS,
        TENSORS,
        st.lists(NAMES, max_size=3),
    ),
    min_size=1,
    max_size=4,
)


END = "\n\nI/O Tensors:\n Name: x, IOMode: Input\n\nEngine Metadata:\n Multi-Device: Disabled"


def written(layers: list[Any], names: PlainNames) -> str:
    """The message, as TensorRT for RTX 1.7 writes it."""

    def tensors(found: list[Any]) -> str:
        return ", ".join(
            f"{{ Name: {names.plain(name)}, Dimensions: [{','.join(map(str, shape))}], "
            f"Strides: [{','.join('1' for _ in shape)}], StrideOrder: [{','.join('0' for _ in shape)}], "
            f"Datatype: {dtype}, Format: (Linear) Row major }}"
            for name, shape, dtype in found
        )

    lines = [
        f"Name: __myl_{names.plain(name)}_0, LayerType: {kind}, Inputs: [{tensors(reads)}], Constants: [], "
        f"Outputs: [{tensors(writes)}], TacticName: __myelin_CASK_STUB, StreamId: 0, "
        + ("EventId: 1, " if kind in ("signal", "wait") else "")
        + "Metadata: "
        + "\x1f".join(f"[ONNX Layer: {names.plain(node)}]" for node in nodes)
        for name, kind, reads, writes, nodes in layers
    ]
    return LISTING + "\n".join(lines) + END


@given(LAYERS)
def test_every_name_comes_back(layers: list[Any]) -> None:
    names = PlainNames()
    found = json.loads(as_inspector_json(written(layers, names), names))["Layers"]
    said = [
        [[tensor["Name"], tensor["Dimensions"], tensor["Datatype"]] for tensor in layer[side]]
        for layer in found
        for side in ("Inputs", "Outputs")
    ]
    assert said == [list(map(list, side)) for _, _, reads, writes, _ in layers for side in (reads, writes)]
    assert [(layer["Name"], layer["LayerType"]) for layer in found] == [
        (f"__myl_{n}_0", kind) for n, kind, *_ in layers
    ]


def test_what_cannot_be_read_proves_nothing() -> None:
    text = as_inspector_json(LISTING + "Name: odd, LayerType: gemm, of another version")
    assert json.loads(text)["Layers"] == ["Name: odd, LayerType: gemm, of another version"]
    layers = parse_layers(text)
    assert not layers.detailed
    assert layers.judged == ()
