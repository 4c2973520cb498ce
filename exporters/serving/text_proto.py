"""Write and read protobuf's text format, without the message classes.

To be written, a message is a mapping from field names to values. A value is a bool, an int, a text, a `Symbol`, another
message, or a list: of messages, which repeats the field, or of scalars, which is written as ``[1, 3, 224]``. What is
read maps every field to the list of its values, for nothing in the text tells a repeated field from a single one.

Source: https://protobuf.dev/reference/protobuf/textformat-spec/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TypeAlias

    Scalar: TypeAlias = bool | int | str
    Message: TypeAlias = Mapping[str, "Value"]
    Value: TypeAlias = Scalar | Message | Sequence[Scalar] | Sequence[Message]
    Parsed: TypeAlias = dict[str, list["int | str | Parsed"]]

_WIDTH = 100
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_TOKEN = re.compile(
    r"""\s+ | \#[^\n]*
    | (?P<text> "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*' )
    | (?P<word> [\w.+-]+ )
    | (?P<sign> [][{}<>:,;] )
    | (?P<other> . )""",
    re.VERBOSE,
)
_ESCAPED = re.compile(rb"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|(.))", re.DOTALL)
_LETTERS = {b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}
_CLOSING = {"{": "}", "<": ">"}
_DEPTH = 50  # messages in messages


class Symbol(str):
    """A value of an enumeration, which is written without quotes."""

    __slots__ = ()


def dumps(message: Message) -> str:
    """Return a message as text, each field on a line of its own."""
    return "".join(f"{line}\n" for line in _lines(message))


def loads(text: str) -> Parsed:
    """Read a message: field -> its values; what is neither a string, an integer nor a message is a `Symbol`.

    Raises:
        ValueError: it is not in the text format.
    """
    return _Reader(text).message("", 0)


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


class _Reader:
    def __init__(self, text: str) -> None:
        found = ((match.lastgroup or "", match.group()) for match in _TOKEN.finditer(text))
        self._tokens = [(kind, token) for kind, token in found if kind]
        self._next = 0

    def message(self, closing: str, depth: int) -> Parsed:
        """Read fields up to ``closing``, or to the end of the text where that is empty."""
        if depth > _DEPTH:
            raise ValueError(f"messages in messages, {depth} deep")
        fields: Parsed = {}
        while not self._take(closing):
            kind, name = self._pop()
            if kind != "word":
                raise ValueError(f"{name!r} where the name of a field should be")
            colon = self._take(":")
            values = fields.setdefault(name, [])
            if self._take("["):
                while not self._take("]"):
                    values.append(self._value(depth))
                    self._take(",")
            else:
                if not colon and self._peek() not in _CLOSING:
                    raise ValueError(f"no value for {name!r}")
                values.append(self._value(depth))
            _ = self._take(",") or self._take(";")
        return fields

    def _value(self, depth: int) -> int | str | Parsed:
        kind, token = self._pop()
        if token in _CLOSING and kind == "sign":
            return self.message(_CLOSING[token], depth + 1)
        if kind == "text":
            parts = [token]
            while self._next < len(self._tokens) and self._tokens[self._next][0] == "text":  # "a" "b" is "ab"
                parts.append(self._pop()[1])
            return "".join(map(_unquoted, parts))
        if kind != "word":
            raise ValueError(f"{token!r} where a value should be")
        try:
            return int(token, 0)
        except ValueError:
            return Symbol(token)

    def _peek(self) -> str:
        """Return the next token, or an empty string at the end."""
        return self._tokens[self._next][1] if self._next < len(self._tokens) else ""

    def _take(self, sign: str) -> bool:
        """Go past the next token where it is ``sign``."""
        if self._peek() != sign:
            return False
        self._next += 1
        return True

    def _pop(self) -> tuple[str, str]:
        if self._next >= len(self._tokens):
            raise ValueError("the text ends within a message")
        self._next += 1
        return self._tokens[self._next - 1]


def _unquoted(literal: str) -> str:
    def byte(match: re.Match[bytes]) -> bytes:
        octal, digits, char = match.groups()
        if char is not None:
            return _LETTERS.get(char, char)
        return bytes([int(octal, 8) & 0xFF if octal else int(digits, 16)])

    return _ESCAPED.sub(byte, literal[1:-1].encode("utf-8", "replace")).decode("utf-8", "replace")
