"""What rich prints with, made to escape. Importing rich takes a while: `deploycli.console` does it when it prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from deploycli.ending import to_nowhere
from deploycli.escaping import escaped


class Output(Console):
    """A stream whose reader may leave when it has enough, as head does: the command, and its exit code, go on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print strings, escaped, and what is made of them here."""
        super().print(*map(_escaped, objects), **options)

    def whole_line(self, text: str) -> None:
        """Print one line as it is, however long, escaped."""
        self.verbatim(escaped(text))

    def verbatim(self, text: str) -> None:
        """Print text that is escaped already, such as JSON."""
        super().print(text, no_wrap=True, overflow="ignore", crop=False)

    def on_broken_pipe(self) -> None:
        """Write the rest to nowhere."""
        to_nowhere(self.file)


class Rows(Table):
    """A table whose cells are escaped."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row."""
        super().add_row(*map(_escaped, cells), **options)


def _escaped(value: Any) -> Any:
    return escaped(value) if isinstance(value, str) else value
