"""Text of files, on a terminal: a name may hold what would move the cursor, change a title or turn the line around."""

from __future__ import annotations

_INDENTED = "  "


def escaped(text: str) -> str:
    r"""Return text of one line in which all that does not print is spelled: ``\x1b``, ``\n``, ``\u202e``, ``\ud800``.

    That is what Unicode calls a control, a format character such as an override of the direction, a lone surrogate, a
    separator other than the space, and what has no meaning yet.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def escaped_message(text: str) -> str:
    """Return a message whose further lines are indented, as an error's are; a line that is not is a name's own."""
    first, *rest = text.split("\n")
    lines = [escaped(first)]
    for line in rest:
        if line.startswith(_INDENTED):
            lines.append(escaped(line))
        else:
            lines[-1] += rf"\n{escaped(line)}"
    return "\n".join(lines)


def escaped_lines(text: str) -> str:
    """Return text of our own making, such as a traceback, with its lines."""
    return "\n".join(map(escaped, text.split("\n")))
