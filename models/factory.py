"""Functions of the user's own, by name: ``package.module:function`` or ``path/to/file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycli.models.errors import UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType


def call_factory(target: str, kwargs: Mapping[str, Any]) -> object:
    """Import a function and call it; a module is looked for in the working folder too.

    Args:
        target: ``package.module:function`` or ``path/to/file.py:function``.
        kwargs: its keyword arguments.

    Raises:
        UsageError: there is no such module, file or function.
        Exception: whatever the stranger's code raises.
    """
    place, _, name = target.rpartition(":")
    with contained():
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise UsageError(f"{place} has no function {name!r}", expected="package.module:function")
    with contained():
        return factory(**kwargs)


class Exited(RuntimeError):  # noqa: N818 - it tells what was done
    """A stranger's code wanted to end the process."""


@contextmanager
def contained() -> Iterator[None]:
    """Turn ``sys.exit`` of a stranger's code, and whatever else is no `Exception`, into an exception like any other.

    What ends the command stays what it is: KeyboardInterrupt, and what Ctrl-C and SIGTERM raise.

    Raises:
        Exited: something of the kind was raised.
    """
    try:
        yield
    except SystemExit as error:
        raise Exited(f"it called sys.exit({error.code!r})").with_traceback(error.__traceback__) from None
    except BaseException as error:
        if isinstance(error, Exception | KeyboardInterrupt) or hasattr(error, "exit_code"):  # ours has one
            raise
        told = f"it raised {type(error).__name__}, which is no Exception: {first_line(error)}"
        raise Exited(told).with_traceback(error.__traceback__) from None


def said(error: BaseException) -> str:
    """Return what a stranger's code raised, and the last line of the traceback: ``KeyError: 'x' (file:line)``."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"


def _import_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        raise UsageError(
            f"there is no module {missing!r}" + ("" if missing in name else f", which {name} imports"),
            expected=f"{name}, importable from {here}",
            hint="run from the folder that holds it, or install it",
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file {path}", expected="path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickling look their module up
    spec.loader.exec_module(module)
    return module
