"""Write protobuf's text format, without the message classes.

A message is a mapping from field names to values. A value is a bool, an int, a text, a `Symbol`, another
message, or a list: of messages, which repeats the field, or of scalars, which is written as ``[1, 3, 224]``.

Source: https://protobuf.dev/reference/protobuf/textformat-spec/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TypeAlias

    Scalar: TypeAlias = bool | int | str
    Message: TypeAlias = Mapping[str, "Value"]
    Value: TypeAlias = Scalar | Message | Sequence[Scalar] | Sequence[Message]

_WIDTH = 100
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Symbol(str):
    """A value of an enumeration, which is written without quotes."""

    __slots__ = ()


def dumps(message: Message) -> str:
    """Return a message as text, each field on a line of its own."""
    return "".join(f"{line}\n" for line in _lines(message))


def comment(text: str) -> str:
    """Return a comment of one line; line breaks and what else is not printable cannot end it."""
    return "# " + "".join(char if char.isprintable() else " " for char in text) + "\n"


def quote(text: str) -> str:
    """Return a string literal: quotes, backslashes and control characters escaped, all else as UTF-8.

    Half a surrogate pair, which is how Python holds bytes of a file name that are no UTF-8, becomes a question mark.
    """
    return '"' + "".join(map(_escaped, text.encode("utf-8", "replace").decode())) + '"'


def _escaped(char: str) -> str:
    # Octal has three digits always: "\1" followed by "2" would be one character.
    return _ESCAPES.get(char) or (f"\\{ord(char):03o}" if ord(char) < 0x20 or ord(char) == 0x7F else char)


def _lines(message: Message) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield from _block(name, value)
        elif isinstance(value, bool | int | str):
            yield f"{name}: {_scalar(value)}"
        elif value and isinstance(value[0], Mapping):
            for item in value:
                assert isinstance(item, Mapping), "a list is of messages or of scalars"
                yield from _block(name, item)
        else:
            yield f"{name}: [{', '.join(map(_scalar, value))}]"  # type: ignore[arg-type]  # no messages: see above


def _block(name: str, message: Message) -> Iterator[str]:
    """Yield a message on one line where it fits and holds no list, or one line a field."""
    lines = list(_lines(message))
    line = f"{name} {{ {' '.join(lines)} }}"
    if len(line) <= _WIDTH and len(lines) <= 2 and not any("{" in part or "[" in part for part in lines[:-1]):
        yield line if lines else f"{name} {{ }}"
    else:
        yield f"{name} {{"
        yield from (f"  {part}" for part in lines)
        yield "}"


def _scalar(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return quote(value) if isinstance(value, str) and not isinstance(value, Symbol) else str(value)
