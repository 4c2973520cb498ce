"""The console blocks of every README: which of them run, what they show, and what they print.

    python -m tests.transcripts [--write]

runs them as the tests do, in a new folder; `--write` puts what they print into the files that show it.

A block is fenced as ``console``; its commands begin with ``$ ``. The lines below a command are what it prints at 80
columns, where a line ``...`` stands for any lines; a command that shows nothing is only run. It must exit with 0, or
with N where ``  # exit N`` follows it. A block that is not run says why in a comment before it:
``<!-- not run: needs a GPU -->``.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.deploycli.commands import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).parents[1]

# A terminal without colours; rich takes a dumb one to have 80 columns.
TERMINAL = {"TERM": "dumb", "TTY_COMPATIBLE": "1"}

_BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```console\n(?P<text>.*?)```", re.DOTALL)
_VARIES = (
    (r"\b\d\.\de-\d\d\b", "ERROR"),
    (r"\b[01]\.\d{6}\b", "COSINE"),
    (r"\b\d+/\d+ \(\d+\)", "TOP-1"),
    (r"\bin \d+ s\b", "in N s"),
    (r"\b\d+(\.\d+){2,3}\b", "VERSION"),
    (r"\b[0-9a-f]{12,64}\b", "HASH"),
    (r"\s+", " "),
)


@dataclass(frozen=True)
class Command:
    """A command of a block.

    Attributes:
        line: as it is written, without its prompt.
        shown: what the file says that it prints.
    """

    line: str
    shown: list[str] = field(default_factory=list)

    @property
    def code(self) -> int:
        """The exit code that the file promises."""
        found = re.search(r"  # exit (\d+)$", self.line)
        return int(found[1]) if found else 0

    @property
    def calls(self) -> list[list[str]]:
        """The words of each call; of a line with && there are several."""
        words, calls = shlex.split(self.line, comments=True), list[list[str]]()
        for word in ["&&", *words]:
            if word == "&&":
                calls.append([])
            else:
                calls[-1].append(word)
        return calls


@dataclass(frozen=True)
class Block:
    """A console block.

    Attributes:
        file: the README.
        line: number of its first line.
        reason: why it is not run; empty where it is.
        commands: in order.
    """

    file: Path
    line: int
    reason: str
    commands: list[Command]

    @property
    def place(self) -> str:
        """Where it stands."""
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    """Return the Markdown files of the repository, first the one at the top: the others use its bundle."""
    folders = ("models", "exporters", "deploycli", "tests")  # models/README.md exports what the others use
    below = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.md")))
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *below]


def blocks(file: Path) -> list[Block]:
    """Read the console blocks of a file."""
    text = file.read_text("utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        commands = list[Command]()
        for line in match["text"].splitlines():
            if line.startswith("$ "):
                commands.append(Command(line.removeprefix("$ ")))
            elif commands:
                commands[-1].shown.append(line)
        found.append(Block(file, text.count("\n", 0, match.start("text")), match["reason"] or "", commands))
    return found


def same(shown: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether a file shows what was printed, but for figures that differ between machines."""
    patterns = [".*" if line == "..." else re.escape(alike(line)) for line in shown]
    return re.fullmatch("\n".join(patterns), "\n".join(map(alike, printed)), re.DOTALL) is not None


def alike(line: str) -> str:
    """Return a line with what differs between machines replaced: rounding, seconds, versions and hashes."""
    for pattern, name in _VARIES:
        line = re.sub(pattern, name, line)
    return line.strip()


def words_of(call: Sequence[str]) -> list[str]:
    """Expand names of files as a shell does."""
    found = list[str]()
    for word in call:
        names = [str(path) for path in sorted(Path().glob(word))] if "*" in word else []
        found += names or [word]
    return found


def shown_of(out: str, err: str) -> list[str]:
    """Return the lines that stay on a terminal: stdout, and of stderr what is no progress."""
    kept = [line for line in err.splitlines() if line.startswith(("weights:", "warning:"))]
    start = err.find("error:")
    kept += err[start:].splitlines() if start >= 0 else []
    return [line.rstrip() for line in (*kept, *out.splitlines())]


def run_all(call: Callable[[list[str]], tuple[int, str, str]]) -> Iterator[tuple[Block, Command, int, list[str]]]:
    """Run what runs, in the order of the files, in the current folder; yield exit codes and lines.

    Args:
        call: runs ``deploycli`` with these arguments; returns exit code, stdout and stderr.
    """
    for block in (block for file in documents() for block in blocks(file) if not block.reason):
        for command in block.commands:
            code, lines = 0, list[str]()
            for program, *arguments in command.calls:
                if program != "deploycli":
                    raise ValueError(f"{block.place}: `{command.line}` is no deploycli command: say why it is not run")
                code, out, err = call(words_of(arguments))
                lines += shown_of(out, err)
                if code:
                    break
            yield block, command, code, lines


def summary() -> str:
    """Say how many blocks run, and how many do not, and why."""
    found = [block for file in documents() for block in blocks(file)]
    reasons = Counter(block.reason for block in found if block.reason)
    run = sum(not block.reason for block in found)
    return "\n".join([f"{run} console blocks run", *(f"{count} not run: {why}" for why, count in reasons.items())])


def _call(arguments: list[str]) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "deploycli", *arguments],
        env=ENVIRONMENT | TERMINAL,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def main() -> None:
    """Run them and say what differs, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put what is printed into the files")
    write = parser.parse_args().write
    print(summary())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for block, command, code, lines in run_all(_call):
            right = same(command.shown, lines) or not command.shown
            if code != command.code:
                print(f"{block.place}: {command.line}: exit {code}\n  " + "\n  ".join(lines))
            elif not right and write and "..." not in command.shown:
                text = block.file.read_text("utf-8")
                before = "\n".join([f"$ {command.line}", *command.shown])
                block.file.write_text(text.replace(before, "\n".join([f"$ {command.line}", *lines]), 1), "utf-8")
            elif not right:
                print(f"{block.place}: {command.line} prints\n  " + "\n  ".join(lines))


if __name__ == "__main__":
    main()
