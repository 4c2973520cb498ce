"""The three ways to install it, each into an environment that has nothing of ours, used beside folders of its names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.deploycli.commands import Result, run
from tests.one_package import MAPPED, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCES = ("deploycli", *MAPPED)


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and where the package is to be imported from in it."""

    python: Path
    package: Path  # of deploycli
    mapped: Path  # the folder that holds what is installed as deploycli.models

    @property
    def script(self) -> Path:
        return self.python.with_name("deploycli")


def ran(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied(folder: Path) -> Path:
    """Copy what the package is made of: a build leaves folders beside its sources."""
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a source distribution, and the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("built")
    ran(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", copied(folder), cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def environments(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Environment]:
    """Make an environment in one of the ways, once."""
    return cache(lambda way: installed(way, tmp_path_factory.mktemp("environment"), built))


@pytest.fixture(params=["pip install .", "pip install -e .", "wheel"])
def environment(request: pytest.FixtureRequest, environments: Callable[[str], Environment]) -> Environment:
    return environments(request.param)


def installed(way: str, folder: Path, built: Path) -> Environment:
    """Make an environment. What the package depends on is what this process has."""
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    dependencies = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in dependencies))  # after what is installed
    install = (python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--ignore-installed")
    if way == "wheel":
        (wheel,) = built.glob("*.whl")
        ran(*install, wheel, cwd=folder)
        return Environment(python, site / "deploycli", site / "deploycli")
    (folder / "sources").mkdir()
    sources = copied(folder / "sources")
    ran(*install, *way.split()[2:], cwd=sources)
    if way == "pip install -e .":
        return Environment(python, sources / "deploycli", sources)
    shutil.rmtree(sources)  # nothing is read from there
    return Environment(python, site / "deploycli", site / "deploycli")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A user's own, whose packages have the names of our folders, and fail where they are taken for them."""
    for name in MAPPED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('of the user')\n")
    return tmp_path


def test_it_is_imported_from_what_was_installed(environment: Environment, repository: Path) -> None:
    names = ["deploycli", *(f"deploycli.{name}" for name in MAPPED)]
    code = f"import json, {', '.join(names)}; print(json.dumps([module.__file__ for module in ({', '.join(names)})]))"
    found = json.loads(run("-c", code, cwd=repository, program=(environment.python,)).out)
    folders = [environment.package, *(environment.mapped / name for name in MAPPED)]
    assert found == [str(folder / "__init__.py") for folder in folders]


def test_script_and_module_say_the_version(environment: Environment, repository: Path) -> None:
    for program in ((environment.script,), (environment.python, "-m", "deploycli")):
        result = run("--version", cwd=repository, program=program)
        assert result == Result(0, f"deploycli {version('deploycli')}\n", "")


def test_module_lists_models_beside_folders_of_the_same_names(environment: Environment, repository: Path) -> None:
    listed = run("list", "--json", cwd=repository, program=(environment.python, "-m", "deploycli")).json()
    assert "deit_t" in [model["name"] for model in listed]


@pytest.mark.parametrize("environment", ["wheel"], indirect=True)
def test_a_wheel_exports_beside_folders_of_the_same_names(environment: Environment, repository: Path) -> None:
    command = ("export", "deit_t", "--img-size", "32", "--json")
    exported = run(*command, cwd=repository, program=(environment.python, "-m", "deploycli")).json()
    assert exported["path"] == "artifacts/deit_t"
    assert (repository / "artifacts/deit_t/model.onnx").is_file()


def test_a_wheel_has_every_source_file_and_no_other(built: Path) -> None:
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    sources = {path.relative_to(ROOT) for name in SOURCES for path in (ROOT / name).rglob("*") if path.is_file()}
    sources = {path for path in sources if path.suffix not in {".md", ".pyc"}}
    assert {"py.typed", "operators.json"} <= {path.name for path in sources}
    expected = {str("deploycli" / path if path.parts[0] in MAPPED else path) for path in sources}
    information = f"deploycli-{version('deploycli')}.dist-info"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if not name.startswith(information)} == expected
    assert {f"{information}/entry_points.txt", f"{information}/licenses/LICENSE"} <= set(names)
    with tarfile.open(archive) as found:
        inside = {str(Path(*Path(name).parts[1:])) for name in found.getnames()}
    assert {str(path) for path in sources} <= inside
