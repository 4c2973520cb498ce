"""The source folders as the one package that they are installed as, for a tool that reads files: mypy.

    python -m tests.one_package [OPTION_OF_MYPY]...

checks the types of all of it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "pyproject.toml"
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


def mypy(
    *options: str,
    cache: Path = ROOT / ".mypy_cache",
    config: Path = CONFIG,
    stubs: Path | None = None,
    beside: Sequence[Path] = (),
) -> "subprocess.CompletedProcess[str]":
    """Run mypy on the package; its output is captured.

    Args:
        options: of mypy; files among them, as they are seen from the folder that holds the package, are all it judges.
        cache: its folder.
        config: its configuration.
        stubs: a folder for ``MYPYPATH``.
        beside: files to copy beside the package.
    """
    with tempfile.TemporaryDirectory() as top:
        for file in beside:
            shutil.copy(file, top)
        command = [sys.executable, "-m", "mypy", f"--config-file={config}", f"--cache-dir={cache}", *options]
        env = os.environ | ({} if stubs is None else {"MYPYPATH": str(stubs)})
        return subprocess.run(command, cwd=linked(Path(top)), env=env, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    result = mypy(*sys.argv[1:])
    print(result.stdout + result.stderr, end="")
    sys.exit(result.returncode)
