"""What holds for the repository as a whole: lint, types, the direction of imports, the documents."""

import ast
import graphlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from deploycli.cli import COMMANDS, cli
from deploycli.exporters.passes.pipeline import PASSES
from tests.one_package import as_installed, mypy
from tests.tensorrt_api.bindings import locked
from tests.transcripts import blocks, documents

ROOT = Path(__file__).parents[1]
LAYERS = ("models", "exporters", "deploycli")


# Folder -> what it imports beside itself; modules that are in none are the journeys.
IMPORTS = {
    "models": "",
    "graph": "models",
    "bundle": "models graph target",
    "data": "models bundle",
    "runtime": "models",
    "verification": "models bundle data runtime",
    "target": "models",
    "lint": "models graph bundle target",
    "precision": "models graph bundle data runtime verification target lint",
    "passes": "models graph",
    "tensorrt": "models graph bundle runtime target lint",
    "journeys": "models graph bundle data runtime verification target lint precision passes tensorrt",
    "bench": "models graph bundle runtime verification target precision tensorrt",
    "serving": "models graph bundle target",
    "deploycli": "models graph bundle runtime verification target lint precision tensorrt journeys bench serving",
}


def module_of(path: Path) -> str:
    return ".".join(as_installed(path).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for package in LAYERS for path in (ROOT / package).rglob("*.py")}


def folder_of(module: str) -> str:
    top, *inside = MODULES[module].relative_to(ROOT).parts
    return top if top != "exporters" else inside[0] if len(inside) > 1 else "journeys"


def imports_of(module: str) -> set[str]:
    """Our modules that a module imports, wherever in it, or for types."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys()


@pytest.mark.parametrize("folder", IMPORTS)
def test_folders_import_what_the_table_says(folder: str) -> None:
    modules = [module for module in MODULES if folder_of(module) == folder]
    assert modules, "no such folder"
    found = {folder_of(imported) for module in modules for imported in imports_of(module)} - {folder}
    assert found == set(IMPORTS[folder].split())


@pytest.mark.parametrize("folder", sorted(IMPORTS.keys() - {"journeys", "deploycli"}))
def test_a_folder_says_what_it_imports(folder: str) -> None:
    path = ROOT / folder if folder in LAYERS else ROOT / "exporters" / folder
    readme = path / "README.md"
    text = (readme if readme.is_file() else path / "__init__.py").read_text("utf-8")
    (sentence,) = re.findall(r"It\s+imports\s([^.;]+)", text)
    assert set(re.findall(r"\w+", sentence)) & IMPORTS.keys() == set(IMPORTS[folder].split()), f"in {folder}"


def test_folders_are_in_no_circle() -> None:
    graphlib.TopologicalSorter({folder: names.split() for folder, names in IMPORTS.items()}).prepare()
    assert {folder_of(module) for module in MODULES} == IMPORTS.keys()


def test_modules_are_in_no_circle() -> None:
    imports = {module: imports_of(module) - {module} for module in MODULES}

    def reached(module: str) -> set[str]:
        found, waiting = set[str](), [module]
        while waiting:
            new = imports[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    assert {module for module in MODULES if module in reached(module)} == set()


def test_every_folder_is_installed() -> None:
    listed = re.search(
        r"^packages = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert listed is not None
    packages = re.findall(r'"(.*)"', listed[1])
    assert packages == sorted(module for module, path in MODULES.items() if path.name == "__init__.py")


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_ruff(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", *LAYERS, "tests"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_mypy() -> None:
    """With the cache of tests.tensorrt_api.stubs, whose runs read the same files."""
    with locked("mypy") as kept:
        result = mypy(cache=kept / "mypy")
    assert result.returncode == 0, result.stdout + result.stderr


def commands() -> list[tuple[str, list[str]]]:
    """Every call of ours in a console block of a README, and where it stands."""
    return [
        (block.place, call[1:])
        for file in documents()
        for block in blocks(file)
        for command in block.commands
        for call in command.calls
        if call[0] == "deploycli"
    ]


def test_commands_of_the_documents_parse() -> None:
    found = commands()
    assert len(found) > 40
    for place, (name, *arguments) in found:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, f"{place}: no command {name}"
        try:
            command.make_context(name, arguments, resilient_parsing=False)
        except click.ClickException as error:
            pytest.fail(f"{place}: {name} {shlex.join(arguments)}: {error.format_message()}")


def options() -> dict[str, list[click.Option]]:
    found = {name: cli.get_command(click.Context(cli), name) for name in COMMANDS}
    return {
        name: [param for param in command.params if isinstance(param, click.Option)]
        for name, command in found.items()
        if command is not None
    }


def test_every_option_has_help() -> None:
    assert [f"{name} {option.opts[0]}" for name, of in options().items() for option in of if not option.help] == []


# Options of other programs, and of the scripts of the tests, that our documents name.
OTHERS = {"--gpus", "--help", "--index-url", "--modelopt", "--record", "--rm", "--strict", "--validate", "--write"}


def test_documents_name_only_options_that_there_are() -> None:
    ours = {text for of in options().values() for option in of for text in (*option.opts, *option.secondary_opts)}
    for file in documents():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", file.read_text("utf-8")))
        assert named - ours - OTHERS == set(), file.relative_to(ROOT)


def test_documents_name_only_files_that_there_are() -> None:
    for file in documents():
        text = file.read_text("utf-8")
        links = re.findall(r"\]\(([^)#]+)", text)
        names = re.findall(r"`((?:models|exporters|deploycli|tests)/[\w/]+\.(?:py|md))`", text)
        modules = (name.replace(".", "/") for name in re.findall(r"\btests(?:\.\w+)+", text))
        missing = [link for link in links if "://" not in link and not (file.parent / link).exists()]
        missing += [name for name in names if not (ROOT / name).is_file()]
        missing += [name for name in modules if not (ROOT / f"{name}.py").is_file() and not (ROOT / name).is_dir()]
        assert missing == [], file.relative_to(ROOT)


def test_every_pass_is_explained() -> None:
    named = set(re.findall(r"`([a-z-]+)`", (ROOT / "exporters/passes/README.md").read_text("utf-8")))
    assert [name for name in PASSES if name not in named] == []


def test_readme_opens_with_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    first = readme.index("deploycli export swin_t --fmt onnx && deploycli build-trt && deploycli verify")
    assert first < readme.index("## ")
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in readme
