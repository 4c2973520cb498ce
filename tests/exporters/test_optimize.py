from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from onnx import TensorProto, helper, numpy_helper

from deploycli.exporters import file_target, gate
from deploycli.exporters import optimize as optimize_module
from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.optimize import Optimized, OptimizeOptions, load, optimize
from deploycli.exporters.passes import any_model
from deploycli.exporters.passes.any_model import optimized
from deploycli.models.errors import (
    DeployError,
    EnvironmentUnsuitable,
    ExportError,
    IntegrityError,
    NumericsError,
    UsageError,
)
from tests.exporters.passes.graphs import differences, ops, parse, slices
from tests.exporters.passes.programs import programs
from tests.exporters.passes.test_properties import examples, launch  # noqa: F401 - a fixture
from tests.peers import import_timm

ROLL = """g (float[batch, 8, 4] x) => (float[batch, 8, 4] y) {
    tail = Slice (x, three, end, one) head = Slice (x, zero, three, one) y = Concat <axis: int = 1> (tail, head)
}"""
TWO = np.float32([2])

pytestmark = pytest.mark.usefixtures("checked_here")


@pytest.fixture
def checked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run in this process, and NVIDIA's parser is not asked; in tests/deploycli/test_optimize.py the command
    does both, each in a child.
    """

    def here(function: Callable[..., Any], *arguments: Any, memory: int | None, **keywords: Any) -> Any:
        assert memory is not None
        return function(*arguments, **keywords)

    monkeypatch.setattr(optimize_module, "isolated", here)
    monkeypatch.setattr(gate, "judging", None)
    monkeypatch.setattr(gate.library, "is_installed", lambda _: False)


CONSTANTS: dict[str, Any] = {"zero": [0], "one": [1], "three": [3], "end": [2**63 - 1]}


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def run(model: onnx.ModelProto, folder: Path, **changes: Any) -> tuple[Optimized, onnx.ModelProto]:
    source = save(model, folder / "in.onnx")
    result = optimize(OptimizeOptions(source, folder / "out.onnx", **changes))
    written = onnx.load(folder / "out.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert list(written.graph.input) == list(model.graph.input)
    assert list(written.graph.output) == list(model.graph.output)
    return result, written


def in_memory(model: onnx.ModelProto) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    result, _ = optimized(ir.from_proto(copy))
    return ir.to_proto(result).SerializeToString(deterministic=True)


def shuffled(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The same graph: its nodes in another order that is sorted, its constants in any."""
    rng = random.Random(seed)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    made = {name for node in model.graph.node for name in node.output if name}
    waiting, known = list(model.graph.node), set[str]()
    del other.graph.node[:], other.graph.initializer[:]
    while waiting:
        ready = [node for node in waiting if all(name in known or name not in made for name in reads(node))]
        node = rng.choice(ready)
        waiting.remove(node)
        other.graph.node.append(node)
        known.update(node.output)
    other.graph.initializer.extend(rng.sample(list(model.graph.initializer), len(model.graph.initializer)))
    return other


def reads(node: onnx.NodeProto) -> set[str]:
    inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    own = {output for graph in inner for n in graph.node for output in n.output}
    return set(node.input) | {name for graph in inner for n in graph.node for name in reads(n)} - own


# --- what becomes of a graph -----------------------------------------------------------------------------------------


def test_a_roll_becomes_a_gather_and_both_graphs_are_run(tmp_path: Path) -> None:
    result, written = run(parse(ROLL, **CONSTANTS), tmp_path)
    assert ops(written) == {"Gather": 1}
    assert (result.before.ops, result.after.ops) == ({"Slice": 2, "Concat": 1}, {"Gather": 1})
    assert (result.before.nodes, result.after.nodes) == (3, 1)
    assert result.before.cost.movement_bytes == 2 * 8 * 4 * 4  # the slices, and what is made of them
    assert result.after.cost.movement_bytes == 8 * 4 * 4
    assert result.before.cost.constant_bytes == 4 * 8
    assert result.after.cost.constant_bytes == 8 * 8
    assert result.after.size == (tmp_path / "out.onnx").stat().st_size
    assert result.check is not None
    assert result.check.runs == ("x:3x8x4", "x:1x8x4", "x:3x8x4")
    assert [(o.name, o.identical, o.vacuous) for o in result.check.outputs] == [("y", True, "")]
    assert result.files == (tmp_path / "out.onnx",)


def test_what_is_not_of_the_graph_stays(tmp_path: Path) -> None:
    plain = parse(ROLL.replace("4] x)", "4] x, int64[n] unread)"), **CONSTANTS)
    plain.opset_import.append(helper.make_opsetid("my.domain", 3))
    helper.set_model_props(plain, {"author": "me", "classes": "a,b"})
    plain.doc_string, plain.producer_name, plain.producer_version, plain.model_version = "of the model", "p", "1", 7
    plain.domain, plain.graph.doc_string = "org.example", "of the graph"
    for value in (plain.graph.input[0], plain.graph.output[0]):
        value.doc_string = f"of {value.name}"
        value.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
        value.metadata_props.add(key="unit", value="volt")
    _, written = run(plain, tmp_path)
    for name in ("metadata_props", "doc_string", "producer_name", "producer_version", "model_version", "domain"):
        assert getattr(written, name) == getattr(plain, name), name
    assert written.graph.doc_string == "of the graph"
    assert written.graph.name == "g"


def test_names_of_the_file_stay_and_new_nodes_are_called_after_their_place(tmp_path: Path) -> None:
    body = ROLL.replace("8, 4] y) {", "8, 4] z) { a = Neg (x)").replace("(x, ", "(a, ")
    plain = parse(body.replace("(tail, head)", "(tail, head) w = Abs (y) z = Add (w, shared)"), **CONSTANTS, shared=TWO)
    places = ["first", "/layers.0/roll/tail", "/layers.0/roll/head", "/layers.0/roll/Concat", "/layers.0/act", ""]
    for node, name in zip(plain.graph.node, places, strict=True):
        node.name = name
    _, written = run(plain, tmp_path)
    assert [node.name for node in written.graph.node] == [
        "first", "/layers.0/roll/Gather", "/layers.0/act", "Add",
    ]  # fmt: skip
    assert [node.output[0] for node in written.graph.node] == ["a", "/layers.0/roll/Gather", "w", "z"]
    assert [tensor.name for tensor in written.graph.initializer] == ["/layers.0/roll/Gather.const1", "shared"]
    assert not any(node.metadata_props for node in written.graph.node)


LOOP = """g (float[batch, 8, 4] x, int64 trips, bool flag) => (float[batch, 8, 4] z) {
    k = Add (one, one)
    y = Loop (trips, , x) <body = body (int64 i, bool go, float[batch, 8, 4] s) => (bool more, float[batch, 8, 4] t) {
        more = Identity (go)
        m = Mul (s, k)
        t = Add (m, x)
    }>
    z = If (flag) <
        then_branch = yes () => (float[batch, 8, 4] p) { Gather = Abs (y) p = Add (Gather, rolled) },
        else_branch = no () => (float[batch, 8, 4] q) { q = Sub (rolled, y) }
    >
}"""


def test_if_and_loop_pass_through_and_what_is_around_them_is_improved(tmp_path: Path) -> None:
    plain = parse(LOOP.replace("k = Add", slices("x", "rolled", 1, 3) + "k = Add"), one=np.float32([1]))
    result, written = run(plain, tmp_path, lint=False)
    assert ops(written) == {"Gather": 1, "Loop": 1, "If": 1}
    assert differences(plain, written) == []
    assert result.check is not None
    assert result.check.outputs[0].identical
    assert len({in_memory(shuffled(plain, seed)) for seed in range(4)} | {in_memory(plain)}) == 1


def test_an_old_opset_passes_through_and_says_why(tmp_path: Path) -> None:
    plain = parse(ROLL, **CONSTANTS)
    plain.opset_import[0].version, plain.ir_version = 11, 6
    result, written = run(plain, tmp_path)
    assert ops(written) == {"Slice": 2, "Concat": 1}
    assert [step.remark for step in result.steps if step.remark] == [
        "the graph is of opset 11, the passes write 13 and above: it is only tidied"
    ]
    assert result.after.cost.movement_bytes == 2 * 8 * 4 * 4


def scaled(ir_version: int) -> onnx.ModelProto:
    """A graph whose scale is a constant, and an input."""
    plain = parse(
        "g (float[batch, 2] x) => (float[batch, 2] y) { a = Mul (x, scale) b = Identity (a) y = Add (b, one) }",
        one=np.float32([1, 2]), scale=np.ones(1, np.float32),
    )  # fmt: skip
    plain.ir_version = ir_version
    plain.graph.input.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, [1]))
    return plain


def test_constants_that_are_inputs_may_be_replaced_and_stay_inputs(tmp_path: Path) -> None:
    result, written = run(scaled(4), tmp_path)
    assert [value.name for value in written.graph.input] == ["x", "scale"]
    assert "scale" in [tensor.name for tensor in written.graph.initializer]
    assert [step.remark for step in result.steps if step.remark] == [
        "1 constants are inputs too, and a caller may pass others: none of scale was taken for a constant"
    ]


def test_before_format_4_every_constant_was_an_input_that_none_may_replace(tmp_path: Path) -> None:
    source = save(scaled(3), tmp_path / "in.onnx")
    result = optimize(OptimizeOptions(source, tmp_path / "out.onnx"))
    written = onnx.load(tmp_path / "out.onnx")
    assert [value.name for value in written.graph.input] == ["x"]
    assert written.ir_version == 4
    assert [step.remark for step in result.steps if step.remark] == []


@pytest.mark.parametrize(
    "text",
    [
        "g (float[batch, 2] x) => (float[batch, 2] x) { }",
        "g () => (float[2] c) { }",
    ],
)
def test_a_graph_without_operators(tmp_path: Path, text: str) -> None:
    plain = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    if "c)" in text:
        plain.graph.initializer.append(numpy_helper.from_array(np.float32([1, 2]), "c"))
    source = save(plain, tmp_path / "in.onnx")
    result = optimize(OptimizeOptions(source, tmp_path / "out.onnx", check=0, lint=False))
    assert result.after.nodes == 0
    assert differences(plain, onnx.load(tmp_path / "out.onnx")) == []


def test_equal_constants_are_stored_once(tmp_path: Path) -> None:
    text = "g (float[batch, 64] x) => (float[batch, 64] y) { a = Add (x, c) b = Mul (a, d) y = Sub (b, e) }"
    weight = np.arange(64, dtype=np.float32)
    _, written = run(parse(text, c=weight, d=weight, e=weight + 1), tmp_path)
    assert [tensor.name for tensor in written.graph.initializer] == ["c", "e"]


def test_sequences_and_optionals_pass_through(tmp_path: Path) -> None:
    plain = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (seq(float[3]) xs, optional(float[3]) o, int64 i) => (float[3] y, seq(float[3]) zs, bool has) {
            a = SequenceAt (xs, i)
            b = Identity (a)
            y = Neg (b)
            zs = SequenceInsert (xs, y)
            has = OptionalHasElement (o)
        }
    """)
    result, written = run(plain, tmp_path, lint=False)
    assert ops(written) == {"SequenceAt": 1, "Neg": 1, "SequenceInsert": 1, "OptionalHasElement": 1}
    assert result.check is not None
    assert result.check.runs[0] == "xs:2 tensors o:3 i:"


CUSTOM = """
    <ir_version: 10, opset_import: ["" : 20, "plugins" : 2]>
    g (float[batch, 4, 4] x) => (float[batch, 4, 4] y) {
        a = Transpose <perm = [0, 2, 1]> (x)
        b = Transpose <perm = [0, 2, 1]> (a)
        c = plugins.Deform <groups = 2> (b)
        d = Transpose <perm = [0, 2, 1]> (c)
        y = Transpose <perm = [0, 2, 1]> (d)
    }
"""


def test_a_custom_operator_stays_and_cannot_be_checked(tmp_path: Path) -> None:
    plain = onnx.parser.parse_model(CUSTOM)
    source = save(plain, tmp_path / "in.onnx")
    with pytest.raises(EnvironmentUnsuitable, match=r"the graph cannot be checked: ONNX Runtime [\s\S]*Deform"):
        optimize(OptimizeOptions(source, tmp_path / "out.onnx", lint=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx"]
    result, written = run(plain, tmp_path, check=0, lint=False)
    assert result.check is None
    assert result.after.ops == {"Transpose": 2, "plugins::Deform": 1}
    assert (result.before.cost.multiply_adds, result.after.cost.movement_bytes) == (None, None)
    assert [node.attribute[0].i for node in written.graph.node if node.domain == "plugins"] == [2]
    assert [(o.domain, o.version) for o in written.opset_import] == [("", 20), ("plugins", 2)]


def test_functions_are_inlined(tmp_path: Path) -> None:
    plain = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        g (float[batch, 6, 4] x) => (float[batch, 6, 4] y) { a = local.turn (x) y = local.turn (a) }
        <domain: "local", opset_import: ["" : 20]>
        turn (u) => (v) { v = Transpose <perm = [0, 2, 1]> (u) }
    """)
    result, written = run(plain, tmp_path)
    assert not written.functions
    assert differences(plain, written) == []
    assert result.before.ops == {"local::turn": 2}


@pytest.mark.parametrize("how", ["another opset", "a circle"])
def test_functions_that_cannot_be_inlined(tmp_path: Path, how: str) -> None:
    plain = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        g (float[batch, 6, 4] x) => (float[batch, 6, 4] y) { y = local.turn (x) }
        <domain: "local", opset_import: ["" : 20, "local" : 1]>
        turn (u) => (v) { v = Neg (u) }
    """)
    if how == "another opset":
        plain.functions[0].opset_import[0].version = 18
    else:
        plain.functions[0].node[0].op_type, plain.functions[0].node[0].domain = "turn", "local"
    source = save(plain, tmp_path / "in.onnx")
    with pytest.raises(DeployError, match=r"the model's functions cannot be inlined: .*turn|circle: turn calls turn"):
        optimize(OptimizeOptions(source, tmp_path / "out.onnx"))


# --- the exporters of PyTorch ----------------------------------------------------------------------------------------


def by_timm(*, dynamo: bool) -> onnx.ModelProto:
    timm = import_timm()
    torch.manual_seed(0)
    swin = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, depths=(2, 1), num_heads=(2, 4), window_size=4, num_classes=8
    ).eval()
    swin.load_state_dict({
        name: torch.randn_like(value) * 0.05 if value.is_floating_point() and "mask" not in name else value
        for name, value in swin.state_dict().items()
    })  # fmt: skip
    images = torch.zeros(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        if dynamo:
            program = torch.onnx.export(
                swin, (images,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
                input_names=["images"], output_names=["logits"], opset_version=20,
            )  # fmt: skip
            assert program is not None
            return program.model_proto
        buffer = io.BytesIO()
        torch.onnx.export(
            swin, (images,), buffer, dynamo=False, opset_version=17, input_names=["images"], output_names=["logits"],
            dynamic_axes={name: {0: "batch"} for name in ("images", "logits")},
        )  # fmt: skip
    return onnx.load_model_from_string(buffer.getvalue())


@pytest.fixture(scope="module")
def exports() -> dict[str, onnx.ModelProto]:
    return {"torchscript": by_timm(dynamo=False), "dynamo": by_timm(dynamo=True)}


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_an_export_of_timms_swin(exports: dict[str, onnx.ModelProto], exporter: str, tmp_path: Path) -> None:
    plain = exports[exporter]
    result, written = run(plain, tmp_path)
    assert {"Constant", "Shape", "Slice", "Concat", "Pad", "Identity", "Cast", "Mod"} & set(result.after.ops) == set()
    assert result.after.nodes < 0.8 * result.before.nodes
    before, after = result.before.cost, result.after.cost
    assert before.movement_bytes is not None and after.movement_bytes is not None  # noqa: PT018 - one fact
    assert after.movement_bytes < before.movement_bytes
    assert after.multiply_adds is not None
    assert after.multiply_adds <= (before.multiply_adds or 0)
    assert result.check is not None
    assert not any(output.vacuous for output in result.check.outputs)
    again = optimize(OptimizeOptions(tmp_path / "out.onnx", tmp_path / "again.onnx", check=0))
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    assert again.before.ops == again.after.ops
    save(shuffled(plain, 1), tmp_path / "shuffled.onnx")
    optimize(OptimizeOptions(tmp_path / "shuffled.onnx", tmp_path / "other.onnx", check=0))
    assert (tmp_path / "other.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    assert written.metadata_props == plain.metadata_props


def test_the_form_of_attention_can_be_chosen(exports: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    ranks = {}
    for attention in ("4d", "5d"):
        _, written = run(exports["dynamo"], tmp_path, attention=attention, check=1)
        sizes = {v.name: len(v.type.tensor_type.shape.dim) for v in written.graph.value_info}
        adds = [node for node in written.graph.node if node.op_type == "Add"]
        ranks[attention] = max(sizes.get(node.output[0], 0) for node in adds)
    assert ranks == {"4d": 4, "5d": 5}


def test_the_operator_attention_on_request(exports: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    plain = onnx.ModelProto()
    plain.CopyFrom(exports["dynamo"])
    with pytest.raises(UsageError, match=r"the graph is of opset 20\n  expected: opset 23"):
        run(plain, tmp_path, attention="onnx")
    plain.opset_import[0].version = 23  # nothing in it has changed its meaning since 20
    result, _ = run(plain, tmp_path, attention="onnx")
    assert (result.after.ops.get("Attention"), result.after.ops.get("Softmax")) == (3, None)
    assert result.after.cost.multiply_adds == result.before.cost.multiply_adds
    optimize(OptimizeOptions(tmp_path / "out.onnx", tmp_path / "again.onnx", attention="onnx", check=0))
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_another_process_writes_the_same_bytes(exports: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    run(exports["torchscript"], tmp_path, check=0)
    code = "from pathlib import Path; from deploycli.exporters.optimize import *; "
    code += "optimize(OptimizeOptions(Path('in.onnx'), Path('other.onnx'), check=0))"
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    out = (tmp_path / "out.onnx").read_bytes()
    assert (tmp_path / "other.onnx").read_bytes() == out.replace(b"out.onnx", b"other.onnx")


@pytest.mark.usefixtures("launch")
@examples(25)
@given(programs())
def test_any_program_keeps_its_answers_and_a_second_run_and_another_order_change_nothing(
    plain: onnx.ModelProto,
) -> None:
    once = in_memory(plain)
    written = onnx.load_model_from_string(once)
    assert differences(plain, written) == []
    assert in_memory(written) == once
    assert in_memory(shuffled(plain, 0)) == once


# --- the check -------------------------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the passes turn a roll the wrong way."""
    plain_rewrite = any_model.rewrite

    def rewrite(model: ir.Model, **options: Any) -> Any:
        steps = plain_rewrite(model, **options)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.size == 8:
                value.const_value = ir.tensor(tensor.numpy()[::-1].copy(), name=value.name)
        return steps

    monkeypatch.setattr(any_model, "rewrite", rewrite)
    monkeypatch.setattr(any_model, "_ROUNDS", 1)


@pytest.mark.parametrize("in_place", [False, True])
def test_another_answer_is_an_error_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    spoil(monkeypatch)
    source = save(parse(ROLL, **CONSTANTS), tmp_path / "in.onnx")
    before = source.read_bytes()
    with pytest.raises(NumericsError, match=r"answers otherwise: output y: relative error .* exceeds 0\.0001"):
        optimize(OptimizeOptions(source, source if in_place else tmp_path / "out.onnx"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"in.onnx": before}


def test_a_dry_run_checks_too_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(parse(ROLL, **CONSTANTS), tmp_path / "in.onnx")
    result = optimize(OptimizeOptions(source, None))
    assert result.files == ()
    assert result.check is not None
    assert result.after.size > 0
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]
    spoil(monkeypatch)
    with pytest.raises(NumericsError):
        optimize(OptimizeOptions(source, None))


def test_a_graph_that_draws_random_numbers_cannot_be_checked(tmp_path: Path) -> None:
    plain = parse("g (float[2] x) => (float[2] y) { r = RandomNormalLike (x) y = Add (x, r) }")
    source = save(plain, tmp_path / "in.onnx")
    with pytest.raises(UsageError, match="RandomNormalLike draws random numbers"):
        optimize(OptimizeOptions(source, tmp_path / "out.onnx"))
    run(plain, tmp_path, check=0)


def test_shapes_may_be_given(tmp_path: Path) -> None:
    text = "g (float[batch, c, h, w] x, float[1, 1, h, w] m) => (float[batch, c, h, w] y) { y = Mul (x, m) }"
    result, _ = run(parse(text), tmp_path, check=2)
    assert result.check is not None
    assert result.check.runs == ("x:3x3x224x224 m:1x1x224x224", "x:1x3x224x224 m:1x1x224x224")
    result, _ = run(parse(text), tmp_path, shapes={"x": (2, 5, 6, 7)})
    assert result.check is not None
    assert set(result.check.runs) == {"x:2x5x6x7 m:1x1x6x7"}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1,)}, "the graph has no input z"),
        ({"x": (1, 8)}, "is no shape of this input"),
        ({"x": (1, 9, 4)}, r"expected: x:batchx8x4"),
    ],
)
def test_shapes_that_do_not_fit(tmp_path: Path, shapes: Any, message: str) -> None:
    source = save(parse(ROLL, **CONSTANTS), tmp_path / "in.onnx")
    with pytest.raises(UsageError, match=message):
        optimize(OptimizeOptions(source, tmp_path / "out.onnx", shapes=shapes))


def test_small_indices_are_drawn_where_large_ones_are_refused(tmp_path: Path) -> None:
    text = "g (int64[n] ids, bool[n] b, uint8[1, 2, 2] p) => (float[n, 4] y) { y = Gather (table, ids) }"
    result, _ = run(parse(text, table=np.ones((2, 4), np.float32)), tmp_path)
    assert result.check is not None
    assert result.check.runs[0] == "ids:3 b:3 p:1x2x2"


def test_inputs_that_no_default_fits_ask_for_a_shape(tmp_path: Path) -> None:
    source = save(parse("g (float[a] x, float[b] y) => (float[n] z) { z = Add (x, y) }"), tmp_path / "in.onnx")
    with pytest.raises(UsageError, match=r"try: --shape NAME:1x3x224x224"):
        optimize(OptimizeOptions(source, tmp_path / "out.onnx"))
    result = optimize(OptimizeOptions(source, tmp_path / "out.onnx", shapes={"x": (5,), "y": (5,)}))
    assert result.check is not None


# --- files -----------------------------------------------------------------------------------------------------------


def large(folder: Path, name: str = "in.onnx") -> Path:
    text = "g (float[batch, 64] x) => (float[batch, 64] y) { a = MatMul (x, w) b = Identity (a) y = Add (b, w0) }"
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = ir.from_proto(parse(text, w=weight, w0=weight[0]))
    path, _ = write_model(model, folder / name, "always")
    return path


def test_external_data_in_and_out_in_place(tmp_path: Path) -> None:
    source = large(tmp_path)
    result = optimize(OptimizeOptions(source, source, external="always"))
    assert [path.name for path in result.unread] == ["in.onnx.data"]
    model, data = result.files
    assert data.name.startswith("in.onnx.")
    assert result.after.size == model.stat().st_size + data.stat().st_size
    assert ops(onnx.load(model)) == {"MatMul": 1, "Add": 1}
    once = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = optimize(OptimizeOptions(source, source, external="always"))
    assert again.unread == ()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == once


def test_external_data_of_inner_graphs_go_into_the_model(tmp_path: Path) -> None:
    plain = parse(
        """g (float[2] x, bool flag) => (float[2] y) {
            y = If (flag) <
                then_branch = yes () => (float[2] p) {
                    c = Constant <value: tensor = float[2] {1, 2}> () p = Add (x, c)
                },
                else_branch = no () => (float[2] q) { q = Neg (x) }
            >
        }"""
    )
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "inner.bin").write_bytes(np.float32([1, 2]).tobytes())
    branch = next(a.g for a in plain.graph.node[0].attribute if a.name == "then_branch")
    tensor = branch.node[0].attribute[0].t
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="inner.bin")
    source = save(plain, tmp_path / "deep" / "in.onnx")
    optimize(OptimizeOptions(source, tmp_path / "out.onnx", lint=False))
    (tmp_path / "deep" / "inner.bin").unlink()
    written = onnx.load(tmp_path / "out.onnx")
    assert "EXTERNAL" not in str(written)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "nowhere.bin"])
def test_external_data_outside_the_folder_or_missing(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 16384)
    (tmp_path / "sub").mkdir()
    source = large(tmp_path / "sub")
    message = onnx.load(source, load_external_data=False)
    for tensor in message.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    save(message, source)
    with pytest.raises(IntegrityError):
        optimize(OptimizeOptions(source, tmp_path / "out.onnx"))
    assert not (tmp_path / "out.onnx").exists()


def test_external_data_with_a_second_name(tmp_path: Path) -> None:
    source = large(tmp_path)
    os.link(tmp_path / "in.onnx.data", tmp_path / "second.data")
    with pytest.raises(IntegrityError, match="without hard links"):
        optimize(OptimizeOptions(source, tmp_path / "out.onnx"))


def spoiled(how: str) -> bytes:
    model = parse("g (float[2] x) => (float[2] y) { a = Neg (x) y = Abs (a) }")
    nodes = model.graph.node
    if how == "unknown value":
        nodes[0].input[0] = "nowhere"
    elif how == "circle":
        nodes[0].input[0] = "y"
    elif how == "two producers":
        nodes[1].output[0] = "a"
    elif how == "no such operator":
        nodes[0].op_type = "Negg"
    elif how == "unknown output":
        model.graph.output[0].name = "z"
    elif how == "short constant":
        model.graph.initializer.add(name="c", data_type=1, dims=[4], raw_data=b"\0" * 8)
        nodes[0].input[0] = "c"
    return model.SerializeToString()


@pytest.mark.parametrize(
    "how", ["unknown value", "circle", "two producers", "no such operator", "unknown output", "short constant"]
)
def test_invalid_graphs(tmp_path: Path, how: str) -> None:
    (tmp_path / "in.onnx").write_bytes(spoiled(how))
    with pytest.raises((ExportError, UsageError), match=r"graph|invalid"):
        optimize(OptimizeOptions(tmp_path / "in.onnx", tmp_path / "out.onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


@pytest.mark.parametrize("content", [b"", b"\x08", b"no ONNX at all, but text", bytes(range(256))])
def test_what_is_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.onnx").write_bytes(content)
    with pytest.raises(UsageError, match="is no ONNX file"):
        optimize(OptimizeOptions(tmp_path / "in.onnx", tmp_path / "out.onnx"))


def test_sparse_constants_and_training_information_are_refused(tmp_path: Path) -> None:
    for field in ("sparse", "training information"):
        model = parse(ROLL, **CONSTANTS)
        if field == "sparse":
            model.graph.sparse_initializer.add()
        else:
            model.training_info.add()
        with pytest.raises(UsageError, match=field):
            load(save(model, tmp_path / "in.onnx"))


def test_an_unknown_pass(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no pass fold-everything\n  expected: some of drop-no-ops"):
        run(parse(ROLL, **CONSTANTS), tmp_path, without=frozenset({"fold-everything"}))


def test_a_pass_may_be_left_out(tmp_path: Path) -> None:
    left_out = frozenset(name for name in optimize_module.PASSES if name.startswith("fold-movement"))
    _, written = run(parse(ROLL, **CONSTANTS), tmp_path, without=left_out)
    assert ops(written) == {"Slice": 2, "Concat": 1}


@pytest.mark.parametrize("external", ["never", "always"])
@pytest.mark.parametrize("when", ["write_model", "isolated", "place", "replace"])
def test_an_interruption_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, external: Any
) -> None:
    source = large(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    if when == "replace":  # of the model: its data are in place
        plain = Path.replace
        monkeypatch.setattr(Path, "replace", lambda a, b: interrupt() if a.suffix == ".onnx" else plain(a, b))
    else:
        monkeypatch.setattr(file_target if when == "write_model" else optimize_module, when, interrupt)
    for target in (source, tmp_path / "out.onnx"):
        with pytest.raises(KeyboardInterrupt):
            optimize(OptimizeOptions(source, target, external=external))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    source = save(parse(ROLL, **CONSTANTS), tmp_path / "in.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentUnsuitable, match="cannot write"):
        optimize(OptimizeOptions(source, tmp_path / "file" / "out.onnx"))
    with pytest.raises(UsageError, match="is a folder"):
        optimize(OptimizeOptions(source, tmp_path))


def test_the_cost_of_every_step_is_known(tmp_path: Path) -> None:
    result, _ = run(parse(ROLL, **CONSTANTS), tmp_path)
    known = Counter(step.cost is not None for step in result.steps)
    assert known[False] == 1  # tidy: nothing is inferred before
    costs = [step.cost for step in result.steps if step.cost is not None]
    assert costs[0].movement_bytes == result.before.cost.movement_bytes
    assert costs[-1] == result.after.cost
    assert result.to_json()["steps"][-1]["cost"] == {
        "movement_bytes": 128, "multiply_adds": 0, "constant_bytes": 64,
    }  # fmt: skip
