from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from deploycli.cli import COMMANDS
from tests.deploycli.commands import ENVIRONMENT, SCRIPT, module, run

if TYPE_CHECKING:
    from pathlib import Path

HEAVY = {"torch", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "PIL", "huggingface_hub", "rich", "msgspec"}
HELPS = [[], *([name] for name in COMMANDS)]


@pytest.mark.parametrize("command", HELPS, ids=lambda command: " ".join(command) or "group")
def test_help_has_an_example_and_imports_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    result = run(*command, "--help", cwd=tmp_path, program=module("-X", "importtime"))
    assert result.code == 0
    assert "Example" in result.out
    assert f"deploycli {' '.join(command)}".strip() + " " in result.out.partition("Example")[2]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.err.splitlines()}
    assert "click" in imported
    assert imported & HEAVY == set()


def test_group_help_names_every_command_and_exit_code(tmp_path: Path) -> None:
    out = " ".join(run("--help", cwd=tmp_path).out.split())
    for name, summary in COMMANDS.items():
        assert f"{name} {summary}" in out
    for code in (*range(9), 130):
        assert f" {code} " in out.partition("Exit codes:")[2]


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param("bash", marks=pytest.mark.skipif(not shutil.which("bash"), reason="click asks bash its version")),
        "zsh",
        "fish",
    ],
)
def test_completion_script(shell: str, tmp_path: Path) -> None:
    result = run(cwd=tmp_path, _DEPLOYCLI_COMPLETE=f"{shell}_source")
    assert result.code == 0
    assert "_DEPLOYCLI_COMPLETE" in result.out


def complete(line: str, cwd: Path) -> list[str]:
    words = line.split(" ")
    environment = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_DEPLOYCLI_COMPLETE": "bash_complete"}
    result = run(cwd=cwd, **environment)
    assert result.err == ""
    return [entry.partition(",")[2] for entry in result.out.splitlines()]


def test_completion_offers_models_commands_and_options(tmp_path: Path) -> None:
    models = complete("deploycli export swin_", tmp_path)
    assert {"swin_t", "swin_b_384"} <= set(models)
    assert all(name.startswith("swin_") for name in models)
    assert complete("deploycli ver", tmp_path) == ["verify"]
    assert complete("deploycli verify --ref", tmp_path) == ["--reference"]


def test_program_is_the_installed_one(tmp_path: Path) -> None:
    assert SCRIPT.is_file(), "install the package: pip install -e ."
    code = "import deploycli; print(deploycli.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=True)
    assert str(run.__code__.co_filename).partition("/tests/")[0] in found.stdout.decode()
