"""The source folders as the one package that they are installed as, for a tool that reads files: mypy.

    python -m tests.one_package [OPTION_OF_MYPY]...

checks the types of all of it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAPPED = ("models", "exporters")  # as in pyproject.toml


def linked(folder: Path) -> Path:
    """Make the package ``deploycli`` in a folder, of links to the sources; return the folder."""
    package = folder / "deploycli"
    package.mkdir()
    for entry in (ROOT / "deploycli").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in MAPPED:
        (package / name).symlink_to(ROOT / name)
    return folder


def as_installed(path: Path) -> Path:
    """Return where a source file is in the package, relative to the folder that holds the package."""
    relative = path.resolve().relative_to(ROOT)
    return Path("deploycli") / relative if relative.parts[0] in MAPPED else relative


def mypy(*options: str, cache: Path = ROOT / ".mypy_cache") -> "subprocess.CompletedProcess[str]":
    """Run mypy on the package; its output is captured."""
    with tempfile.TemporaryDirectory() as folder:
        config = f"--config-file={ROOT / 'pyproject.toml'}"
        command = [sys.executable, "-m", "mypy", config, f"--cache-dir={cache}", *options]
        return subprocess.run(command, cwd=linked(Path(folder)), capture_output=True, text=True, check=False)


if __name__ == "__main__":
    result = mypy(*sys.argv[1:])
    print(result.stdout + result.stderr, end="")
    sys.exit(result.returncode)
