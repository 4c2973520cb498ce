"""The one console: everything that people read goes through it, and through `deploycli.ending.say` what ends a command.

Names and texts come from files of strangers. They are escaped when they become part of what is printed: strings that
are printed as they are, cells of tables, text with a style. No markup is read, which brackets in a name would be.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

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


def stdout() -> Output:
    """Return a console that breaks no lines in a file or a pipe."""
    console = Output()
    return console if console.is_terminal else Output(width=200)


def stderr() -> Output:
    """Return a console on this very stream, also while something redirects stderr."""
    return Output(file=sys.stderr)


def styled(text: str, style: str = "") -> Text:
    """Return text with a style, escaped."""
    return Text(escaped(text), style)


def assembled(*parts: str | tuple[str, str]) -> Text:
    """Return text in pieces, some of them with a style, escaped."""
    return Text.assemble(*(escaped(p) if isinstance(p, str) else (escaped(p[0]), p[1]) for p in parts))


def table_of(*columns: str) -> Rows:
    """Return an empty table with these headings."""
    table = Rows(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def facts() -> Rows:
    """Return an empty table of facts: what, and which."""
    table = Rows.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    assert isinstance(table, Rows), "grid makes one of its own class"
    return table


def _escaped(value: Any) -> Any:
    return escaped(value) if isinstance(value, str) else value
