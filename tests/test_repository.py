"""What holds for the repository as a whole: lint, types, the direction of imports, the README."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from deploycli.cli import COMMANDS, cli

ROOT = Path(__file__).parents[1]
LAYERS = ("models", "exporters", "deploycli")  # data flows this way, imports point the other way
README = (ROOT / "README.md").read_text("utf-8")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_one_way(package: str) -> None:
    above = set(LAYERS[LAYERS.index(package) + 1 :])
    guilty = {str(path.relative_to(ROOT)): imported_packages(path) & above for path in sources(package)}
    assert not {path: found for path, found in guilty.items() if found}


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_ruff(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", *LAYERS, "tests"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_mypy() -> None:
    command = [sys.executable, "-m", "mypy"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:console|bash)\n(.*?)```", README, re.DOTALL)
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    calls = [part.strip() for line in lines for part in line.split("&&")]
    return [call for call in calls if call.startswith("deploycli ")]


@pytest.mark.parametrize("line", readme_commands())
def test_readme_command_parses(line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    if arguments[0].startswith("-"):
        return  # an option of the group: it exits while it is parsed
    command = cli.get_command(click.Context(cli), arguments[0])
    assert command is not None, f"{line}: no such command"
    command.make_context(arguments[0], arguments[1:], resilient_parsing=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_readme_names_every_option(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = [option for param in command.params for option in param.opts if option.startswith("--")]
    assert [option for option in options if f"`{option}" not in README] == []


def test_readme_opens_with_the_two_commands() -> None:
    assert README.index("deploycli export swin_t --fmt onnx && deploycli build-trt && deploycli verify") < README.index(
        "## "
    )
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in README
