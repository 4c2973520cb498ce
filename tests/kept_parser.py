"""NVIDIA's parser as the gate of export, cast, quantize and optimize asks it: one child for all tests of a process.

The product starts a child for each file, which takes half a second; a test of the command line in a process of its own
does so too, and so does ``lint --parser``. Here the files are hundreds, all our own, and none of them crashes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING

from deploycli.exporters.runtime.isolated import die_with
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.verdict import Verdict
from deploycli.exporters.tensorrt import parser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SECONDS = 60.0


def _library() -> str | None:
    """Where the library would be imported from: a test may have put another in its place."""
    try:
        found = find_spec(RTX.module)
    except (ImportError, ValueError):
        return None
    return None if found is None else found.origin


class _Child:
    """The child; it dies with this process."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())],
            cwd=Path(__file__).parents[1],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # that there is no driver
        )
        theirs.close()


_LIBRARY = _library()
_child: _Child | None = None


@contextmanager
def judging(path: Path) -> Iterator[Callable[[], Verdict]]:
    """Yield what gives the verdict on a file; where the library is another one, as the product does."""
    if _library() != _LIBRARY:
        with parser.judging(path) as verdict:
            yield verdict
        return
    global _child
    _child = _child or _Child()
    pipe, verdicts = _child.pipe, list[Verdict]()
    pipe.send(str(path.absolute()))

    def received() -> Verdict:
        if not verdicts:
            assert pipe.poll(_SECONDS), f"no verdict on {path}"
            verdicts.append(pipe.recv())
        return verdicts[0]

    try:
        yield received
    finally:
        received()


def _serve(pipe: Connection) -> None:
    while True:
        try:
            path = Path(pipe.recv())
        except EOFError:
            return
        pipe.send(parser._judge(path, progress=lambda _: None))


if __name__ == "__main__":
    die_with(int(sys.argv[2]))
    _serve(Connection(int(sys.argv[1])))
