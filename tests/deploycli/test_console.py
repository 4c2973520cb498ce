"""Names of strangers on a terminal: spelled, not obeyed; and nothing prints past the console."""

from __future__ import annotations

import ast
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.torch import save_file

from deploycli.console import assembled, styled
from deploycli.escaping import escaped, escaped_message
from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.bundle.manifest import MANIFEST_NAME
from deploycli.exporters.graph.steps import Remark, Step
from deploycli.models.spec import Weights
from deploycli.terminal import Output, Rows
from tests.exporters.bundle import bundles

if TYPE_CHECKING:
    from tests.deploycli.commands import Result
    from tests.deploycli.conftest import Command

ROOT = Path(__file__).parents[2]
EVIL = "\x1b[31mEVIL\x1b]0;title\x07\n\r\t\x7f\x9b2J\u202e\u2066\u200b[red]x[/red]"
SPELLED = r"\x1b[31mEVIL\x1b]0;title\x07\n\r\t\x7f\x9b2J\u202e\u2066\u200b[red]x[/red]"


def assert_harmless(result: Result, *, shown: bool = True) -> None:
    for text in (result.out, result.err):
        assert all(c.isprintable() or c == "\n" for c in text), ascii(text)
    assert "Traceback" not in result.err
    if shown:
        joined = (result.out + result.err).replace("\n", "").replace(" ", "")
        assert SPELLED.replace(" ", "") in joined, ascii(joined)


@given(st.text())
def test_whatever_is_printed_is_one_line_that_prints(text: str) -> None:
    assert escaped(text).isprintable()
    assert escaped(escaped(text)) == escaped(text)
    if text.isprintable():
        assert escaped(text) == text
    for thing in (text, styled(text, "red"), assembled((text, "red"), text)):
        stream = io.StringIO()
        Output(file=stream, width=100_000).print(thing, soft_wrap=True)
        assert stream.getvalue().count("\n") == 1
        assert escaped(text) in stream.getvalue() or not text.strip()
    stream = io.StringIO()
    table = Rows("a")
    table.add_row(text)
    Output(file=stream, width=100_000).print(table)
    assert all(c.isprintable() or c == "\n" for c in stream.getvalue())


def test_an_error_keeps_its_lines_and_a_name_gets_none() -> None:
    assert escaped_message("no\x1b\n  expected: a\n  try: b") == "no\\x1b\n  expected: a\n  try: b"
    assert escaped_message("the name a\nerror: b") == r"the name a\nerror: b"


def hostile_model(path: Path) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x" + EVIL, "y" + EVIL)]
    one = helper.make_tensor("w" + EVIL, TensorProto.FLOAT, [4], [1.0] * 4)
    nodes = [
        helper.make_node("Mul", ["x" + EVIL, "w" + EVIL], ["m" + EVIL], name=EVIL),
        helper.make_node("Einsum", ["m" + EVIL], ["y" + EVIL], name=EVIL * 2, equation="...->..."),
    ]
    graph = helper.make_graph(nodes, EVIL, ends[:1], ends[1:], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8, producer_name=EVIL)
    onnx.save(model, path)
    return path


def test_graphs(deploycli: Command, tmp_path: Path) -> None:
    file = hostile_model(tmp_path / "evil.onnx")
    assert_harmless(deploycli("inspect", file))
    assert_harmless(deploycli("lint", file, "-v"), shown=False)
    assert_harmless(deploycli("optimize", file, "-o", "o.onnx", "-v", "--no-lint"), shown=False)
    assert_harmless(deploycli("optimize", file, "--dry-run", "--check", 0, "-v", "--no-lint"), shown=False)
    for command in (("inspect", file),):
        result = deploycli(*command, "--json")
        assert result.out.isascii()
        assert EVIL in strings(json.loads(result.out))


def strings(value: Any) -> set[str]:
    if isinstance(value, dict | list):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return {text for item in inner for text in strings(item)}
    return {value} if isinstance(value, str) else set()


def hostile_bundle(folder: Path) -> Bundle:
    bundle = bundles.make(folder)
    manifest = bundle.manifest
    step = Step(EVIL, 1, 0.5, (Remark(EVIL, EVIL),), remark=EVIL)
    (artifact,) = manifest.artifacts
    artifact = replace(artifact, steps=(step,), ops_before={EVIL: 1}, source=EVIL)
    weights = Weights("checkpoint", path=f"/nowhere/{EVIL}", sha256="0" * 64, report={EVIL: 1}, entry=EVIL)
    spec = replace(manifest.spec, name=EVIL, family=EVIL)
    manifest = replace(
        manifest, tool_version=EVIL, spec=spec, weights=weights, artifacts=(artifact,), versions={EVIL: EVIL}
    )
    (bundle.path / MANIFEST_NAME).write_text(manifest.dumps())
    return Bundle.open(bundle.path)


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "-v"),
        ("verify", "--batches", "1"),
        ("bench", "--rounds", "1", "--batches", "1"),
        ("cast", "-v"),
        ("lint", "-v"),
        ("package", "--triton", "t"),
        ("quantize", "--allow-random-calibration", "--samples", "2"),
        ("build-trt", "--dry-run"),
        ("verify", "--reference", "eager"),
    ],
)
def test_bundles(deploycli: Command, tmp_path: Path, command: tuple[str, ...]) -> None:
    bundle = hostile_bundle(tmp_path / "artifacts")
    assert_harmless(deploycli(command[0], bundle.path, *command[1:]), shown=command[0] in ("inspect", "verify"))


def test_a_folder_and_a_file(deploycli: Command, tmp_path: Path) -> None:
    name = EVIL.replace("/", "")
    bundle = bundles.make(tmp_path)
    shutil.move(bundle.path, tmp_path / name)
    for command in ("inspect", "lint", "verify"):
        result = deploycli(command, tmp_path / name)
        assert_harmless(result, shown=False)
        assert r"\x1b[31mEVIL" in result.out + result.err
    for command in ("inspect", "lint"):
        assert_harmless(deploycli(command, f"{name}.onnx"), shown=False)
    assert_harmless(deploycli("list", name), shown=False)
    assert_harmless(deploycli(name), shown=False)
    assert_harmless(deploycli("inspect", "a", name), shown=False)
    assert_harmless(deploycli("verify", f"--{name}"), shown=False)
    assert_harmless(deploycli("export", name), shown=False)


def test_keys_of_a_checkpoint_and_fields_of_json(deploycli: Command, tmp_path: Path, smallest: str) -> None:
    save_file({EVIL: torch.ones(2), "head.weight": torch.ones(5, 4)}, tmp_path / "evil.safetensors")
    assert_harmless(deploycli("export", smallest, "--checkpoint", "evil.safetensors"), shown=False)
    bundle = bundles.make(tmp_path / "artifacts")
    data: dict[str, Any] = json.loads((bundle.path / MANIFEST_NAME).read_text())
    for change in ({EVIL: 1}, {"golden": {**data["golden"], "path": f"../{EVIL}"}}):
        (bundle.path / MANIFEST_NAME).write_text(json.dumps(data | change))
        result = deploycli("inspect", bundle.path)
        assert result.code == 8
        assert_harmless(result, shown=False)


PRINTS = {
    "deploycli/ending.py": {"print"},
    "exporters/tensorrt/child.py": {"print"},
    "exporters/serving/ort_rtx_load.py": {"print"},
}
"""Who may: what ends a command, escaped; a child, into its own log; what is
run without this program."""


def test_nothing_prints_past_the_console() -> None:
    guilty = []
    for package in ("deploycli", "exporters", "models"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            tree = ast.parse(path.read_text("utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                    guilty += [] if name in PRINTS else [f"{name}:{node.lineno}: print"]
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.stdout.write", "sys.stderr.write"):
                    guilty.append(f"{name}:{node.lineno}: {ast.unparse(node.func)}")
                if isinstance(node, ast.ImportFrom) and node.module in ("rich.console", "rich.text", "rich.table"):
                    typed = name.startswith("deploycli/commands") and node.col_offset > 0
                    ours = name in ("deploycli/console.py", "deploycli/terminal.py")
                    guilty += [] if typed or ours else [f"{name}:{node.lineno}: {node.module}"]
    assert not guilty
